"""The examples as a newcomer runs them, only shorter."""

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

import llmfound
from llmfound.reproduce.figure import cell

ROOT = pathlib.Path(__file__).parents[1]
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}  # backend: the package it needs


def start(backend, script, *arguments, cwd=ROOT):
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "examples" / script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)


def run(backend, script, *arguments):
    found = start(backend, script, *arguments)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the import replaces
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module("shared")
    sys.modules.pop("shared")


def test_common_errors_are_one_sentence(shared, capsys, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setattr(sys, "argv", ["examples/demo.py"])
    monkeypatch.setattr(shared, "interrupted", shared.GOES_ON)
    monkeypatch.setattr(os, "_exit", lambda status: print(status))
    for error, text in (
        (KeyboardInterrupt(), f"\nInterrupted. {shared.GOES_ON}\n"),
        (FileNotFoundError(2, "No such file", "nope"), "demo.py: error: [Errno 2] No such file: 'nope'\n"),
        (ModuleNotFoundError(name="jax"),
         'jax is not installed: pip install ".[jax]", or change KERAS_BACKEND, which is jax.\n'),
    ):  # fmt: skip
        shared.show_error(type(error), error, None)
        shown = capsys.readouterr()
        assert shown.err == text and shown.out == "130\n" * isinstance(error, KeyboardInterrupt)
    monkeypatch.delenv("LLMFOUND_DATA", raising=False)
    for read, lines in ((llmfound.data.trec, {1}), (int, {4, 5})):  # what is no common error is shown in full
        try:
            read("train")
        except ValueError as error:
            shared.show_error(ValueError, error, error.__traceback__)
        assert capsys.readouterr().err.count("\n") in lines


def test_a_folder_keeps_to_its_options(shared, tmp_path):
    def options(**changed):
        given = dict(rate=1e-3, train=["a", "b"], epochs=2, folder=tmp_path / "run")
        return argparse.Namespace(**{**given, **changed})

    shared.same_run(options(), "epochs")
    shared.same_run(options(epochs=3), "epochs")
    with pytest.raises(SystemExit, match=r"run has a run of rate 0\.001, not 0\.1, and would go on with that"):
        shared.same_run(options(rate=0.1), "epochs")
    with pytest.raises(SystemExit, match=r"train \['a', 'b'\], not \['a', 'c'\]"):
        shared.same_run(options(train=["a", "c"]), "epochs")
    shared.same_run(options(rate=0.1, folder=tmp_path / "other"), "epochs")


def test_training_can_be_ended_early(shared):
    class CtrlC(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                signal.raise_signal(signal.SIGINT)

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((80, 2), "float32")
    callbacks = [shared.stop_on_interrupt(model), CtrlC()]
    history = model.fit(x, x[:, :1], batch_size=8, epochs=3, verbose=0, callbacks=callbacks)
    assert len(history.epoch) == 1 and model.optimizer.iterations == 3 and model.predict(x, verbose=0).shape == (80, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.on_one_backend
@pytest.mark.parametrize(
    "command, message",
    [
        ("demo.py --minutes -1", "demo.py: error: --minutes must be positive; got -1"),
        ("demo.py --folder file/out", "demo.py: error: [Errno 20] Not a directory: 'file/out'"),
        ("translate.py nope", "translate.py: error: there is no folder with model.keras, and no .keras file, nope"),
        ("rnnsearch.py --train nope.en nope.de --test a b", "error: [Errno 2] No such file or directory: 'nope.en'"),
        ("ulmfit.py --general wikitext-2", "--general: must be tatoeba, wikitext2, or a folder of an earlier stage 1"),
        ("bert_pretrain.py --text file", "file has 1 documents, and 4 are needed at least; blank lines divide them"),
        ("ulmfit_ablation.py --general .", "--general: must be tatoeba, wikitext2, or a folder of an earlier stage 1"),
    ],
)
def test_a_mistake_is_told_at_once(command, message, tmp_path):
    (tmp_path / "file").write_text("One sentence. Another one.\n")
    found = start("torch", *command.split(), cwd=tmp_path)
    assert found.returncode in (1, 2) and message in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_the_demo_leaves_a_model_that_translates_on_every_backend(tmp_path):
    pytest.importorskip("matplotlib")
    here = keras.backend.backend()
    shown = run(here, "demo.py", "--minutes", "0.5", "--folder", str(tmp_path))
    assert shown.count("BLEU") == 2 and shown.count("\nreference  ") == 12
    assert {path.name for path in tmp_path.iterdir()} == {"model.keras", "tokenizer.json", "attention.png"}
    sentences = "We are here.", "I don't know what he wants."
    installed = [backend for backend, package in BACKENDS.items() if importlib.util.find_spec(package)]
    translations = {backend: run(backend, "translate.py", str(tmp_path), *sentences) for backend in installed}
    assert translations[here].count("\n") == len(sentences)
    assert set(translations.values()) == {translations[here]}


@pytest.mark.slow
def test_ulmfit_runs_its_three_stages(tmp_path):
    options = "--general-texts", "1000", "--vocabulary", "1000", "--task-epochs", "1", "--epochs", "3", "--labels", "90"
    shown = run(keras.backend.backend(), "ulmfit.py", "--folder", str(tmp_path / "a"), *options)
    assert "epoch 2: training lstm_3 at 3.85e-03 and head at 1.00e-02; waiting: embedding, lstm_1, lstm_2" in shown
    assert "90 labels; error on 755 texts" in shown
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"general", "task", "classifier", "result.json"}
    again = run(keras.backend.backend(), "ulmfit.py", "--general", str(tmp_path / "a" / "general"), "--folder",
                str(tmp_path / "b"), *options)  # fmt: skip
    assert "general text: tatoeba" in shown and f"taken from {tmp_path / 'a' / 'general'}" in again
    assert "Stage 3" in again and not (tmp_path / "b" / "general").exists()


@pytest.mark.slow
def test_the_ablation_of_ulmfit_goes_on_where_it_stopped(tmp_path):
    options = ("--folder", str(tmp_path), "--general-texts", "500", "--vocabulary", "500", "--task-texts", "200",
               "--task-epochs", "1", "--epochs", "2", "--few", "30", "--seeds", "2", "--rates", "0.01", "0.001",
               "--held-out", "30", "--rows", "full", "freez + discr + stlr")  # fmt: skip
    shown = run(keras.backend.backend(), "ulmfit_ablation.py", *options)
    table = (tmp_path / "table.md").read_text()
    assert shown.count("\nerror ") == 2 * (2 + 2) and shown.endswith(table + "\n" * (not shown.endswith(table)))
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| full", "| freez + discr + stlr"]
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    errors = {(row, seed): error for row, _, seed, _, part, error in runs if part == "test"}
    below = [100 * (errors["full", seed] - errors["freez + discr + stlr", seed]) for seed in range(2)]
    assert cell(np.array(below)) in table.splitlines()[3]
    (tmp_path / "table.md").unlink()
    again = run(keras.backend.backend(), "ulmfit_ablation.py", *options)
    assert "error " not in again.replace("| error", "") and (tmp_path / "table.md").read_text() == table


@pytest.mark.slow
def test_bert_is_pretrained_and_fine_tuned_and_transformers_reads_both(tmp_path):
    transformers = pytest.importorskip("transformers")
    here, made = keras.backend.backend(), tmp_path / "made"
    sizes = "--vocabulary", "1000", "--layers", "1", "--hidden-dim", "32", "--max-length", "32", "--epochs", "2"
    shown = run(here, "bert_pretrain.py", "--folder", str(made), *sizes)
    assert "held-out documents: " in shown and "next_sentence_accuracy" in shown and shown.count(": ") > 10
    again = run(here, "bert_pretrain.py", "--folder", str(made), *sizes)
    assert "2 epochs and 0 batches are done, none is left" in again
    model = transformers.BertForPreTraining.from_pretrained(made)
    assert model.config.num_hidden_layers == 1
    (tmp_path / "SST-2").mkdir()
    rows = [f"a {word} film\t{label}" for word, label in (("good", 1), ("bad", 0)) for _ in range(32)]
    for part in ("train", "dev"):
        (tmp_path / "SST-2" / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *rows]), "utf-8")
    options = "--data", str(tmp_path), "--epochs", "40", "--rate", "0.003", "--folder", str(tmp_path / "tuned")
    shown = run(here, "bert_finetune.py", str(made), "--task", "sst2", *options)
    assert "accuracy 1" in shown
    found = transformers.pipeline("text-classification", str(tmp_path / "tuned"))(["a good film", "a bad film"])
    assert [row["label"] for row in found] == ["LABEL_1", "LABEL_0"]


