"""Scale and leaks: what a watch, a key or a wait costs the others, and what is left of them afterwards.

Work is counted, not timed: calls, the length of what a built-in method has to walk, and bytes allocated. A thousand
watches show what grows with their number; the slow tests say it of ten thousand.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import sysconfig
import threading
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

import stigmergy
from processes import PATIENCE, eventually, timers
from stigmergy import Change, MemoryStore, Set, Store, Watch
from stigmergy.subscription import Subscription
from stigmergy.testing import VirtualClock

CONSTANT_TIME = {"append", "popleft", "get", "setdefault", "items", "values", "keys", "release", "add", "discard"}


many_of_them = pytest.mark.parametrize("many", [1000, pytest.param(10_000, marks=pytest.mark.slow)])


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


@many_of_them
def test_each_of_many_watches_is_told_of_a_hundred_changes_read_by_threads(many: int) -> None:
    store = MemoryStore()
    watches = [store.watch(prefix="p", capacity=most_of_them_small(number)) for number in range(many)]
    results: list[int] = []

    def read(mine: list[Watch]) -> None:
        parked = [mine[0].get(timeout=PATIENCE)]  # this one is there before the first change
        for watch in mine:
            before = parked if watch is mine[0] else []
            results.append(told([*before, *watch]))

    threads = [
        threading.Thread(target=read, args=(watches[start * many // 2 : (start + 1) * many // 2],))
        for start in range(2)
    ]
    for thread in threads:
        thread.start()
    for number in range(1, 101):
        store.set("p", number)
    store.close()  # what is buffered is still delivered
    for thread in threads:
        thread.join(timeout=PATIENCE)

    assert Counter(results) == {100: many}


@many_of_them
async def test_each_of_many_watches_is_told_of_a_hundred_changes_read_by_tasks(many: int) -> None:
    store = MemoryStore()
    watches = [store.watch(prefix="p", capacity=most_of_them_small(number)) for number in range(many)]

    async def read(watch: Watch) -> int:
        return told([change async for change in watch])

    tasks = [asyncio.create_task(read(watch)) for watch in watches]
    await asyncio.sleep(0)  # all are parked now
    for number in range(1, 101):
        store.set("p", number)
        if number % 50 == 0:
            await asyncio.sleep(0)
    store.close()

    assert Counter(await asyncio.gather(*tasks)) == {100: many}


SUBSCRIBERS: dict[str, Callable[[Store, int], Watch]] = {
    "one key": lambda store, number: store.watch("a"),
    "keys": lambda store, number: store.watch(f"key {number}"),
    "one prefix": lambda store, number: store.watch(prefix="a"),
    "prefixes": lambda store, number: store.watch(prefix=f"key {number}"),
    "observe": lambda store, number: store.observe(f"key {number}"),
}
every_subscriber = pytest.mark.parametrize("subscribe", SUBSCRIBERS.values(), ids=SUBSCRIBERS.keys())


@many_of_them
@every_subscriber
def test_many_idle_watches_take_two_kibibytes_each_at_most(subscribe: Callable[[Store, int], Watch], many: int) -> None:
    store = MemoryStore()
    watches: list[Watch] = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        watches += (subscribe(store, number) for number in range(many))
        each = (tracemalloc.get_traced_memory()[0] - before) / many
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


@many_of_them
@every_subscriber
def test_closing_one_of_many_watches_is_no_more_work_than_one_of_ten(
    subscribe: Callable[[Store, int], Watch], many: int
) -> None:
    assert_no_more(closing(MemoryStore(), subscribe, many), closing(MemoryStore(), subscribe, 10))


@many_of_them
@every_subscriber
def test_dropping_ten_times_as_many_watches_is_ten_times_the_work(
    subscribe: Callable[[Store, int], Watch], many: int
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

    few, all_of_them = dropped(many // 10), dropped(many)

    assert all_of_them.calls <= 10.1 * few.calls
    assert all_of_them.bytes <= 12 * few.bytes


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


@many_of_them
def test_no_write_is_more_work_with_many_watches_elsewhere(many: int) -> None:
    with MemoryStore() as quiet, MemoryStore() as busy:
        watches = [quiet.watch(prefix="other 00000"[:length]) for length in range(7, 12)]
        watches += [busy.watch(f"other {number}") for number in range(many)]
        watches += [busy.watch(prefix=f"other {number:05}"[: 7 + number % 5]) for number in range(many)]
        alone, crowded = costs_of_writes(quiet), costs_of_writes(busy)

        for name in WRITES:
            assert_no_more(crowded[name], alone[name])
        assert all(watch.get_nowait() is None for watch in watches)


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="that collector's calls would be counted")
@pytest.mark.parametrize("keys", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_write_is_more_work_among_many_keys(keys: int) -> None:
    with MemoryStore() as empty, MemoryStore() as full:
        for number in range(keys):
            full.set(f"other {number}", number)
        alone, crowded = costs_of_writes(empty), costs_of_writes(full)

        for name in WRITES:
            assert_no_more(crowded[name], alone[name])


@pytest.mark.parametrize("keys", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_scan_by_prefix_among_many_keys_is_as_much_work_as_what_it_finds(keys: int) -> None:
    def scanning(store: Store, prefix: str, count: int) -> Work:
        assert len(store.scan(prefix)) == count
        return work(lambda: store.scan(prefix))

    def after_a_write(store: Store) -> Work:
        return work(lambda: (store.set("new", 0), store.delete("new"), store.scan("k00000")))

    full, thousand = MemoryStore(history=0), MemoryStore(history=0)
    for number in range(keys):
        full.set(f"k{number:06}", 0)
    for number in range(1000):
        thousand.set(f"k{number:06}", 0)
    costs = [scanning(full, prefix, count) for prefix, count in [("k00000", 10), ("k0000", 100), ("k000", 1000)]]
    alone = [scanning(thousand, prefix, count) for prefix, count in [("k00000", 10), ("k0000", 100)]]

    for small, large in pairwise(costs):
        assert large.calls <= 10 * small.calls
        assert large.bytes <= 10 * small.bytes + 16_384
    for crowded, few in zip(costs, alone, strict=False):
        assert abs(crowded.calls - few.calls) <= 2
        assert crowded.bytes <= few.bytes + 16_384
    crowded, few = after_a_write(full), after_a_write(thousand)
    assert crowded.calls <= few.calls + 4 * 1024, "one chunk of the order at most"
    assert crowded.bytes <= few.bytes + 65_536
    full.close()


# -- nothing is left ---------------------------------------------------------------------------------------------------


def living(*kinds: type) -> dict[int, object]:
    """What there is of some kinds, by its id. Held, so that nothing that is made later has one of these ids."""
    return {id(each): each for each in gc.get_objects() if isinstance(each, kinds)}


ALLOCATES = [
    tracemalloc.Filter(True, threading.__file__),
    *[tracemalloc.Filter(True, f"{package.__path__[0]}/*") for package in (asyncio, stigmergy)],
]
"""Where all is allocated that a watch or a wait can leave. What runs beside it, pytest say, allocates elsewhere."""


@contextmanager
def nothing_left(store: MemoryStore, many: int) -> Iterator[None]:
    """Afterwards there are no watches and threads that were not there before, and but 75 bytes for each of `many`.

    What other tests left may go meanwhile, and makes up for nothing.
    """
    gc.collect()
    watches, threads, timed = living(Watch, Subscription), set(threading.enumerate()), timers(store._sweeper._calls)
    tracemalloc.start()
    try:
        yield
        store.set("-", 0)  # whoever writes next clears up
        gc.collect()
        held = tracemalloc.take_snapshot().filter_traces(ALLOCATES)
        assert sum(trace.size for trace in held.traces) < 75 * many
    finally:
        tracemalloc.stop()
    assert living(Watch, Subscription).keys() <= watches.keys()
    assert not store._hub.keys
    assert not store._hub.prefixes
    assert not store._hub.left
    assert not store._hub.to_wake
    assert not store._hub.to_release
    eventually(lambda: threads.issuperset(threading.enumerate()) and timers(store._sweeper._calls) == timed)


@many_of_them
@every_subscriber
def test_many_watches_opened_and_closed_leave_nothing(subscribe: Callable[[Store, int], Watch], many: int) -> None:
    with MemoryStore() as store, nothing_left(store, many):
        for number in range(many):
            subscribe(store, number).close()


@many_of_them
@every_subscriber
def test_many_abandoned_watches_leave_nothing(subscribe: Callable[[Store, int], Watch], many: int) -> None:
    with MemoryStore(history=16) as store, nothing_left(store, many):
        abandoned = [subscribe(store, number) for number in range(many)]
        for number in range(0, many, 100):
            store.set(f"key {number}", [number])
            store.set("a", [number])
        del abandoned
        for number in range(0, many, 100):
            store.delete(f"key {number}")
        for _ in range(2 * 16):  # the history forgets them, too
            store.set("a", 0)


@many_of_them
@pytest.mark.parametrize("wait", ["watch", "one watch", "wait_for"])
def test_many_cancelled_waits_leave_nothing(wait: str, many: int) -> None:
    store = MemoryStore()
    shared = store.watch("shared")

    async def wait_in_vain(number: int) -> object:
        if wait == "wait_for":
            return await store.aio.wait_for(f"key {number}", lambda value: True)
        watch = shared if wait == "one watch" else store.watch(f"key {number}")
        return await anext(watch)

    async def main(many: int) -> None:
        for start in range(0, many, 1000):
            tasks = [asyncio.create_task(wait_in_vain(number)) for number in range(start, start + 1000)]
            await asyncio.sleep(0)
            assert not any(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(main(1000))  # what is made once for all is there now
    store.set("-", 0)
    gc.collect()
    futures = living(asyncio.Future)  # and tasks, which are such
    with suppress_topics(store, shared), nothing_left(store, many):
        asyncio.run(main(many))
    assert not shared._subscription.waiters
    assert living(asyncio.Future).keys() <= futures.keys()
    store.set("shared", 1)
    assert shared.get(timeout=0).value == 1
    store.close()


@contextmanager
def suppress_topics(store: MemoryStore, watch: Watch) -> Iterator[None]:
    """Let the hub look as if `watch` were not subscribed, and check afterwards that nothing but it is."""
    topics = store._hub.keys
    assert list(topics) == ["shared"]
    members = topics.pop("shared")
    yield
    assert list(members) == [watch._subscription]
    topics["shared"] = members


@many_of_them
@pytest.mark.parametrize("wait", ["watch", "one watch", "wait_for"])
def test_many_waits_that_timed_out_in_threads_leave_nothing(wait: str, many: int) -> None:
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

    wait_in_vain(0)  # what is made once for all is there now
    store.set("-", 0)
    timed_out.clear()
    with suppress_topics(store, shared), nothing_left(store, many):
        threads = [
            threading.Thread(target=lambda start=start: [wait_in_vain(n) for n in range(start, many, 4)])
            for start in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=PATIENCE)
    assert len(timed_out) == many
    assert not shared._subscription.waiters
    store.set("shared", 1)
    assert shared.get(timeout=0).value == 1
    store.close()


class Value:
    pass


def all_gone(references: list[ref[Value]]) -> bool:
    return all(each() is None for each in references)


@many_of_them
def test_entries_that_expired_are_physically_gone(many: int) -> None:
    clock = VirtualClock()
    store = MemoryStore(clock=clock, history=0, copy=None)
    store.set("-", 0, ttl=1)
    store.delete("-")
    eventually(lambda: timers(store._sweeper._calls) == 1)
    with nothing_left(store, many):
        values = []
        for number in range(many):
            value = Value()
            values.append(ref(value))
            store.set(f"key {number}", value, ttl=3600 + number % 7)
        del value
        store.scan("key 1")  # the order of the keys knows them
        assert sum(each() is not None for each in values) == many
        clock.advance(3607)
        store.scan("key 1")
        eventually(partial(all_gone, values))  # the timer may have one in hand
        assert not store._entries
        assert not store._deadlines.heap
        assert not list(store._order.beginning_with("", None))
        del values

    store.close()
    eventually(lambda: timers(store._sweeper._calls) == 0)


@many_of_them
def test_one_timer_serves_all_deadlines_and_ends_with_its_store(many: int) -> None:
    with MemoryStore() as store:
        for number in range(many):
            store.set(f"key {number}", 0, ttl=3600)
        eventually(lambda: timers(store._sweeper._calls) == 1)
        for number in range(many):
            store.delete(f"key {number}")
        assert timers(store._sweeper._calls) == 1
    eventually(lambda: timers(store._sweeper._calls) == 0)


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


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_watch_dies_at_once_without_the_collector(use: Callable[[Watch], object]) -> None:
    with MemoryStore(history=0) as store:
        gc.collect()
        gc.disable()
        try:
            subscriptions = living(Subscription)
            for kind, subscribe in SUBSCRIBERS.items():
                watch = subscribe(store, 1)
                store.commit(Set("a", [1]), Set("key 1", [2]))
                use(watch)
                gone = ref(watch)
                del watch

                assert gone() is None, kind
            store.set("-", 0)
            assert living(Subscription).keys() <= subscriptions.keys()
        finally:
            gc.enable()
