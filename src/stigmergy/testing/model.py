"""A store as a dict and a list: the oracle of the state machine. Slow, sequential, and plain enough to be believed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

from stigmergy.errors import RevisionConflict
from stigmergy.flow import OpenWatch
from stigmergy.model import Change, Delete, Op, Set, Ttl, Write
from stigmergy.testing.laws import matches

__all__ = ["ModelStore", "ModelWatch"]


class _Kept(NamedTuple):
    value: Any
    revision: int
    deadline: float


_ABSENT = _Kept(None, 0, inf)


class ModelStore:
    """What a store must answer that is empty at revision `base`. Time is what `now` says."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.entries: dict[str, _Kept] = {}
        self.log: list[Change] = []
        self.watches: list[ModelWatch] = []
        self.now = 0.0

    @property
    def revision(self) -> int:
        """The revision of the last change."""
        return self.base + len(self.log)

    def at(self, key: str) -> _Kept:
        """What is kept at `key`; at revision 0 if nothing is."""
        return self.entries.get(key, _ABSENT)

    def commit(self, writes: Iterable[Write]) -> tuple[int | None, ...]:
        """`Store.commit`."""
        writes = list(writes)
        for write in writes:
            actual = self.at(write.key).revision
            if write.if_revision not in (None, actual):
                raise RevisionConflict(write.key, write.if_revision or 0, actual)
        changes = [isinstance(each, Set) or (isinstance(each, Delete) and each.key in self.entries) for each in writes]
        last = self.revision + sum(changes)
        return tuple(
            [self._write(each, last) if changing else None for each, changing in zip(writes, changes, strict=True)]
        )

    def expire(self) -> None:
        """Remove what is past its deadline, each in a commit of its own."""
        due = sorted((kept.deadline, key) for key, kept in self.entries.items() if kept.deadline <= self.now)
        for _, key in due:
            self._record(Op.DELETE, key, _ABSENT, self.revision + 1, expired=True)

    def scan(self, prefix: str, after: str | None, limit: int | None) -> dict[str, tuple[Any, int]]:
        """The values and revisions of a page."""
        keys = sorted(key for key in self.entries if key.startswith(prefix) and key > (after or ""))
        return {key: self.entries[key][:2] for key in keys[:limit]}

    def open(self, request: OpenWatch) -> ModelWatch:
        """A watch that hears of what follows."""
        watch = ModelWatch(request, self)
        self.watches.append(watch)
        return watch

    def _write(self, write: Write, commit: int) -> int:
        revision = self.revision + 1
        if isinstance(write, Set):
            kept = _Kept(write.value, revision, self._deadline(write.key, write.ttl))
            self._record(Op.SET, write.key, kept, commit)
        else:
            self._record(Op.DELETE, write.key, _ABSENT, commit)
        return revision

    def _deadline(self, key: str, ttl: Ttl) -> float:
        if ttl == "keep":
            return self.at(key).deadline
        return inf if ttl is None else self.now + ttl

    def _record(self, op: Op, key: str, kept: _Kept, commit: int, *, expired: bool = False) -> None:
        old = self.at(key)
        revision = self.revision + 1
        change = Change(op, key, kept.value, old.value, revision, old.revision, commit, None, 0.0, expired, 0, None)
        if op is Op.SET:
            self.entries[key] = kept
        else:
            del self.entries[key]
        self.log.append(change)
        for watch in self.watches:
            watch.put(change)


class ModelWatch:
    """What a watch must deliver next: the backlog first, which may be of any length, then what the buffer has."""

    def __init__(self, request: OpenWatch, store: ModelStore) -> None:
        self.request = request
        self.backlog: deque[Change] = deque()
        self.buffer: deque[Change] = deque()
        self.missed = 0
        self.taken = store.revision
        """The revision up to which everything was taken out."""
        if isinstance(request.since, int):
            self.taken = request.since
            self.backlog.extend(
                change for change in store.log[request.since - store.base :] if matches(change, request)
            )

    def put(self, change: Change) -> None:
        """Buffer `change`, if it was asked for."""
        if not matches(change, self.request):
            return
        if len(self.buffer) == self.request.capacity:
            self.buffer.popleft()
            self.missed += 1
        self.buffer.append(change)

    def take(self) -> Change | None:
        """Remove and return the oldest change."""
        if self.backlog:
            change = self.backlog.popleft()
        elif self.buffer:
            change = self.buffer.popleft()._replace(missed=self.missed)
            self.missed = 0
        else:
            return None
        self.taken = change.revision
        return change
