"""Rows: one write that many watches receive."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib import import_module
from time import perf_counter
from typing import Any, TypeAlias

from benchmarks.measure import Effort, Run
from benchmarks.model import Budget, Contender, Row, less_than, more
from benchmarks.ours import OURS
from stigmergy import MemoryStore

__all__ = ["ROWS"]

_BATCH = 1000
"""Buffers are emptied after so many, off the clock."""

Start: TypeAlias = Callable[[Effort], AbstractContextManager[Run]]
Ends: TypeAlias = tuple[Callable[[int], Any], Callable[[], Any]]
"""How to write to all readers, and how to empty their buffers."""


def _to_all(count: int, open_all: Callable[[ExitStack, int], Ends]) -> Start:
    """One write that `count` readers receive: the time for one reader, until it is in the buffer."""

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        size = effort.size(count)
        with ExitStack() as after:
            write, drain = open_all(after, size)

            def run(times: int) -> float:
                took = 0.0
                for first in range(0, times, _BATCH):
                    started = perf_counter()
                    for i in range(first, min(first + _BATCH, times)):
                        write(i)
                    took += perf_counter() - started
                    drain()
                return took / size

            yield run

    return start


def _our_watches(after: ExitStack, count: int) -> Ends:
    store = after.enter_context(MemoryStore())
    watches = [store.watch("key") for _ in range(count)]

    def drain() -> None:
        for watch in watches:
            while watch.get_nowait() is not None:
                pass

    return partial(store.set, "key"), drain


def _queues(make: Callable[[], Any], after: ExitStack, count: int) -> Ends:
    queues = [make() for _ in range(count)]

    def write(item: int) -> None:
        for each in queues:
            each.put(item)

    def drain() -> None:
        for each in queues:
            while not each.empty():
                each.get()

    return write, drain


def _fan_out(count: int, name: str, budget: Budget) -> Row:
    found = {
        "ours": Contender("ours", _to_all(count, _our_watches)),
        "SimpleQueue": Contender("floor", _to_all(count, partial(_queues, queue.SimpleQueue)), "a `put` into each"),
        "culsans": Contender(
            "queue",
            _to_all(count, partial(_queues, lambda: import_module("culsans").Queue().sync_q)),
            "a `put` into each",
        ),
    }
    if count == 1:
        found["without"] = OURS.contender("set", "floor")
    about = f"set with {count:,} watches on the key, all of which receive it: for each of them"
    return Row(name, about, found, base="without" if count == 1 else "SimpleQueue", budget=budget, longer=1 / count)


ROWS = (
    _fan_out(1, "fan-out to 1 watch", more(0.3e-6, "without", "0.3 us")),
    _fan_out(100, "fan-out to 100 watches", less_than(0.3e-6, "0.3 us")),
    _fan_out(10_000, "fan-out to 10,000 watches", less_than(0.3e-6, "0.3 us")),
)
