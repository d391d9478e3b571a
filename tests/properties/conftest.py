"""How many cases a property gets: a few in `make test`, and in `make test-slow` over 1,000 for each file."""

import pytest
from hypothesis import settings

FEW, MANY = 25, 250  # for each property
settings.register_profile("few", settings.get_profile("repeatable"), max_examples=FEW)
settings.register_profile("many", settings.get_profile("repeatable"), max_examples=MANY)


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
