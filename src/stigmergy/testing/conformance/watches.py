"""Watches: every change, in order, once, or counted; from now on, or from a moment of the past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stigmergy.errors import Compacted, Lagged, WatchClosed
from stigmergy.model import Change, Delete, Op, Set
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.transcript import heard, needs, refused, rest, revisions, take, take_one

__all__ = ["Watches"]


class Watches:
    """G12 to G16 of the guarantees. A resumable store remembers at least its last hundred changes."""

    async def test_a_watch_delivers_every_change_of_its_key_in_order(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a")
        await store.set("a", 1)
        await store.set("b", 1)
        await store.set("a", 2)
        await store.delete("a")

        set_, again, gone = await take(colour, watch, 3)

        assert (set_.op, set_.key, set_.value, set_.old_value) == (Op.SET, "a", 1, None)
        assert (set_.revision, set_.old_revision) == (1, 0)
        assert (again.value, again.old_value, again.revision, again.old_revision) == (2, 1, 3, 1)
        assert (gone.op, gone.value, gone.old_value, gone.revision, gone.old_revision) == (Op.DELETE, None, 2, 4, 3)
        assert not any(change.expired or change.missed for change in (set_, again, gone))

    async def test_a_watch_is_subscribed_before_the_next_write(self, store: Any, colour: Colour) -> None:
        for number in range(10):
            watch = await store.watch("a")
            await store.set("a", number)
            await heard(store, colour)

            assert [change.value for change in await colour.drain(watch)] == [number]

    async def test_a_watch_hears_nothing_of_what_was_before(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)
        watch = await store.watch("a")
        await store.set("a", 2)

        assert revisions(await take(colour, watch, 1)) == [2]

    async def test_a_write_of_an_equal_value_is_a_change(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a")
        await store.set("a", 1)
        await store.set("a", 1)

        assert revisions(await take(colour, watch, 2)) == [1, 2]

    async def test_a_watch_of_several_keys_has_one_order(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a", "b", "a")
        for key in "abcab":
            await store.set(key, 0)

        assert revisions(await take(colour, watch, 4)) == [1, 2, 4, 5]

    async def test_a_watch_of_a_prefix_has_one_order(self, store: Any, colour: Colour) -> None:
        some, every = await store.watch(prefix="a:"), await store.watch(prefix="")
        for key in ["a", "a:", "a:1", "ab", "a:2"]:
            await store.set(key, 0)

        assert revisions(await take(colour, some, 3)) == [2, 3, 5]
        assert revisions(await take(colour, every, 5)) == [1, 2, 3, 4, 5]

    async def test_a_write_reaches_every_length_of_prefix(self, store: Any, colour: Colour) -> None:
        watches = [await store.watch(prefix="abc"[:length]) for length in range(4)]
        await store.set("ab", 1)
        await store.set("abc", 2)

        assert [revisions(await take(colour, watch, 2)) for watch in watches[:3]] == [[1, 2]] * 3
        assert revisions(await take(colour, watches[3], 1)) == [2]

    async def test_old_value_is_true_within_one_commit_and_across(self, store: Any, colour: Colour) -> None:
        watch = await store.watch(prefix="")
        await store.commit(Set("a", 1), Set("b", 1))
        await store.commit(Delete("a"), Set("b", 2))
        await store.set("a", 3)

        assert [(change.key, change.old_value, change.old_revision) for change in await take(colour, watch, 5)] == [
            ("a", None, 0),
            ("b", None, 0),
            ("a", 1, 1),
            ("b", 1, 2),
            ("a", None, 0),
        ]

    # -- full watches --------------------------------------------------------------------------------------------------

    async def test_a_full_watch_never_blocks_the_writer_and_says_what_it_missed(
        self, store: Any, colour: Colour
    ) -> None:
        watch = await store.watch("a", capacity=16)
        for number in range(40):
            await store.set("a", number)
        await heard(store, colour)

        assert watch.dropped == 24
        changes = await colour.drain(watch)
        assert [change.value for change in changes] == list(range(24, 40))
        assert [change.missed for change in changes] == [24] + [0] * 15
        assert [change.old_value for change in changes] == list(range(23, 39))

    async def test_missed_stands_where_the_gap_is(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a", capacity=3)
        for number in range(3):
            await store.set("a", number)
        (first,) = await take(colour, watch, 1)
        for number in range(3, 6):
            await store.set("a", number)
        await heard(store, colour)

        assert (first.value, first.missed) == (0, 0)
        assert [(change.value, change.missed) for change in await colour.drain(watch)] == [(3, 2), (4, 0), (5, 0)]
        assert watch.dropped == 2

    async def test_overflow_raise_says_so_once_and_goes_on(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a", capacity=2, overflow="raise")
        for number in range(5):
            await store.set("a", number)
        await heard(store, colour)

        with pytest.raises(Lagged) as lagged:
            await take_one(colour, watch)

        assert lagged.value.missed == 3
        assert [(change.value, change.missed) for change in await colour.drain(watch)] == [(3, 0), (4, 0)]
        assert watch.dropped == 3

    async def test_a_watch_keeps_a_thousand_changes_unless_told_otherwise(self, store: Any, colour: Colour) -> None:
        usual, unbounded = await store.watch(prefix="k"), await store.watch(prefix="k", capacity=None)
        for _ in range(11):
            await store.commit(*[Set(f"k{number}", 0) for number in range(100)])
        await heard(store, colour)

        assert revisions(await colour.drain(unbounded)) == list(range(1, 1101))
        assert revisions(await colour.drain(usual)) == list(range(1101 - 1024, 1101))
        assert (usual.dropped, unbounded.dropped) == (1100 - 1024, 0)

    # -- since ---------------------------------------------------------------------------------------------------------

    async def test_since_delivers_everything_after_a_revision_and_then_goes_on(
        self, store: Any, colour: Colour
    ) -> None:
        needs(store, "resumable")
        for number in range(60):
            await store.set("a", number)
        watch = await store.watch("a", since=0, capacity=4)
        await store.set("a", 60)

        changes = await take(colour, watch, 61)

        assert [change.value for change in changes] == list(range(61))
        assert [change.old_value for change in changes] == [None, *range(60)]
        assert watch.dropped == 0

    async def test_since_matches_keys_and_prefixes(self, store: Any, colour: Colour) -> None:
        needs(store, "resumable")
        for key in ["a", "b", "ab", "a"]:
            await store.set(key, 0)
        one, below, none = (
            await store.watch("a", since=1),
            await store.watch(prefix="a", since=0),
            await store.watch("a", since=4),
        )
        await store.set("a", 0)

        assert revisions(await take(colour, one, 2)) == [4, 5]
        assert revisions(await take(colour, below, 4)) == [1, 3, 4, 5]
        assert revisions(await take(colour, none, 1)) == [5]

    async def test_since_tells_of_commits_and_deletes_as_a_watch_would_have(self, store: Any, colour: Colour) -> None:
        needs(store, "resumable")
        live = await store.watch(prefix="")
        await store.commit(Set("a", [1], writer="planner", meta={"trace": "1"}), Set("b", 2))
        await store.commit(Delete("a", writer="worker"), Set("b", 3))
        await store.delete("b")

        past = await store.watch(prefix="", since=0)

        assert await take(colour, past, 5) == await take(colour, live, 5)

    async def test_a_gap_behind_a_backlog_stands_behind_the_backlog(self, store: Any, colour: Colour) -> None:
        needs(store, "resumable")
        for number in range(3):
            await store.set("a", number)
        watch = await store.watch("a", since=1, capacity=2)
        for number in range(3, 7):
            await store.set("a", number)
        await heard(store, colour)

        assert [(change.value, change.missed) for change in await colour.drain(watch)] == [
            (1, 0),
            (2, 0),
            (5, 2),
            (6, 0),
        ]

    async def test_the_past_is_whole_or_it_is_compacted(self, store: Any, colour: Colour) -> None:
        for _ in range(12):
            await store.commit(*[Set(f"k{number}", 0) for number in range(100)])
        oldest = await _oldest(store)
        assert oldest <= (1101 if "resumable" in store.capabilities else 1201)

        if oldest > 1:
            await refused(Compacted, lambda: store.watch(prefix="", since=oldest - 2))
        watch = await store.watch(prefix="", since=oldest - 1, capacity=None)
        await store.set("last", 0)

        assert revisions(await take(colour, watch, 1201 - oldest + 1)) == list(range(oldest, 1202))

    async def test_a_store_that_is_not_resumable_goes_on_from_the_present_only(
        self, store: Any, colour: Colour
    ) -> None:
        if "resumable" in store.capabilities:
            pytest.skip("only for stores that are not resumable")
        await store.set("a", 1)
        before = (await store.scan()).bookmark
        revision = await store.set("a", 2)

        for since in (0, 1, before):
            with pytest.raises(Compacted):
                await store.watch("a", since=since)
        watch = await store.watch("a", since=revision)
        await store.set("a", 3)
        assert (await take_one(colour, watch)).value == 3

    async def test_the_future_is_compacted(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)

        for since in (2, 1_000_000):
            with pytest.raises(Compacted):
                await store.watch("a", since=since)

    async def test_a_bookmark_of_another_stores_life_is_compacted(
        self, store: Any, colour: Colour, new_store: Callable[[], Any]
    ) -> None:
        if {"durable", "distributed"} & store.capabilities:
            pytest.skip("only for stores that are neither durable nor distributed")
        other = new_store()
        await store.set("a", 1)
        await other.set("a", 1)

        with pytest.raises(Compacted):
            await store.watch("a", since=(await other.scan()).bookmark)

    # -- bookmarks -----------------------------------------------------------------------------------------------------

    async def test_resuming_from_the_watchs_bookmark_at_any_point_loses_and_repeats_nothing(
        self, store: Any, colour: Colour
    ) -> None:
        needs(store, "resumable")
        for number in range(20):
            await store.set("ab"[number % 2], number)
        watch = await store.watch("a", since=0)
        odd = list(range(1, 21, 2))
        for read in range(10):
            resumed = await store.watch("a", since=watch.bookmark)
            assert revisions(await take(colour, resumed, 10 - read)) == odd[read:]
            assert (await take_one(colour, watch)).revision == odd[read]
        await store.set("a", 20)

        resumed = await store.watch("a", since=watch.bookmark)
        assert revisions(await take(colour, resumed, 1)) == [21]

    async def test_a_bookmark_behind_a_gap_not_yet_reported_resumes_before_it(self, store: Any, colour: Colour) -> None:
        needs(store, "resumable")
        watch = await store.watch("a", capacity=2)
        for number in range(4):
            await store.set("a", number)
        await heard(store, colour)

        assert watch.revision == 0
        resumed = await store.watch("a", since=watch.bookmark)
        assert revisions(await take(colour, resumed, 4)) == [1, 2, 3, 4]
        await take(colour, watch, 1)
        assert watch.revision == 3

    async def test_revision_advances_without_deliveries(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a")
        await store.set("b", 1)
        await heard(store, colour)
        assert watch.revision == 2
        await store.set("a", 1)
        await store.set("b", 2)
        await heard(store, colour)

        assert watch.revision == 2
        await take(colour, watch, 1)
        assert watch.revision == 5

    # -- reading -------------------------------------------------------------------------------------------------------

    async def test_get_times_out(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a")

        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError):
                await colour.get(watch, timeout)
        assert watch.get_nowait() is None

    async def test_a_watch_that_ended_raises_when_it_is_drained(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a")
        await store.set("a", 1)
        await heard(store, colour)
        watch.close()
        watch.close()
        await store.set("a", 2)

        assert (await take_one(colour, watch)).value == 1
        with pytest.raises(WatchClosed):
            await take_one(colour, watch)
        with pytest.raises(WatchClosed):
            watch.get_nowait()
        assert await colour.all(watch) == []

    async def test_leaving_the_with_block_ends_the_watch(self, store: Any, colour: Colour) -> None:
        if colour.name == "sync":
            with colour.raw(store).watch("a") as watch:
                await store.set("a", 1)
                await heard(store, colour)
        else:
            async with store.watch("a") as watch:
                await store.set("a", 1)
                await heard(store, colour)
        await store.set("a", 2)

        assert [change.value for change in await rest(colour, watch)] == [1]

    async def test_map_sees_each_change_in_order_as_it_is_taken_out(self, store: Any, colour: Colour) -> None:
        seen: list[int] = []

        def count(change: Change) -> Change:
            seen.append(change.revision)
            return change._replace(value=change.value * 10)

        watch = (await store.watch("a")).map(count).map(lambda change: change._replace(value=change.value + 1))
        await store.set("a", 1)
        await store.set("a", 2)
        await heard(store, colour)
        assert seen == []

        assert [change.value for change in await take(colour, watch, 2)] == [11, 21]
        assert seen == [1, 2]
        assert await store.get("a") == 2


async def _oldest(store: Any) -> int:
    """The revision of the oldest change that `store` remembers, by what it says itself."""
    try:
        (await store.watch(prefix="", since=0)).close()
    except Compacted as compacted:
        return compacted.oldest
    return 1
