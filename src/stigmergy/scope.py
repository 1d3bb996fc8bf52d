"""Handles: a store as somebody in particular sees it, through a scope, an identity or a guard.

Each is one more layer of middleware around the store it was made of, so it keeps everything that a store can do, in
both colours. Closing a handle ends that handle and its watches, never the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, overload
from weakref import ref

from stigmergy.aio import AsyncStore
from stigmergy.errors import (
    AccessDenied,
    ClaimLost,
    DamagedValue,
    InvalidValue,
    RevisionConflict,
    StateError,
    StoreClosed,
)
from stigmergy.flow import Commit, Flow, GetEntry, OpenWatch, Operation, Scan
from stigmergy.keys import Scope, check_key, check_scope, inside, scoped_key
from stigmergy.middleware import AsyncMiddlewareStore, Middleware, MiddlewareStore, around
from stigmergy.model import Change, Check, Entry, Snapshot, Write
from stigmergy.store import Store
from stigmergy.watch import Deliver, Watch

__all__ = ["acting_as", "agent_store", "guarded", "scoped"]


@overload
def scoped(store: Store, scope: str) -> Store: ...
@overload
def scoped(store: AsyncStore, scope: str) -> AsyncStore: ...
def scoped(store: Store | AsyncStore, scope: str) -> Store | AsyncStore:
    """Return a handle whose keys are those of `store` that begin with `scope` and a `:`, without that beginning.

    Watches, scans, snapshots, bookmarks and errors speak of these relative keys. A `scope` is one or more segments,
    none empty and none with a `:`, with a `/` between them, always whole: "agent/plan" never meets "agent/planner".
    A scope of a scope joins segments: `scoped(scoped(store, "agent"), "planner")` is `scoped(store, "agent/planner")`.
    With a guard or another middleware in between, the inner scope lies among the keys of the outer one.

    Raises `InvalidKey` for a bad scope, and later for a key that is too long together with it.
    """
    return _scoped(store, check_scope(scope))


@overload
def acting_as(store: Store, writer: str) -> Store: ...
@overload
def acting_as(store: AsyncStore, writer: str) -> AsyncStore: ...
def acting_as(store: Store | AsyncStore, writer: str) -> Store | AsyncStore:
    """Return a handle that puts `writer` on every write: `entry.writer` and `change.writer` tell who it was.

    A write that bears the name of another writer already is `AccessDenied`, so that whoever stacks handles cannot write
    in the name of somebody else. `writer` follows the grammar of keys, so an empty
    one is `InvalidKey`.
    """
    return _through(store, _Identity(check_key(writer)))


@overload
def guarded(store: Store, *, writer: str, read: Iterable[str] = (), write: Iterable[str] = ()) -> Store: ...
@overload
def guarded(store: AsyncStore, *, writer: str, read: Iterable[str] = (), write: Iterable[str] = ()) -> AsyncStore: ...
def guarded(
    store: Store | AsyncStore, *, writer: str, read: Iterable[str] = (), write: Iterable[str] = ()
) -> Store | AsyncStore:
    """Return a handle that acts as `writer`, and may do nothing but `read` and `write` what is listed.

    A grant that ends in `:` covers every key that begins with it; any other is exactly one key. Whatever is not granted
    is `AccessDenied` before anything has happened: a `Check` reads, `update` and `claim` read and write, and a scan or
    a watch of a prefix needs a grant that covers all of it. Operations of an unknown kind are denied.

    This is the boundary between agents that share a process and mean no harm. No public name leads from the handle to
    `store`; but Python code that wants to get past it can, as it can past everything in its own process.
    """
    return _through(store, _Guard(check_key(writer), _Grants(read), _Grants(write)))


@overload
def agent_store(store: Store, *, agent: str, session: str | None = None, global_write: Iterable[str] = ()) -> Store: ...
@overload
def agent_store(
    store: AsyncStore, *, agent: str, session: str | None = None, global_write: Iterable[str] = ()
) -> AsyncStore: ...
def agent_store(
    store: Store | AsyncStore, *, agent: str, session: str | None = None, global_write: Iterable[str] = ()
) -> Store | AsyncStore:
    """Return a handle for one `agent` in one `session`, guarded by the scopes of `scoped_key`.

    It acts as `agent`. It reads and writes `agent/<agent>:` and `session/<session>:`, and reads `global:`. What it may
    write there is listed in `global_write`, without the "global:" and otherwise as for `guarded`. Keys are whole keys,
    such as `scoped_key(Scope.AGENT, "counter", owner=agent)`.
    """
    own = [_below(Scope.AGENT, agent)] + ([] if session is None else [_below(Scope.SESSION, session)])
    shared = [scoped_key(Scope.GLOBAL, grant) for grant in listed(global_write)]
    read, write = [*own, f"{Scope.GLOBAL}:"], [*own, *shared]
    if isinstance(store, AsyncStore):
        return guarded(store, writer=agent, read=read, write=write)
    return guarded(store, writer=agent, read=read, write=write)


# -- handles -----------------------------------------------------------------------------------------------------------


class _Handle:
    """A middleware: one view, until it is closed, and the watches that were opened through it.

    `of` is the handle that this one was made of without being around it. It is closed with that one, too.
    """

    def __init__(self, view: Middleware, of: _Handle | None = None) -> None:
        self.view = view
        self._of = of
        self._closed = False
        self._watches: dict[int, ref[Watch]] = {}

    def __call__(self, operation: Operation[Any]) -> Flow[Any]:
        if self._is_closed():
            raise StoreClosed
        result = yield from self.view(operation)
        if isinstance(result, Watch):
            self._keep(result)
            if self._is_closed():
                raise StoreClosed
        return result

    def close(self) -> None:
        """End this handle, and the watches."""
        self._closed = True
        for reference in list(self._watches.values()):
            watch = reference()
            if watch is not None:
                watch.close()

    def _keep(self, watch: Watch) -> None:
        """Remember `watch`, as long as somebody else does, to end it with this handle."""
        self._watches[id(watch)] = ref(watch, partial(_forget, self._watches, id(watch)))
        if self._of is not None:
            self._of._keep(watch)

    def _is_closed(self) -> bool:
        return self._closed or (self._of is not None and self._of._is_closed())


def _through(store: Store | AsyncStore, view: Middleware, of: _Handle | None = None) -> Store | AsyncStore:
    handle = _Handle(view, of)
    return around(store, (handle,), handle)


def _scoped(store: Store | AsyncStore, scope: str) -> Store | AsyncStore:
    if isinstance(store, (MiddlewareStore, AsyncMiddlewareStore)) and isinstance(store.handle, _Handle):
        view = store.handle.view
        if isinstance(view, _Scope):
            return _through(store._inner, _Scope(check_scope(f"{view.scope}/{scope}")), store.handle)
        if type(view) is _Identity:
            return _through(_scoped(store._inner, scope), view, store.handle)
    return _through(store, _Scope(scope))


def _forget(watches: dict[int, ref[Watch]], number: int, _: object) -> None:
    watches.pop(number, None)


# -- the views ---------------------------------------------------------------------------------------------------------


_KEYED = (AccessDenied, ClaimLost, DamagedValue, InvalidValue, RevisionConflict)
"""Errors that speak of a key."""


class _Scope:
    """Keys below a prefix, and back."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self._prefix = f"{scope}:"

    def __call__(self, operation: Operation[Any]) -> Flow[Any]:
        try:
            return (yield from self._there_and_back(plain(operation)))
        except _KEYED as error:
            relative = self._relative(error)
        try:
            raise relative
        finally:
            del relative  # it holds this frame

    def _there_and_back(self, operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, GetEntry):
            return (yield GetEntry(self._inside(operation.key)))
        if isinstance(operation, Commit):
            return (yield Commit([write._replace(key=self._inside(write.key)) for write in operation.writes]))
        if isinstance(operation, Scan):
            return self._pictured((yield self._scan(operation)))
        assert isinstance(operation, OpenWatch)
        watch: Watch = yield self._watch(operation)
        return watch.around(self._delivered)

    def _scan(self, operation: Scan) -> Scan:
        after = None if operation.after is None else self._inside(operation.after)
        if operation.keys is None:
            return Scan(self._inside(operation.prefix), after=after, limit=operation.limit)
        return Scan(keys=map(self._inside, operation.keys), after=after, limit=operation.limit)

    def _watch(self, operation: OpenWatch) -> OpenWatch:
        keys = tuple(map(self._inside, operation.keys))
        prefix = None if operation.prefix is None else self._inside(operation.prefix)
        return OpenWatch(keys, prefix, operation.since, operation.capacity, operation.overflow, operation.latest)

    def _pictured(self, snapshot: Snapshot) -> Snapshot:
        def opened(_: str, key: str) -> Entry:
            try:
                return snapshot[key]
            except (DamagedValue, InvalidValue) as error:
                raise self._relative(error)  # noqa: B904, it has its cause

        names = {self._outside(key): key for key in snapshot}
        return Snapshot(names, opened, snapshot.revision, snapshot.bookmark)

    def _delivered(self, deliver: Deliver, change: Change) -> Change:
        try:
            change = deliver(change)
            return change._replace(key=self._outside(change.key))
        except _KEYED as error:
            relative = self._relative(error)
        try:
            raise relative
        finally:
            del relative

    def _inside(self, key: str) -> str:
        return inside(self._prefix, key)

    def _outside(self, key: str) -> str:
        return key.removeprefix(self._prefix)

    def _relative(self, error: Any) -> StateError:
        """The same error, with the same cause, of the key as it is called here."""
        kind: Any = type(error)
        relative = kind.__new__(kind)  # a subclass may have an `__init__` of its own
        vars(relative).update(vars(error))
        relative.key = self._outside(error.key)
        relative.args = tuple(relative.key if each is error.key else each for each in error.args)
        relative.__cause__ = error.__cause__
        made: StateError = relative
        return made


