"""Middleware: logic around every operation of a store, written once for both colours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias, overload

from stigmergy.aio import AsyncStore
from stigmergy.flow import Commit, Flow, GetEntry, OpenWatch, Operation, Scan, arun, run
from stigmergy.model import Check, Delete, Entry, Set, Snapshot
from stigmergy.store import Store
from stigmergy.watch import Watch

__all__ = ["Middleware", "apply_middleware"]

Middleware: TypeAlias = Callable[[Operation[Any]], Flow[Any]]
"""A generator function around one operation: it yields that operation, or another, or several, or raises.

It must let operations of a type it does not know through if it observes, and refuse them if it guards.
"""


@overload
def apply_middleware(store: Store, *middleware: Middleware) -> Store: ...
@overload
def apply_middleware(store: AsyncStore, *middleware: Middleware) -> AsyncStore: ...
def apply_middleware(store: Store | AsyncStore, *middleware: Middleware) -> Store | AsyncStore:
    """Return `store` with `middleware` around each of its operations, the first one outermost.

    Whatever the store can do, the result can: reads, conditional writes, commits, scans and watches all pass through,
    and none goes around. What `aio` or `sync` lead to is wrapped by the same chain. Applied to the result again, more
    middleware extends the chain on the outside. Closing the result closes the store.
    """
    for function in middleware:
        if not callable(function):
            raise TypeError(f"a middleware is a generator function, not a {type(function).__name__}")
    if type(store) is MiddlewareStore:
        return MiddlewareStore(store._inner, middleware + store._chain)
    if type(store) is AsyncMiddlewareStore:
        return AsyncMiddlewareStore(store._inner, middleware + store._chain)
    if isinstance(store, Store):
        return MiddlewareStore(store, middleware)
    if isinstance(store, AsyncStore):
        return AsyncMiddlewareStore(store, middleware)
    raise TypeError(f"middleware is applied to a store, not to a {type(store).__name__}")


class MiddlewareStore(Store):
    """A store whose operations pass through a chain of middleware on the way to another store."""

    def __init__(self, inner: Store, chain: tuple[Middleware, ...]) -> None:
        self._inner = inner
        self._chain = chain
        self.capabilities = inner.capabilities
        self.blocking = inner.blocking
        self._through = _chained(chain, _around, inner._perform)
        self._open_through = _chained(chain, _around_opening, inner._perform)

    def get_entry(self, key: str) -> Entry | None:
        entry: Entry | None = self._through(GetEntry(key))
        return entry

    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        snapshot: Snapshot = self._through(Scan(prefix, keys=keys, after=after, limit=limit))
        return snapshot

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        revisions: tuple[int | None, ...] = self._through(Commit(writes))
        return revisions

    def open_watch(self, request: OpenWatch) -> Watch:
        watch: Watch = self._open_through(request)
        return watch

    def close(self) -> None:
        self._inner.close()

    def _to_async(self) -> AsyncStore:
        other = AsyncMiddlewareStore(self._inner.aio, self._chain)
        other._faces["sync"] = self
        return other

    def _perform(self, operation: Operation[Any]) -> Any:
        return self._open_through(operation) if isinstance(operation, OpenWatch) else self._through(operation)


class AsyncMiddlewareStore(AsyncStore):
    """Same as `MiddlewareStore`, on the way to an `AsyncStore`."""

    def __init__(self, inner: AsyncStore, chain: tuple[Middleware, ...]) -> None:
        self._inner = inner
        self._chain = chain
        self.capabilities = inner.capabilities
        self._through = _chained(chain, _around_awaiting, inner._perform)
        self._open_through = _chained(chain, _around_opening_awaiting, inner._perform)

    async def get_entry(self, key: str) -> Entry | None:
        entry: Entry | None = await self._through(GetEntry(key))
        return entry

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        snapshot: Snapshot = await self._through(Scan(prefix, keys=keys, after=after, limit=limit))
        return snapshot

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        revisions: tuple[int | None, ...] = await self._through(Commit(writes))
        return revisions

    async def open_watch(self, request: OpenWatch) -> Watch:
        watch: Watch = await self._open_through(request)
        return watch

    async def close(self) -> None:
        await self._inner.close()

    def _to_sync(self) -> Store:
        other = MiddlewareStore(self._inner.sync, self._chain)
        other._faces["aio"] = self
        return other

    def _perform(self, operation: Operation[Any]) -> Any:
        return self._open_through(operation) if isinstance(operation, OpenWatch) else self._through(operation)


_Perform: TypeAlias = Callable[[Operation[Any]], Any]
_Around: TypeAlias = Callable[[Middleware, _Perform, Operation[Any]], Any]


def _chained(chain: tuple[Middleware, ...], around: _Around, perform: _Perform) -> _Perform:
    for function in reversed(chain):
        perform = partial(around, function, perform)
    return perform


def _around(function: Middleware, perform: _Perform, operation: Operation[Any]) -> Any:
    result = run(function(operation), perform)
    if result is None or isinstance(operation, (Scan, OpenWatch)):
        _check_result(function, operation, result)
    return result


async def _around_awaiting(function: Middleware, perform: _Perform, operation: Operation[Any]) -> Any:
    result = await arun(function(operation), perform)
    if result is None or isinstance(operation, (Scan, OpenWatch)):
        _check_result(function, operation, result)
    return result


# An opening that fails leaves no watch behind. A middleware may fail, or be cancelled, when it has a watch already; the
# error may be kept, and with it the frame of the middleware.


def _around_opening(function: Middleware, perform: _Perform, operation: Operation[Any]) -> Any:
    opened: list[Any] = []

    def remember(operation: Operation[Any]) -> Any:
        opened.append(perform(operation))
        return opened[-1]

    try:
        return _around(function, remember, operation)
    except BaseException:
        _close_watches(opened)
        raise


async def _around_opening_awaiting(function: Middleware, perform: _Perform, operation: Operation[Any]) -> Any:
    opened: list[Any] = []

    async def remember(operation: Operation[Any]) -> Any:
        opened.append(await perform(operation))
        return opened[-1]

    try:
        return await _around_awaiting(function, remember, operation)
    except BaseException:
        _close_watches(opened)
        raise


def _close_watches(results: Iterable[Any]) -> None:
    for result in results:
        if isinstance(result, Watch):
            result.close()


def _check_result(function: Middleware, operation: Operation[Any], result: Any) -> None:
    """Raise `TypeError` for a result that would fail where nobody knows any more whose it was."""
    kind = Snapshot if isinstance(operation, Scan) else Watch if isinstance(operation, OpenWatch) else object
    name = getattr(function, "__qualname__", type(function).__name__)
    if result is None and not isinstance(operation, GetEntry):
        raise TypeError(f"the middleware {name} returned None for {operation!r}: it must `return (yield operation)`")
    if not isinstance(result, kind):
        given = type(result).__name__
        raise TypeError(f"the middleware {name} returned a {given} for {operation!r}, and not a {kind.__name__}")
