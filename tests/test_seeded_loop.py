"""The event loop with a seed finds races that a plain loop hides, and finds them again."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from stigmergy import MemoryStore
from stigmergy.testing.loop import LeftBehind, SeededLoop, Stuck, run_seeded

Main = Callable[[], Coroutine[Any, Any, None]]


async def order_of_ten_tasks() -> list[tuple[int, int]]:
    order: list[tuple[int, int]] = []

    async def task(number: int) -> None:
        for step in range(3):
            order.append((number, step))
            await asyncio.sleep(0)

    await asyncio.gather(*[task(number) for number in range(10)])
    return order


# -- order and time ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_order() -> None:
    assert run_seeded(order_of_ten_tasks, 7) == run_seeded(order_of_ten_tasks, 7)
    assert run_seeded(order_of_ten_tasks, "a seed") == run_seeded(order_of_ten_tasks, "a seed")


def test_other_seeds_give_other_orders() -> None:
    assert len({str(run_seeded(order_of_ten_tasks, seed)) for seed in range(100)}) == 100


def test_what_is_ready_may_run_in_every_order() -> None:
    async def main() -> str:
        order: list[str] = []
        for name in "abc":
            asyncio.get_running_loop().call_soon(order.append, name)
        while len(order) < 3:  # noqa: ASYNC110, whatever the order
            await asyncio.sleep(0)
        return "".join(order)

    assert {run_seeded(main, seed) for seed in range(100)} == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_a_day_passes_at_once() -> None:
    async def main() -> float:
        await asyncio.sleep(86400)
        return asyncio.get_running_loop().time()

    assert 86400 <= run_seeded(main, 1) < 86401
    assert not hasattr(SeededLoop, "_selector")  # there is nothing that it could wait with


def test_each_step_takes_up_to_two_milliseconds() -> None:
    async def main() -> list[float]:
        times = []
        for _ in range(200):
            times.append(asyncio.get_running_loop().time())
            await asyncio.sleep(0)
        return [after - before for before, after in pairwise(times)]

    steps = run_seeded(main, 1)
    assert 0 <= min(steps) < 0.0002
    assert 0.0018 < max(steps) <= 0.002


def test_no_timer_is_early_and_a_cancelled_one_takes_no_time() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(1000, str).cancel()
        fired: list[float] = []
        for delay in (5, 1, 3):
            loop.call_later(delay, lambda delay=delay: fired.append(loop.time() - delay))
        await asyncio.sleep(10)
        assert all(0 <= late < 0.1 for late in fired)
        assert len(fired) == 3
        assert loop.time() < 11
        loop.call_later(1000, str).cancel()

    run_seeded(main, 1)


def test_ttls_and_timers_share_the_time() -> None:
    async def main() -> None:
        store = MemoryStore(clock=asyncio.get_running_loop().time)
        store.set("a", 1, ttl=3600)
        await asyncio.sleep(3599)
        assert store.get("a") == 1
        await asyncio.sleep(1)
        assert store.get("a") is None
        store.close()

    run_seeded(main, 1)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_program_in_which_nothing_can_run_is_stuck_and_says_who_waits_where() -> None:
    store = MemoryStore()

    async def reader(secret: str) -> None:
        await store.watch(secret).aget()

    async def main() -> None:
        await asyncio.gather(asyncio.create_task(reader("hush"), name="the reader"), asyncio.Event().wait())

    with pytest.raises(Stuck) as stuck:
        run_seeded(main, 3)

    first, *waiting = str(stuck.value).splitlines()
    assert first == "nothing can run:"
    assert len(waiting) == 3
    (line,) = [each for each in waiting if each.startswith("the reader: ")]
    assert "reader (test_seeded_loop.py:" in line
    assert "> aget (watch.py:" in line
    assert "hush" not in str(stuck.value)
    assert stuck.value.__notes__ == ["seed: 3"]


def test_a_failure_tells_its_seed() -> None:
    async def main() -> None:
        raise KeyError

    with pytest.raises(KeyError) as error:
        run_seeded(main, "x/1")

    assert error.value.__notes__ == ["seed: 'x/1'"]


def test_tasks_that_still_wait_at_the_end_are_left_behind() -> None:
    async def main() -> None:
        asyncio.create_task(asyncio.sleep(60), name="sleeper")  # noqa: RUF006, that is what is tested

    with pytest.raises(LeftBehind, match=r"sleeper: sleep \(tasks.py:"):
        run_seeded(main, 1)


def test_a_failure_that_nobody_asks_for_is_left_behind() -> None:
    async def fail() -> None:
        raise KeyError

    async def main() -> None:
        task = asyncio.create_task(fail(), name="loser")
        await asyncio.wait([task])

    with pytest.raises(LeftBehind, match=r"loser failed: KeyError\(\)"):
        run_seeded(main, 1)


def test_a_callback_that_fails_is_no_secret() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(int, "x")
        await asyncio.sleep(1)

    with pytest.raises(LeftBehind, match="invalid literal"):
        run_seeded(main, 1)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_closed_at_the_end(fails: bool) -> None:
    ended: list[str] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(1)
            ended.append("generator")

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            ended.append("task")

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(wait())
        generator = numbers()
        await anext(generator)
        loops.append(generator)  # type: ignore[arg-type]
        await asyncio.sleep(1)
        if fails:
            await task

    with pytest.raises(Stuck if fails else LeftBehind):
        run_seeded(main, 1)

    assert sorted(ended) == ["generator", "task"]
    assert loops[0].is_closed()


def test_a_task_that_will_not_end_does_not_hold_up_the_end() -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        asyncio.create_task(stubborn())  # noqa: RUF006
        await asyncio.sleep(1)

    with pytest.raises(LeftBehind, match="stubborn"):
        run_seeded(main, 1)


def test_there_are_no_threads() -> None:
    async def main() -> None:
        await asyncio.to_thread(str)

    with pytest.raises(NotImplementedError, match="no threads"):
        run_seeded(main, 1)


# -- the parts of asyncio that it stands on ----------------------------------------------------------------------------


def test_the_private_parts_of_this_python_are_as_expected() -> None:
    loop = SeededLoop(1)
    try:
        handle, timer = loop.call_soon(str), loop.call_later(1, str)
        assert isinstance(loop._ready, deque)
        assert list(loop._ready) == [handle]
        assert loop._scheduled == [timer]
        assert (timer._when, timer._scheduled) == (1.0, True)  # type: ignore[attr-defined]
        assert loop._stopping is False
        loop._run_once()
        assert not loop._ready
        loop._run_once()
        assert loop._scheduled == []
        assert timer._scheduled is False  # type: ignore[attr-defined]

        async def fail() -> None:
            raise KeyError

        task = loop.create_task(fail())
        loop._run_once()
        assert task._log_traceback is True  # type: ignore[attr-defined]
        task.exception()
        assert task._log_traceback is False  # type: ignore[attr-defined]
        with pytest.raises(Stuck):
            loop._run_once()
    finally:
        loop.close()


def test_what_asyncio_offers_works_in_every_order() -> None:
    async def main() -> None:
        queue: asyncio.Queue[int] = asyncio.Queue(2)
        lock, got = asyncio.Lock(), []

        async def produce() -> None:
            for number in range(5):
                await queue.put(number)

        async def consume() -> None:
            while len(got) < 5:
                async with lock:
                    got.append(await queue.get())

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            consumer = group.create_task(consume(), name="consumer")
        assert got == [0, 1, 2, 3, 4]
        assert consumer.get_name() == "consumer"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await queue.get()
        asyncio.get_running_loop().call_soon_threadsafe(queue.put_nowait, 1)
        assert await asyncio.wait_for(queue.get(), 1) == 1

    for seed in range(100):
        run_seeded(main, seed)


def test_a_runner_takes_it() -> None:
    with asyncio.Runner(loop_factory=lambda: SeededLoop(1)) as runner:
        assert len(runner.run(order_of_ten_tasks())) == 30


def test_it_stops_when_told() -> None:
    loop = SeededLoop(1)
    loop.call_later(60, loop.stop)
    loop.run_forever()
    loop.stop()
    loop.run_forever()

    assert 60 <= loop.time() < 61
    loop.close()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks before Python 3.12")
def test_eager_tasks_work() -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        assert len(await order_of_ten_tasks()) == 30

    run_seeded(main, 1)


# -- planted bugs ------------------------------------------------------------------------------------------------------


class Box:
    """A store for one value, done badly."""

    def __init__(self) -> None:
        self.items: deque[int] = deque()
        self.waiter: asyncio.Future[None] | None = None
        self.subscribers: list[deque[int]] = []

    def put(self, item: int) -> None:
        self.items.append(item)
        for subscriber in self.subscribers:
            subscriber.append(item)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self) -> int:
        while not self.items:
            await self.ready_to_park()
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.items.popleft()

    async def ready_to_park(self) -> None:
        """A step between the check and the parking."""
        await asyncio.sleep(0)

    async def get_and_confirm(self) -> int:
        item = await self.get()
        await asyncio.sleep(0)
        return item

    async def watch(self) -> deque[int]:
        seen = deque(self.items)
        await asyncio.sleep(0)
        self.subscribers.append(seen)
        return seen


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def a_wake_up_is_lost() -> None:
    box = Box()
    reader = asyncio.create_task(box.get())
    await turns(5)
    box.put(1)
    async with asyncio.timeout(10):
        assert await reader == 1


async def a_watch_is_subscribed_one_step_late() -> None:
    box = Box()

    async def write() -> None:
        for number in range(3):
            await asyncio.sleep(0.05)
            box.put(number)

    async def watch() -> deque[int]:
        await asyncio.sleep(0.02)
        await turns(30)
        return await box.watch()

    seen, _ = await asyncio.gather(watch(), write())
    assert list(seen) == [0, 1, 2]


async def an_item_is_lost_on_cancellation() -> None:
    box = Box()
    reader = asyncio.create_task(box.get_and_confirm())
    await turns(5)
    box.put(1)
    await turns(5)
    reader.cancel()
    (got,) = await asyncio.gather(reader, return_exceptions=True)
    assert got == 1 or list(box.items) == [1]


PLANTED = [a_wake_up_is_lost, a_watch_is_subscribed_one_step_late, an_item_is_lost_on_cancellation]


def fails(run: Callable[[Main], object], main: Main) -> bool:
    try:
        run(main)
    except (AssertionError, TimeoutError):
        return True
    return False


class PlainLoop(asyncio.SelectorEventLoop):
    """A loop in asyncio's own order, in which time passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def skip(timeout: float | None) -> Any:
            self.now += timeout or 0
            return select(0)

        self._selector.select = skip  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


def run_plainly(main: Main) -> None:
    with asyncio.Runner(loop_factory=PlainLoop) as runner:
        runner.run(main())


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_within_five_hundred_seeds(bug: Main, seed: str) -> None:
    found = sum(fails(partial(run_seeded, seed=f"{seed}/{number}"), bug) for number in range(500))

    print(f"found by {found} seeds")
    assert found


@pytest.mark.parametrize("bug", PLANTED)
def test_a_plain_loop_does_not_find_it(bug: Main) -> None:
    assert not fails(run_plainly, bug)  # it has one order only


def test_code_without_the_bugs_passes(monkeypatch: pytest.MonkeyPatch, seed: str) -> None:
    async def at_once(*_: object) -> None:
        pass

    async def watch(box: Box) -> deque[int]:
        box.subscribers.append(deque(box.items))
        return box.subscribers[0]

    monkeypatch.setattr(Box, "ready_to_park", at_once)
    monkeypatch.setattr(Box, "get_and_confirm", Box.get)
    monkeypatch.setattr(Box, "watch", watch)

    for number in range(500):
        for program in PLANTED:
            run_seeded(program, f"{seed}/{number}")
