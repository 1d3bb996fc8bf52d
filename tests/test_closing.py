"""Closing, while others read and write; and loops that come, go, and are closed."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from random import Random
from typing import Any

import pytest

from stigmergy import (
    Change,
    Commit,
    Flow,
    Hooks,
    MemoryStore,
    OpenWatch,
    Operation,
    Store,
    StoreClosed,
    Watch,
    WatchClosed,
    apply_middleware,
    with_hooks,
)

LONG = 100.0
"""Seconds after which something hangs."""


class Blocking(MemoryStore):
    """Says of itself that it blocks: its async face makes its calls in threads."""

    blocking = True


class Party:
    """Threads that start at once. `join` says how each ended: with what it returned, or with what it raised."""

    def __init__(self, **members: Callable[[], Any]) -> None:
        self.outcomes: dict[str, Any] = {}
        self._start = threading.Barrier(len(members))
        self._threads = {
            name: threading.Thread(target=self._run, args=[name, member], daemon=True)
            for name, member in members.items()
        }
        for thread in self._threads.values():
            thread.start()

    def _run(self, name: str, member: Callable[[], Any]) -> None:
        try:
            self._start.wait()
            self.outcomes[name] = member()
        except BaseException as error:
            self.outcomes[name] = type(error)

    def join(self) -> dict[str, Any]:
        deadline = time.monotonic() + LONG
        for name, thread in self._threads.items():
            thread.join(max(deadline - time.monotonic(), 0))
            assert not thread.is_alive(), f"{name} still waits"
        return self.outcomes


def drain(watch: Watch) -> list[Change]:
    return list(iter(watch.get_nowait, None))


# -- close under traffic -----------------------------------------------------------------------------------------------


class Traffic:
    """Writers and readers in threads and in a loop, on one store that is closed at its `moment`-th write."""

    def __init__(self, way: str, moment: int) -> None:
        # A finaliser runs where nobody holds the value any more: not the ring either.
        self.memory = MemoryStore(copy=None, history=0) if way == "finaliser" else MemoryStore()
        self.store: Store = apply_middleware(self.memory, WRAPPERS.get(way, watched)(self))
        self.way = way
        self.moment = moment
        self.writes = 0
        self.reached = threading.Event()
        self.everything = self.memory.watch(prefix="", capacity=None)
        self.shared = self.memory.watch("a", capacity=None)
        self.latest = self.memory.observe(prefix="")
        self.acknowledged: list[int] = []
        self.got: list[int] = []

    def is_time(self) -> bool:
        self.writes += 1  # not exact, with two writers
        if self.writes < self.moment or self.reached.is_set():
            return False
        self.reached.set()
        return True

    def run(self) -> dict[str, Any]:
        party = Party(
            writer=lambda: self.write("a"),
            another_writer=lambda: self.write("b"),
            all_changes=self.read_all,
            getter=self.get,
            waiter=lambda: self.store.wait_for("a", lambda value: value is None),
            looping=lambda: asyncio.run(self.loop()),
            closer=self.close_in_time,
        )
        return party.join()

    def write(self, key: str) -> None:
        number = 0
        while True:
            number += 1
            value = LastWords(self) if self.way == "finaliser" and self.is_time() else number
            self.acknowledged.append(self.store.set(key, value))
            del value

    def read_all(self) -> list[int]:
        return [change.revision for change in self.everything]

    def get(self) -> None:
        while True:
            self.got.append(self.shared.get().revision)

    async def loop(self) -> list[Any]:
        async def follow(watch: Watch) -> str:
            async for change in watch:
                if watch is self.shared:
                    self.got.append(change.revision)
            return "ended"

        async def get() -> None:
            while True:
                self.got.append((await self.shared.aget()).revision)

        async def close() -> str:
            while not self.reached.is_set():  # noqa: ASYNC110, another thread sets it
                await asyncio.sleep(0)
            if self.way == "task":
                await self.store.aio.close()
            return "ended"

        outcomes = await asyncio.gather(
            follow(self.shared),
            follow(self.latest),
            get(),
            self.store.aio.wait_for("b", lambda value: value is None),
            close(),
            return_exceptions=True,
        )
        return [each if isinstance(each, str) else type(each) for each in outcomes]

    def close_in_time(self) -> None:
        assert self.reached.wait(LONG)
        if self.way == "thread":
            self.store.close()


class LastWords:
    """A value that closes the store when nothing refers to it any more."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def __del__(self) -> None:
        self.traffic.store.close()


