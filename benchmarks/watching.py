"""Rows: one write that many watches receive."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

from benchmarks.floors import BASELINE
from benchmarks.measure import FULL, Effort, Run, sample
from benchmarks.model import BASELINE_SET, Budget, Contender, Row, more_sets, sets, times
from benchmarks.ours import OURS
from stigmergy import MemoryStore

__all__ = ["ROWS", "fan_out_after"]

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


def _as_often(count: int, contender: Contender) -> Contender:
    """`contender`, `count` times for one: its samples then last as long as those of a write to `count` readers."""

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        size = effort.size(count)
        with contender.start(effort) as once:

            def run(times: int) -> float:
                took = once(times * size)
                assert isinstance(took, float)
                return took / size

            yield run

    return replace(contender, start=start)


# -- in processes of their own -----------------------------------------------------------------------------------------


def fan_out_after(fills: int, count: int) -> None:
    """Let a watch become full `fills` times, then take samples: how often is read from standard input, line by line."""
    with MemoryStore() as store, store.watch("key", capacity=1) as watch:
        for i in range(fills):
            store.set("key", i)
            watch.get_nowait()
    with _to_all(count, _our_watches)(FULL) as run:
        for line in sys.stdin:
            print(sample(run, int(line)), flush=True)


_AFTER = "from benchmarks.watching import fan_out_after; fan_out_after({}, {})"


def _after(fills: int, count: int) -> Start:
    """What a fill costs, it may cost its process for good: so the samples are taken in a process of their own."""

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        with subprocess.Popen(
            [sys.executable, "-c", _AFTER.format(effort.size(fills), effort.size(count))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            cwd=Path(__file__).parent.parent,
        ) as process:

            def run(times: int) -> float:
                assert process.stdout is not None
                print(times, file=process.stdin, flush=True)
                return float(process.stdout.readline())

            yield run

    return start


# -- rows --------------------------------------------------------------------------------------------------------------


def _fan_out(count: int, name: str, budget: Budget) -> Row:
    found = {
        "ours": Contender("ours", _to_all(count, _our_watches)),
        "SimpleQueue": Contender("floor", _to_all(count, partial(_queues, queue.SimpleQueue)), "a `put` into each"),
        "culsans": Contender(
            "queue",
            _to_all(count, partial(_queues, lambda: import_module("culsans").Queue().sync_q)),
            "a `put` into each",
        ),
        BASELINE_SET: _as_often(count, BASELINE[BASELINE_SET]),
    }
    if count == 1:
        found["without"] = OURS.contender("set", "floor")
    about = f"set with {count:,} watches on the key, all of which receive it: for each of them"
    return Row(name, about, found, base="without" if count == 1 else "SimpleQueue", budget=budget, longer=1 / count)


ROWS = (
    _fan_out(1, "fan-out to 1 watch", more_sets(0.9, "without")),
    _fan_out(100, "fan-out to 100 watches", sets(0.9)),
    _fan_out(10_000, "fan-out to 10,000 watches", sets(0.9)),
    Row(
        "fan-out after 10,000 fills",
        "fan-out to 100 watches, in a process in which a watch has become full that often, and in one without",
        {"ours": Contender("ours", _after(10_000, 100)), "before": Contender("floor", _after(0, 100))},
        base="before",
        budget=times(1.1, "before"),
        longer=1 / 100,
    ),
)
