"""Every behaviour in both colours from one source.

A test is an `async def` that takes a store. In the async colour that is an `AsyncStore`, and the test runs on an event
loop. In the sync colour it is a `Store` whose calls are made awaitable, and the test runs without any event loop:
nothing in it ever suspends, so blocking calls block as they do for users.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import pytest

from stigmergy.aio import AsyncStore
from stigmergy.errors import StoreClosed
from stigmergy.model import Change
from stigmergy.store import Store
from stigmergy.testing.clock import HANG_TIMEOUT
from stigmergy.watch import Opening, Watch

__all__ = ["Colour"]

T = TypeVar("T")


class Colour:
    """What differs between the colours. `name` is "sync" or "async"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._faces: list[Any] = []
        """Of the stores that `stores` made."""
        self.found_late = 0
        """How many changes were there when a reader had waited for them in vain."""

    def __repr__(self) -> str:
        return self.name

    @contextmanager
    def stores(self, make: Callable[..., Store | AsyncStore]) -> Iterator[Callable[..., Any]]:
        """A function that makes a store with `make` and returns its face in this colour; all are closed at the end."""
        made: list[Store | AsyncStore] = []

        def new(**options: Any) -> Any:
            store = make(**options)
            made.append(store)
            self._faces.append(self.face(store))
            return self._faces[-1]

        try:
            yield new
        finally:
            self._faces.clear()
            for store in made:
                store.close() if isinstance(store, Store) else asyncio.run(store.close())

    async def revision(self) -> int | None:
        """The latest revision that an open one of those stores has; None where `stores` made none."""
        if not self._faces:
            return None
        latest = 0
        for face in self._faces:
            with suppress(StoreClosed):
                latest = max(latest, (await face.scan(limit=1)).revision)
        return latest

    def face(self, store: Store | AsyncStore) -> Any:
        """`store` with methods to await, whichever colour it has."""
        if self.name == "async":
            return store if isinstance(store, AsyncStore) else store.aio
        return _Awaitable(store if isinstance(store, Store) else _sync(store))

    def raw(self, face: Any) -> Store:
        """The `Store` behind a face."""
        store: Store = _sync(face) if self.name == "async" else face.store
        return store

    async def get(self, watch: Watch, timeout: float = HANG_TIMEOUT) -> Change:
        """The next change, or `TimeoutError` after `timeout` seconds."""
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

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a test to its end."""
        if self.name == "async":
            return asyncio.run(coroutine)
        try:
            coroutine.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result
        coroutine.close()
        raise AssertionError("a test of the sync colour suspended")


def _sync(store: AsyncStore) -> Store:
    """Its sync interface. A test that needs one is skipped where there is none."""
    try:
        return store.sync
    except TypeError as error:
        pytest.skip(str(error))


class _Awaitable:
    """A `Store` whose methods are awaited as an `AsyncStore`'s are."""

    PLAIN = frozenset({"require"})
    OPENED = frozenset({"watch", "observe"})

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.store, name)
        if not callable(attribute) or name in self.PLAIN:
            return attribute

        async def call(*args: Any, **kwargs: Any) -> Any:
            return attribute(*args, **kwargs)

        return (lambda *args, **kwargs: Opening(call(*args, **kwargs))) if name in self.OPENED else call

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.store.close()
