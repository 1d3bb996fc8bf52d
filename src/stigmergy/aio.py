"""AsyncStore: the same store, awaited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from stigmergy import flow as flows
from stigmergy.checks import Overflow, check_capabilities
from stigmergy.flow import Flow, OpenWatch, Operation
from stigmergy.model import Check, Delete, Entry, Set, Snapshot, Ttl
from stigmergy.watch import Opening, Watch

if TYPE_CHECKING:
    from stigmergy.store import Store

__all__ = ["AsyncStore"]

T = TypeVar("T")


class AsyncStore(ABC):
    """Same as `Store`, for tasks of any number of event loops; each method does what its namesake there does.

    On a store that does not block, calls never suspend, with one exception: a write that fills a watch, or finds it
    full (or another thread's write does meanwhile, in any store), gives the loop one turn before it returns, so that a
    reader in the same loop can follow. It has happened by then, also for a task that is cancelled in that turn.

    On a store that blocks, a call that is cancelled goes on in its thread: a write may still happen, even after later
    ones.

    What `watch` and `observe` return is to be opened, by `watch = await store.watch("k")`, or for the length of a block
    by `async with store.watch("k") as watch:`. A change counts from then on, and what goes wrong is raised there. An
    opening that fails or is cancelled leaves nothing behind, also on a store that answers later.
    """

    capabilities: frozenset[str] = frozenset()
    """Same as `Store.capabilities`."""

    _faces: dict[str, Store]

    def __new__(cls, *_: Any, **__: Any) -> Self:
        store = super().__new__(cls)
        store._faces = {}
        return store

    # -- the five primitives -------------------------------------------------------------------------------------------

    @abstractmethod
    async def get_entry(self, key: str) -> Entry | None:
        """Same as `Store.get_entry`."""

    @abstractmethod
    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        """Same as `Store.scan`."""

    @abstractmethod
    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        """Same as `Store.commit`."""

    @abstractmethod
    async def open_watch(self, request: OpenWatch) -> Watch:
        """Same as `Store.open_watch`."""

    @abstractmethod
    async def close(self) -> None:
        """Same as `Store.close`."""

    # -- derived -------------------------------------------------------------------------------------------------------

    async def get(self, key: str, default: Any = None) -> Any:
        """Same as `Store.get`."""
        entry = await self.get_entry(key)
        return default if entry is None else entry.value

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Same as `Store.get_many`."""
        return await self.run(flows.get_many(keys))

    async def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        """Same as `Store.set`."""
        (revision,) = await self.commit(Set(key, value, if_revision, ttl))
        assert revision is not None
        return revision

    async def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        """Same as `Store.delete`."""
        (revision,) = await self.commit(Delete(key, if_revision))
        return revision is not None

    async def update(self, key: str, function: Callable[[Any], Any], *, default: Any = None) -> Any:
        """Same as `Store.update`; `function` may be async."""
        return await self.run(flows.update(key, function, default))

    def watch(
        self,
        *keys: str,
        prefix: str | None = None,
        since: int | str | None = None,
        capacity: int | None = 1024,
        overflow: Overflow = "drop",
    ) -> Opening:
        """Same as `Store.watch`, once it is awaited or entered. Bad arguments are refused at once."""
        return Opening(self._open(OpenWatch(keys, prefix, since, capacity, overflow)))

    def observe(self, *keys: str, prefix: str | None = None) -> Opening:
        """Same as `Store.observe`, once it is awaited or entered. Bad arguments are refused at once."""
        return Opening(self._open(OpenWatch(keys, prefix, latest=True)))

    async def wait_for(self, key: str, predicate: Callable[[Any], Any], *, timeout: float | None = None) -> Entry:
        """Same as `Store.wait_for`; `predicate` may be async."""
        return await self.run(flows.wait_for(key, predicate, timeout))

    def require(self, *capabilities: str) -> Self:
        """Same as `Store.require`."""
        check_capabilities(self.capabilities, capabilities)
        return self

    async def run(self, flow: Flow[T]) -> T:
        """Same as `Store.run`."""
        return await flows.arun(flow, self._perform)

    @property
    def sync(self) -> Store:
        """The same store for threads: the same methods, blocking. Of a store written for asyncio only a `TypeError`."""
        if not self._faces:
            self._faces.setdefault("sync", self._to_sync())
        return self._faces["sync"]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a store cannot be copied or pickled")

    def _to_sync(self) -> Store:
        raise TypeError(f"{type(self).__name__} has no sync interface: it is for asyncio only (`open_async_store`)")

    def _open(self, request: OpenWatch) -> Coroutine[Any, Any, Watch]:
        opening = self.open_watch(request)
        if isinstance(opening, Watch):
            opening.close()
            raise TypeError(f"{type(self).__qualname__}.open_watch must be `async def`")
        return opening

    def _perform(self, operation: Operation[Any]) -> Any:
        return operation.apply(self)
