"""Scale and leaks: what a watch, a key or a wait costs the others, and what is left of them afterwards.

Work is counted, not timed: calls, the length of what a built-in method has to walk, and bytes allocated.
"""

from __future__ import annotations

import _thread
import asyncio
import gc
import sys
import sysconfig
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import Any
from weakref import ref

import pytest

from stigmergy import Change, MemoryStore, Set, Store, Watch
from stigmergy.subscription import Subscription
from stigmergy.testing import VirtualClock

MANY = 10_000
CONSTANT_TIME = {"append", "popleft", "get", "setdefault", "items", "values", "keys", "release", "add", "discard"}


@dataclass
class Work:
    calls: int
    """Calls of functions, Python's and built-in ones; one that walks its object counts once per item."""
    bytes: int
    """The most that was allocated at any one time."""


def work(function: Callable[[], object]) -> Work:
    """What a call of `function` costs when it is not the first."""
    function()
    calls = 0

    def count(frame: FrameType, event: str, called: Any) -> None:
        nonlocal calls
        if event == "call":
            calls += 1
        elif event == "c_call":
            container = getattr(called, "__self__", None)
            walks = isinstance(container, (list, dict, set)) and called.__name__ not in CONSTANT_TIME
            if walks and (called.__name__, type(container)) != ("pop", dict):
                calls += len(container)
            calls += 1

    gc.disable()
    try:
        sys.setprofile(count)
        function()
        sys.setprofile(None)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        function()
        return Work(calls, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        gc.enable()


def assert_no_more(crowded: Work, alone: Work) -> None:
    assert alone.calls <= crowded.calls <= alone.calls + 2, (crowded, alone)
    assert crowded.bytes <= alone.bytes + 2048, (crowded, alone)


# -- many watches ------------------------------------------------------------------------------------------------------


def told(changes: list[Change]) -> int:
    """How many changes a reader was told of: delivered, or counted in the right place."""
    seen = 0
    for change in changes:
        seen += change.missed + 1
        assert change.value == change.revision == seen
    return seen


def most_of_them_small(number: int) -> int | None:
    return 16 if number % 4 else None


def test_each_of_ten_thousand_watches_is_told_of_a_hundred_changes_read_by_threads() -> None:
    store = MemoryStore()
    watches = [store.watch(prefix="p", capacity=most_of_them_small(number)) for number in range(MANY)]
    results: list[int] = []

    def read(mine: list[Watch]) -> None:
        parked = [mine[0].get(timeout=30)]  # this one is there before the first change
        for watch in mine:
            before = parked if watch is mine[0] else []
            results.append(told([*before, *watch]))

    threads = [
        threading.Thread(target=read, args=(watches[start * MANY // 2 : (start + 1) * MANY // 2],))
        for start in range(2)
    ]
    for thread in threads:
        thread.start()
    for number in range(1, 101):
        store.set("p", number)
    store.close()  # what is buffered is still delivered
    for thread in threads:
        thread.join(timeout=30)

    assert Counter(results) == {100: MANY}


async def test_each_of_ten_thousand_watches_is_told_of_a_hundred_changes_read_by_tasks() -> None:
    store = MemoryStore()
    watches = [store.watch(prefix="p", capacity=most_of_them_small(number)) for number in range(MANY)]

    async def read(watch: Watch) -> int:
        return told([change async for change in watch])

    tasks = [asyncio.create_task(read(watch)) for watch in watches]
    await asyncio.sleep(0)  # all are parked now
    for number in range(1, 101):
        store.set("p", number)
        if number % 50 == 0:
            await asyncio.sleep(0)
    store.close()

    assert Counter(await asyncio.gather(*tasks)) == {100: MANY}


SUBSCRIBERS: dict[str, Callable[[Store, int], Watch]] = {
    "one key": lambda store, number: store.watch("a"),
    "keys": lambda store, number: store.watch(f"key {number}"),
    "one prefix": lambda store, number: store.watch(prefix="a"),
    "prefixes": lambda store, number: store.watch(prefix=f"key {number}"),
    "observe": lambda store, number: store.observe(f"key {number}"),
}
every_subscriber = pytest.mark.parametrize("subscribe", SUBSCRIBERS.values(), ids=SUBSCRIBERS.keys())


@every_subscriber
def test_ten_thousand_idle_watches_take_two_kibibytes_each_at_most(subscribe: Callable[[Store, int], Watch]) -> None:
    store = MemoryStore()
    watches: list[Watch] = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        watches += (subscribe(store, number) for number in range(MANY))
        each = (tracemalloc.get_traced_memory()[0] - before) / MANY
    finally:
        tracemalloc.stop()

    assert each <= 2048
    store.close()


def closing(store: Store, subscribe: Callable[[Store, int], Watch], crowd: int) -> Work:
    """What it costs to close the middle one of `crowd` watches."""
    watches = [subscribe(store, number) for number in range(crowd)]
    middle = watches[crowd // 2 - 2 : crowd // 2 + 2]
    cost = work(lambda: middle.pop().close())
    assert len(middle) == 1
    store.close()
    return cost


@every_subscriber
def test_closing_one_of_ten_thousand_watches_is_no_more_work_than_one_of_ten(
    subscribe: Callable[[Store, int], Watch],
) -> None:
    few = closing(MemoryStore(), subscribe, 10)
    many = closing(MemoryStore(), subscribe, MANY)

    assert_no_more(many, few)


@every_subscriber
def test_dropping_ten_thousand_watches_is_ten_times_the_work_of_a_thousand(
    subscribe: Callable[[Store, int], Watch],
) -> None:
    def dropped(crowd: int) -> Work:
        store = MemoryStore()
        watches: list[Watch] = []

        def drop() -> None:
            watches.clear()
            store.watch("z").close()

        def again() -> None:
            watches.extend([subscribe(store, number) for number in range(crowd)])
            drop()

        return work(again)

    few, many = dropped(1000), dropped(MANY)

    assert many.calls <= 10.1 * few.calls
    assert many.bytes <= 12 * few.bytes


WRITES: dict[str, Callable[[Store], object]] = {
    "set": lambda store: store.set("mine", 1),
    "set with ttl": lambda store: store.set("mine", 1, ttl=100),
    "conditional set": lambda store: store.set("mine", 1, if_revision=store.get_entry("mine").revision),  # type: ignore[union-attr]
    "commit": lambda store: store.commit(Set("mine", 1), Set("also mine", 2)),
    "create and delete": lambda store: (store.set("new", 1), store.delete("new")),
    "update": lambda store: store.update("mine", lambda value: 1),
    "watch": lambda store: store.watch("mine").close(),
}


def costs_of_writes(store: MemoryStore) -> dict[str, Work]:
    store.set("mine", 0, ttl=3600)  # so that there is a deadline for all of them
    return {name: work(lambda write=write: write(store)) for name, write in WRITES.items()}  # type: ignore[misc]


def test_no_write_is_more_work_with_ten_thousand_watches_elsewhere() -> None:
    with MemoryStore() as few, MemoryStore() as many:
        watches = [few.watch(prefix="other 00000"[:length]) for length in range(7, 12)]
        watches += [many.watch(f"other {number}") for number in range(MANY)]
        watches += [many.watch(prefix=f"other {number:05}"[: 7 + number % 5]) for number in range(MANY)]
        alone, crowded = costs_of_writes(few), costs_of_writes(many)

        for name in WRITES:
            assert_no_more(crowded[name], alone[name])
        assert all(watch.get_nowait() is None for watch in watches)


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="that collector's calls would be counted")
def test_no_write_is_more_work_among_a_hundred_thousand_keys() -> None:
    with MemoryStore() as few, MemoryStore() as many:
        for number in range(100_000):
            many.set(f"other {number}", number)
        alone, crowded = costs_of_writes(few), costs_of_writes(many)

        for name in WRITES:
            assert_no_more(crowded[name], alone[name])


def test_a_scan_by_prefix_among_a_million_keys_is_as_much_work_as_what_it_finds() -> None:
    def scanning(store: Store, prefix: str, count: int) -> Work:
        assert len(store.scan(prefix)) == count
        return work(lambda: store.scan(prefix))

    def after_a_write(store: Store) -> Work:
        return work(lambda: (store.set("new", 0), store.delete("new"), store.scan("k00000")))

    million, thousand = MemoryStore(history=0), MemoryStore(history=0)
    for number in range(1_000_000):
        million.set(f"k{number:06}", 0)
    for number in range(1000):
        thousand.set(f"k{number:06}", 0)
    costs = [scanning(million, prefix, count) for prefix, count in [("k00000", 10), ("k0000", 100), ("k000", 1000)]]
    alone = [scanning(thousand, prefix, count) for prefix, count in [("k00000", 10), ("k0000", 100)]]

    for small, large in pairwise(costs):
        assert large.calls <= 10 * small.calls
        assert large.bytes <= 10 * small.bytes + 16_384
    for crowded, few in zip(costs, alone, strict=False):
        assert abs(crowded.calls - few.calls) <= 2
        assert crowded.bytes <= few.bytes + 16_384
    crowded, few = after_a_write(million), after_a_write(thousand)
    assert crowded.calls <= few.calls + 4 * 1024, "one chunk of the order at most"
    assert crowded.bytes <= few.bytes + 65_536
    million.close()


# -- nothing is left ---------------------------------------------------------------------------------------------------


def eventually(condition: Callable[[], bool]) -> None:
    """Let other threads come to the end of what they are at."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0)


def living(kind: type) -> int:
    return sum(isinstance(each, kind) for each in gc.get_objects())


@contextmanager
def nothing_left(store: MemoryStore) -> Iterator[None]:
    """Afterwards there are as many watches, threads and bytes as before, give or take a megabyte."""
    gc.collect()
    threads, watches, subscriptions = _thread._count(), living(Watch), living(Subscription)
    tracemalloc.start()
    try:
        yield
        store.set("-", 0)  # whoever writes next clears up
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()
    assert (living(Watch), living(Subscription)) == (watches, subscriptions)
    assert not store._hub._keys
    assert not store._hub._prefixes
    assert not store._hub.left
    assert not store._hub.afterwards
    assert _thread._count() == threads


@every_subscriber
def test_a_hundred_thousand_watches_opened_and_closed_leave_nothing(
    subscribe: Callable[[Store, int], Watch],
) -> None:
    with MemoryStore() as store, nothing_left(store):
        for number in range(100_000 // len(SUBSCRIBERS)):
            subscribe(store, number).close()


@every_subscriber
def test_ten_thousand_abandoned_watches_leave_nothing(subscribe: Callable[[Store, int], Watch]) -> None:
    with MemoryStore() as store, nothing_left(store):
        abandoned = [subscribe(store, number) for number in range(MANY)]
        for number in range(0, MANY, 100):
            store.set(f"key {number}", [number])
            store.set("a", [number])
        del abandoned
        for _ in range(2 * 1024):  # the history forgets them, too
            store.set("a", 0)


@pytest.mark.parametrize("wait", ["watch", "one watch", "wait_for"])
def test_ten_thousand_cancelled_waits_leave_nothing(wait: str) -> None:
    store = MemoryStore()
    shared = store.watch("shared")
    before = living(asyncio.Task), living(asyncio.Future)

    async def wait_in_vain(number: int) -> object:
        if wait == "wait_for":
            return await store.aio.wait_for(f"key {number}", lambda value: True)
        watch = shared if wait == "one watch" else store.watch(f"key {number}")
        return await anext(watch)

    async def main() -> None:
        for start in range(0, MANY, 1000):
            tasks = [asyncio.create_task(wait_in_vain(number)) for number in range(start, start + 1000)]
            await asyncio.sleep(0)
            assert not any(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(asyncio.sleep(0))
    with suppress_topics(store, shared), nothing_left(store):
        asyncio.run(main())
    assert not shared._source().waiters
    assert (living(asyncio.Task), living(asyncio.Future)) == before
    store.set("shared", 1)
    assert shared.get(timeout=0).value == 1
    store.close()


@contextmanager
def suppress_topics(store: MemoryStore, watch: Watch) -> Iterator[None]:
    """Let the hub look as if `watch` were not subscribed, and check afterwards that nothing but it is."""
    topics = store._hub._keys
    assert list(topics) == ["shared"]
    members = topics.pop("shared")
    yield
    assert list(members) == [watch._source()]
    topics["shared"] = members


@pytest.mark.parametrize("wait", ["watch", "one watch", "wait_for"])
def test_ten_thousand_waits_that_timed_out_in_threads_leave_nothing(wait: str) -> None:
    store = MemoryStore()
    shared = store.watch("shared")
    timed_out: list[None] = []

    def wait_in_vain(number: int) -> None:
        try:
            if wait == "wait_for":
                store.wait_for(f"key {number}", lambda value: True, timeout=1e-4)
            else:
                (shared if wait == "one watch" else store.watch(f"key {number}")).get(timeout=1e-4)
        except TimeoutError:
            timed_out.append(None)

    with suppress_topics(store, shared), nothing_left(store):
        threads = [
            threading.Thread(target=lambda start=start: [wait_in_vain(n) for n in range(start, MANY, 4)])
            for start in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert len(timed_out) == MANY
    assert not shared._source().waiters
    store.set("shared", 1)
    assert shared.get(timeout=0).value == 1
    store.close()


class Value:
    pass


def all_gone(references: list[ref[Value]]) -> bool:
    return all(each() is None for each in references)


def test_ten_thousand_entries_that_expired_are_physically_gone() -> None:
    clock = VirtualClock()
    store = MemoryStore(clock=clock, history=0, copy=None)
    threads = _thread._count()
    with nothing_left_but_the_timer(store):
        values = []
        for number in range(MANY):
            value = Value()
            values.append(ref(value))
            store.set(f"key {number}", value, ttl=3600 + number % 7)
        del value
        store.scan("key 1")  # the order of the keys knows them
        assert sum(each() is not None for each in values) == MANY
        clock.advance(3607)
        store.scan("key 1")
        eventually(partial(all_gone, values))  # the timer may have one in hand
        assert not store._entries
        assert not store._deadlines.heap
        assert not list(store._order.beginning_with("", None))
        del values

    store.close()
    eventually(lambda: _thread._count() == threads)


@contextmanager
def nothing_left_but_the_timer(store: MemoryStore) -> Iterator[None]:
    """One thread makes all deadlines come due."""
    threads = _thread._count()
    store.set("-", 0, ttl=1)
    store.delete("-")
    eventually(lambda: _thread._count() == threads + 1)
    with nothing_left(store):
        yield


def test_one_timer_serves_ten_thousand_deadlines_and_ends_with_its_store() -> None:
    before = _thread._count()
    with MemoryStore() as store:
        for number in range(MANY):
            store.set(f"key {number}", 0, ttl=3600)
        eventually(lambda: _thread._count() == before + 1)
        for number in range(MANY):
            store.delete(f"key {number}")
        assert _thread._count() == before + 1
    eventually(lambda: _thread._count() == before)


def drained(watch: Watch) -> None:
    list(iter(watch.get_nowait, None))


def timed_out(watch: Watch) -> None:
    drained(watch)
    with suppress(TimeoutError):
        watch.get(timeout=1e-4)


def cancelled(watch: Watch) -> None:
    async def main() -> None:
        drained(watch)
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await anext(watch)

    asyncio.run(main())


def iterated_to_the_end(watch: Watch) -> None:
    watch.close()
    list(watch)


USES: dict[str, Callable[[Watch], object]] = {
    "never used": lambda watch: None,
    "drained": drained,
    "timed out": timed_out,
    "cancelled": cancelled,
    "mapped": lambda watch: watch.map(lambda change: change).get_nowait(),
    "closed": Watch.close,
    "iterated": iterated_to_the_end,
    "left": lambda watch: watch.__enter__().__exit__(),
    "shown": repr,
}


@every_subscriber
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_watch_dies_at_once_without_the_collector(
    subscribe: Callable[[Store, int], Watch], use: Callable[[Watch], object]
) -> None:
    with MemoryStore(history=0) as store:
        gc.collect()
        gc.disable()
        try:
            subscriptions = living(Subscription)
            watch = subscribe(store, 1)
            store.commit(Set("a", [1]), Set("key 1", [2]))
            use(watch)
            gone = ref(watch)
            del watch

            assert gone() is None
            store.set("-", 0)
            assert living(Subscription) == subscriptions
        finally:
            gc.enable()
