"""What most tests take: the in-memory store in both colours (`stigmergy.testing.Colour`), and a clock to be told."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from _pytest.fixtures import resolve_fixture_function

from stigmergy import MemoryStore
from stigmergy.testing import Colour, VirtualClock

pytest_plugins = ["processes", "servers"]


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    return Colour(request.param)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def new_store(colour: Colour) -> Iterator[Callable[..., Any]]:
    """`new_store(**options)`: another store, closed afterwards."""
    with colour.stores(MemoryStore) as new:
        yield new


@pytest.fixture
def store(new_store: Callable[..., Any]) -> Any:
    return new_store()


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """What a program begins with: Ctrl-C raises `KeyboardInterrupt`. A signal that is still blocked then is dropped."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, before)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test without a colour on an event loop."""
    if "colour" in pyfuncitem.funcargs or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


# -- without a GIL: `.ci/free-threaded` runs each test in several threads at once, by pytest-run-parallel --------------

ALONE = frozenset(
    {
        "test_benchmarks",
        "test_cancellation",
        "test_cli",
        "test_closing",
        "test_demo",
        "test_distributed",
        "test_examples",
        "test_interrupts",
        "test_layout",
        "test_linearizability",
        "test_log",
        "test_opening",
        "test_processes",
        "test_races",
        "test_redis",
        "test_redis_engine",
        "test_redis_lives",
        "test_redis_network",
        "test_redis_refusals",
        "test_redis_transport",
        "test_reentrancy",
        "test_scale",
        "test_seeded_loop",
        "test_sqlite",
        "test_servers",
        "test_strikes",
    }
)
"""Modules whose tests fork, start processes, are struck by signals, trace, count what the interpreter does, or try out
one schedule after another: nothing that several threads could do at once, or learn from."""

SHARED = frozenset({"colour", "request", "seed", "tmp_path"})
"""Fixtures that the threads of one test may share: nobody changes them. Those of a module are shared as well."""


def pytest_collection_finish() -> None:
    """Thousands of tests live until the end: whoever calls the cycle collector need not walk over them each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        areas = getattr(getattr(item, "cls", None), "slow_areas", ())
        if any(item.originalname in vars(area) for area in areas):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)
    if config.pluginmanager.hasplugin("run-parallel") and config.getoption("parallel_threads") != "1":
        for item in items:
            if isinstance(item, pytest.Function):
                item.obj = InThread(item)
                if item.path.stem in ALONE:
                    item.add_marker(pytest.mark.thread_unsafe)


class InThread:
    """A test as each of several threads runs it: with stores, and all else that its fixtures make, of its own.

    So revisions can be counted, and what the threads still share is what the library and the interpreter share.
    """

    def __init__(self, test: pytest.Function) -> None:
        functools.update_wrapper(self, test.obj)
        self.__globals__ = test.obj.__globals__  # where the plugin looks for what cannot run in parallel
        self.test = test

    def __call__(self, **arguments: Any) -> None:
        function = self.__wrapped__  # type: ignore[attr-defined]
        with ExitStack() as stack:
            if threading.current_thread() is not threading.main_thread():
                made = {name: value for name, value in self.test.funcargs.items() if not self.is_made_anew(name)}
                made["request"] = self.test._request
                for name in arguments:
                    if self.is_made_anew(name):
                        arguments[name] = self.make(name, made, stack)
            if not inspect.iscoroutinefunction(function):
                function(**arguments)
            elif isinstance(self.test.funcargs.get("colour"), Colour):
                self.test.funcargs["colour"].run(function(**arguments))
            else:
                asyncio.run(function(**arguments))

    def is_made_anew(self, name: str) -> bool:
        definitions = self.test._fixtureinfo.name2fixturedefs.get(name)
        parametrized = hasattr(self.test, "callspec") and name in self.test.callspec.params
        return bool(definitions) and not parametrized and name not in SHARED and definitions[-1].scope == "function"

    def make(self, name: str, made: dict[str, Any], stack: ExitStack) -> Any:
        """Call the function of the fixture `name` as pytest has done once for all threads."""
        if name not in made:
            definition = self.test._fixtureinfo.name2fixturedefs[name][-1]
            function = resolve_fixture_function(definition, self.test._request)
            arguments = {needed: self.make(needed, made, stack) for needed in definition.argnames}
            value = function(**arguments)
            made[name] = stack.enter_context(contextmanager(lambda: value)()) if inspect.isgenerator(value) else value
        return made[name]