class _Identity:
    """Who writes."""

    def __init__(self, writer: str) -> None:
        self.writer = writer

    def __call__(self, operation: Operation[Any]) -> Flow[Any]:
        operation = plain(operation)
        self._look_at(operation)
        return (yield Commit(map(self._signed, operation.writes)) if isinstance(operation, Commit) else operation)

    def _look_at(self, operation: Operation[Any]) -> None:
        """Raise `AccessDenied` for what may not be done."""

    def _signed(self, write: Write) -> Write:
        if isinstance(write, Check):
            return write
        if write.writer not in (None, self.writer):
            raise AccessDenied("write in the name of another writer", write.key)
        return write._replace(writer=self.writer)


class _Guard(_Identity):
    """Who writes, and what may be read and written."""

    def __init__(self, writer: str, read: _Grants, write: _Grants) -> None:
        super().__init__(writer)
        self._read = read
        self._write = write

    def _look_at(self, operation: Operation[Any]) -> None:
        if isinstance(operation, GetEntry):
            self._read.check("read", [operation.key])
        elif isinstance(operation, Commit):
            for write in operation.writes:
                checks = isinstance(write, Check)
                (self._read if checks else self._write).check("read" if checks else "write", [write.key])
        elif isinstance(operation, Scan):
            self._read.check("scan", operation.keys, operation.prefix)
        elif isinstance(operation, OpenWatch):
            self._read.check("watch", operation.keys or None, operation.prefix or "")


