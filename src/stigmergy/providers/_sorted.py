"""Sorted keys, for scans by prefix."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator

__all__ = ["SortedKeys"]

_LOAD = 512


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
