"""The other face of a store: the only module that knows both colours at once."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from threading import Lock, Thread
from typing import Any, TypeVar
from weakref import finalize, ref

from stigmergy.aio import AsyncStore
from stigmergy.flow import OpenWatch
from stigmergy.model import Check, Delete, Entry, Set, Snapshot, Ttl
from stigmergy.store import Store
from stigmergy.watch import Subscription, Watch

__all__ = ["to_async", "to_sync"]

T = TypeVar("T")


def to_async(store: Store) -> AsyncStore:
    """The face that `store.aio` shows, unless the store brings its own."""
    return _ThreadedStore(store) if store.blocking else _InlineStore(store)


def to_sync(store: AsyncStore) -> Store:
    """The face that `store.sync` shows for a store that was written async."""
    return _PortalStore(store)


class _Face(AsyncStore):
    """Asks a `Store`; how, is for `_ask` to say."""

    def __init__(self, store: Store) -> None:
        self._store = self._sync = store
        self.capabilities = store.capabilities

    async def _ask(self, method: Callable[..., T], *args: Any) -> T:
        raise NotImplementedError

    async def get_entry(self, key: str) -> Entry | None:
        return await self._ask(self._store.get_entry, key)

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return await self._ask(partial(self._store.scan, prefix, keys=keys, after=after, limit=limit))

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return await self._ask(self._store.commit, *writes)

    async def get(self, key: str, default: Any = None) -> Any:
        return await self._ask(self._store.get, key, default)

    async def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        return await self._ask(partial(self._store.set, key, value, if_revision=if_revision, ttl=ttl))

    async def close(self) -> None:
        await self._ask(self._store.close)


class _InlineStore(_Face):
    """The async face of a store that does not block: calls are made where they are."""

    async def _ask(self, method: Callable[..., T], *args: Any) -> T:
        before = Subscription.last_fill
        result = method(*args)
        if Subscription.last_fill is not before:
            await asyncio.sleep(0)
        return result

    def open_watch(self, request: OpenWatch) -> Watch:
        return self._store.open_watch(request)


class _ThreadedStore(_Face):
    """The async face of a store that blocks: calls are made in threads."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._unopened: deque[ref[Watch]] = deque()
        self._opening = Lock()

    async def _ask(self, method: Callable[..., T], *args: Any) -> T:
        return await asyncio.to_thread(self._open_and_call, method, *args)

    def open_watch(self, request: OpenWatch) -> Watch:
        watch = Watch(partial(self._store.open_watch, request))
        self._unopened.append(ref(watch))
        return watch

    def _open_and_call(self, method: Callable[..., T], *args: Any) -> T:
        if self._unopened:
            with self._opening:  # nobody's operation may overtake
                while self._unopened:
                    watch = self._unopened[0]()
                    if watch is not None:
                        watch.try_open()
                    self._unopened.popleft()
        return method(*args)


class _PortalStore(Store):
    """The sync face of a store that was written async: calls are made on an event loop in a thread of its own."""

    blocking = True

    def __init__(self, store: AsyncStore) -> None:
        self._store = self._aio = store
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
        return self._portal.call(_opened(self._store.open_watch(request)))

    def close(self) -> None:
        self._portal.call(self._store.close())
        self._portal.stop()


class _Portal:
    """An event loop in a thread, started by the first call."""

    def __init__(self) -> None:
        self._starting = Lock()
        self._thread: Thread | None = None
        self._loop: asyncio.AbstractEventLoop

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` there, and return its result here."""
        self._start()
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("use the async store here: waiting for it would block the event loop that it runs on")
        result = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return result.result()
        except BaseException:
            result.cancel()
            raise

    def stop(self) -> None:
        """End the thread. A later call starts another one."""
        with self._starting:
            if self._thread is not None:
                self._loop.call_soon_threadsafe(self._stop.set)
                self._thread.join()
                self._thread = None

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():  # it is not alive in a child process
                started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
                self._thread = Thread(target=asyncio.run, args=(_serve(started),), name="stigmergy-portal", daemon=True)
                self._thread.start()
                self._loop, self._stop = started.result()
                finalize(self, _stop, self._loop, self._stop).atexit = False


async def _serve(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    stop = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stop))
    await stop.wait()


def _stop(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with suppress(RuntimeError):  # it has ended already
        loop.call_soon_threadsafe(stop.set)


async def _opened(watch: Watch) -> Watch:
    return await watch
