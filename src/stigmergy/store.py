"""Store: the contract, and everything that can be derived from its five primitives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from stigmergy import flow as flows
from stigmergy.checks import Overflow, check_capabilities
from stigmergy.flow import Flow, OpenWatch, Operation
from stigmergy.model import Check, Delete, Entry, Set, Snapshot, Ttl
from stigmergy.watch import Watch

if TYPE_CHECKING:
    from stigmergy.aio import AsyncStore

__all__ = ["Store"]

T = TypeVar("T")

_made = tuple.__new__
"""Makes a named tuple in half the time of its own constructor (benchmark: set through middleware)."""


class Store(ABC):
    """Watchable shared state, for any number of threads; `aio` is the same store for tasks of any event loop.

    Every write that changes something takes the next *revision* of the store: an int that starts at 1, grows by 1 and
    never comes back. Keys are checked against the grammar in `stigmergy.keys`; a bad one is `InvalidKey`. After
    `close` every operation raises `StoreClosed`. Whatever is raised before a write happened, nothing has changed.

    A provider implements `get_entry`, `scan`, `commit`, `open_watch` and `close`, and sets the two attributes below.
    It may override other methods for speed, never for meaning.
    """

    capabilities: frozenset[str] = frozenset()
    """What this store can do beyond the contract: "durable" (survives the process), "distributed" (shared between
    processes), "resumable" (remembers changes for `since`), "isolated" (values are copied in and out)."""

    blocking: bool = True
    """Whether a call may wait for I/O or for another process; `aio` then makes it in a thread."""

    _faces: dict[str, AsyncStore]
    """The other face, once it was asked for. `vars(self)` would do, but on CPython 3.11 it slows down every attribute
    for good (benchmark: get)."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        store = super().__new__(cls)
        store._faces = {}
        return store

    # -- the five primitives -------------------------------------------------------------------------------------------

    @abstractmethod
    def get_entry(self, key: str) -> Entry | None:
        """Return the entry at `key`, or `None` if the key is absent. A stored `None` is an entry. Creates nothing."""

    @abstractmethod
    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        """Return the entries whose keys begin with `prefix`, or those at `keys`, as they all are at one revision.

        Sorted by key, by code points. `after` leaves out the keys up to and including it, and `limit` those beyond so
        many: page with `after=` the last key of the page before; each page is exact for its own `revision`.
        """

    @abstractmethod
    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        """Check every condition, then do every write: all of them, at once, or none.

        Each write that changes something takes the next revision, in the order given, with no foreign one in between.
        Returns one revision per write: `None` where nothing changed (a `Check`, a `Delete` of an absent key). Nobody
        sees half of it. A key may be written once, and checked as well.

        Raises `RevisionConflict`, `InvalidKey`, `InvalidValue`, `StoreFull`; `ValueError` for no writes, a key written
        twice, a negative `if_revision`, a ttl that is not a positive, finite number.
        """

    @abstractmethod
    def open_watch(self, request: OpenWatch) -> Watch:
        """Return a subscribed watch, as `watch` and `observe` describe it. Raises `Compacted`, `ValueError`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Open watches deliver what they have buffered, and end. Closing twice is fine."""

    # -- derived -------------------------------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value at `key`, or `default` if the key is absent; the value is the caller's own."""
        entry = self.get_entry(key)
        return default if entry is None else entry.value

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values of those `keys` that are there, by key, as they all are at one revision."""
        return self.run(flows.get_many(keys))

    def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        """Write `value` at `key` and return the revision of the new entry.

        `if_revision`: `None`, no condition; 0, the key must be absent; n, its entry must be at revision n; else
        `RevisionConflict`. `ttl`: in seconds, > 0; the entry is gone when they have passed, and that is an ordinary
        change (`op=DELETE`, `expired=True`). `None` clears an earlier ttl, `"keep"` keeps the deadline.

        Raises `InvalidKey`, `InvalidValue`, `StoreFull`, `ValueError`.
        """
        (revision,) = self.commit(_made(Set, (key, value, if_revision, ttl, None, None)))
        assert revision is not None
        return revision

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        """Remove `key` and return whether it was there. An absent key is left alone: no revision, no change.

        Of several racing deletes exactly one returns `True`. `if_revision` as for `set`.
        """
        (revision,) = self.commit(Delete(key, if_revision))
        return revision is not None

    def update(self, key: str, function: Callable[[Any], Any], *, default: Any = None) -> Any:
        """Replace the value at `key` by `function(value)` and return the new one, losing nobody else's write.

        `function` gets `default` where the key is absent. It runs outside every lock, again (a few milliseconds later,
        with jittered backoff) whenever somebody else wrote in between, so it must be pure, and return the new value:
        `lambda tags: [*tags, "new"]`, not `tags.append`. If it raises, nothing is written. A ttl stays as it is, and
        a key that was absent gets none.
        """
        return self.run(flows.update(key, function, default))

    def watch(
        self,
        *keys: str,
        prefix: str | None = None,
        since: int | str | None = None,
        capacity: int | None = 1024,
        overflow: Overflow = "drop",
    ) -> Watch:
        """Return a watch of every change to `keys`, or to all keys that begin with `prefix`, from now on.

        `since`, a revision or a bookmark: from there on; `Compacted` if the store no longer remembers, or never was
        there. What lies in the past does not count against `capacity`.

        Writers never wait for a watch: it buffers `capacity` changes (`None`: any number), then the oldest gives way to
        the newest. With `overflow="drop"` the next change read says how many it `missed`; with `"raise"` the next read
        raises `Lagged` once. Raises `ValueError` for a capacity below 1, or both or neither of `keys` and `prefix`.
        """
        return self.open_watch(OpenWatch(keys, prefix, since, capacity, overflow))

    def observe(self, *keys: str, prefix: str | None = None) -> Watch:
        """Return a watch of the latest state of `keys`, or of all keys that begin with `prefix`.

        It starts with a `SET` for each key that is there, in the order of revisions, and then delivers what is newest
        of each key: states in between may be skipped, the last one never is. `old_value` is the value delivered before.
        """
        return self.open_watch(OpenWatch(keys, prefix, latest=True))

    def wait_for(self, key: str, predicate: Callable[[Any], Any], *, timeout: float | None = None) -> Entry:
        """Return the entry at `key` as soon as `predicate(value)` holds, at once if it does already.

        An absent key never satisfies. A state that was only passed through may be missed. Raises `TimeoutError` after
        `timeout` seconds, `StoreClosed` if the store is closed meanwhile.
        """
        return self.run(flows.wait_for(key, predicate, timeout))

    def require(self, *capabilities: str) -> Self:
        """Return this store if it has all of `capabilities`, else raise `Unsupported`. For the start of a program."""
        check_capabilities(self.capabilities, capabilities)
        return self

    def run(self, flow: Flow[T]) -> T:
        """Drive a flow of your own on this store; `AsyncStore.run` drives the same one."""
        return flows.run(flow, self._perform)

    @property
    def aio(self) -> AsyncStore:
        """The same store for asyncio: the same methods, awaited."""
        if not self._faces:
            self._faces.setdefault("aio", self._to_async())  # at once: two threads must not get two
        return self._faces["aio"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a store cannot be copied or pickled: open its URL where it is needed")

    def _to_async(self) -> AsyncStore:
        from stigmergy.bridge import to_async

        return to_async(self)

    def _open(self, request: OpenWatch) -> Watch:
        return self.open_watch(request)

    def _perform(self, operation: Operation[Any]) -> Any:
        return operation.apply(self)
