"""Strikes a writing loop: run by test_interrupts.py in a process of its own.

    python storm.py raise|write|collect COUNT SEED

`raise`: timer signals whose handler raises KeyboardInterrupt, wherever inside the library they strike. `write`: timer
signals whose handler uses the store. `collect`: finalisers, run by the garbage collector, that use the store.

Afterwards an unbounded watch must have every revision from 1 to the last, in order, a reader parked in another thread
must have got them all, and an observer must have converged.
"""

from __future__ import annotations

import faulthandler
import gc
import random
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import stigmergy
from stigmergy import Delete, MemoryStore, Op, RevisionConflict, Set, Watch

LIBRARY = str(Path(stigmergy.__file__).parent)
store = MemoryStore(history=64)
every = store.watch(prefix="", capacity=None)
parked = store.watch(prefix="", capacity=None)
small = store.watch(prefix="k", capacity=4)
state = store.observe(prefix="")
strikes = depth = 0
sys.unraisablehook = lambda _: None  # a KeyboardInterrupt inside a finaliser


def use(number: int) -> None:
    """What the loop does, and those who strike it."""
    key = f"k{number % 7}"
    match number % 9:
        case 0:
            store.commit(Set(key, [number]), Set("x", number), Delete("y"))
        case 1:
            store.delete(key)
        case 2:
            store.set(key, number, ttl=1000)
        case 3:
            store.update("n", lambda value: value + 1, default=0)
        case 4:
            with suppress(RevisionConflict):
                store.set(key, number, if_revision=number)
        case 5:
            small.get_nowait()
        case 6:
            store.get(key)
            store.scan("k", limit=3)
        case 7:
            with store.watch(key) as watch:
                store.set(key, number)
                watch.get_nowait()
        case _:
            store.set(key, number)


def again() -> None:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0003))


def raise_inside(signum: int, frame: FrameType | None) -> None:
    global strikes
    again()
    if frame is not None and frame.f_code.co_filename.startswith(LIBRARY):
        strikes += 1
        raise KeyboardInterrupt


def write_anywhere(signum: int, frame: FrameType | None) -> None:
    global depth, strikes
    strikes += 1
    depth += 1
    if depth < 3:  # a handler may be struck as well, but not for ever
        again()
    use(strikes)
    depth -= 1
    again()


class Finalised:
    created = 0
    ended: ClassVar[list[None]] = []

    def __init__(self) -> None:
        self.myself = self
        Finalised.created += 1

    def __del__(self) -> None:
        global strikes
        strikes += 1
        use(strikes)
        self.ended.append(None)


def with_timer(handler: Callable[[int, FrameType | None], None], count: int) -> None:
    signal.signal(signal.SIGALRM, handler)
    again()
    number = 0
    while strikes < count:
        number += 1
        with suppress(KeyboardInterrupt):
            use(number)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def with_collector(count: int) -> None:
    gc.set_threshold(20, 2, 2)
    number = 0
    while strikes < count:
        number += 1
        Finalised()
        use(number)
    gc.set_threshold(700, 10, 10)
    while len(Finalised.ended) < Finalised.created:  # in whatever thread: nobody may write while the watches are judged
        gc.collect()


def drained(watch: Watch) -> list[Any]:
    return list(iter(watch.get_nowait, None))


def main(kind: str, count: int) -> None:
    faulthandler.dump_traceback_later(40 + count / 20, exit=True)
    got: list[int] = []
    reader = threading.Thread(target=lambda: got.extend(change.revision for change in parked), daemon=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # the reader inherits it: signals strike the writer only
    reader.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    if kind == "collect":
        with_collector(count)
    else:
        with_timer(raise_inside if kind == "raise" else write_anywhere, count)
    last = store.set("end", 0)
    model: dict[str, Any] = {}
    for change in drained(state):
        model.pop(change.key, None)
        if change.op is Op.SET:
            model[change.key] = change.value
    changes = drained(every)
    revisions = [change.revision for change in changes]
    assert revisions == list(range(1, last + 1)), f"gap, repeat or disorder: {len(revisions)} of {last}"
    replayed: dict[str, tuple[Any, int]] = {}
    for change in changes:
        assert replayed.pop(change.key, (None, 0)) == (change.old_value, change.old_revision), "untrue old_value"
        if change.op is Op.SET:
            replayed[change.key] = change.value, change.revision
    present = {key: (entry.value, entry.revision) for key, entry in store.scan().items()}
    assert replayed == present, "the dict and the watch disagree"
    assert model == {key: value for key, (value, _) in present.items()}, "observe did not converge"
    assert small.dropped >= sum(change.missed for change in drained(small)), "dropped without being counted"
    store.close()
    reader.join()
    assert got == list(range(1, last + 1)), "the parked reader lost something"
    print(f"{strikes} strikes, {last} revisions")


random.seed(int(sys.argv[3]))
main(sys.argv[1], int(sys.argv[2]))
