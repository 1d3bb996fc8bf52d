"""Whatever interrupts, a commit is whole or not at all, and its watches hear of it."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from processes import eventually
from stigmergy import Compacted, MemoryStore, Set, WatchClosed, claim
from stigmergy._core.helpers import start_helper

POSIX = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")


@POSIX
@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["raise", "write", "collect"])
def test_interrupts_at_random_moments_lose_nothing(kind: str, count: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    script = Path(__file__).with_name("storm.py")

    storm = subprocess.run(
        [sys.executable, script, kind, str(count), str(seed)],
        capture_output=True,
        text=True,
        timeout=60 + count / 20,
        check=False,
    )

    assert storm.returncode == 0, storm.stderr[-3000:]
    assert int(storm.stdout.split()[0]) >= count


@POSIX
def test_ctrl_c_while_a_reader_is_parked_ends_the_wait_and_leaves_no_waiter() -> None:
    main = threading.get_ident()
    with MemoryStore() as store:
        watch = store.watch("a")

        struck: list[int] = []

        def handler(number: int, _: object) -> None:
            struck.append(number)
            if len(struck) == 1:
                raise KeyboardInterrupt

        def interrupt() -> None:
            eventually(lambda: watch._subscription.waiters)
            # One that comes just before the thread waits is handled when the next one comes.
            eventually(lambda: signal.pthread_kill(main, signal.SIGUSR1) or struck)

        before = signal.signal(signal.SIGUSR1, handler)
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                watch.get()
        finally:
            interrupter.join()
            signal.signal(signal.SIGUSR1, before)

        assert not watch._subscription.waiters
        store.set("a", 1)
        assert watch.get(timeout=0).value == 1


class Writes:
    """Writes when it is compared, hashed, copied, shown or let go of."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store

    def write(self) -> None:
        self.store.update("writes", lambda number: number + 1, default=0)

    def __eq__(self, other: object) -> bool:
        self.write()
        return self is other

    def __hash__(self) -> int:
        self.write()
        return 1

    def __repr__(self) -> str:
        self.write()
        return "Writes"

    def __deepcopy__(self, memo: Any) -> Writes:
        self.write()
        return Writes(self.store)

    def __del__(self) -> None:
        with suppress(Exception):  # the store may be closed by then
            self.write()


@pytest.mark.parametrize("isolated", [True, False])
def test_values_whose_methods_write_neither_deadlock_nor_disturb_the_order(isolated: bool) -> None:
    store = MemoryStore(history=8) if isolated else MemoryStore(history=8, copy=None)
    watch = store.watch(prefix="", capacity=None)
    small = store.watch("a", capacity=2)
    state = store.observe("a")
    for number in range(200):
        store.set("a", Writes(store))
        store.commit(Set("a", [Writes(store)]), Set("b", {number: Writes(store)}))
        store.get("a")
        store.delete("a")
        repr((small.get_nowait(), state.get_nowait()))
    gc.collect()
    last = store.set("end", 0)
    revisions = []
    while (change := watch.get_nowait()) is not None:
        revisions.append(change.revision)
        if change.key == "end":
            break

    assert revisions == list(range(1, last + 1))
    store.close()


def test_what_a_write_replaces_is_let_go_of_outside_the_lock() -> None:
    store = MemoryStore(history=0, copy=None)
    seen: list[bool] = []

    class Value:
        def __del__(self) -> None:
            def other_thread() -> None:
                seen.append(store._lock.acquire(timeout=30))
                store._lock.release()

            thread = threading.Thread(target=other_thread)
            thread.start()
            thread.join()

    store.set("a", Value())
    store.set("a", 1)
    store.set("a", Value())
    store.delete("a")
    store.set("a", Value(), ttl=3600)
    store.commit(Set("a", 1))
    watch = store.watch("b", capacity=1)
    store.set("b", Value())
    store.set("b", 1)
    store.set("b", Value())
    store.close()
    watch.get_nowait()

    assert seen == [True] * 5


