"""What every run has: executed documents, a limit that ends a test that hangs, and the budgets of random tests.

README.md, docs/*.md and the docstrings of src are executed, each document in a namespace of its own.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
        "--limit", type=float, default=180, metavar="SECONDS", help="what takes longer is ended (slow: 10 times)"
    )


# -- a test that hangs -------------------------------------------------------------------------------------------------

STDERR = pytest.StashKey[int]()


class Limit:
    """The end of a process in which a test hangs, after it has shown where each thread is; xdist goes on with another.

    Nothing less ends it. An exception raised by an alarm leaves whatever lock the interrupted code held locked, and the
    cleaning up hangs in its turn; a thread of Python's never runs beside C code that keeps the GIL. This timer is a
    thread of C's. A forked child does not have it, and is ended by an alarm that nothing handles: the child would keep
    the pipe of xdist open, which then would not notice that this process has ended.
    """

    seconds = 0.0
    """Of what runs now: a limit for hangs, which no busy machine gets near."""

    @classmethod
    @contextmanager
    def of(cls, config: pytest.Config, item: pytest.Item | None = None) -> Iterator[None]:
        cls.seconds = config.getoption("--limit")
        if item is not None:
            cls.seconds *= 60 if item.get_closest_marker("large") else 10 if item.get_closest_marker("slow") else 1
        faulthandler.dump_traceback_later(cls.seconds, exit=True, file=config.stash[STDERR])
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @classmethod
    def set_alarm(cls) -> None:
        signal.alarm(math.ceil(cls.seconds))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Limit.set_alarm)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # before a test captures it
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A script that runs this in the background ignores Ctrl-C, and so would the programs that the tests interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    with Limit.of(session.config):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with Limit.of(item.config, item):
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Kill what the tests of a process of xdist have started, if that has ended before its time."""
    mine = {f"PYTEST_XDIST_{name}={node.workerinput[key]}".encode() for name, key in XDIST.items()}
    for process in Path("/proc").glob("[0-9]*") if error else ():
        with suppress(OSError):  # it has ended, or is not ours
            if mine <= set((process / "environ").read_bytes().split(b"\0")):
                os.kill(int(process.name), signal.SIGKILL)


XDIST = {"WORKER": "workerid", "TESTRUNUID": "testrunuid"}
"""Environment variables that what a test starts inherits, and what xdist calls them in its own process."""


def pytest_unconfigure() -> None:
    """Let no thread that a test has left keep the process."""
    faulthandler.dump_traceback_later(60, exit=True)
