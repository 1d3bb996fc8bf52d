"""Our own store, in the shapes that the rows compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.model import SMALL, Names, Statement, Subject
from stigmergy import MemoryStore, Set

__all__ = ["LIVE", "OURS"]

_DOES: dict[str, Statement] = {
    "get": "store.get('key')",
    "set": "store.set('key', i)",
    "set with a ttl": "store.set('key', i, ttl=60)",
    "delete": "store.set('gone', i)\nstore.delete('gone')",
    "conditional set": ("r = store.get_entry('key').revision", "r = store.set('key', i, if_revision=r)"),
    "update": "store.update('key', add_one)",
    "commit of 10": "store.commit(*[Set(key, i) for key in ten])",
    "scan": "[entry.value for entry in store.scan('p/').values()]",
    "get of a small dict": "store.get('small')",
    "set of a small dict": "store.set('small', SMALL)",
    "async get": "await aio.get('key')",
    "async set": "await aio.set('key', i)",
    "set and deliver": ("watch = store.watch('key')", "store.set('key', i)\nwatch.get().value"),
}


@contextmanager
def _open(**options: Any) -> Iterator[Names]:
    with MemoryStore(**options) as store:
        for number in range(1000):
            store.set(f"{'p' if number < 100 else 'q'}/{number:04}", number)
        store.set("key", 1)
        store.set("small", SMALL)
        yield {"store": store, "aio": store.aio, "Set": Set, "add_one": lambda value: value + 1}


OURS = Subject("ours", "ours", _open, _DOES)
LIVE = Subject("copy=None", "ours", lambda: _open(copy=None), _DOES, live=True, gives_up="ours with live objects")
