"""Rows: several threads at once. The time is that of the whole divided by what all of them did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Barrier, Event, Thread
from time import perf_counter

from benchmarks.floors import DICT
from benchmarks.measure import Effort, Run
from benchmarks.model import Contender, Row, Subject, looped
from benchmarks.ours import OURS
from benchmarks.peers import PEERS

__all__ = ["ROWS"]


def _at_once(runs: list[Run]) -> Run:
    """All of `runs`, each in a thread, each with its share of the times."""

    def run(times: int) -> float:
        share = max(1, times // len(runs))
        barrier = Barrier(len(runs))
        moments: list[float] = []

        def work(each: Run) -> None:
            barrier.wait()
            moments.append(perf_counter())
            each(share)
            moments.append(perf_counter())

        threads = [Thread(target=work, args=(each,), daemon=True) for each in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (max(moments) - min(moments)) * times / (share * len(runs))

    return run


@contextmanager
def _going_on(runs: list[Run]) -> Iterator[None]:
    """Each of `runs` in a thread of its own, over and over."""
    ended = Event()

    def work(each: Run) -> None:
        while not ended.is_set():
            each(100)

    threads = [Thread(target=work, args=(each,), daemon=True) for each in runs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _contender(subject: Subject, does: str, threads: int, beside: str, others: int) -> Contender:
    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        with ExitStack() as stack:
            names = stack.enter_context(subject.open())
            together = _at_once([stack.enter_context(looped(subject.does[does], names)) for _ in range(threads)])
            going_on = [stack.enter_context(looped(subject.does[beside], names)) for _ in range(others)]

            def run(times: int) -> float | list[float]:
                with _going_on(going_on):
                    return together(times)

            yield run

    return replace(subject.contender(does), start=start)


def _row(name: str, about: str, does: str, threads: int, beside: str = "", others: int = 0) -> Row:
    """`threads` threads that do one thing, while `others` do another, beside it.

    A thread has the GIL for 5 ms at a time, so samples must be longer than that.
    """
    able = [subject for subject in (OURS, DICT, *PEERS) if subject.title in _FOR_THREADS and does in subject.does]
    found = {subject.title: _contender(subject, does, threads, beside, others) for subject in able}
    return Row(name, about, found, base=DICT.title, longer=40, rounds=15)


_FOR_THREADS = {"ours", DICT.title, "cachetools", "blackboardx", "diskcache", "fakeredis"}
"""Those that any thread may use; blackboardx has no way to add to a number, and its loop cannot be shared to set."""

ROWS = (
    _row("update under 8 threads", "add one to the same number", "update", 8),
    _row("get by 1 thread", "reads of one key", "get", 1),
    _row("get by 2 threads", "reads of one key: half as much, where two cores can read at once", "get", 2),
    _row("get by 8 threads beside a writer", "reads of the key that one more thread sets", "get", 8, "set", 1),
    _row("set beside 8 readers", "sets of the key that eight more threads read", "set", 1, "get", 8),
)
