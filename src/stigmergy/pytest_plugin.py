"""The pytest plugin: stores as fixtures, tests in both colours, seeds, and the report of the conformance suite.

Installed with stigmergy, under the name `stigmergy`; `-p no:stigmergy` turns it off.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# The asserts of the suite show their values, as those of tests do.
pytest.register_assert_rewrite("stigmergy.testing")

if TYPE_CHECKING:
    from stigmergy.aio import AsyncStore
    from stigmergy.store import Store
    from stigmergy.testing.clock import VirtualClock


@pytest.fixture
def virtual_clock() -> VirtualClock:
    """A clock that stands still until `advance(seconds)`. The stores of a test that asks for it go by it."""
    from stigmergy.testing.clock import VirtualClock

    return VirtualClock()


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A fresh in-memory `Store`, closed after the test."""
    from stigmergy.providers.memory import MemoryStore

    if "virtual_clock" in request.fixturenames:
        clock: VirtualClock = request.getfixturevalue("virtual_clock")
        new = clock.follow(MemoryStore(clock=clock))
    else:
        new = MemoryStore()
    with new:
        yield new


@pytest.fixture
def async_store(store: Store) -> AsyncStore:
    """The same store as the fixture `store`, for tests that await."""
    return store.aio


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stigmergy")
    group.addoption(
        "--stigmergy-seed", type=int, metavar="N", help="the seed of random tests (printed where one fails)"
    )
    group.addoption("--stigmergy-url", metavar="URL", help="the store that `python -m stigmergy.testing` judges")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.stigmergy_seed is None:
        config.option.stigmergy_seed = random.SystemRandom().randrange(1_000_000)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    """The seed of a random test: of this run and this test. It is printed where the test fails."""
    chosen = request.config.option.stigmergy_seed
    print(f"seed: run this test again with --stigmergy-seed={chosen}")
    return f"{chosen}/{request.node.nodeid.split('::', 1)[-1]}"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test that takes a `Colour` as `colour`."""
    if "colour" not in pyfuncitem.funcargs or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    from stigmergy.testing.colour import Colour

    colour = pyfuncitem.funcargs["colour"]
    if not isinstance(colour, Colour):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    colour.run(pyfuncitem.obj(**arguments))
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report on the tests of the conformance suite that ran: for `python -m stigmergy.testing`, and with `-v`."""
    if config.get_verbosity() <= 0 and config.option.stigmergy_url is None:
        return
    reports = [report for outcome in terminalreporter.stats.values() for report in outcome]
    if any(name == "stigmergy" for report in reports for name, _ in getattr(report, "user_properties", ())):
        from stigmergy.testing.report import report_lines

        for line in report_lines(terminalreporter.stats):
            terminalreporter.write_line(line)
