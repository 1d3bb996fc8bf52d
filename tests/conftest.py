"""Every behaviour in both colours from one source.

A test is an `async def` that takes `store`. In the async colour that is an `AsyncStore`, and the test runs on an event
loop. In the sync colour it is a `Store` whose calls are made awaitable (`Awaitable`), and the test is run without any
event loop: nothing in it ever suspends, so that blocking calls block as they do for users.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from stigmergy import Change, MemoryStore, Watch


class Colour:
    """What differs between the colours, for tests."""

    def __init__(self, name: str) -> None:
        self.name = name

    def face(self, store: Any) -> Any:
        """`store` with methods to await, whichever colour it has."""
        return store.aio if self.name == "async" else Awaitable(store)

    def raw(self, face: Any) -> Any:
        """The `Store` behind a face."""
        return face.sync if self.name == "async" else face.store

    async def get(self, watch: Watch, timeout: float | None = 5) -> Change:
        """The next change."""
        if self.name == "sync":
            return watch.get(timeout)
        async with asyncio.timeout(timeout):
            return await watch.aget()

    async def drain(self, watch: Watch) -> list[Change]:
        """All that is buffered."""
        return list(iter(watch.get_nowait, None))

    async def all(self, watch: Watch) -> list[Change]:
        """All changes until the watch ends."""
        return list(watch) if self.name == "sync" else [change async for change in watch]

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self.name == "async":
            return asyncio.run(coroutine)
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value
        coroutine.close()
        raise AssertionError("a test of the sync colour suspended")


class Awaitable:
    """A `Store` whose methods are awaited as an `AsyncStore`'s are."""

    PLAIN = frozenset({"watch", "observe", "open_watch", "require"})

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.store, name)
        if not callable(attribute) or name in self.PLAIN:
            return attribute

        async def call(*args: Any, **kwargs: Any) -> Any:
            return attribute(*args, **kwargs)

        return call

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.store.close()


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    return Colour(request.param)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new_store(colour: Colour) -> Iterator[Callable[..., Any]]:
    """`new_store(**options)`: another store, closed afterwards."""
    stores: list[MemoryStore] = []

    def new(**options: Any) -> Any:
        stores.append(MemoryStore(**options))
        return colour.face(stores[-1])

    yield new
    for store in stores:
        store.close()


@pytest.fixture
def store(new_store: Callable[..., Any]) -> Any:
    return new_store()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test: in its colour, or on an event loop if it has none."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    colour = pyfuncitem.funcargs.get("colour", Colour("async"))
    colour.run(pyfuncitem.obj(**arguments))
    return True