class _Grants:
    """Some keys, and some prefixes that end in `:`."""

    def __init__(self, grants: Iterable[str]) -> None:
        plain = [check_key(grant) for grant in listed(grants)]
        self._prefixes = tuple(grant for grant in plain if grant.endswith(":"))
        self._keys = frozenset(grant for grant in plain if not grant.endswith(":"))

    def check(self, action: str, keys: Iterable[str] | None, prefix: str = "") -> None:
        """Raise `AccessDenied` unless all of `keys`, or else everything below `prefix`, is granted."""
        if keys is None:
            if not prefix.startswith(self._prefixes):
                raise AccessDenied(action, prefix)
            return
        for key in keys:
            if key not in self._keys and not key.startswith(self._prefixes):
                raise AccessDenied(action, key)


def listed(grants: Iterable[str]) -> Iterable[str]:
    """Return `grants`, unless they are a single `str`, which is an iterable as well, of its letters: `TypeError`."""
    if isinstance(grants, str):
        raise TypeError("grants are an iterable of keys: write [grant] for a single one")
    return grants


def _below(scope: Scope, owner: str) -> str:
    return scoped_key(scope, "k", owner=owner)[:-1]


def plain(operation: Operation[Any]) -> Operation[Any]:
    """`operation` made anew, so that it is what it says; `AccessDenied` for one of an unknown kind."""
    kind = type(operation)
    if isinstance(operation, GetEntry) and kind is GetEntry:
        return GetEntry(operation.key)
    if isinstance(operation, Commit) and kind is Commit:
        return Commit(operation.writes)
    if isinstance(operation, Scan) and kind is Scan:
        return Scan(operation.prefix, keys=operation.keys, after=operation.after, limit=operation.limit)
    if isinstance(operation, OpenWatch) and kind is OpenWatch:
        buffer = operation.since, operation.capacity, operation.overflow
        return OpenWatch(operation.keys, operation.prefix, *buffer, operation.latest)
    raise AccessDenied(kind.__name__, "")
