"""Concurrency: plain threads on the sync face, and event loops in threads on the async one, all at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from stigmergy.errors import Compacted, RevisionConflict, StoreClosed, WatchClosed
from stigmergy.model import Set, Snapshot
from stigmergy.store import Store
from stigmergy.testing.clock import HANG_TIMEOUT
from stigmergy.testing.report import Figures
from stigmergy.watch import Watch

__all__ = ["Concurrency", "in_threads"]

THREADS = 8


class Concurrency:
    """G3, G4, G5, G16, G19 and G22 of the guarantees, under threads."""

    rounds: ClassVar[int] = 100
    """How often each thread does what it does; up to ten times as often where it writes while others look."""

    def test_concurrent_updates_add_up_exactly(self, sync_store: Store, figures: Figures) -> None:
        each = self.rounds

        def add() -> None:
            for _ in range(each):
                sync_store.update("n", lambda value: value + 1, default=0)

        async def aadd() -> None:
            for _ in range(each):
                await sync_store.aio.update("n", lambda value: value + 1, default=0)

        in_threads(*[add] * (THREADS // 2), *[lambda: asyncio.run(aadd())] * (THREADS // 2))

        assert sync_store.get("n") == THREADS * each
        assert sync_store.scan().revision == THREADS * each
        figures.note("concurrent updates that added up", THREADS * each)

    def test_of_racing_creates_exactly_one_wins(self, sync_store: Store, figures: Figures) -> None:
        wins: list[int] = []

        def create() -> None:
            for number in range(self.rounds):
                try:
                    sync_store.set(f"task:{number}", "mine", if_revision=0)
                except RevisionConflict:
                    continue
                wins.append(number)

        in_threads(*[create] * THREADS)

        assert sorted(wins) == list(range(self.rounds))
        figures.note("races to create with exactly one winner", self.rounds)

    def test_of_racing_deletes_exactly_one_returns_true(self, sync_store: Store, figures: Figures) -> None:
        for number in range(self.rounds):
            sync_store.set(f"k{number}", 1)
        wins: list[int] = []

        def delete() -> None:
            wins.extend(number for number in range(self.rounds) if sync_store.delete(f"k{number}"))

        in_threads(*[delete] * THREADS)

        assert sorted(wins) == list(range(self.rounds))
        assert sync_store.scan().revision == 2 * self.rounds
        figures.note("races to delete with exactly one winner", self.rounds)

    def test_racing_writes_take_every_revision_once(self, sync_store: Store) -> None:
        each = self.rounds // 2
        taken: list[int] = []
        watch = sync_store.watch(prefix="", capacity=None)

        def write(name: int) -> Callable[[], None]:
            def writes() -> None:
                mine = [sync_store.set(f"k{name}", number) for number in range(each)]
                assert mine == sorted(mine)
                taken.extend(mine)

            return writes

        in_threads(*[write(name) for name in range(THREADS)])

        assert sorted(taken) == list(range(1, each * THREADS + 1))
        assert [watch.get(HANG_TIMEOUT).revision for _ in taken] == sorted(taken)

    def test_nobody_sees_half_a_commit(self, sync_store: Store, figures: Figures) -> None:
        sync_store.commit(Set("a", 0), Set("b", 0))
        last = 10 * self.rounds - 1
        following, done = threading.Event(), threading.Event()
        looks: list[int] = []

        def write() -> None:
            assert following.wait(HANG_TIMEOUT)
            try:
                for number in range(1, last + 1):
                    sync_store.commit(Set("a", number), Set("b", number))
            finally:
                done.set()

        def read() -> None:
            count = 0
            while not done.is_set() or not count:
                first = sync_store.get("a")
                assert sync_store.get("b") >= first
                snapshot = sync_store.scan()
                assert snapshot["a"].value == snapshot["b"].value
                assert snapshot.revision == snapshot["b"].revision == snapshot["a"].revision + 1
                count += 1
            looks.append(count)

        def follow() -> None:
            with sync_store.watch("a", capacity=None) as watch:
                following.set()
                while (change := watch.get(HANG_TIMEOUT)).value < last:
                    assert sync_store.get("b") >= change.value

        in_threads(write, read, read, follow)
        figures.note("looks at commits under way, none half", sum(looks))

    def test_every_watch_opened_while_others_write_has_neither_gap_nor_repeat(
        self, sync_store: Store, figures: Figures
    ) -> None:
        ended: list[str] = []
        opened: list[int] = []

        def write(key: str) -> Callable[[], None]:
            def writes() -> None:
                try:
                    for number in range(500):  # with fewer, a change lost while a watch is opened stays hidden
                        sync_store.set(key, number)
                finally:
                    ended.append(key)

            return writes

        def check() -> None:
            count = 0
            while (writing := len(ended) < 2) or not count:
                try:
                    watch, snapshot = _opened(sync_store)
                except Compacted:  # the store may forget a snapshot behind which much was written
                    if writing:
                        continue
                    raise
                with watch:
                    _follow(sync_store, watch, snapshot)
                count += 1
            opened.append(count)

        in_threads(write("a"), write("b"), check, check)
        figures.note("watches opened while others wrote, without gap or repeat", sum(opened))

    def test_whoever_waits_wakes_when_the_store_is_closed(self, sync_store: Store) -> None:
        sync_store.set("b", 0)
        watch = sync_store.watch("a")
        ended: list[str] = []
        waiting = threading.Semaphore(0)

        def look(value: int) -> bool:
            waiting.release()
            return False

        def wait_in_thread() -> None:
            waiting.release()
            with pytest.raises(WatchClosed):
                watch.get()
            ended.append("get")

        def wait_for_in_thread() -> None:
            with pytest.raises(StoreClosed):
                sync_store.wait_for("b", look)
            ended.append("wait_for")

        async def read() -> None:
            assert [change async for change in watch] == []

        async def wait_in_loop() -> None:
            reader = asyncio.create_task(read())
            await asyncio.sleep(0)  # in which the task comes to where it waits
            waiting.release()
            await reader
            ended.append("async for")

        async def wait_for_in_loop() -> None:
            with pytest.raises(StoreClosed):
                await sync_store.aio.wait_for("b", look)
            ended.append("await wait_for")

        def close() -> None:
            assert all(waiting.acquire(timeout=HANG_TIMEOUT) for _ in range(4))
            for number in range(1, 4):  # each takes a round trip: time for the readers to park
                sync_store.set("b", number)
                assert all(waiting.acquire(timeout=HANG_TIMEOUT) for _ in range(2))
            sync_store.close()

        loops = [lambda: asyncio.run(wait_in_loop()), lambda: asyncio.run(wait_for_in_loop())]
        in_threads(wait_in_thread, wait_for_in_thread, *loops, close)

        assert sorted(ended) == ["async for", "await wait_for", "get", "wait_for"]

    def test_loops_may_come_and_go(self, sync_store: Store) -> None:
        watch = sync_store.watch("a")

        async def write_and_read(number: int) -> Any:
            reader = asyncio.create_task(watch.aget())
            await asyncio.sleep(0)
            await sync_store.aio.set("a", number)
            return (await reader).value

        assert [asyncio.run(write_and_read(number)) for number in range(3)] == [0, 1, 2]

    def test_a_task_that_calls_again_and_again_ends_when_it_is_cancelled(self, sync_store: Store) -> None:
        store = sync_store.aio

        async def call_without_end() -> None:
            while True:
                await store.set("a", 1)
                await store.get("a")
                await asyncio.sleep(0)

        async def cancelled_after(steps: int) -> bool:
            task = asyncio.create_task(call_without_end())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=HANG_TIMEOUT)
            return task.cancelled()

        async def main() -> None:
            for steps in range(1, 60):
                assert await cancelled_after(steps), "a cancellation was lost"

        asyncio.run(main())

    def test_threads_and_loops_talk_through_one_store(self, sync_store: Store) -> None:
        rounds = 50

        def play() -> None:
            with sync_store.observe("pong") as watch:
                sync_store.set("ping", 0)
                for change in watch:
                    if change.value >= rounds:
                        break
                    sync_store.set("ping", change.value + 1)

        async def answer() -> None:
            async with sync_store.aio.observe("ping") as watch:
                async for change in watch:
                    await sync_store.aio.set("pong", change.value + 1)
                    if change.value + 1 >= rounds:
                        break

        in_threads(play, lambda: asyncio.run(answer()))
        assert sync_store.get("pong") >= rounds


def in_threads(*functions: Callable[[], object]) -> None:
    """Run them all at once; what goes wrong in one goes wrong here."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> None:
        try:
            start.wait()
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=[function], daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10 * HANG_TIMEOUT  # a slow store may take long for all of it
    for thread in threads:
        while thread.is_alive() and not failures and time.monotonic() < deadline:
            thread.join(timeout=0.1)
    if failures:
        for thread in threads:
            thread.join(timeout=1)
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def _opened(store: Store) -> tuple[Watch, Snapshot]:
    """A watch that goes on from a snapshot, or is a little older."""
    if "resumable" in store.capabilities:
        snapshot = store.scan()
        return store.watch(prefix="", since=snapshot.bookmark, capacity=None), snapshot
    return store.watch(prefix="", capacity=None), store.scan()


def _follow(store: Store, watch: Watch, snapshot: Snapshot) -> None:
    """Take what `watch` delivers behind `snapshot`: the very changes that come next."""
    state = {key: entry.value for key, entry in snapshot.items()}
    expected = snapshot.revision
    while expected < min(store.scan().revision, snapshot.revision + 50):
        change = watch.get(HANG_TIMEOUT)
        if change.revision > snapshot.revision:
            expected += 1
            assert change.revision == expected
            assert state.get(change.key) == change.old_value
            state[change.key] = change.value
