"""The async interface of a store that was written for threads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

from stigmergy.aio import AsyncStore
from stigmergy.flow import OpenWatch
from stigmergy.model import Check, Delete, Entry, Set, Snapshot, Ttl
from stigmergy.store import Store
from stigmergy.subscription import last_fill
from stigmergy.threads import Threads
from stigmergy.watch import Watch

__all__ = ["to_async"]

T = TypeVar("T")


def to_async(store: Store) -> AsyncStore:
    """The face that `store.aio` shows, unless the store brings its own."""
    return _ThreadedStore(store) if store.blocking else _InlineStore(store)


class _InlineStore(AsyncStore):
    """The async face of a store that does not block: calls are made where they are."""

    def __init__(self, store: Store) -> None:
        self._store = self._faces["sync"] = store
        self.capabilities = store.capabilities

    async def get_entry(self, key: str) -> Entry | None:
        return self._store.get_entry(key)

    async def get(self, key: str, default: Any = None) -> Any:
        return self._store.get(key, default)

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return self._store.scan(prefix, keys=keys, after=after, limit=limit)

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        before = last_fill[0]
        revisions = self._store.commit(*writes)
        if last_fill[0] is not before:
            await asyncio.sleep(0)
        return revisions

    async def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        before = last_fill[0]
        revision = self._store.set(key, value, if_revision=if_revision, ttl=ttl)
        if last_fill[0] is not before:
            await asyncio.sleep(0)
        return revision

    async def open_watch(self, request: OpenWatch) -> Watch:
        return self._store.open_watch(request)

    async def close(self) -> None:
        self._store.close()


class _ThreadedStore(AsyncStore):
    """The async face of a store that blocks: calls are made in threads."""

    def __init__(self, store: Store) -> None:
        self._store = self._faces["sync"] = store
        self.capabilities = store.capabilities
        self._threads = Threads()

    async def get_entry(self, key: str) -> Entry | None:
        return await self._threads.call(self._store.get_entry, key)

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return await self._threads.call(partial(self._store.scan, prefix, keys=keys, after=after, limit=limit))

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return await self._threads.call(self._store.commit, *writes)

    async def open_watch(self, request: OpenWatch) -> Watch:
        return await self._threads.open_watch(self._store, request)

    async def close(self) -> None:
        await self._threads.call(self._store.close)
        self._threads.close()

    def close_soon(self) -> None:
        """For the other face: the store is closed, and needs no threads any more."""
        self._threads.close()
