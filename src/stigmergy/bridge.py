"""The other face of a store: the only module that knows both colours at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from os import getpid
from threading import Lock, Thread
from typing import Any, TypeVar
from weakref import finalize

from stigmergy.aio import AsyncStore
from stigmergy.errors import StoreClosed
from stigmergy.flow import OpenWatch
from stigmergy.model import Check, Delete, Entry, Set, Snapshot, Ttl
from stigmergy.store import Store
from stigmergy.subscription import fills
from stigmergy.threads import Threads
from stigmergy.watch import Watch

__all__ = ["to_async", "to_sync"]

T = TypeVar("T")


def to_async(store: Store) -> AsyncStore:
    """The face that `store.aio` shows, unless the store brings its own."""
    return _ThreadedStore(store) if store.blocking else _InlineStore(store)


def to_sync(store: AsyncStore) -> Store:
    """The face that `store.sync` shows for a store that was written async."""
    return _PortalStore(store)


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
        before = fills.last
        revisions = self._store.commit(*writes)
        if fills.last is not before:
            await asyncio.sleep(0)
        return revisions

    async def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        before = fills.last
        revision = self._store.set(key, value, if_revision=if_revision, ttl=ttl)
        if fills.last is not before:
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
        return await self._in_thread(self._store.get_entry, key)

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return await self._in_thread(partial(self._store.scan, prefix, keys=keys, after=after, limit=limit))

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return await self._in_thread(self._store.commit, *writes)

    async def open_watch(self, request: OpenWatch) -> Watch:
        return await self._in_thread(self._store.open_watch, request)

    async def close(self) -> None:
        await self._in_thread(self._store.close)
        self._threads.close()

    def close_soon(self) -> None:
        """For the other face: the store is closed, and needs no threads any more."""
        self._threads.close()

    async def _in_thread(self, method: Callable[..., T], *args: Any) -> T:
        return await self._threads.call(method, *args)


class _PortalStore(Store):
    """The sync face of a store that was written async: calls are made on an event loop in a thread of its own.

    Unlike a store that was written for threads, it cannot be used by signal handlers and finalisers: they would wait
    for a thread that may be waiting for the one they struck.
    """

    blocking = True

    def __init__(self, store: AsyncStore) -> None:
        self._store = self._faces["aio"] = store
        self.capabilities = store.capabilities
        self._portal = _Portal()

    def get_entry(self, key: str) -> Entry | None:
        return self._portal.call(self._store.get_entry(key))

    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return self._portal.call(self._store.scan(prefix, keys=keys, after=after, limit=limit))

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return self._portal.call(self._store.commit(*writes))

    def open_watch(self, request: OpenWatch) -> Watch:
        return self._portal.call(self._store.open_watch(request))

    def close(self) -> None:
        if not self._portal.stopped:
            with suppress(StoreClosed):  # somebody else was faster
                self._portal.call(self._store.close())
            self._portal.stop()


class _Portal:
    """An event loop in a thread, started by the first call."""

    def __init__(self) -> None:
        self.stopped = False
        self._guards: dict[int, Lock] = {}
        self._thread: Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._calls: set[Future[Any]] = set()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` there, and return its result here. Raises `StoreClosed` when stopped."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("use the async store here: waiting for it would block the event loop that it runs on")
        result = self._submit(coroutine)
        try:
            return result.result()
        except BaseException:
            result.cancel()
            raise
        finally:
            self._calls.discard(result)

    def stop(self) -> None:
        """Let the calls that were made come to their end, and then the thread."""
        with self._guard():
            self.stopped = True
        wait(self._calls.copy())
        if self._thread is not None:
            _stop(self._loop, self._stop)
            self._thread.join()

    def _guard(self) -> Lock:
        # One for each process: a child may be forked while another thread, which it does not have, holds the parent's.
        return self._guards.setdefault(getpid(), Lock())

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        with self._guard():
            if self.stopped:
                coroutine.close()
                raise StoreClosed
            if self._thread is None or not self._thread.is_alive():  # it is not alive in a child process
                self._start()
            result = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(result)
            return result

    def _start(self) -> None:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        thread = Thread(target=lambda: asyncio.run(_serve(started)), name="stigmergy-portal", daemon=True)
        try:
            thread.start()
            self._loop, self._stop = started.result()
        except BaseException:
            started.add_done_callback(lambda future: _stop(*future.result()))  # nobody will ever use it
            raise
        self._thread = thread
        self._calls = set()  # in a child process, those of the parent never end
        finalize(self, _stop, self._loop, self._stop).atexit = False


async def _serve(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    stop = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stop))
    await stop.wait()


def _stop(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with suppress(RuntimeError):  # it has ended already
        loop.call_soon_threadsafe(stop.set)
