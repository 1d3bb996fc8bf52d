"""Middleware: logic around every operation of a store, written once for both colours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Protocol, Self, TypeAlias, TypeVar, overload

from stigmergy.aio import AsyncStore
from stigmergy.flow import Commit, Flow, GetEntry, OpenWatch, Operation, Scan, arun, run
from stigmergy.model import Check, Delete, Entry, Set, Snapshot
from stigmergy.store import Store
from stigmergy.watch import Watch

__all__ = ["Middleware", "apply_middleware"]

T = TypeVar("T")

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
    if isinstance(store, (MiddlewareStore, AsyncMiddlewareStore)) and store.handle is None:
        return around(store._inner, middleware + store._chain)
    return around(store, middleware)


def around(store: Store | AsyncStore, chain: tuple[Middleware, ...], handle: Any = None) -> Store | AsyncStore:
    """Return `store` with `chain` around it. Closing that closes `handle`, if there is one, instead of the store."""
    if isinstance(store, Store):
        return MiddlewareStore(store, chain, handle)
    if isinstance(store, AsyncStore):
        return AsyncMiddlewareStore(store, chain, handle)
    raise TypeError(f"a store is needed, not a {type(store).__name__}")


class MiddlewareStore(Store):
    """A store whose operations pass through a chain of middleware on the way to another store."""

    def __init__(self, inner: Store, chain: tuple[Middleware, ...], handle: Any) -> None:
        self._inner = inner
        self._chain = chain
        self.handle = handle
        self.capabilities = inner.capabilities
        self.blocking = inner.blocking
        self._through: _Performs = _chained(chain, _around, inner._perform)
        self._open_through: _Performs = _chained(chain, _around_opening, inner._perform)

    def get_entry(self, key: str) -> Entry | None:
        return self._through(GetEntry(key))

    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return self._through(Scan(prefix, keys=keys, after=after, limit=limit))

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return self._through(Commit(writes))

    def open_watch(self, request: OpenWatch) -> Watch:
        return self._open_through(request)

    def close(self) -> None:
        (self.handle or self._inner).close()

    def _to_async(self) -> AsyncStore:
        other = AsyncMiddlewareStore(self._inner.aio, self._chain, self.handle)
        other._faces["sync"] = self
        return other

    def _perform(self, operation: Operation[Any]) -> Any:
        return self._open_through(operation) if isinstance(operation, OpenWatch) else self._through(operation)


class AsyncMiddlewareStore(AsyncStore):
    """Same as `MiddlewareStore`, on the way to an `AsyncStore`."""

    def __init__(self, inner: AsyncStore, chain: tuple[Middleware, ...], handle: Any) -> None:
        self._inner = inner
        self._chain = chain
        self.handle = handle
        self.capabilities = inner.capabilities
        self._through: _Awaits = _chained(chain, _around_awaiting, inner._perform)
        self._open_through: _Awaits = _chained(chain, _around_opening_awaiting, inner._perform)

    async def get_entry(self, key: str) -> Entry | None:
        return await self._through(GetEntry(key))

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return await self._through(Scan(prefix, keys=keys, after=after, limit=limit))

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return await self._through(Commit(writes))

    async def open_watch(self, request: OpenWatch) -> Watch:
        return await self._open_through(request)

    async def close(self) -> None:
        if self.handle is None:
            await self._inner.close()
        else:
            self.handle.close()

    def _to_sync(self) -> Store:
        other = MiddlewareStore(self._inner.sync, self._chain, self.handle)
        other._faces["aio"] = self
        return other

    def _perform(self, operation: Operation[Any]) -> Any:
        return self._open_through(operation) if isinstance(operation, OpenWatch) else self._through(operation)


class _Performs(Protocol):
    def __call__(self, operation: Operation[T], /) -> T: ...


class _Awaits(Protocol):
    def __call__(self, operation: Operation[T], /) -> Awaitable[T]: ...


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


def _around_opening(function: Middleware, perform: _Perform, operation: Operation[Any]) -> Any:
    with _Opened() as opened:
        return _around(function, lambda each: opened.noted(perform(each)), operation)


async def _around_opening_awaiting(function: Middleware, perform: _Perform, operation: Operation[Any]) -> Any:
    async def perform_and_note(operation: Operation[Any]) -> Any:
        return opened.noted(await perform(operation))

    with _Opened() as opened:
        return await _around_awaiting(function, perform_and_note, operation)


class _Opened:
    """The watches that a middleware was given, closed at once if it fails behind that: its error holds its frame."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []

    def noted(self, result: Any) -> Any:
        if isinstance(result, Watch):
            self._watches.append(result)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for watch in self._watches if kind is not None else ():
            watch.close()


def _check_result(function: Middleware, operation: Operation[Any], result: Any) -> None:
    """Raise `TypeError` for a result that would fail where nobody knows any more whose it was."""
    kind = Snapshot if isinstance(operation, Scan) else Watch if isinstance(operation, OpenWatch) else object
    name = getattr(function, "__qualname__", type(function).__name__)
    if result is None and not isinstance(operation, GetEntry):
        raise TypeError(f"the middleware {name} returned None for {operation!r}: it must `return (yield operation)`")
    if not isinstance(result, kind):
        given = type(result).__name__
        raise TypeError(f"the middleware {name} returned a {given} for {operation!r}, and not a {kind.__name__}")