def watched(traffic: Traffic) -> Any:
    """Tells those who close when it is time."""

    def count_writes(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit) and traffic.way != "finaliser":
            traffic.is_time()
        return (yield operation)

    return count_writes


def closing_hook(traffic: Traffic) -> Any:
    def close_in_time(key: str, value: object) -> None:
        if traffic.is_time():
            traffic.store.close()

    return with_hooks(Hooks(before_set=close_in_time))


def closing_middleware(traffic: Traffic) -> Any:
    def close_in_time(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        if isinstance(operation, Commit) and traffic.is_time():
            traffic.store.close()
        return result

    return close_in_time


WRAPPERS = {"hook": closing_hook, "middleware": closing_middleware}


@pytest.mark.parametrize("way", ["thread", "task", "hook", "middleware", "finaliser"])
@pytest.mark.parametrize(
    "runs", [10, pytest.param(40, marks=pytest.mark.slow), pytest.param(4000, marks=pytest.mark.large)]
)
def test_a_store_closed_at_any_moment_ends_everybody_and_delivers_what_it_has(way: str, runs: int, seed: str) -> None:
    draw = Random(seed)
    for _ in range(runs):
        traffic = Traffic(way, moment=draw.randint(1, 300))
        outcomes = traffic.run()

        delivered = outcomes.pop("all_changes")
        assert outcomes == {
            "writer": StoreClosed,
            "another_writer": StoreClosed,
            "getter": WatchClosed,
            "waiter": StoreClosed,
            "looping": ["ended", "ended", WatchClosed, StoreClosed, "ended"],
            "closer": None,
        }
        assert delivered == list(range(1, len(delivered) + 1))
        assert set(traffic.acknowledged) <= set(delivered)
        assert (
            len(delivered) - len(traffic.acknowledged) <= 2
        )  # a write that happened, and then was told that it is over
        shared = traffic.got
        assert len(shared) == len(set(shared))
        assert set(shared) <= set(delivered)
        assert not traffic.shared._subscription.waiters
        for _ in range(2):
            traffic.store.close()
        with pytest.raises(StoreClosed):
            traffic.memory.get("a")


def test_many_may_close_at_once(seed: str) -> None:
    for _ in range(50):
        store = MemoryStore()
        watch = store.watch("a")
        store.set("a", 1)

        async def close_from_tasks(store: MemoryStore = store) -> None:
            await asyncio.gather(*[store.aio.close() for _ in range(3)])

        party = Party(
            one=store.close,
            another=store.close,
            tasks=lambda close=close_from_tasks: asyncio.run(close()),  # type: ignore[misc]
            watch=watch.close,
            reader=lambda watch=watch: [change.value for change in watch],  # type: ignore[misc]
        )

        assert party.join() == {"one": None, "another": None, "tasks": None, "watch": None, "reader": [1]}


def test_a_watch_that_is_closed_by_its_own_reader_ends() -> None:
    store = MemoryStore()
    watch = store.watch("a").map(lambda change: change if change.value < 3 else (watch.close(), change)[1])
    for number in range(1, 5):
        store.set("a", number)

    assert [change.value for change in watch] == [1, 2, 3, 4]
    store.set("a", 5)
    with pytest.raises(WatchClosed):
        watch.get_nowait()
    store.close()


def test_a_store_closed_by_the_collector_ends_its_readers() -> None:
    store = MemoryStore()
    watch = store.watch("a")

    class Owner:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            store.close()

    async def main() -> None:
        reader = asyncio.create_task(watch.aget())
        await asyncio.sleep(0)
        Owner()
        gc.collect()
        async with asyncio.timeout(LONG):
            with pytest.raises(WatchClosed):
                await reader

    party = Party(thread=watch.get, loop=lambda: asyncio.run(main()))

    assert party.join() == {"thread": WatchClosed, "loop": None}


# -- the end of the interpreter ----------------------------------------------------------------------------------------

READERS = """
import asyncio, atexit, threading
from contextlib import suppress
from stigmergy import MemoryStore, StateError

store = MemoryStore()
watch = store.watch("a", capacity=None)
store.set("t", 1, ttl=3600)
parked = threading.Barrier(4)

def in_thread(wait):
    parked.wait()
    with suppress(StateError):
        wait()

async def in_tasks():
    waiting = [watch.aget(), store.aio.wait_for("b", bool), store.aio.wait_for("b", bool, timeout=3600)]
    tasks = [asyncio.ensure_future(each) for each in waiting]
    await asyncio.sleep(0)
    parked.wait()
    await asyncio.gather(*tasks, return_exceptions=True)

threading.Thread(target=in_thread, args=[watch.get], daemon=True).start()
threading.Thread(target=in_thread, args=[lambda: store.wait_for("b", bool, timeout=3600)], daemon=True).start()
threading.Thread(target=asyncio.run, args=[in_tasks()], daemon=True).start()
"""
PARKED = 'parked.wait(); print("end", flush=True)'
ENDINGS = {
    "readers that wait": PARKED,
    "a close at exit": f"atexit.register(store.close); {PARKED}",
    "a write and a close at exit": f"""
atexit.register(store.close)
atexit.register(store.set, "a", 1, ttl=1)
{PARKED}
""",
    "a close, and a reader that is no daemon": f"""
threading.Thread(target=list, args=[watch]).start()
store.close()
{PARKED}
""",
    "a main task that leaves readers": f"""
async def main():
    for _ in range(100):
        asyncio.ensure_future(watch.aget())
    await asyncio.sleep(0)
    {PARKED}
asyncio.run(main())
""",
    "a finaliser that closes": f"""
class Owner:
    def __init__(self):
        self.store = store
    def __del__(self):
        self.store.close()
owner = Owner()
{PARKED}
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_soon(ending: str) -> None:
    if ending == "a finaliser that closes" and sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("this interpreter takes modules apart before the last finalisers run")
    end = subprocess.run(  # those who wait would do so for an hour
        [sys.executable, "-c", READERS + ENDINGS[ending]], capture_output=True, text=True, timeout=LONG, check=False
    )
    assert (end.returncode, end.stdout, end.stderr) == (0, "end\n", "")


# -- loops -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def noise(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What asyncio says aloud."""
    said: list[str] = []
    with caplog.at_level(logging.DEBUG, logger="asyncio"):
        yield said
        gc.collect()
        said += [record.getMessage() for record in caplog.records if record.name == "asyncio"]
        assert [message for message in said if "Using selector" not in message] == []


def silently_forget(*tasks: asyncio.Task[Any]) -> None:
    """What asyncio says about tasks of a loop that was closed under them is for those who closed it."""
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        task.get_coro().close()  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["one watch", "a watch each", "observe", "wait_for"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["before the wake-up", "after the wake-up"])
def test_a_loop_closed_with_a_hundred_waiters_harms_no_other_loop(way: str, scheduled: bool, noise: list[str]) -> None:
    store = MemoryStore()
    shared = store.watch("a")
    watches = [shared] + [store.watch("a") for _ in range(100)]

    def wait(number: int) -> Coroutine[Any, Any, Any]:
        if way == "wait_for":
            return store.aio.wait_for("a", lambda value: False)
        if way == "observe":
            watches.append(store.observe("a"))
            return watches[-1].aget()
        return (watches[number + 1] if way == "a watch each" else shared).aget()

    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(wait(number)) for number in range(100)]
    loop.run_until_complete(asyncio.sleep(0))
    if scheduled:
        Party(writer=lambda: [store.set("a", number) for number in range(3)]).join()
    loop.close()

    async def write() -> int:
        reader = asyncio.create_task(shared.aget())
        await asyncio.sleep(0)
        await store.aio.set("a", 0)
        assert not any(watch._subscription.waiters for watch in watches)  # one write is enough
        for number in range(1, 1000):
            await store.aio.set("a", number)
        return (await reader).value

    async def read(watch: Watch) -> int:
        return (await watch.aget()).value

    assert asyncio.run(write()) == 0
    assert [asyncio.run(read(watch)) for watch in watches[:3]] == [1, 0, 0]
    silently_forget(*tasks)
    store.close()


@pytest.mark.parametrize("make", [MemoryStore, Blocking])
def test_a_loop_that_ends_with_a_hundred_waiters_leaves_nothing_behind(
    make: Callable[[], MemoryStore], noise: list[str]
) -> None:
    store = make()
    tasks: list[asyncio.Task[Any]] = []

    async def open_watch() -> Watch:
        return await store.aio.watch("a")

    watch = asyncio.run(open_watch())

    async def leave_readers() -> None:
        tasks.extend(asyncio.create_task(watch.aget()) for _ in range(100))
        await asyncio.sleep(0)
        assert len(watch._subscription.waiters) == 100

    async def write() -> int:
        reader = asyncio.create_task(watch.aget())
        for number in range(1000):
            await store.aio.set("a", number)
        return (await reader).value

    for _ in range(2):
        asyncio.run(leave_readers())
        assert not watch._subscription.waiters
        assert asyncio.run(write()) == 0
        drain(watch)
    assert all(task.cancelled() for task in tasks)
    store.close()


def over_two_runs(store: Store) -> None:
    """One `asyncio.run` leaves a watch, a reader and a `wait_for` behind; the next one goes on with the same store."""
    face, watches = store.aio, []

    async def first() -> None:
        watches.append(await face.watch("a"))
        await face.set("a", 1)
        assert (await watches[0].aget()).value == 1
        for waiting in (watches[0].aget(), face.wait_for("b", bool)):
            asyncio.ensure_future(waiting)  # noqa: RUF006, the end of the run cancels them
        await asyncio.sleep(0)

    async def second() -> None:
        waiting = asyncio.create_task(face.wait_for("b", bool))
        await face.set("a", 2)
        await face.set("b", 2)
        assert (await watches[0].aget()).value == 2
        assert (await waiting).value == 2
        await face.close()
        with pytest.raises(WatchClosed):
            await watches[0].aget()

    asyncio.run(first())
    asyncio.run(second())


@pytest.mark.parametrize("make", [MemoryStore, Blocking])
def test_a_store_outlives_the_loops_that_it_is_used_in(make: Callable[[], MemoryStore], noise: list[str]) -> None:
    over_two_runs(make())


@pytest.mark.parametrize("make", [MemoryStore, Blocking])
def test_a_loop_need_not_be_in_the_main_thread(make: Callable[[], MemoryStore], noise: list[str]) -> None:
    assert Party(loop=lambda: over_two_runs(make())).join() == {"loop": None}


def test_a_store_and_its_watches_may_be_made_before_there_is_any_loop() -> None:
    program = """
import sys
from stigmergy import MemoryStore
store = MemoryStore()
watch, latest = store.watch("a"), store.observe("a")
store.set("a", 1)
assert "asyncio" not in sys.modules
import asyncio
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    assert (await watch.aget()).value == (await latest.aget()).value == 1
    waiting = asyncio.create_task(watch.aget())
    await asyncio.sleep(0)
    await store.aio.set("a", 2)
    assert (await waiting).value == 2
    await store.aio.close()
asyncio.run(main())
"""
    end = subprocess.run([sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=LONG)
    assert (end.returncode, end.stderr) == (0, "")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks before Python 3.12")
@pytest.mark.parametrize("make", [MemoryStore, Blocking])
def test_eager_tasks_read_write_and_end(make: Callable[[], MemoryStore], noise: list[str]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        async with make().aio as store:
            watch = await store.watch("a")
            one, another = asyncio.create_task(watch.aget()), asyncio.create_task(watch.aget())
            waiting = asyncio.create_task(store.wait_for("a", lambda value: value == 2))
            await store.set("a", 1)
            await asyncio.create_task(store.set("a", 2))
            async with asyncio.timeout(LONG):
                assert {(await one).value, (await another).value} == {1, 2}
                assert (await waiting).value == 2
            last = asyncio.create_task(watch.aget())
        with pytest.raises(WatchClosed):
            await last

    asyncio.run(main())


def test_a_watch_request_may_be_performed_in_a_loop_and_read_in_a_thread() -> None:
    with MemoryStore() as store:

        async def open_watch() -> Watch:
            return await store.aio.open_watch(OpenWatch(["a"]))

        watch = asyncio.run(open_watch())
        party = Party(reader=lambda: watch.get().value, writer=lambda: asyncio.run(store.aio.set("a", 1)))

        assert party.join() == {"reader": 1, "writer": 1}