@pytest.mark.slow
def test_rnnsearch_and_its_baseline_draw_the_papers_figures(tmp_path):
    pytest.importorskip("matplotlib")
    here = keras.backend.backend()
    options = "--minutes", "0.3", "--hidden-dim", "32", "--batch-tokens", "400", "--beam", "2", "--words"
    shown = run(here, "rnnsearch.py", "--model", "RNNencdec", "--folder", str(tmp_path / "a"), *options)
    assert shown.count("BLEU") == 1 and shown.count("\nreference  ") >= 6
    assert "alignment.png" not in {path.name for path in (tmp_path / "a").iterdir()}
    against = "--against", str(tmp_path / "a")
    run(here, "rnnsearch.py", "--folder", str(tmp_path / "b"), *options, *against)
    found = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert set(found) == {"model.keras", "source.json", "target.json", "result.json", "alignment.png",
                          "bleu_by_length.png"}  # fmt: skip
    again = run(here, "rnnsearch.py", "--folder", str(tmp_path / "b"), "--load", *options, "--sentence", "He is here.")
    assert (tmp_path / "b" / "result.json").read_bytes() == found["result.json"]
    assert (tmp_path / "b" / "alignment.png").read_bytes() != found["alignment.png"]
    assert "saved alignment.png" in again and "BLEU" not in again


@pytest.mark.slow
def test_a_transformer_of_a_small_set_goes_on_where_it_was_stopped(tmp_path):
    pytest.importorskip("matplotlib")
    pairs = llmfound.data.read_pairs(ROOT / "examples" / "data" / "eng-fra.valid.tsv.xz")[:160]
    for name, side in zip(("en", "fr"), zip(*pairs)):
        (tmp_path / name).write_text("\n".join(side) + "\n", "utf-8")
    files = [str(tmp_path / name) for name in ("en", "fr")]
    options = ["--train", *files, "--valid", *files, "--test", *files, "--folder", str(tmp_path / "out"),
               "--vocabulary", "300", "--layers", "1", "--warmup", "1000", "--beam", "2", "--batch-tokens", "800",
               "--epochs", "2"]  # fmt: skip
    shown = run(keras.backend.backend(), "transformer.py", *options)
    assert "steps instead of 1,000, half of all" in shown
    assert "beam 1: BLEU" in shown and "beam 2: BLEU" in shown and shown.count("\ntranslation  ") >= 6
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"checkpoints", "model.keras", "options.json", "tokenizer.json", "result.json", "heads.png"}
    again = run(keras.backend.backend(), "transformer.py", *options)
    assert "2 epochs and 0 batches are done, none is left" in again
