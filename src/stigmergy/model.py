"""The values that travel: what a store keeps, what it is asked to write, and what a watch delivers.

All are immutable and cheap to build. Read them by field name: that some are named tuples is for speed, and unpacking
them is not promised; `change._replace(value=...)` makes a changed copy. Their `repr` shows keys and revisions, never
values.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

__all__ = ["Change", "Check", "Delete", "Entry", "Meta", "Op", "Set", "Snapshot", "Ttl", "Write"]

Meta: TypeAlias = Mapping[str, str]
Ttl: TypeAlias = float | Literal["keep"] | None


class Op(StrEnum):
    """What a change did to its key."""

    SET = "set"
    DELETE = "delete"


class Entry(NamedTuple):
    """What the store keeps at a key."""

    value: Any
    revision: int
    """The store's revision at the write that left this value."""
    writer: str | None
    """Who wrote it, where a handle stamped it."""
    time: float
    """When it was written, in seconds since the epoch by the clock of the host; for people, not for ordering."""
    expires: float | None
    """When it will be gone, in seconds since the epoch, or `None`."""
    meta: Meta | None
    """What middleware stamped on the write."""

    def __repr__(self) -> str:
        return f"Entry(revision={self.revision}, writer={self.writer!r}, expires={self.expires})"


class Change(NamedTuple):
    """One key went from `old_value` to `value` at `revision`."""

    op: Op
    key: str
    value: Any
    """The new value; `None` when `op` is `Op.DELETE`."""
    old_value: Any
    """What was there before (from `observe`: what was delivered before); `None` when `old_revision` is 0."""
    revision: int
    old_revision: int
    """The revision of `old_value`, or 0: nothing was there."""
    commit: int
    """The revision of the last write of the same commit: changes that happened together share it."""
    writer: str | None
    time: float
    """When it was written, in seconds since the epoch by the clock of the host; for people, not for ordering."""
    expired: bool
    """Whether a `DELETE` came from the entry's ttl."""
    missed: int
    """How many changes right before this one gave way in the buffer of this watch, and were never delivered."""
    meta: Meta | None
    """What middleware stamped on the write."""

    def __repr__(self) -> str:
        expired = ", expired=True" if self.expired else ""
        missed = f", missed={self.missed}" if self.missed else ""
        return f"Change({self.op}, {self.key!r}, revision={self.revision}{expired}{missed})"


class Set(NamedTuple):
    """Write `value` at `key`; `if_revision` and `ttl` (in seconds) as for `Store.set`."""

    key: str
    value: Any
    if_revision: int | None = None
    ttl: Ttl = None
    writer: str | None = None
    meta: Meta | None = None

    def __repr__(self) -> str:
        return f"Set({self.key!r}{_condition(self.if_revision)})"


class Delete(NamedTuple):
    """Remove what is at `key`; `if_revision` as for `Store.delete`."""

    key: str
    if_revision: int | None = None
    writer: str | None = None
    meta: Meta | None = None

    def __repr__(self) -> str:
        return f"Delete({self.key!r}{_condition(self.if_revision)})"


class Check(NamedTuple):
    """Write nothing; the commit fails unless `key` is at `if_revision` (0: absent)."""

    key: str
    if_revision: int

    def __repr__(self) -> str:
        return f"Check({self.key!r}{_condition(self.if_revision)})"


Write: TypeAlias = Set | Delete | Check
_assign = object.__setattr__


class Snapshot(Mapping[str, Entry]):
    """Entries by key, sorted by key, as they all were at `revision`.

    Each read of an item copies its value out of the store's keeping, so nobody's copy is anybody else's.
    `store.watch(prefix=..., since=snapshot.bookmark)` goes on from here with no gap and no repeat.
    """

    __slots__ = ("_entries", "_open", "bookmark", "revision")

    _entries: Mapping[str, Any]
    _open: Callable[[str, Any], Entry]
    revision: int
    bookmark: str

    def __init__(
        self, entries: Mapping[str, Any], open: Callable[[str, Any], Entry], revision: int, bookmark: str
    ) -> None:
        """For providers and middleware: `entries` by key, sorted, and what makes an `Entry` of a key and its entry."""
        _assign(self, "_entries", entries)
        _assign(self, "_open", open)
        _assign(self, "revision", revision)
        _assign(self, "bookmark", bookmark)

    def __getitem__(self, key: str) -> Entry:
        return self._open(key, self._entries[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Snapshot is immutable")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Snapshot cannot be copied or pickled: it reads what the store keeps; take dict(snapshot)")

    def __repr__(self) -> str:
        return f"Snapshot({len(self)} entries, revision={self.revision})"


def _condition(if_revision: int | None) -> str:
    return "" if if_revision is None else f", if_revision={if_revision}"
