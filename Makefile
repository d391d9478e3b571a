# Works from a bare clone with Python 3.11 or later and make. Every target sets up what it needs, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PEERS ?= .venv-peers
# The longest suite first.
BACKENDS = tensorflow jax torch
BACKEND ?= $(or $(KERAS_BACKEND),jax)
# `tensorflow` for a GPU, and where there is no tensorflow-cpu.
TENSORFLOW ?= tensorflow-cpu
# Suites at a time; each runs on one thread.
JOBS ?= 2

ifeq ($(filter $(BACKEND),$(BACKENDS)),)
$(error BACKEND must be one of $(BACKENDS); got "$(BACKEND)")
endif

STAMPS = $(VENV)/stamps
INSTALL = -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
.DELETE_ON_ERROR:
# Two pips must not write to one environment.
.NOTPARALLEL:
.PHONY: help setup demo test test-slow lint format bench clean

help:
	@echo "make demo       train and show the first paper's model in minutes, on BACKEND=jax, torch or tensorflow"
	@echo "make test       the whole suite, once per backend; BACKENDS=\"jax torch\" for some of them"
	@echo "make test-slow  the tests that take longer, once per backend"
	@echo "make lint       ruff, as CI runs it; make format mends what it can"
	@echo "make bench      all benchmarks against their peers, written into benchmarks/README.md; takes two to three hours"
	@echo "make setup      only the environment, $(VENV), with every backend"
	@echo "make clean      removes the environments and what runs left behind"

setup: $(BACKENDS:%=$(STAMPS)/%) $(STAMPS)/dev

demo: $(STAMPS)/$(BACKEND) $(STAMPS)/plots
	KERAS_BACKEND=$(BACKEND) $(VENV)/bin/python examples/demo.py

test: MARK = not slow
test-slow: MARK = slow
# Each backend in two parts, so that two jobs end at about the same time.
test test-slow: setup
	@mkdir -p runs && rm -f runs/test-*.log
	@echo "testing on $(BACKENDS), $(JOBS) jobs at a time; each log is shown when it is complete"
	@printf '%s\n' $(BACKENDS:%=%-parts) $(BACKENDS:%=%-whole) | xargs -P $(JOBS) -I {} sh -c \
	  'name={}; backend=$${name%-*}; case $$name in *-parts) tests="tests/*/";; *) tests="tests/test_*.py";; esac; \
	   KERAS_BACKEND=$$backend $(VENV)/bin/python -m pytest -m "$(MARK)" $$tests >runs/test-$$name.log 2>&1; \
	   code=$$?; cat runs/test-$$name.log; grep -qx "backend: $$backend" runs/test-$$name.log && exit $$code'; \
	code=$$?; \
	for log in runs/test-*.log; do printf '%-30s  ' $$log; tail -n 1 $$log; done; \
	exit $$code

lint: $(STAMPS)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMPS)/dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup $(PEERS)/stamp
	for script in transformer_step bert_step bert_classifier_step recomputation bert_inference greedy_decode recurrent_step additive_attention ulmfit_step kernels; do \
	  $(VENV)/bin/python benchmarks/$$script.py --peer-python $(PEERS)/bin/python || exit 1; done

clean:
	rm -rf $(VENV) $(PEERS) build runs *.egg-info .pytest_cache .ruff_cache .hypothesis

$(STAMPS)/jax: PACKAGES = jax
$(STAMPS)/torch: PACKAGES = torch
$(STAMPS)/tensorflow: PACKAGES = $(TENSORFLOW)
$(STAMPS)/plots: PACKAGES = --editable .[plots]
$(STAMPS)/dev: PACKAGES = --editable .[dev]

$(STAMPS)/%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing $(PACKAGES) into $(VENV)"
	@$(VENV)/bin/python $(INSTALL) $(PACKAGES)
	@mkdir -p $(@D) && touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# keras-hub asks for tensorflow-text, which its models do not use; so it comes without its dependencies.
$(PEERS)/stamp: constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) torch
	$(PEERS)/bin/python $(INSTALL) keras jax $(TENSORFLOW) --requirement benchmarks/peers.txt
	$(PEERS)/bin/python $(INSTALL) --no-deps keras-hub
	touch $@
