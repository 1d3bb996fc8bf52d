"""The in-process store: a dict, one lock, a hub.

Commit point. A commit becomes a fact in one atomic section (see `subscription.py`): `_pending` gets its records, and
`_revision` its last revision, if the revision is still the one that the commit was decided on. Before that section
nothing has happened; after it nothing can be taken back.

Rolling forward. `_settle` does what follows from a fact: the dict, the deadlines, the ring and the watches; it ends by
clearing `_pending`. The committer may be interrupted in the midst of it, for good (a `KeyboardInterrupt`) or by a
handler or finaliser that uses the store. So every user of the lock first applies what is pending, and doing so again
does no harm: each step knows by its revision whether it was done. Readers that take no lock look at `_pending`, and
take the lock if it is set. Without this, an interrupted `set` would have used a revision up while the dict still holds
the value before: the next write would report a wrong `old_value`, and watches would never receive the change between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from math import inf
from operator import itemgetter
from threading import RLock
from typing import Any, Final, Literal, TypeAlias

from stigmergy._core.fork import after_fork_in_child
from stigmergy.checks import check_number, check_ttl, check_writes
from stigmergy.errors import InvalidValue, RevisionConflict, StoreClosed, StoreFull
from stigmergy.flow import Commit, GetEntry, OpenWatch, Operation, Scan
from stigmergy.hub import Hub
from stigmergy.keys import check_key
from stigmergy.model import Change, Check, Delete, Entry, Meta, Op, Set, Snapshot, Ttl, Write
from stigmergy.providers._deadlines import Deadlines
from stigmergy.providers._sorted import KeyOrder
from stigmergy.providers._sweeper import Sweeper
from stigmergy.store import Store
from stigmergy.values import SCALARS, isolate
from stigmergy.watch import Watch

__all__ = ["MemoryStore", "open_memory"]

# Plain tuples, because a write builds two of them: a NamedTuple takes four times as long (benchmark: set). What is
# handed out is a NamedTuple, made in half the time of its own constructor (benchmark: conditional set).
_made: Final = tuple.__new__
_Stored: TypeAlias = tuple[Any, int, str | None, float, float | None, Meta | None, int, float]
"""An `Entry` as the dict keeps it, the revision of its commit, its deadline by the store's clock (infinite: none)."""
_Record: TypeAlias = tuple[str, _Stored, _Stored | None, Op, bool]
"""One change, as the ring keeps it: key, what is stored now (for a `DELETE`: no value, but who, when and at which
revision), what was before, the op, whether it expired."""

_REVISION: Final = 1
_EXPIRES: Final = 4
_DEADLINE: Final = 7
_SET, _DELETE = Op.SET, Op.DELETE
_CLOSED: tuple[_Record, ...] = ()
"""The commit that is pending for ever: each reader and writer finds it, takes the lock, and gets `StoreClosed`."""


