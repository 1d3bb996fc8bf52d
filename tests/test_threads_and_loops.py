"""One store object, any thread, any loop. More of it is in `stigmergy.testing`, for every store."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from typing import Any

import pytest

from processes import PATIENCE, eventually, timers
from stigmergy import MemoryStore
from stigmergy.testing.conformance.concurrency import in_threads


@pytest.fixture
def store() -> Any:
    with MemoryStore() as store:
        yield store


def test_a_write_in_a_thread_reaches_an_async_for_in_a_loop(store: MemoryStore) -> None:
    watch = store.watch("a", capacity=None)

    async def read() -> list[int]:
        values = []
        async for change in watch:
            values.append(change.value)
            if change.value == 1999:
                break
        return values

    def write() -> None:
        for number in range(2000):
            store.set("a", number)

    got: list[int] = []
    in_threads(lambda: got.extend(asyncio.run(read())), write)
    assert got == list(range(2000))


def test_a_write_in_a_loop_reaches_a_for_in_a_thread(store: MemoryStore) -> None:
    watch = store.watch("a", capacity=None)
    got: list[int] = []

    async def write() -> None:
        for number in range(2000):
            await store.aio.set("a", number)
        watch.close()

    in_threads(lambda: got.extend(change.value for change in watch), lambda: asyncio.run(write()))
    assert got == list(range(2000))


def test_two_loops_in_two_threads_talk_through_one_store(store: MemoryStore) -> None:
    async def play(mine: str, others: str, begins: bool) -> None:
        watch = await store.aio.watch(others, since=0)
        if begins:
            await store.aio.set(mine, 0)
        async for change in watch:
            await store.aio.set(mine, change.value + 1)
            if change.value >= 500:
                break

    in_threads(lambda: asyncio.run(play("ping", "pong", True)), lambda: asyncio.run(play("pong", "ping", False)))
    assert store.get("ping") > 499


def test_a_loop_closed_with_a_hundred_waiters_is_no_error_in_a_writer(store: MemoryStore) -> None:
    watch = store.watch("a")
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(watch.aget()) for _ in range(100)]
    loop.run_until_complete(asyncio.sleep(0))
    assert len(watch._subscription.waiters) == 100
    loop.close()

    for number in range(1000):
        store.set("a", number)

    assert not watch._subscription.waiters
    assert watch.get(timeout=0).value == 0
    for task in tasks:  # so that their end makes no noise
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        task.get_coro().close()
    del tasks, task
    gc.collect()


def test_a_wake_up_passes_over_readers_of_a_dead_loop(store: MemoryStore) -> None:
    watch = store.watch("a")
    loop = asyncio.new_event_loop()
    task = loop.create_task(watch.aget())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    parked = threading.Thread(target=watch.get)
    parked.start()
    while len(watch._subscription.waiters) < 2:
        pass

    store.set("a", 1)

    parked.join(timeout=PATIENCE)
    assert not parked.is_alive()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    task.get_coro().close()


def test_a_reader_whose_loop_stands_still_does_not_keep_others_waiting(store: MemoryStore) -> None:
    watch = store.watch("a")
    loop = asyncio.new_event_loop()
    task = loop.create_task(watch.aget())
    loop.run_until_complete(asyncio.sleep(0))
    parked = threading.Thread(target=watch.get)
    parked.start()
    while len(watch._subscription.waiters) < 2:
        pass

    store.set("a", 1)
    parked.join(timeout=PATIENCE)
    assert not parked.is_alive()
    store.set("a", 2)
    assert loop.run_until_complete(task).value == 2
    loop.close()


def test_a_reader_that_was_woken_is_not_woken_twice_while_another_one_waits(store: MemoryStore) -> None:
    watch = store.watch("a")
    source = watch._subscription
    readers = [threading.Thread(target=watch.get) for _ in range(2)]
    for reader in readers:
        reader.start()
    while len(source.waiters) < 2:
        pass
    first = source.waiters[0]

    assert first.wake()
    while not first._parked.locked():  # type: ignore[attr-defined]
        pass  # it runs on, and has taken its lock again

    assert not first.wake()
    store.set("a", 1)
    store.set("a", 2)
    for reader in readers:
        reader.join(timeout=PATIENCE)
        assert not reader.is_alive()


def test_a_task_that_waits_is_ended_by_asyncio_timeout(store: MemoryStore) -> None:
    async def main() -> None:
        for waiting in (store.aio.wait_for("a", lambda value: True), store.watch("a").aget()):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await waiting

    asyncio.run(main())


def test_the_program_ends_though_readers_and_timers_are_left() -> None:
    program = """
import threading
from stigmergy import MemoryStore
store = MemoryStore()
store.set("a", 1, ttl=3600)
threading.Thread(target=store.watch("b").get, daemon=True).start()
print("end")
"""
    end = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert (end.stdout, end.stderr) == ("end\n", "")


def test_a_store_that_nobody_holds_ends_its_timer() -> None:
    store = MemoryStore()
    calls = store._sweeper._calls
    store.set("a", 1, ttl=3600)
    eventually(lambda: timers(calls) == 1)

    del store
    gc.collect()

    eventually(lambda: timers(calls) == 0)


async def test_what_came_in_time_is_no_timeout_though_the_loop_had_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async with MemoryStore().aio as store:
        waiting = asyncio.create_task(store.wait_for("a", bool, timeout=3600))
        for _ in range(10):
            await asyncio.sleep(0)
        writer = threading.Thread(target=store.sync.set, args=("a", 1))
        writer.start()
        writer.join()
        loop = asyncio.get_running_loop()
        late = loop.time() + 7200
        monkeypatch.setattr(loop, "time", lambda: late)
        assert (await waiting).value == 1


def test_no_thread_is_started_before_the_first_ttl() -> None:
    with MemoryStore() as store:
        store.set("a", 1)
        store.watch("a")
        asyncio.run(store.aio.set("a", 2))

        assert not store._sweeper._started
        assert timers(store._sweeper._calls) == 0
