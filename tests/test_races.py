"""Tasks on one store, in hundreds of orders each (slow: thousands): what is promised holds in all of them.

Each program runs once per seed on a loop that draws the order from it. A failure says the seed; that order alone is
`python tests/test_races.py THE_TEST SEED`.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from math import inf
from random import Random
from typing import Any

import pytest

from stigmergy import (
    AsyncStore,
    Call,
    Change,
    Delete,
    Entry,
    Flow,
    Lagged,
    MemoryStore,
    Op,
    Operation,
    RevisionConflict,
    Set,
    StoreClosed,
    Watch,
    WatchClosed,
    apply_middleware,
)
from stigmergy.testing.loop import run_seeded


class World:
    """What a program takes: a store in the time of the loop, and draws of its own from the seed."""

    def __init__(self, seed: str) -> None:
        self.draw = Random(seed)
        self.loop = asyncio.get_running_loop()

    def store(self, **options: Any) -> AsyncStore:
        memory = MemoryStore(clock=self.loop.time, **options)
        memory._sweeper = LoopTimer(self.loop, memory._sweep)  # type: ignore[assignment]
        return memory.aio

    async def pause(self, most: float = 0.01) -> None:
        await asyncio.sleep(self.draw.random() * most)

    @asynccontextmanager
    async def tasks(self, *coroutines: Coroutine[Any, Any, Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
        """Tasks that are cancelled at the end, if they still run."""
        tasks = [asyncio.create_task(each) for each in coroutines]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await ended(*tasks)

    async def cancel(self, *tasks: asyncio.Task[Any], within: float = 0.01) -> None:
        """Cancel one after the other, at random moments."""
        for task in tasks:
            await self.pause(within)
            task.cancel()
        await ended(*tasks)


class LoopTimer:
    """A store's timer as a timer of the loop, in place of the thread that would wait in real time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sweep: Callable[[], float]) -> None:
        self.until = inf
        self._loop = loop
        self._sweep = sweep
        self._handle: asyncio.Handle | None = None

    def wake(self) -> None:
        self.until = -inf
        self.stop()
        self._handle = self._loop.call_soon(self._run)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _run(self) -> None:
        wait = self._sweep()
        self._handle = self._loop.call_later(wait, self._run) if wait < inf else None


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Wait for the end of `tasks`, which may be cancellation."""
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def collect(watch: Watch, into: list[Change]) -> None:
    async for change in watch:
        into.append(change)  # noqa: PERF401, one at a time: others look


def drain(watch: Watch) -> list[Change]:
    return list(iter(watch.get_nowait, None))


def revisions(changes: list[Change]) -> list[int]:
    return [change.revision for change in changes]


def waiters(watch: Watch) -> int:
    return len(watch._subscription.waiters)


Program = Callable[[World], Coroutine[Any, Any, None]]
PROGRAMS: dict[str, Program] = {}


def run(program: Program, seed: str) -> None:
    async def main() -> None:
        await program(World(seed))

    run_seeded(main, seed)


def in_every_order(program: Program) -> Callable[..., None]:
    """A test that runs `program` with many seeds."""
    PROGRAMS[program.__name__] = program

    @pytest.mark.parametrize(
        "runs", [500, pytest.param(2000, marks=pytest.mark.slow), pytest.param(200_000, marks=pytest.mark.large)]
    )
    def test(seed: str, runs: int) -> None:
        for number in range(runs):
            run(program, f"{seed}/{number}")

    test.__name__ = test.__qualname__ = program.__name__
    return test


# -- watches -----------------------------------------------------------------------------------------------------------


@in_every_order
async def test_a_watch_opened_while_others_write_has_neither_gap_nor_repeat(world: World) -> None:
    store = world.store()

    async def write(key: str) -> None:
        for number in range(4):
            await world.pause()
            await store.set(key, number)

    async def follow() -> None:
        await world.pause(0.02)
        snapshot = await store.scan()
        await world.pause()
        async with store.watch(prefix="", since=snapshot.bookmark) as watch:
            state = {key: entry.value for key, entry in snapshot.items()}
            for revision in range(snapshot.revision + 1, 9):
                change = await watch.aget()
                assert change.revision == revision
                assert change.old_value == state.get(change.key)
                state[change.key] = change.value
        assert state == await store.get_many(["a", "b"])

    async def follow_from_now() -> None:
        await world.pause(0.02)
        before = (await store.scan()).revision
        async with store.watch(prefix="") as watch:
            for revision in range(before + 1, 9):
                assert (await watch.aget()).revision == revision

    await asyncio.gather(write("a"), write("b"), follow(), follow(), follow_from_now())


@in_every_order
async def test_a_reader_that_times_out_loses_nothing(world: World) -> None:
    store = world.store()
    watch = await store.watch("a")

    async def read() -> list[int]:
        got: list[int] = []
        while len(got) < 6:
            try:
                async with asyncio.timeout(world.draw.random() * 0.006):
                    while True:
                        got.append((await watch.aget()).value)
            except TimeoutError:
                assert not waiters(watch)
        return got

    async def write() -> None:
        for number in range(6):
            await world.pause()
            await store.set("a", number)

    got, _ = await asyncio.gather(read(), write())
    assert got == [0, 1, 2, 3, 4, 5]


@in_every_order
async def test_of_several_readers_those_that_are_cancelled_lose_nothing_and_the_others_still_wake(world: World) -> None:
    store = world.store()
    watch = await store.watch("a")
    got: list[int] = []
    complete = asyncio.Event()

    async def read() -> None:
        async for change in watch:
            got.append(change.value)
            if len(got) == 3:
                complete.set()

    async def write() -> None:
        for number in range(3):
            await world.pause(0.004)
            await store.set("a", number)

    async with world.tasks(*[read() for _ in range(3)]) as (one, another, _):
        await asyncio.gather(write(), world.cancel(one, another, within=0.006), complete.wait())

    assert got == [0, 1, 2]


@in_every_order
async def test_readers_of_one_watch_share_its_changes(world: World) -> None:
    store = world.store()
    watch = await store.watch("a", "b")
    shares: list[list[Change]] = [[], [], []]

    async def read(share: list[Change]) -> None:
        async for change in watch:
            share.append(change)
            await world.pause(0.004)

    async def write(key: str) -> None:
        for number in range(4):
            await store.set(key, number)
            await world.pause()

    async def close_once_all_is_read() -> None:
        await asyncio.gather(write("a"), write("b"))
        while sum(map(len, shares)) < 8:
            await asyncio.sleep(0.01)
            assert world.loop.time() < 1
        watch.close()

    await asyncio.gather(*map(read, shares), close_once_all_is_read())
    assert sorted(revisions([*shares[0], *shares[1], *shares[2]])) == list(range(1, 9))
    assert all(revisions(share) == sorted(revisions(share)) for share in shares)
    assert not waiters(watch)


@in_every_order
async def test_a_watch_that_is_closed_delivers_what_it_has_and_ends_every_reader(world: World) -> None:
    store = world.store()
    watch = await store.watch("a")
    got: list[Change] = []
    before_close = 0

    async def read_to_the_end() -> None:
        with suppress(WatchClosed):
            while True:
                got.append(await watch.aget())
                await world.pause(0.003)

    async def write() -> None:
        for number in range(5):
            await world.pause()
            await store.set("a", number)

    async def close() -> None:
        nonlocal before_close
        await world.pause(0.03)
        before_close = await store.get("a", -1) + 1
        watch.close()

    await asyncio.gather(read_to_the_end(), collect(watch, got), write(), close())
    assert sorted(revisions(got)) == list(range(1, before_close + 1))
    assert not waiters(watch)


@in_every_order
async def test_a_store_that_is_closed_ends_everybody_with_what_is_documented(world: World) -> None:
    store = world.store()
    shared, latest = await store.watch("a"), await store.observe("a")
    got: list[Change] = []
    states: list[Change] = []
    written = 0

    async def refused(waiting: Coroutine[Any, Any, Any], error: type[Exception]) -> None:
        with pytest.raises(error):
            await waiting

    async def write() -> None:
        nonlocal written
        while True:
            written = await store.set("a", written)
            await world.pause(0.004)

    async def read() -> None:
        while True:
            got.append(await shared.aget())

    async def close() -> None:
        await world.pause(0.03)
        await store.close()
        await store.close()

    await asyncio.gather(
        refused(write(), StoreClosed),
        refused(read(), WatchClosed),
        collect(shared, got),
        collect(latest, states),
        refused(store.wait_for("a", lambda value: False), StoreClosed),
        refused(store.wait_for("b", lambda value: True), StoreClosed),
        close(),
    )
    assert sorted(revisions(got)) == list(range(1, written + 1))
    assert [change.revision for change in states[-1:]] == [written][: len(states)]
    assert not waiters(shared)
    assert not waiters(latest)


@in_every_order
async def test_observe_converges_whatever_is_cancelled(world: World) -> None:
    store = world.store()
    watch = await store.observe(prefix="")
    mirror: dict[str, int] = {}

    async def follow() -> None:
        async for change in watch:
            assert change.old_value == mirror.get(change.key)
            if change.op is Op.SET:
                mirror[change.key] = change.value
            else:
                del mirror[change.key]
            await world.pause(0.003)

    async def write(number: int) -> None:
        for _ in range(5):
            key = world.draw.choice("ab")
            await (store.delete(key) if world.draw.random() < 0.4 else store.set(key, number))
            await world.pause(0.005)

    async with world.tasks(follow(), follow(), write(1), write(2), write(3)) as (one, another, *writers):
        await world.cancel(one, writers[0], another)
        await ended(*writers)
    revision = await store.set("end", 0)

    async with world.tasks(follow()) as (last,):
        while "end" not in mirror:
            await asyncio.sleep(0.01)
            assert world.loop.time() < 1
        await world.cancel(last)
    assert watch.get_nowait() is None
    assert watch.revision == revision
    assert mirror == {key: entry.value for key, entry in (await store.scan()).items()}


@in_every_order
async def test_a_bookmark_resumes_after_a_cancelled_reader_with_neither_gap_nor_repeat(world: World) -> None:
    store = world.store()
    got: list[Change] = []
    bookmark = (await store.scan()).bookmark

    async def read() -> None:
        nonlocal bookmark
        async with store.watch("a", since=bookmark, capacity=2) as watch:
            while True:
                got.append(await watch.aget())
                bookmark = watch.bookmark
                await world.pause(0.003)

    async def write(key: str) -> None:
        for number in range(4):
            await world.pause(0.006)
            await store.set(key, number)

    async def read_and_be_cancelled() -> None:
        while len(got) + sum(change.missed for change in got) < 4:
            async with world.tasks(read()) as (reader,):
                await world.cancel(reader)

    await asyncio.gather(write("a"), write("b"), read_and_be_cancelled())
    values = [change.value for change in got]
    assert values == sorted(set(values))
    assert len(values) + sum(change.missed for change in got) == 4
    for before, change in zip([None, *got], got, strict=False):
        missed = 0 if before is None else before.value + 1
        assert change.value == missed + change.missed


@in_every_order
async def test_a_slow_reader_gets_or_counts_everything(world: World) -> None:
    store = world.store()
    watch = await store.watch("a", capacity=2)
    raising = await store.watch("a", capacity=2, overflow="raise")
    got: list[Change] = []
    seen: list[Change] = []
    lagged = 0

    async def read() -> None:
        async for change in watch:
            got.append(change)
            await world.pause(0.01)

    async def read_and_be_told() -> None:
        nonlocal lagged
        while True:
            try:
                seen.append(await raising.aget())
            except Lagged as lag:
                lagged += lag.missed
            except WatchClosed:
                return
            await world.pause(0.01)

    async def write() -> None:
        for number in range(8):
            await world.pause(0.004)
            await store.set("a", number)
        await store.close()

    await asyncio.gather(read(), read_and_be_told(), write())
    missed = sum(change.missed for change in got)
    assert len(got) + missed == len(seen) + lagged == 8
    assert (missed, lagged) == (watch.dropped, raising.dropped)
    for changes in (got, seen):
        assert revisions(changes) == sorted(set(revisions(changes)))
        assert changes[-1].value == 7


# -- writes ------------------------------------------------------------------------------------------------------------


def pausing(world: World) -> Any:
    """A middleware that awaits before and after every operation."""

    def pause_around(operation: Operation[Any]) -> Flow[Any]:
        yield from Call(partial(world.pause, 0.003))
        result = yield operation
        yield from Call(partial(world.pause, 0.003))
        return result

    return pause_around


@in_every_order
async def test_a_cancelled_write_is_whole_or_not_at_all_and_watches_hear_of_it(world: World) -> None:
    store = world.store()
    log, full = await store.watch(prefix="", capacity=None), await store.watch("b", capacity=1)
    if world.draw.random() < 0.5:
        store = apply_middleware(store, pausing(world))
    acknowledged: list[int | None] = []
    written = 0

    async def write(number: int) -> None:
        nonlocal written
        for _ in range(3):
            await world.pause(0.004)
            written += 1
            value = (number, written)
            acknowledged.extend(await store.commit(Set("a", value), Set("b", value), Delete("c")))

    async def read() -> None:
        async for _ in full:
            await world.pause(0.004)

    async with world.tasks(read(), write(1), write(2), write(3)) as (_, *writers):
        await world.cancel(*writers)

    changes = drain(log)
    assert revisions(changes) == list(range(1, len(changes) + 1))
    pairs = list(zip(changes[::2], changes[1::2], strict=True))
    assert all((a.key, b.key, a.value) == ("a", "b", b.value) and a.commit == b.commit for a, b in pairs)
    assert len(pairs) == len({a.value for a, _ in pairs}) <= written
    assert {revision for revision in acknowledged if revision} <= {change.revision for change in changes}
    last = dict.fromkeys("ab", pairs[-1][0].value) if pairs else {}
    assert await store.get_many(["a", "b", "c"]) == last


@in_every_order
async def test_updates_add_up_to_those_that_were_acknowledged(world: World) -> None:
    store = world.store()
    acknowledged = 0

    async def add_one(value: int) -> int:
        await world.pause(0.001)
        return value + 1

    async def count() -> None:
        nonlocal acknowledged
        for _ in range(2):
            await store.update("n", add_one, default=0)
            acknowledged += 1

    async with world.tasks(*[count() for _ in range(4)]) as tasks:
        await world.cancel(*tasks[:2])
        await ended(*tasks)

    assert acknowledged >= 4
    assert await store.get("n", 0) == acknowledged


@in_every_order
async def test_wait_for_returns_a_state_that_was_whatever_was_deleted_or_expired(world: World) -> None:
    store = world.store()
    log = await store.watch("a", capacity=None)
    found: list[Entry] = []

    async def wait() -> None:
        await world.pause(0.01)
        found.append(await store.wait_for("a", lambda value: value >= 2))
        assert (found[-1].expires is None) == (found[-1].value == 3)

    async def wait_in_vain() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02 * world.draw.random()):
                await store.wait_for("a", lambda value: value > 3)

    async def write() -> None:
        for value in world.draw.sample([1, 1, 2, 2], 4):
            await store.set("a", value, ttl=0.001 + 0.003 * world.draw.random())
            await world.pause(0.006)
            if world.draw.random() < 0.3:
                await store.delete("a")
        await store.set("a", 3)

    await asyncio.gather(wait(), wait(), wait_in_vain(), write())
    states = {change.revision: change.value for change in drain(log)}
    assert all(states[entry.revision] == entry.value >= 2 for entry in found)


@in_every_order
async def test_a_value_that_one_has_seen_expired_is_never_live_to_another(world: World) -> None:
    store = world.store()
    log = await store.watch("a", capacity=None)
    deadlines: dict[int, float] = {}
    gone = 0
    """The revision up to which somebody has seen every entry gone."""

    def set_deadline(revision: int, deadline: float) -> None:
        deadlines[revision] = deadline

    async def look() -> Entry | None:
        nonlocal gone
        entry = await store.get_entry("a")
        if entry is None:
            gone = max(gone, store.sync._revision)  # type: ignore[attr-defined]
        else:
            assert entry.revision > gone
            assert world.loop.time() < deadlines[entry.revision]
        return entry

    async def write() -> None:
        for number in range(3):
            ttl = 0.002 + 0.006 * world.draw.random()
            set_deadline(await store.set("a", number, ttl=ttl), world.loop.time() + ttl)
            await world.pause(0.012)

    async def renew() -> None:
        for _ in range(3):
            await world.pause()
            entry = await look()
            await world.pause(0.005)
            if entry is None:
                continue
            keep = world.draw.random() < 0.5
            try:
                revision = await store.set("a", 9, if_revision=entry.revision, ttl="keep" if keep else 0.005)
            except RevisionConflict:
                continue
            set_deadline(revision, deadlines[entry.revision] if keep else world.loop.time() + 0.005)

    async def read() -> None:
        for _ in range(6):
            await world.pause(0.006)
            await look()

    await asyncio.gather(write(), renew(), renew(), read())
    await asyncio.sleep(0.02)
    assert await store.get("a") is None
    lives = Counter(change.old_revision for change in drain(log) if change.op is Op.DELETE)
    assert set(lives.values()) == {1}
    assert lives.keys() <= deadlines.keys()


@in_every_order
async def test_an_expiry_reaches_readers_that_only_wait(world: World) -> None:
    store = world.store()
    watch, latest = await store.watch("a", "b"), await store.observe("a", "b")
    deadlines = {}

    async def write(key: str) -> None:
        await world.pause()
        ttl = 0.05 + world.draw.random()
        await store.set(key, 1, ttl=ttl)
        deadlines[key] = world.loop.time() + ttl

    async def read(watch: Watch) -> None:
        left = {"a", "b"}
        while left:
            change = await watch.aget()
            assert change.expired == (change.op is Op.DELETE)
            if change.expired:
                assert change.old_value == 1
                assert 0 <= world.loop.time() - deadlines[change.key] < 0.05
                left.remove(change.key)
            await world.pause(0.001)

    await asyncio.gather(write("a"), write("b"), read(watch), read(latest))


@in_every_order
async def test_a_mutex_of_a_conditional_set_and_a_watch_never_overlaps_and_lets_everybody_in(world: World) -> None:
    store = world.store()
    inside: list[int] = []
    entered: list[int] = []

    async def acquire(me: int) -> int:
        async with store.watch("lock") as watch:
            while True:
                try:
                    return await store.set("lock", me, if_revision=0)
                except RevisionConflict:
                    while (await watch.aget()).op is not Op.DELETE:
                        pass

    async def work(me: int, times: int) -> None:
        for _ in range(times):
            held = await acquire(me)
            inside.append(me)
            try:
                await world.pause(0.003)
                assert inside == [me]
                entered.append(me)
            finally:
                inside.remove(me)
                assert await store.delete("lock", if_revision=held)

    async with world.tasks(*[work(number, 2) for number in range(4)]) as workers:
        await world.cancel(workers[3])
        await ended(*workers)

    assert all(entered.count(number) == 2 for number in range(3))
    assert await store.get_entry("lock") is None


if __name__ == "__main__":
    run(PROGRAMS[sys.argv[1]], sys.argv[2])
