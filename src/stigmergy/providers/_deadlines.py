"""The deadlines of the memory provider's entries."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

__all__ = ["Deadlines"]


class Deadlines:
    """A heap of deadlines and keys. Used with the store's lock held, and struck and re-entered like the store.

    It may hold deadlines of entries that were replaced since: whoever takes one out looks whether it is still true.
    `entries` are the store's, each a tuple that ends with its deadline (infinite: none).
    """

    __slots__ = ("_entries", "_pushed", "_worth_tidying", "heap")

    def __init__(self, entries: dict[str, Any]) -> None:
        self._entries = entries
        self.heap: list[tuple[float, str]] = []
        self._pushed = 0
        self._worth_tidying = 64

    def push(self, deadline: float, key: str) -> None:
        if len(self.heap) > self._worth_tidying or len(self.heap) > 2 * len(self._entries) + 64:
            self._tidy()
        self._pushed += 1
        heappush(self.heap, (deadline, key))

    def first(self) -> tuple[float, str]:
        """The earliest deadline and its key; an infinite one if there is none."""
        return self.heap[0] if self.heap else (inf, "")

    def drop(self, first: tuple[float, str]) -> None:
        """Take out what `first` returned, if nobody did so meanwhile."""
        if self.heap and self.heap[0] is first:  # atomic: no bytecode boundary
            heappop(self.heap)

    def _tidy(self) -> None:
        """Drop what is outdated: renewing one entry for ever must not cost memory."""
        pushed = self._pushed
        entries = self._entries.copy()
        kept = [(stored[-1], key) for key, stored in entries.items() if stored[-1] < inf]
        heapify(kept)
        worth = 2 * len(kept) + len(entries) // 8 + 64
        if self._pushed == pushed:  # atomic: no bytecode boundary
            self.heap = kept
            self._worth_tidying = worth
