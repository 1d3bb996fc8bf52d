"""What a watch delivers, in both colours."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from typing import Any

import pytest

from stigmergy import Change, Compacted, Delete, Lagged, MemoryStore, Op, Set, WatchClosed


def revisions(changes: list[Change]) -> list[int]:
    return [change.revision for change in changes]


async def test_a_watch_delivers_every_change_of_its_key_in_order(store: Any, colour: Any) -> None:
    watch = store.watch("a")
    await store.set("a", 1)
    await store.set("b", 1)
    await store.set("a", 2)
    await store.delete("a")

    set_, again, gone = await colour.drain(watch)

    assert (set_.op, set_.key, set_.value, set_.old_value, set_.revision, set_.old_revision) == (
        Op.SET,
        "a",
        1,
        None,
        1,
        0,
    )
    assert (again.value, again.old_value, again.revision, again.old_revision) == (2, 1, 3, 1)
    assert (gone.op, gone.value, gone.old_value, gone.revision, gone.old_revision) == (Op.DELETE, None, 2, 4, 3)
    assert not any(change.expired or change.missed for change in (set_, again, gone))


async def test_a_watch_is_subscribed_when_it_returns(store: Any, colour: Any) -> None:
    watch = store.watch("a")
    await store.set("a", 1)

    assert (await colour.get(watch)).value == 1


async def test_a_watch_of_several_keys_has_one_order(store: Any, colour: Any) -> None:
    watch = store.watch("a", "b", "a")
    for key in "abcab":
        await store.set(key, 0)

    assert revisions(await colour.drain(watch)) == [1, 2, 4, 5]


async def test_a_watch_of_a_prefix_has_one_order(store: Any, colour: Any) -> None:
    some, every = store.watch(prefix="a:"), store.watch(prefix="")
    for key in ["a", "a:", "a:1", "ab", "a:2"]:
        await store.set(key, 0)

    assert revisions(await colour.drain(some)) == [2, 3, 5]
    assert revisions(await colour.drain(every)) == [1, 2, 3, 4, 5]


async def test_old_value_is_true_within_one_commit_and_across(store: Any, colour: Any) -> None:
    watch = store.watch(prefix="")
    await store.commit(Set("a", 1), Set("b", 1))
    await store.commit(Delete("a"), Set("b", 2))

    assert [(change.key, change.old_value) for change in await colour.drain(watch)] == [
        ("a", None),
        ("b", None),
        ("a", 1),
        ("b", 1),
    ]


async def test_a_full_watch_never_blocks_the_writer_and_says_what_it_missed(
    store: Any, colour: Any, caplog: pytest.LogCaptureFixture
) -> None:
    watch = store.watch("a", capacity=16)
    for number in range(17):
        await store.set("a", number)

    assert watch.dropped == 1
    changes = await colour.drain(watch)
    assert changes[0].missed == 1
    assert [change.value for change in changes] == list(range(1, 17))
    assert sum(change.missed for change in changes[1:]) == 0
    assert [record.levelno for record in caplog.records if record.name == "stigmergy"] == [logging.WARNING]


async def test_missed_stands_where_the_gap_is(store: Any, colour: Any) -> None:
    watch = store.watch("a", capacity=3)
    for number in range(3):
        await store.set("a", number)
    first = watch.get_nowait()
    for number in range(3, 6):
        await store.set("a", number)

    assert (first.value, first.missed) == (0, 0)
    assert [(change.value, change.missed) for change in await colour.drain(watch)] == [(3, 2), (4, 0), (5, 0)]
    assert watch.dropped == 2


async def test_overflow_raise_says_so_once_and_goes_on(store: Any, colour: Any) -> None:
    watch = store.watch("a", capacity=2, overflow="raise")
    for number in range(5):
        await store.set("a", number)

    with pytest.raises(Lagged) as lagged:
        await colour.get(watch)

    assert lagged.value.missed == 3
    assert [(change.value, change.missed) for change in await colour.drain(watch)] == [(3, 0), (4, 0)]
    assert watch.dropped == 3


async def test_an_unbounded_watch_keeps_everything(store: Any, colour: Any) -> None:
    watch = store.watch("a", capacity=None)
    for number in range(5000):
        await store.set("a", number)

    assert revisions(await colour.drain(watch)) == list(range(1, 5001))
    assert watch.dropped == 0


async def test_since_delivers_everything_after_a_revision_and_then_goes_on(store: Any, colour: Any) -> None:
    for number in range(300):
        await store.set("a", number)
    watch = store.watch("a", since=0, capacity=4)
    await store.set("a", 300)

    changes = await colour.drain(watch)

    assert [change.value for change in changes] == list(range(301))
    assert (watch.dropped, changes[5].old_value) == (0, 4)


async def test_a_gap_behind_a_backlog_stands_behind_the_backlog(store: Any, colour: Any) -> None:
    for number in range(3):
        await store.set("a", number)
    watch = store.watch("a", since=1, capacity=2)
    for number in range(3, 7):
        await store.set("a", number)

    assert [(change.value, change.missed) for change in await colour.drain(watch)] == [(1, 0), (2, 0), (5, 2), (6, 0)]


async def test_since_matches_keys_and_prefixes(store: Any, colour: Any) -> None:
    for key in ["a", "b", "ab", "a"]:
        await store.set(key, 0)

    assert revisions(await colour.drain(store.watch("a", since=1))) == [4]
    assert revisions(await colour.drain(store.watch(prefix="a", since=0))) == [1, 3, 4]
    assert revisions(await colour.drain(store.watch("a", since=4))) == []


async def test_since_beyond_what_is_remembered_is_compacted(new_store: Any, colour: Any) -> None:
    store = new_store(history=10)
    for number in range(25):
        await store.set("a", number)

    with pytest.raises(Compacted) as compacted:
        store.watch("a", since=14)
    assert (compacted.value.since, compacted.value.oldest) == (14, 16)
    assert revisions(await colour.drain(store.watch("a", since=15))) == list(range(16, 26))
    with pytest.raises(Compacted):
        store.watch("a", since=26)


async def test_history_zero_remembers_nothing_but_the_present(new_store: Any) -> None:
    store = new_store(history=0)
    revision = await store.set("a", 1)

    with pytest.raises(Compacted):
        store.watch("a", since=0)
    watch = store.watch("a", since=revision)
    await store.set("a", 2)
    assert watch.get_nowait().value == 2
    assert "resumable" not in store.capabilities


async def test_a_bookmark_of_another_stores_life_is_compacted(store: Any, new_store: Any) -> None:
    other = new_store()
    await store.set("a", 1)
    await other.set("a", 1)

    with pytest.raises(Compacted):
        store.watch("a", since=(await other.scan()).bookmark)
    with pytest.raises(ValueError, match="bookmark"):
        store.watch("a", since="no bookmark at all")


async def test_resuming_from_the_watchs_bookmark_at_any_point_loses_and_repeats_nothing(
    store: Any, colour: Any
) -> None:
    for number in range(20):
        await store.set("ab"[number % 2], number)
    watch = store.watch("a", since=0)
    read: list[int] = []
    for _ in range(10):
        resumed = store.watch("a", since=watch.bookmark)
        assert read + revisions(await colour.drain(resumed)) == list(range(1, 21, 2))
        read.append((await colour.get(watch)).revision)
    assert watch.get_nowait() is None


async def test_a_bookmark_behind_a_gap_not_yet_reported_resumes_before_it(store: Any, colour: Any) -> None:
    watch = store.watch("a", capacity=2)
    for number in range(4):
        await store.set("a", number)

    assert watch.revision == 0
    assert revisions(await colour.drain(store.watch("a", since=watch.bookmark))) == [1, 2, 3, 4]
    watch.get_nowait()
    assert watch.revision == 3


async def test_revision_advances_without_deliveries(store: Any) -> None:
    watch = store.watch("a")
    await store.set("b", 1)
    assert watch.revision == 1
    await store.set("a", 1)
    await store.set("b", 2)

    assert watch.revision == 1
    watch.get_nowait()
    assert watch.revision == 3


async def test_get_times_out(store: Any, colour: Any) -> None:
    watch = store.watch("a")

    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError):
            await colour.get(watch, timeout)


async def test_a_watch_that_ended_raises_when_it_is_drained(store: Any, colour: Any) -> None:
    watch = store.watch("a")
    await store.set("a", 1)
    watch.close()
    watch.close()
    await store.set("a", 2)

    assert (await colour.get(watch)).value == 1
    with pytest.raises(WatchClosed):
        await colour.get(watch)
    with pytest.raises(WatchClosed):
        watch.get_nowait()
    assert await colour.all(watch) == []
    assert watch.revision == 1


async def test_leaving_the_with_block_ends_the_watch(store: Any, colour: Any) -> None:
    if colour.name == "sync":
        with store.watch("a") as watch:
            await store.set("a", 1)
    else:
        async with store.watch("a") as watch:
            await store.set("a", 1)
    await store.set("a", 2)

    assert [change.value for change in await colour.all(watch)] == [1]


async def test_map_sees_each_change_in_order_as_it_is_taken_out(store: Any, colour: Any) -> None:
    seen: list[int] = []

    def count(change: Change) -> Change:
        seen.append(change.revision)
        return change._replace(value=change.value * 10)

    watch = store.watch("a").map(count).map(lambda change: change._replace(value=change.value + 1))
    await store.set("a", 1)
    await store.set("a", 2)
    assert seen == []

    assert [change.value for change in await colour.drain(watch)] == [11, 21]
    assert seen == [1, 2]


async def test_a_watch_that_nobody_holds_unsubscribes(store: Any, colour: Any) -> None:
    raw = colour.raw(store)
    watches = [store.watch("a", capacity=None), store.watch(prefix="a"), store.observe("a")]
    gone = [weakref.ref(watch) for watch in watches]
    del watches
    gc.collect()
    await store.set("a", 1)

    assert [reference() for reference in gone] == [None, None, None]
    assert raw._hub._everybody() == []
    assert raw._hub._keys == {}
    assert raw._hub._prefixes == {}


async def test_a_write_under_a_prefix_reaches_every_length_of_prefix(store: Any, colour: Any) -> None:
    watches = [store.watch(prefix="abc"[:length]) for length in range(4)]
    await store.set("abc", 1)
    await store.set("ab", 2)

    assert [revisions(await colour.drain(watch)) for watch in watches] == [[1, 2], [1, 2], [1, 2], [1]]


# -- observe -----------------------------------------------------------------------------------------------------------


async def test_observe_starts_with_the_present_state_in_the_order_of_revisions(store: Any, colour: Any) -> None:
    for key in ["b", "a", "x", "b", "y"]:
        await store.set(key, await store.get(key, 0) + 1)
    await store.delete("y")
    changes = await colour.drain(store.observe("a", "b", "y", "z"))

    assert [(change.op, change.key, change.value, change.revision) for change in changes] == [
        (Op.SET, "a", 1, 2),
        (Op.SET, "b", 2, 4),
    ]
    assert [(change.old_value, change.old_revision) for change in changes] == [(None, 0), (None, 0)]


async def test_observe_knows_the_commits_it_begins_with(store: Any, colour: Any) -> None:
    await store.commit(Set("a", 1), Set("b", 2))

    assert [change.commit for change in await colour.drain(store.observe("a", "b"))] == [2, 2]


async def test_observe_keeps_only_the_newest_of_each_key(store: Any, colour: Any) -> None:
    watch = store.observe(prefix="")
    for number in range(100):
        await store.set("a", number)
        await store.set("b", number)
    changes = await colour.drain(watch)

    assert [(change.key, change.value) for change in changes] == [("a", 99), ("b", 99)]
    await store.set("a", 100)
    (last,) = await colour.drain(watch)
    assert (last.old_value, last.old_revision) == (99, changes[0].revision)
    assert watch.get_nowait() is None


async def test_observe_delivers_the_delete_of_what_it_delivered_and_nothing_else(store: Any, colour: Any) -> None:
    watch = store.observe(prefix="")
    await store.set("known", 1)
    watch.get_nowait()
    await store.set("unknown", 1)
    await store.set("known", 2)
    await store.delete("unknown")
    await store.delete("known")

    (change,) = await colour.drain(watch)

    assert (change.op, change.key, change.value, change.old_value, change.old_revision) == (
        Op.DELETE,
        "known",
        None,
        1,
        1,
    )


async def test_observe_converges_on_the_truth_however_slow_it_is(store: Any) -> None:
    watch = store.observe(prefix="")
    seen: dict[str, int] = {}
    last = 0
    for number in range(2000):
        key = f"k{number * 31 % 17}"
        if number % 5 == 0:
            await store.delete(key)
        else:
            await store.set(key, number)
        if number % 7 == 0 and (change := watch.get_nowait()) is not None:
            last = follow(seen, change, last)
    while (change := watch.get_nowait()) is not None:
        last = follow(seen, change, last)

    assert seen == {key: entry.value for key, entry in (await store.scan()).items()}


def follow(seen: dict[str, int], change: Change, last: int) -> int:
    assert change.revision > last
    assert seen.get(change.key) == change.old_value
    if change.op is Op.SET:
        seen[change.key] = change.value
    else:
        del seen[change.key]
    return change.revision


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_waiting_synchronously_inside_a_running_loop_raises_an_instruction() -> None:
    with MemoryStore() as store:
        watch = store.watch("a")
        store.set("a", 1)

        assert watch.get().value == 1
        with pytest.raises(RuntimeError, match="async for"):
            watch.get()
        with pytest.raises(RuntimeError, match="async for"):
            next(watch)


async def test_a_reader_in_the_same_loop_follows_a_busy_writer() -> None:
    async with MemoryStore().aio as store:
        watch = store.watch("a", capacity=16)

        async def read() -> list[int]:
            return [(await anext(watch)).value for _ in range(1000)]

        reader = asyncio.create_task(read())
        for number in range(1000):
            await store.set("a", number)

        assert await reader == list(range(1000))
        assert watch.dropped == 0


async def test_a_cancelled_reader_loses_nothing_and_leaves_no_waiter_behind() -> None:
    async with MemoryStore().aio as store:
        watch = store.watch("a")
        readers = [asyncio.create_task(anext(watch)) for _ in range(10)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

        assert not watch._source().waiters
        await store.set("a", 1)
        assert (await anext(watch)).value == 1


async def test_a_reader_cancelled_after_it_was_woken_passes_the_wake_up_on() -> None:
    async with MemoryStore().aio as store:
        watch = store.watch("a")
        first, second = (asyncio.create_task(watch.aget()) for _ in range(2))
        await asyncio.sleep(0)
        await store.set("a", 1)
        first.cancel()

        async with asyncio.timeout(5):
            assert (await second).value == 1


async def test_several_readers_of_one_watch_share_its_changes() -> None:
    async with MemoryStore().aio as store:
        watch = store.watch("a", capacity=None)
        readers = [asyncio.create_task(take_all(watch)) for _ in range(5)]
        for number in range(500):
            await store.set("a", number)
            if number % 10 == 0:
                await asyncio.sleep(0)
        watch.close()

        taken = [value for values in await asyncio.gather(*readers) for value in values]

        assert sorted(taken) == list(range(500))


async def take_all(watch: Any) -> list[int]:
    return [change.value async for change in watch]
