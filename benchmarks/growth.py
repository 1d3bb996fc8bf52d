"""Rows: what it costs as there is more of it, what it weighs, and what the import takes."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from itertools import cycle
from time import perf_counter
from typing import Any

from benchmarks.floors import DICT, LockedDict
from benchmarks.measure import Effort, Run
from benchmarks.model import Contender, Row, less_than, looped, more, times
from benchmarks.ours import OURS
from stigmergy import MemoryStore

__all__ = ["ROWS"]

Start = Callable[[Effort], AbstractContextManager[Run]]


def _key(number: int) -> str:
    return f"agent/{number:07}:state"


# -- many keys ---------------------------------------------------------------------------------------------------------


def _among(count: int, make: Callable[[], Any], statement: str) -> Start:
    """`statement` on a store of `count` keys, with `key` at random among them."""

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        keys = [_key(number) for number in range(effort.size(count))]
        store = make()
        for key in keys:
            store.set(key, 1)
        random.Random(count).shuffle(keys)
        with looped(f"key = next(keys); {statement}", {"store": store, "keys": cycle(keys)}) as run:
            yield run

    return start


def _row_among(does: str, statement: str, count: int) -> Row:
    found = {
        "ours": Contender("ours", _among(count, MemoryStore, statement)),
        DICT.title: Contender("floor", _among(count, LockedDict, statement)),
    }
    return Row(f"{does} among {count:,} keys", f"{does} of a key at random", found, base=DICT.title)


_SCAN = "len(list(store.scan(key[:11]).values()))"
"""The 100 keys that share the first digits with one at random."""


def _scan_among(count: int) -> Start:
    return _among(count, MemoryStore, _SCAN)


# -- many watches ------------------------------------------------------------------------------------------------------


@contextmanager
def _beside_watches(effort: Effort) -> Iterator[Run]:
    with OURS.open() as names:
        watches = [names["store"].watch(_key(number)) for number in range(effort.size(10_000))]
        with looped(OURS.does["set"], names) as run:
            yield run
        del watches


_KEY = "job/" + "/".join(str(number) for number in range(100, 170))


def _beside_prefixes(count: int) -> Start:
    """Sets beside `count` watches of prefixes of as many lengths.

    Each is the beginning of the key but for its last character, so that no search is over before it has come to that;
    in the order of texts they stand on both sides of the key.
    """

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        with MemoryStore() as store:
            store.set(_KEY, 1)
            watches = [store.watch(prefix=_KEY[:length] + "!~"[length % 2]) for length in range(count)]
            with looped("store.set(key, i)", {"store": store, "key": _KEY}) as run:
                yield run
            del watches

    return start


def _row_beside_prefixes(count: int, limit: float) -> Row:
    found = {
        "ours": Contender("ours", _beside_prefixes(count)),
        "without": Contender("floor", _beside_prefixes(0)),
    }
    return Row(
        f"set, prefixes of {count} lengths watched",
        "set of a scalar, while there are watches of prefixes of other keys with the same beginnings",
        found,
        base="without",
        budget=times(limit, "without"),
    )


# -- weight ------------------------------------------------------------------------------------------------------------


def _weighed(fill: Callable[[list[str]], Any]) -> Start:
    """The bytes that what `fill(keys)` returns keeps alive; the keys themselves are not counted."""

    def run(times: int) -> float:
        keys = [_key(number) for number in range(times)]
        gc.collect()
        tracemalloc.start()
        try:
            held = fill(keys)
            gc.collect()
            size = tracemalloc.get_traced_memory()[0]
            del held
        finally:
            tracemalloc.stop()
        return float(size)

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        yield run

    return start


def _our_entries(keys: list[str]) -> Any:
    store = MemoryStore()
    for key in keys:
        store.set(key, None)
    store.scan(keys[-1])  # which puts the keys in order
    return store


def _our_watches(keys: list[str]) -> Any:
    store = MemoryStore()
    return store, [store.watch(key) for key in keys]


def _items(make: Callable[[], Any]) -> Start:
    def fill(keys: list[str]) -> Any:
        cache = make()
        for key in keys:
            cache[key] = None
        return cache

    return _weighed(fill)


def _langgraph_entries(keys: list[str]) -> Any:
    store = import_module("langgraph.store.memory").InMemoryStore()
    for key in keys:
        store.put(("state",), key, {"value": None})
    return store


def _culsans_queues(keys: list[str]) -> Any:
    return [import_module("culsans").Queue() for _ in keys]


# -- the import --------------------------------------------------------------------------------------------------------


def _program(source: str) -> Start:
    """A new interpreter that runs `source`, with all of its bytecode in a cache."""

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}

            def run(times: int) -> float:
                started = perf_counter()
                for _ in range(times):
                    subprocess.run([sys.executable, "-c", source], env=environment, check=True)
                return perf_counter() - started

            run(1)
            yield run

    return start


# -- rows --------------------------------------------------------------------------------------------------------------

_SIZES = (1_000, 100_000, 1_000_000)

ROWS = (
    *(_row_among("get", "store.get(key)", count) for count in _SIZES),
    *(_row_among("set", "store.set(key, i)", count) for count in _SIZES),
    Row(
        "scan among 1,000,000 keys",
        "the values of 100 keys below a prefix; the budget is to grow with the 100, not with the million",
        {
            "ours": Contender("ours", _scan_among(1_000_000)),
            "among 1,000": Contender("floor", _scan_among(1_000)),
        },
        base="among 1,000",
        budget=times(2, "among 1,000"),
    ),
    Row(
        "set beside 10,000 watches",
        "set of a scalar, while there are 10,000 watches of other keys",
        {"ours": Contender("ours", _beside_watches), "without": OURS.contender("set", "floor")},
        base="without",
        budget=times(1.1, "without"),
    ),
    _row_beside_prefixes(8, 1.5),
    _row_beside_prefixes(256, 2),
    Row(
        "memory of an entry",
        "one of 100,000, without its key and its value",
        {
            "ours": Contender("ours", _weighed(_our_entries)),
            "a dict": Contender("floor", _items(dict)),
            "cachetools": Contender("store", _items(lambda: import_module("cachetools").LRUCache(1 << 21)), live=True),
            "LangGraph InMemoryStore": Contender(
                "store", _weighed(_langgraph_entries), "and the dict of the value", live=True
            ),
        },
        base="a dict",
        budget=more(256, "a dict", "256 B"),
        unit="bytes",
        times=100_000,
        rounds=1,
    ),
    Row(
        "memory of an idle watch",
        "one of 10,000, each of another key",
        {
            "ours": Contender("ours", _weighed(_our_watches)),
            "culsans": Contender("queue", _weighed(_culsans_queues), "an empty queue"),
        },
        budget=less_than(2048, "2 KiB"),
        unit="bytes",
        times=10_000,
        rounds=1,
    ),
    Row(
        "import",
        "a new interpreter that imports the package",
        {
            "ours": Contender("ours", _program("import stigmergy")),
            "bare Python": Contender("floor", _program("pass")),
        },
        base="bare Python",
        budget=more(30e-3, "bare Python", "30 ms"),
        times=1,
        rounds=40,
    ),
)