class MemoryStore(Store):
    """Shared state within one process. Forgets everything when the process ends.

    Args:
        history: how many of the last changes are remembered for `since=`. The values that they replaced or deleted
            stay alive as long; 0 remembers none.
        copy: what isolates values, on their way in and out. `None` shares live objects: whoever changes one changes it
            for everybody, without a revision and without a change. Only for values that nobody changes.
        max_entries: how many entries there may be; a commit that would leave more is `StoreFull`.
        clock: seconds, never going back; ttls are measured by it. It is called with the store's lock held.

    """

    blocking = False

    def __init__(
        self,
        *,
        history: int = 1024,
        copy: Callable[[Any], Any] | None = isolate,
        max_entries: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        history = check_number("history", history, 0)
        self.capabilities = frozenset({"resumable"} if history else ()) | frozenset({"isolated"} if copy else ())
        self._copy = _shared if copy is None else copy
        self._scalars = SCALARS if copy is None or copy is isolate else frozenset[type]()
        """The types of values that need no copy."""
        self._shares = copy is None
        self._max_entries = inf if max_entries is None else check_number("max_entries", max_entries, 1)
        self._clock = clock
        self._lock = RLock()
        self._entries: dict[str, _Stored] = {}
        self._revision = 0
        """The revision of the last commit."""
        self._pending: tuple[_Record, ...] | None = None
        """The records of the last commit, until all that follows from it is done."""
        self._deadlines = Deadlines(self._entries)
        self._order = KeyOrder(self._entries)
        self._hub = Hub(
            lock=self._lock,
            settle=self._settle,
            key=itemgetter(0),
            changed=_changed,
            deliver=self._deliver,
            history=history,
        )
        self._sweeper = Sweeper(self._sweep)
        after_fork_in_child(self, MemoryStore._live_on_in_child)

    def get(self, key: str, default: Any = None) -> Any:
        if type(key) is str:
            stored = self._entries.get(key)
            if stored is not None and stored[_EXPIRES] is None and self._pending is None:
                value = stored[0]
                return value if type(value) in self._scalars or self._shares else self._copied(key, value)
        return super().get(key, default)

    def get_entry(self, key: str) -> Entry | None:
        return self._get_entry(check_key(key))

    def _get_entry(self, key: str) -> Entry | None:
        stored = self._entries.get(key)
        deadline = inf if stored is None else stored[_DEADLINE]
        # `_pending` is looked at behind the entry, here and in `get`: so what was read is no half of a commit.
        if self._pending is not None or (deadline < inf and deadline <= self._clock()):
            stored = self._hub.locked(self._read_while_locked, key)
        return None if stored is None else self._entry(key, stored)

    def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        if self._max_entries < inf or not (if_revision is None or type(if_revision) is int):
            return super().set(key, value, if_revision=if_revision, ttl=ttl)
        if type(key) is not str or key not in self._entries:
            key = check_key(key)
        if ttl is not None:
            ttl = check_ttl(ttl)
        if type(value) not in self._scalars and not self._shares:
            value = self._copied(key, value)
        if if_revision is None and ttl is None and key not in self._hub.keys:
            revision = self._replace(key, value)
            if revision:
                return revision
        return self._commit_one(_SET, key, value, if_revision, None, None, ttl)

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        if not (if_revision is None or type(if_revision) is int):
            return super().delete(key, if_revision=if_revision)
        if type(key) is not str or key not in self._entries:
            key = check_key(key)
        return self._commit_one(_DELETE, key, None, if_revision, None, None) > 0

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return self._commit(check_writes(writes))

    def _commit(self, checked: tuple[Write, ...]) -> tuple[int | None, ...]:
        if len(checked) == 1 and self._max_entries == inf:
            (write,) = checked
            if type(write) is Set:
                key, value, expected, ttl, writer, meta = self._isolated(write)
                if expected is None and ttl is None and writer is None and meta is None and key not in self._hub.keys:
                    revision = self._replace(key, value)
                    if revision:
                        return (revision,)
                return (self._commit_one(_SET, key, value, expected, writer, meta, ttl),)
            if type(write) is Delete:
                return (self._commit_one(_DELETE, write.key, None, *write[1:]) or None,)
        isolated = tuple([self._isolated(write) if type(write) is Set else write for write in checked])
        return self._hub.locked(self._commit_while_locked, isolated)

    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return self._hub.locked(self._scan_while_locked, Scan(prefix, keys=keys, after=after, limit=limit))

    def open_watch(self, request: OpenWatch) -> Watch:
        return self._hub.locked(self._open_while_locked, request)

    def close(self) -> None:
        self._hub.locked(self._close_while_locked)
        self._sweeper.stop()

    def _perform(self, operation: Operation[Any]) -> Any:
        # An operation that exists is a valid one, and need not be checked again (benchmark: set through middleware).
        # But a subclass may have a `commit` of its own, and the caller may hold the `meta`, and change it.
        if type(operation) is Commit and type(self) is MemoryStore:
            write = operation.writes[0]
            if type(write) is Set and write.meta is None and len(operation.writes) == 1:
                return self._commit(operation.writes)
        elif type(operation) is GetEntry and type(self) is MemoryStore:
            return self._get_entry(operation.key)
        return operation.apply(self)

    # -- the commit ----------------------------------------------------------------------------------------------------

    def _enter_while_locked(self) -> float:
        """Settle, and make due deadlines into changes; return the time. Raises `StoreClosed`."""
        if self._pending is not None:
            self._hub.to_release.append(self._settle())
        if self._pending is _CLOSED:
            raise StoreClosed
        now = self._clock()
        while (due := self._deadlines.first())[0] <= now:
            self._expire_while_locked(due)
        if due[0] < self._sweeper.until:
            self._sweeper.wake()
        return now

    def _replace(self, key: str, value: Any) -> int:
        """Replace what is at `key`, where that takes no more than a few stores to memory: it has no watch, and no
        deadline is known. Return the revision, or 0 for what is to go the long way.

        The way of most writes (benchmark: set): commit point and all that follows from it are one section.
        """
        hub = self._hub
        with self._lock:
            chains, seen, before = hub.chains, self._revision, self._entries.get(key)
            if before is None or self._deadlines.heap or hub.left or (hub.prefixes and hub.is_watched_by_prefix(key)):
                return 0
            revision = seen + 1
            stored = (value, revision, None, time.time(), None, None, revision, inf)
            record = (key, stored, before, _SET, False)
            pending = (record,)
            if (  # atomic: no bytecode boundary, to the end
                self._revision != seen or self._pending is not None or hub.chains is not chains or key in hub.keys
            ):
                return 0
            self._pending = pending
            self._revision = revision
            self._entries[key] = stored
            if hub.history:
                slot = revision % hub.history
                before = hub.ring[slot]  # kept alive until the lock is released, as is what `record` has
                hub.ring[slot] = record
            hub.revision = revision
            self._pending = None
        return revision

    def _commit_one(
        self,
        op: Op,
        key: str,
        value: Any,
        expected: int | None,
        writer: str | None,
        meta: Meta | None,
        ttl: Ttl = None,
    ) -> int:
        """Commit a single write; return its revision, or 0 if it was a `DELETE` of an absent key.

        What `_commit_while_locked` does by way of `Hub.locked`, in place.
        """
        if expected is not None and expected < 0:
            raise ValueError(f"if_revision must not be negative, not {expected}")
        try:
            with self._lock:
                while True:
                    if self._pending is not None or self._deadlines.heap:
                        self._enter_while_locked()
                    seen = self._revision
                    revision = seen + 1
                    before = self._entries.get(key)
                    if expected is not None and expected != (0 if before is None else before[_REVISION]):
                        raise RevisionConflict(key, expected, 0 if before is None else before[_REVISION])
                    if op is _DELETE and before is None:
                        revision = 0
                        break
                    wrote, expires, deadline = time.time(), None, inf
                    if ttl is not None:
                        expires, deadline = _deadline(ttl, before, wrote, self._clock())
                    stored = (value, revision, writer, wrote, expires, meta, revision, deadline)
                    if self._commit_point(seen, ((key, stored, before, op, False),)):
                        done = self._settle()  # noqa: F841, kept alive until the lock is released
                        break
            if self._hub.to_wake or self._hub.to_release:
                self._hub.run_deferred()
        except BaseException:
            self._hub.recover()
            raise
        return revision

    def _commit_while_locked(self, writes: tuple[Write, ...]) -> tuple[int | None, ...]:
        while True:
            now = self._enter_while_locked()
            seen = self._revision
            pending, revisions = self._decide(writes, seen, now)
            if not pending or self._commit_point(seen, pending):
                self._hub.to_release.append(self._settle())
                return revisions

    def _decide(
        self, writes: tuple[Write, ...], seen: int, now: float
    ) -> tuple[tuple[_Record, ...], tuple[int | None, ...]]:
        """What `writes` would change after revision `seen`: the records, and the revision of each write."""
        entries = self._entries
        changing = grown = 0
        for write in writes:
            kind, expected, before = type(write), write.if_revision, entries.get(write.key)
            if expected is not None and expected != (0 if before is None else before[_REVISION]):
                raise RevisionConflict(write.key, expected, 0 if before is None else before[_REVISION])
            if kind is Set:
                changing += 1
                grown += before is None
            elif kind is Delete and before is not None:
                changing += 1
                grown -= 1
        if len(entries) + grown > self._max_entries:
            raise StoreFull(int(self._max_entries))
        wrote, revision, last = time.time(), seen, seen + changing
        pending: list[_Record] = []
        revisions: list[int | None] = []
        for write in writes:
            before = entries.get(write.key)
            if type(write) is Check or (before is None and type(write) is Delete):
                revisions.append(None)
                continue
            revision += 1
            revisions.append(revision)
            if type(write) is Set:
                key, value, _, ttl, writer, meta = write
                expires, deadline = (None, inf) if ttl is None else _deadline(ttl, before, wrote, now)
                stored = (value, revision, writer, wrote, expires, meta, last, deadline)
                pending.append((key, stored, before, _SET, False))
            elif type(write) is Delete:
                stored = (None, revision, write.writer, wrote, None, write.meta, last, inf)
                pending.append((write.key, stored, before, _DELETE, False))
        return tuple(pending), tuple(revisions)

    def _commit_point(self, seen: int, pending: tuple[_Record, ...]) -> bool:
        """Make `pending` a fact. `False`, and nothing has happened, if there was a commit since revision `seen`."""
        last = seen + len(pending)
        if self._revision == seen and self._pending is None:  # atomic: no bytecode boundary
            self._pending = pending
            self._revision = last
            return True
        return False

    def _settle(self) -> object:
        """Roll the last commit forward: the dict, the ring and the watches follow it. Doing so again changes nothing.

        Returns what it released; keep that alive until the lock is released, for it may have finalisers.
        """
        pending = self._pending
        if pending is None:
            return None
        if pending is _CLOSED:
            self._hub.close()
            return None
        done: object = pending
        for record in pending:
            key, stored, before, op, _ = record
            if stored[_DEADLINE] < inf:
                self._deadlines.push(stored[_DEADLINE], key)
                if stored[_DEADLINE] < self._sweeper.until:
                    self._sweeper.wake()
            if op is _DELETE or before is None:
                self._order.touch(key)
            if self._pending is not pending:
                return done  # a re-entrant call has applied all of this, and may have written since
            # atomic: no bytecode boundary, since that look
            if op is _SET:
                self._entries[key] = stored
            elif key in self._entries:
                del self._entries[key]
            done = done, self._hub.publish(stored[_REVISION], key, record)
        if self._pending is pending:  # atomic: no bytecode boundary
            self._pending = None
        return done

    def _close_while_locked(self) -> None:
        while self._pending is not _CLOSED:
            self._hub.to_release.append(self._settle())
            if self._pending is None:  # atomic: no bytecode boundary
                self._pending = _CLOSED
        self._hub.to_release.append((self._settle(), self._entries.copy()))
        self._entries.clear()

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read_while_locked(self, key: str) -> _Stored | None:
        """For when the quick way is barred: a commit is pending, a deadline has passed, or the store is closed."""
        self._enter_while_locked()
        return self._entries.get(key)

    def _scan_while_locked(self, request: Scan) -> Snapshot:
        self._enter_while_locked()
        found, revision = self._found(request)
        return Snapshot(found, self._entry, revision, self._hub.bookmark(revision))

    def _open_while_locked(self, request: OpenWatch) -> Watch:
        self._enter_while_locked()
        return self._hub.open(request, partial(self._current, request))

    def _current(self, request: OpenWatch) -> list[Change]:
        """The present state as changes, in the order of revisions."""
        found, _ = self._found(Scan(keys=request.keys) if request.prefix is None else Scan(request.prefix))
        in_order = sorted(found.items(), key=lambda item: item[1][_REVISION])
        return [_changed((key, stored, None, _SET, False)) for key, stored in in_order]

    def _found(self, request: Scan) -> tuple[dict[str, _Stored], int]:
        """What matches, sorted by key, and the revision at which it all does."""
        while True:
            seen = self._revision
            try:
                found = dict(islice(self._matching(request), request.limit))
            except IndexError:  # somebody struck and took keys away
                if self._revision == seen:
                    raise
            else:
                if self._revision == seen:
                    return found, seen

    def _matching(self, request: Scan) -> Iterator[tuple[str, _Stored]]:
        names: Iterable[str]
        if request.keys is None:
            names = self._order.beginning_with(request.prefix, request.after)
        else:
            names = (key for key in sorted(request.keys) if request.after is None or key > request.after)
        for name in names:
            stored = self._entries.get(name)
            if stored is not None:
                yield name, stored

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def _expire_while_locked(self, due: tuple[float, str]) -> None:
        """Make the first of the deadlines into a change, unless its entry is no longer the same."""
        deadline, key = due
        seen = self._revision
        before = self._entries.get(key)
        if before is not None and before[_DEADLINE] == deadline:
            stored = (None, seen + 1, None, time.time(), None, None, seen + 1, inf)
            if not self._commit_point(seen, ((key, stored, before, _DELETE, True),)):
                return
            self._hub.to_release.append(self._settle())
        self._deadlines.drop(due)

    def _sweep(self) -> float:
        try:
            return self._hub.locked(self._sweep_while_locked)
        except StoreClosed:
            return inf

    def _sweep_while_locked(self) -> float:
        now = self._enter_while_locked()
        self._sweeper.until = self._deadlines.first()[0]
        return self._sweeper.until - now

    # -- values --------------------------------------------------------------------------------------------------------

    def _copied(self, key: str, value: Any) -> Any:
        try:
            return self._copy(value)
        except InvalidValue:
            raise
        except Exception as error:
            raise InvalidValue(key, type(value).__name__) from error

    def _isolated(self, write: Set) -> Set:
        if type(write.value) in self._scalars:
            return write
        return write._replace(value=self._copied(write.key, write.value))

    def _entry(self, key: str, stored: _Stored) -> Entry:
        value, revision, writer, wrote, expires, meta, _, _ = stored
        if type(value) not in self._scalars:
            value = self._copied(key, value)
        return _made(Entry, (value, revision, writer, wrote, expires, None if meta is None else dict(meta)))

    def _deliver(self, change: Change) -> Change:
        if change.meta is None and type(change.value) in self._scalars and type(change.old_value) in self._scalars:
            return change
        value = self._copied(change.key, change.value)
        old_value = self._copied(change.key, change.old_value)
        meta = None if change.meta is None else dict(change.meta)
        return change._replace(value=value, old_value=old_value, meta=meta)

    def _live_on_in_child(self) -> None:
        """Part with what a child process does not have: the parent's threads, what they held, who waited in them."""
        if self._pending:  # without a GIL a fork can find another thread between the two stores of its commit point
            self._revision = self._pending[-1][1][_REVISION]
        self._lock = RLock()
        self._sweeper = Sweeper(self._sweep)
        self._hub.live_on_in_child(self._lock)


def open_memory(url: str, **options: Any) -> MemoryStore:
    """What `open_store` calls: a new store, with `options`, and those in the query (`memory://?history=0`)."""
    from urllib.parse import parse_qsl, urlsplit  # takes as long to import as all the rest

    parts = urlsplit(url)
    if parts.netloc or parts.path.lower() not in ("", "/", "memory", "inmemory"):
        raise ValueError("a memory store has no name: every call opens a new one")
    for name, number in parse_qsl(parts.query, keep_blank_values=True):
        if name not in ("history", "max_entries") or not number.isdecimal():
            raise ValueError(f"a memory store has no option {name!r} of this kind in its URL")
        options.setdefault(name, int(number))
    return MemoryStore(**options)


def _changed(record: _Record) -> Change:
    key, stored, before, op, expired = record
    value, revision, writer, wrote, _, meta, commit, _ = stored
    old_value, old_revision = (None, 0) if before is None else before[:2]
    return _made(Change, (op, key, value, old_value, revision, old_revision, commit, writer, wrote, expired, 0, meta))


def _deadline(
    ttl: float | Literal["keep"], before: _Stored | None, wrote: float, now: float
) -> tuple[float | None, float]:
    """When the new entry is gone: by the epoch, for people, and by the store's clock."""
    if ttl == "keep":
        return (None, inf) if before is None else (before[_EXPIRES], before[_DEADLINE])
    return wrote + ttl, now + ttl


def _shared(value: Any) -> Any:
    return value
