"""Sorted keys, for scans by prefix."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

__all__ = ["KeyOrder", "SortedKeys"]

_LOAD = 512


class KeyOrder:
    """The keys of `entries` in order. Used with the store's lock held, and struck and re-entered like the store.

    Sorted when somebody asks for the first time, and brought up to date when somebody asks again: a store that nobody
    scans pays nothing for it.
    """

    __slots__ = ("_entries", "_sorted", "_touched")

    def __init__(self, entries: dict[str, Any]) -> None:
        self._entries = entries
        self._sorted: SortedKeys | None = None
        self._touched: list[str] | None = None
        """Keys that may have come or gone since; `None` while nobody asks."""

    def touch(self, key: str) -> None:
        """Take note that `key` is coming or going."""
        touched = self._touched
        if touched is not None:
            touched.append(key)
            if len(touched) > len(self._entries) + 1000:  # nobody has asked for long
                self._sorted = self._touched = None

    def beginning_with(self, prefix: str, after: str | None) -> Iterator[str]:
        """The keys that begin with `prefix` and are beyond `after`."""
        ordered = self._up_to_date()
        if after is None or after < prefix:
            rest = ordered.starting_at(prefix)
        else:
            rest = ordered.starting_at(after, after=True)
        return takewhile(lambda key: key.startswith(prefix), rest)

    def _up_to_date(self) -> SortedKeys:
        while True:
            ordered, touched = self._taken_out()
            if ordered is None or touched is None:
                ordered = SortedKeys(self._entries.copy())
            else:
                for key in touched:
                    ordered.add(key) if key in self._entries else ordered.discard(key)
            if self._sorted is None and not self._touched:  # atomic: no bytecode boundary
                self._sorted = ordered
                return ordered

    def _taken_out(self) -> tuple[SortedKeys | None, list[str] | None]:
        """What there is, removed: if its use is interrupted, the next one starts anew."""
        fresh: list[str] = []
        # atomic: no bytecode boundary. Allocating may be interrupted, so the new list was made before
        ordered, touched = self._sorted, self._touched
        self._sorted, self._touched = None, fresh
        return ordered, touched


class SortedKeys:
    """A sorted set of keys: adding, removing and finding the first take O(log n) and a shift within one chunk.

    >>> keys = SortedKeys(["b", "a", "c"])
    >>> keys.add("aa"); keys.discard("b")
    >>> list(keys.starting_at("aa"))
    ['aa', 'c']
    """

    __slots__ = ("_chunks", "_lasts")

    def __init__(self, keys: Iterable[str] = ()) -> None:
        ordered = sorted(keys)
        self._chunks = [ordered[start : start + _LOAD] for start in range(0, len(ordered), _LOAD)] or [[]]
        self._lasts = [chunk[-1] for chunk in self._chunks[:-1]]
        """The last key of every chunk but the last one."""

    def add(self, key: str) -> None:
        place = bisect_left(self._lasts, key)
        chunk = self._chunks[place]
        at = bisect_left(chunk, key)
        if at < len(chunk) and chunk[at] == key:
            return
        insort(chunk, key)
        if len(chunk) > 2 * _LOAD:
            self._chunks[place : place + 1] = chunk[:_LOAD], chunk[_LOAD:]
            self._lasts.insert(place, chunk[_LOAD - 1])

    def discard(self, key: str) -> None:
        place = bisect_left(self._lasts, key)
        chunk = self._chunks[place]
        at = bisect_left(chunk, key)
        if at < len(chunk) and chunk[at] == key:
            del chunk[at]
            if not chunk and len(self._chunks) > 1:
                del self._chunks[place]
                del self._lasts[min(place, len(self._lasts) - 1)]

    def starting_at(self, key: str, *, after: bool = False) -> Iterator[str]:
        """The keys from `key` on (with `after`: beyond it), in order."""
        place = bisect_left(self._lasts, key)
        chunk = self._chunks[place]
        yield from chunk[(bisect_right if after else bisect_left)(chunk, key) :]
        for chunk in self._chunks[place + 1 :]:
            yield from chunk
