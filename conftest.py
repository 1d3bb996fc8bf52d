"""What every run has: executed documents, a limit that ends a test that hangs, and the budgets of random tests.

README.md, docs/*.md and the docstrings of src are executed, each document in a namespace of its own.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Generator

import hypothesis
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

pages = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"])
docstrings = Sybil(parsers=[DocTestParser()], path="src", pattern="*.py")

pytest_collect_file = (pages + docstrings).pytest()

hypothesis.settings.register_profile("small", max_examples=50, deadline=None)
hypothesis.settings.register_profile("large", max_examples=500, deadline=None)
hypothesis.settings.load_profile("small")  # `--hypothesis-profile=large` takes its place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", dest="stigmergy_seed", type=int, metavar="N", help="same as --stigmergy-seed")
    parser.addoption(
        "--limit", type=float, default=120, metavar="SECONDS", help="what takes longer is ended (slow: 10 times)"
    )


# -- a test that hangs -------------------------------------------------------------------------------------------------

STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # before a test captures it
    limit = int(config.getoption("--limit"))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.alarm(limit) and None)


def pytest_unconfigure() -> None:
    """Let no thread that a test has left keep the process."""
    faulthandler.dump_traceback_later(60, exit=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the process of a test that hangs, after it has shown where each thread is; xdist goes on with another one.

    Nothing less does. An exception raised by an alarm leaves whatever lock the interrupted code held locked, and the
    cleaning up hangs in its turn; a thread of Python's never runs beside C code that keeps the GIL. This one is a
    thread of C's. A forked child does not have it, and is ended by an alarm that nothing handles: the child would keep
    the pipe of xdist open, which then would not notice that this process has ended.
    """
    limit = limit_of(item)
    faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def limit_of(item: pytest.Item) -> float:
    """The seconds that a test may take: a limit for hangs, which no busy machine gets near."""
    limit: float = item.config.getoption("--limit")
    if item.get_closest_marker("large"):
        return 60 * limit
    return 10 * limit if item.get_closest_marker("slow") else limit