def test_the_ring_lets_go_outside_the_lock() -> None:
    store = MemoryStore(history=2, copy=None)
    seen: list[bool] = []

    class Value:
        def __del__(self) -> None:
            thread = threading.Thread(
                target=lambda: seen.append(store._lock.acquire(timeout=30) and not store._lock.release())
            )
            thread.start()
            thread.join()

    for _ in range(6):
        store.set("a", Value())

    assert seen == [True] * 3
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.slow
def test_two_hundred_forks_under_load_never_show_half_a_commit_to_a_child() -> None:
    store = MemoryStore()
    watch = store.watch(prefix="")
    stop = threading.Event()

    def load() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            store.commit(Set("a", number), Set("b", number), Set("c", [number]))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            child = os.fork()
            if child == 0:
                os._exit(child_is_well(store, watch))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert store.set("a", 0) > 0
    store.close()


def child_is_well(store: MemoryStore, watch: Any) -> int:
    try:
        entries = store.scan()
        values = {entry.value if isinstance(entry.value, int) else entry.value[0] for entry in entries.values()}
        revisions = sorted(entry.revision for entry in entries.values())
        assert len(values) <= 1
        assert not revisions or revisions == list(range(revisions[0], revisions[0] + 3))
        while True:  # the parent's watch delivers what it had, and ends
            try:
                watch.get(timeout=60)
            except WatchClosed:
                break
        mine = store.watch("mine", "short")
        assert store.set("mine", 1) == entries.revision + 1
        assert mine.get(timeout=60).value == 1
        store.set("short", 1, ttl=0.01)
        assert mine.get(timeout=60).value == 1
        assert mine.get(timeout=60).expired
        return 0
    except BaseException as error:
        os.write(2, repr(error).encode())
        return 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_bookmark_from_before_a_fork_is_of_another_life_in_the_child() -> None:
    with MemoryStore() as store:
        store.set("a", 1)
        bookmark = store.scan().bookmark
        child = os.fork()
        if child == 0:
            try:
                store.watch("a", since=bookmark)
            except Compacted:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.watch("a", since=bookmark).get_nowait() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_deadlines_of_the_parent_come_due_in_a_child_that_watches() -> None:
    now = [0.0]
    store = MemoryStore(clock=lambda: now[0])
    store.set("short", 1, ttl=0.2)
    child = os.fork()
    if child == 0:
        try:
            watch = store.watch("short")
            now[0] = 1.0
            os._exit(0 if watch.get(timeout=60).expired else 1)
        finally:
            os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.close()


# -- signals that a program waits for ----------------------------------------------------------------------------------

HELPERS = {
    "timer": """
store = MemoryStore()
store.set("a", 1, ttl=3600)
""",
    "keeper of a claim": """
held = claim(MemoryStore(), "task", "planner", 3600)
held.__enter__()
""",
    "worker of an async interface": """
store = Blocking()
asyncio.run(store.aio.get("a"))
""",
}
WAITS_BY_SIGWAIT = """
import asyncio, os, signal, sys, time
from stigmergy import MemoryStore, claim

class Blocking(MemoryStore):
    blocking = True
{start}
while len(sys._current_frames()) < 2:
    time.sleep(0.001)  # until the helper thread runs
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
for _ in range(20):
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.sigwait({{signal.SIGTERM}}) == signal.SIGTERM
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals of POSIX")
@pytest.mark.parametrize("helper", HELPERS)
def test_a_signal_that_the_program_waits_for_by_sigwait_is_not_taken_by_a_helper_thread(helper: str) -> None:
    program = WAITS_BY_SIGWAIT.format(start=HELPERS[helper])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals of POSIX")
def test_starting_a_helper_thread_leaves_the_signals_of_the_starting_one_as_they_were() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        with MemoryStore() as store, claim(store, "task", "planner", 3600):
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR2}
        with pytest.raises(RuntimeError, match="no more"):
            start_helper(refuse)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def refuse() -> None:
    raise RuntimeError("no more threads")
