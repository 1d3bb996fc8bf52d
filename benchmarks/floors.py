"""The least there could be: what one would write by hand, with no isolation, no revision that lasts, no watch."""

from __future__ import annotations

import queue
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from benchmarks.model import BASELINE_SET, Names, Subject

__all__ = ["BASELINE", "DICT", "LockedDict"]


class LockedDict:
    """One-line methods around a dict with a lock; a value has a revision, so that a write can depend on it."""

    def __init__(self) -> None:
        self.data: dict[str, tuple[Any, int]] = {}
        self.lock = Lock()
        self.revision = 0

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    def set(self, key: str, value: Any) -> None:
        with self.lock:
            self.data[key] = (value, self.revision)

    def delete(self, key: str) -> bool:
        with self.lock:
            return self.data.pop(key, None) is not None

    def compare_and_set(self, key: str, value: Any, revision: int) -> int:
        with self.lock:
            if self.data[key][1] != revision:
                raise ValueError(key)
            self.data[key] = (value, revision + 1)
            return revision + 1

    def set_many(self, keys: list[str], value: Any) -> None:
        with self.lock:
            for key in keys:
                self.data[key] = (value, self.revision)

    def add(self, key: str, number: int) -> None:
        with self.lock:
            value, revision = self.data[key]
            self.data[key] = (value + number, revision + 1)

    async def aget(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    async def aset(self, key: str, value: Any) -> None:
        with self.lock:
            self.data[key] = (value, self.revision)

    def below(self, prefix: str, ordered: list[str]) -> list[tuple[Any, int]]:
        with self.lock:
            start, end = bisect_left(ordered, prefix), bisect_left(ordered, prefix[:-1] + chr(ord(prefix[-1]) + 1))
            return [self.data[key] for key in ordered[start:end]]


@contextmanager
def _open_dict() -> Iterator[Names]:
    plain = LockedDict()
    for number in range(1000):
        plain.set(f"{'p' if number < 100 else 'q'}/{number:04}", number)
    plain.set("key", 1)
    ordered = sorted(plain.data)
    yield {"plain": plain, "ordered": ordered, "passed": queue.SimpleQueue()}


DICT = Subject(
    "a dict with a lock",
    "floor",
    _open_dict,
    {
        "get": "plain.get('key')",
        "set": "plain.set('key', i)",
        "delete": "plain.set('gone', i)\nplain.delete('gone')",
        "conditional set": ("r = plain.data['key'][1]", "r = plain.compare_and_set('key', i, r)"),
        "update": "plain.add('key', 1)",
        "commit of 10": "plain.set_many(ten, i)",
        "scan": "plain.below('p/', ordered)",
        "async get": "await plain.aget('key')",
        "async set": "await plain.aset('key', i)",
        "set and deliver": "plain.set('key', i)\npassed.put(i)\npassed.get()",
    },
    notes={"scan": "keeps no order: it is given the sorted keys", "set and deliver": "and a `SimpleQueue`"},
)

BASELINE = {BASELINE_SET: DICT.contender("set")}
"""To be measured in each row whose budget is counted in it."""
