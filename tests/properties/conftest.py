"""How many cases a property gets: a few in `make test`, and in `make test-slow` over 1,000 for each file.

The cases are the same in every run, and nothing of them is kept on disk.
"""

import pytest
from hypothesis import Phase, settings

FEW, MANY = 25, 250  # for each property
PHASES = (
    Phase.explicit,
    Phase.generate,
    Phase.shrink,
)  # to explain a failure takes a hundred times as long as to find it
COMMON = dict(deadline=None, derandomize=True, database=None, phases=PHASES)
settings.register_profile("few", max_examples=FEW, **COMMON)
settings.register_profile("many", max_examples=MANY, **COMMON)


def is_slow_run(config):
    return config.option.markexpr == "slow"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The properties of this folder take the profile; those of other folders keep theirs."""
    before = settings.get_current_profile_name()
    settings.load_profile("many" if is_slow_run(collector.config) else "few")
    try:
        return (yield)
    finally:
        settings.load_profile(before)


def pytest_itemcollected(item):
    if is_slow_run(item.config):
        item.add_marker("slow")
