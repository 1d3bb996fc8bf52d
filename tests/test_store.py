"""What a store does, in both colours."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stigmergy import (
    Check,
    Delete,
    Entry,
    InvalidValue,
    MemoryStore,
    Op,
    RevisionConflict,
    Set,
    StoreClosed,
    StoreFull,
    Unsupported,
)


async def test_get_returns_what_set_took(store: Any) -> None:
    await store.set("a", 1)

    assert await store.get("a") == 1


async def test_get_returns_the_default_for_an_absent_key_and_creates_nothing(store: Any) -> None:
    assert await store.get("a") is None
    assert await store.get("a", 7) == 7
    assert await store.get_entry("a") is None
    assert (await store.scan()).revision == 0


async def test_a_stored_none_is_a_value(store: Any) -> None:
    await store.set("a", None)

    assert await store.get("a", "absent") is None
    entry = await store.get_entry("a")
    assert entry is not None
    assert entry.value is None


async def test_an_entry_tells_value_revision_and_times(store: Any) -> None:
    await store.set("a", 1)
    revision = await store.set("b", 2, ttl=60)

    entry = await store.get_entry("b")

    assert (entry.value, entry.revision, entry.writer, entry.meta) == (2, revision, None, None)
    assert entry.expires == pytest.approx(entry.time + 60)


async def test_every_write_that_changes_something_takes_the_next_revision(store: Any) -> None:
    assert await store.set("a", 1) == 1
    assert await store.set("b", 1) == 2
    assert await store.delete("a") is True
    assert await store.delete("a") is False
    assert await store.set("a", 1) == 4


async def test_delete_says_whether_the_key_was_there(store: Any) -> None:
    await store.set("a", None)

    assert [await store.delete("a"), await store.delete("a")] == [True, False]


async def test_a_conditional_set_succeeds_only_at_its_revision(store: Any) -> None:
    revision = await store.set("a", 1)

    await store.set("a", 2, if_revision=revision)
    with pytest.raises(RevisionConflict) as conflict:
        await store.set("a", 3, if_revision=revision)

    assert (conflict.value.key, conflict.value.expected, conflict.value.actual) == ("a", 1, 2)
    assert await store.get("a") == 2


async def test_if_revision_zero_means_the_key_must_be_absent(store: Any) -> None:
    await store.set("a", 1, if_revision=0)

    with pytest.raises(RevisionConflict):
        await store.set("a", 2, if_revision=0)
    assert await store.get("a") == 1


async def test_a_conditional_delete_succeeds_only_at_its_revision(store: Any) -> None:
    await store.set("a", 1)

    with pytest.raises(RevisionConflict):
        await store.delete("a", if_revision=7)
    with pytest.raises(RevisionConflict):
        await store.delete("b", if_revision=7)
    assert await store.delete("a", if_revision=1) is True
    assert await store.delete("a", if_revision=0) is False


async def test_after_delete_and_recreate_an_old_revision_never_matches_again(store: Any) -> None:
    old = []
    for _ in range(100):
        old.append(await store.set("a", 1))
        await store.delete("a")
        await store.set("a", 1)
        for revision in old:
            with pytest.raises(RevisionConflict):
                await store.set("a", 2, if_revision=revision)
        await store.delete("a")


async def test_after_expiry_and_recreate_an_old_revision_never_matches_again(new_store: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    old = await store.set("a", 1, ttl=1)
    clock.advance(1)
    await store.set("a", 1)

    with pytest.raises(RevisionConflict):
        await store.set("a", 2, if_revision=old)


async def test_a_commit_takes_consecutive_revisions_in_the_order_given(store: Any) -> None:
    await store.set("gone", 0)

    revisions = await store.commit(Set("b", 1), Check("x", 0), Delete("gone"), Delete("never"), Set("a", 2))

    assert revisions == (2, None, 3, None, 4)
    assert await store.get_many(["a", "b", "gone"]) == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    "failing",
    [Check("a", 9), Check("a", 0), Check("absent", 1), Set("a", 5, if_revision=9), Delete("a", if_revision=9)],
)
async def test_a_commit_with_one_condition_that_fails_changes_nothing(store: Any, failing: Any) -> None:
    await store.set("a", 1)
    watch = store.watch(prefix="")

    with pytest.raises(RevisionConflict):
        await store.commit(Set("b", 2), failing, Set("c", 3))

    assert dict(await store.get_many(["a", "b", "c"])) == {"a": 1}
    assert (await store.scan()).revision == 1
    assert watch.get_nowait() is None


async def test_a_key_may_be_checked_and_written_in_one_commit(store: Any) -> None:
    await store.set("a", 1)

    assert await store.commit(Check("a", 1), Set("a", 2)) == (None, 2)


async def test_changes_of_one_commit_share_its_last_revision(store: Any, colour: Any) -> None:
    watch = store.watch(prefix="")
    await store.set("x", 0)
    await store.commit(Set("a", 1), Set("b", 2))

    assert [(change.revision, change.commit) for change in await colour.drain(watch)] == [(1, 1), (2, 3), (3, 3)]


async def test_a_commit_carries_writer_and_meta(store: Any) -> None:
    watch = store.watch("a")
    await store.commit(Set("a", 1, writer="planner", meta={"trace": "1"}))
    await store.commit(Delete("a", writer="worker", meta={"trace": "2"}))

    first, second = watch.get_nowait(), watch.get_nowait()

    assert (first.writer, first.meta) == ("planner", {"trace": "1"})
    assert (second.writer, second.meta) == ("worker", {"trace": "2"})


async def test_meta_is_isolated(store: Any) -> None:
    meta = {"trace": "1"}
    watch = store.watch("a")
    await store.commit(Set("a", 1, meta=meta))
    meta["trace"] = "2"
    (await store.get_entry("a")).meta["trace"] = "3"
    watch.get_nowait().meta["trace"] = "4"

    assert (await store.get_entry("a")).meta == {"trace": "1"}
    assert store.watch("a", since=0).get_nowait().meta == {"trace": "1"}


async def test_scan_returns_the_keys_that_begin_with_a_prefix_sorted_by_code_points(store: Any) -> None:
    for key in ["b", "a:2", "a:10", "a", "a:é", "a:Z", "aé", "a:\U0001f600", "a:\uffff"]:
        await store.set(key, key)

    snapshot = await store.scan("a:")

    assert list(snapshot) == sorted(["a:2", "a:10", "a:é", "a:Z", "a:\U0001f600", "a:\uffff"])
    assert {key: entry.value for key, entry in snapshot.items()} == {key: key for key in snapshot}
    assert snapshot.revision == 9


async def test_scan_pages_by_after_and_limit(store: Any) -> None:
    keys = [f"k{number:04}" for number in range(2500)]
    for key in keys:
        await store.set(key, 0)
    await store.set("other", 0)
    pages: list[str] = []
    after = None
    while page := list(await store.scan("k", after=after, limit=7)):
        pages += page
        after = page[-1]

    assert pages == keys


async def test_scan_of_keys_returns_exactly_those_that_are_there(store: Any) -> None:
    for key in "abc":
        await store.set(key, key)

    assert list(await store.scan(keys=["c", "x", "a", "a"])) == ["a", "c"]
    assert list(await store.scan(keys=["c", "b", "a"], after="a", limit=1)) == ["b"]
    assert await store.get_many(iter(["b", "x"])) == {"b": "b"}


async def test_scans_follow_creations_and_deletions(store: Any) -> None:
    model: set[str] = set()
    for number in range(3000):
        key = f"k{number * 7919 % 1000}"
        if key in model:
            await store.delete(key)
            model.discard(key)
        else:
            await store.set(key, 0)
            model.add(key)
        if number % 97 == 0:
            assert list(await store.scan("k1")) == sorted(key for key in model if key.startswith("k1"))
    assert list(await store.scan()) == sorted(model)


async def test_a_watch_from_a_snapshots_bookmark_goes_on_without_gap_or_repeat(store: Any, colour: Any) -> None:
    await store.set("a", 1)
    snapshot = await store.scan()
    await store.set("a", 2)

    watch = store.watch(prefix="", since=snapshot.bookmark)
    await store.set("a", 3)

    assert [change.value for change in await colour.drain(watch)] == [2, 3]


async def test_a_snapshot_stays_as_it_was(store: Any) -> None:
    await store.set("a", [1])
    snapshot = await store.scan()

    snapshot["a"].value.append(2)
    await store.set("a", [3])

    assert snapshot["a"].value == [1]
    assert "b" not in snapshot
    assert len(snapshot) == 1


async def test_update_returns_the_new_value(store: Any) -> None:
    assert await store.update("n", lambda value: value + 1, default=0) == 1
    assert await store.update("n", lambda value: value + 1, default=0) == 2


async def test_update_runs_again_when_somebody_wrote_in_between(store: Any, colour: Any) -> None:
    await store.set("n", 0)
    seen = []

    def add(value: int) -> int:
        seen.append(value)
        if len(seen) == 1:
            colour.raw(store).set("n", 10)
        return value + 1

    assert await store.update("n", add) == 11
    assert seen == [0, 10]


async def test_update_keeps_a_ttl(new_store: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    await store.set("n", 0, ttl=10)
    clock.advance(5)

    await store.update("n", lambda value: value + 1)

    assert await store.get("n") == 1
    clock.advance(5)
    assert await store.get("n") is None


async def test_update_writes_nothing_when_the_function_raises(store: Any) -> None:
    await store.set("n", 0)

    with pytest.raises(ZeroDivisionError):
        await store.update("n", lambda value: 1 // value)

    assert (await store.get_entry("n")).revision == 1


async def test_wait_for_returns_at_once_what_already_holds(store: Any) -> None:
    await store.set("a", 3)

    entry = await store.wait_for("a", lambda value: value == 3, timeout=0)

    assert isinstance(entry, Entry)
    assert (entry.value, entry.revision) == (3, 1)


async def test_wait_for_times_out(store: Any) -> None:
    await store.set("a", 1)

    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError):
            await store.wait_for("a", lambda value: value == 2, timeout=timeout)
        with pytest.raises(TimeoutError):
            await store.wait_for("absent", lambda value: True, timeout=timeout)
    with pytest.raises(ValueError, match="NaN"):
        await store.wait_for("a", lambda value: True, timeout=math.nan)


# -- ttl ---------------------------------------------------------------------------------------------------------------


async def test_an_entry_past_its_deadline_is_never_readable(new_store: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    await store.set("a", 1, ttl=10)
    clock.advance(9.999)
    assert await store.get("a") == 1
    clock.advance(0.001)

    assert await store.get("a") is None
    assert await store.get_entry("a") is None
    assert list(await store.scan()) == []
    assert await store.delete("a") is False


async def test_expiry_is_an_ordinary_change_exactly_once(new_store: Any, colour: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    watch = store.watch("a")
    await store.set("a", [1], ttl=1)
    clock.advance(5)
    for _ in range(3):
        await store.scan()
    await store.set("a", 2, ttl=1)

    first, expiry, again = await colour.drain(watch)

    assert (first.op, first.revision) == (Op.SET, 1)
    assert (expiry.op, expiry.expired, expiry.old_value, expiry.value) == (Op.DELETE, True, [1], None)
    assert (expiry.revision, expiry.old_revision) == (2, 1)
    assert (again.op, again.revision, again.old_revision) == (Op.SET, 3, 0)


async def test_a_timer_expires_what_nobody_asks_for(store: Any, colour: Any) -> None:
    watch = store.watch("a")
    await store.set("a", 1, ttl=0.01)

    changes = [await colour.get(watch), await colour.get(watch)]

    assert [(change.op, change.expired) for change in changes] == [(Op.SET, False), (Op.DELETE, True)]


async def test_an_earlier_deadline_overtakes_a_later_one(store: Any, colour: Any) -> None:
    watch = store.watch("soon")
    await store.set("late", 1, ttl=3600)
    await store.set("soon", 1, ttl=0.01)

    await colour.get(watch)

    assert (await colour.get(watch)).expired


async def test_a_set_without_ttl_clears_an_earlier_one(new_store: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    await store.set("a", 1, ttl=1)
    await store.set("a", 2)
    clock.advance(2)

    assert await store.get("a") == 2
    assert (await store.get_entry("a")).expires is None


async def test_keep_keeps_the_deadline(new_store: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    await store.set("a", 1, ttl=10)
    expires = (await store.get_entry("a")).expires
    clock.advance(6)
    await store.set("a", 2, ttl="keep")
    await store.set("b", 2, ttl="keep")

    assert (await store.get_entry("a")).expires == expires
    assert (await store.get_entry("b")).expires is None
    clock.advance(4)
    assert await store.get_many(["a", "b"]) == {"b": 2}


async def test_renewing_one_entry_for_ever_costs_no_memory(new_store: Any, colour: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    for _ in range(5000):
        await store.set("lease", 1, ttl=100)

    assert len(colour.raw(store)._deadlines.heap) < 200
    clock.advance(100)
    assert await store.get("lease") is None


async def test_a_conditional_write_meets_the_expiry_first(new_store: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    revision = await store.set("a", 1, ttl=1)
    clock.advance(1)

    with pytest.raises(RevisionConflict) as conflict:
        await store.set("a", 2, if_revision=revision)

    assert conflict.value.actual == 0


# -- isolation ---------------------------------------------------------------------------------------------------------


async def test_nobody_changes_state_by_changing_an_object(store: Any, colour: Any) -> None:
    value = {"list": [1], "set": {1}, "tuple": ([1],)}
    watch = store.watch("a")
    observe = store.observe("a")
    await store.set("a", value)
    value["list"].append(2)  # type: ignore[attr-defined]

    for copy in (
        await store.get("a"),
        (await store.get_entry("a")).value,
        (await store.scan())["a"].value,
        (await store.get_many(["a"]))["a"],
        (await colour.get(watch)).value,
        (await colour.get(observe)).value,
    ):
        assert copy == {"list": [1], "set": {1}, "tuple": ([1],)}
        copy["list"].append(3)
        copy["set"].add(3)
        copy["tuple"][0].append(3)

    assert await store.get("a") == {"list": [1], "set": {1}, "tuple": ([1],)}


async def test_two_watches_never_share_a_value(store: Any, colour: Any) -> None:
    one, other = store.watch("a"), store.watch("a")
    await store.set("a", [1])
    await store.set("a", [2])

    for change in await colour.drain(one):
        change.value.append("x")
        if change.old_value is not None:
            change.old_value.append("x")

    assert [(change.value, change.old_value) for change in await colour.drain(other)] == [([1], None), ([2], [1])]


async def test_update_gets_a_copy(store: Any) -> None:
    await store.set("a", [1])

    def spoil(value: list[int]) -> list[int]:
        value.append(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.update("a", spoil)
    assert await store.get("a") == [1]


async def test_copy_none_shares_live_objects(new_store: Any) -> None:
    store = new_store(copy=None)
    value = [1]
    await store.set("a", value)

    assert await store.get("a") is value
    assert "isolated" not in store.capabilities


async def test_a_value_that_cannot_be_copied_is_refused_before_anything_changed(store: Any) -> None:
    await store.set("a", 1)

    with pytest.raises(InvalidValue) as refused:
        await store.set("a", (number for number in range(3)))
    with pytest.raises(InvalidValue):
        await store.commit(Set("b", 1), Set("a", [(number for number in range(3))]))

    assert (refused.value.key, refused.value.type) == ("a", "generator")
    assert await store.get_many(["a", "b"]) == {"a": 1}


async def test_a_copier_of_ones_own_sees_every_value(new_store: Any) -> None:
    def only_numbers(value: Any) -> Any:
        if not isinstance(value, int):
            raise TypeError("no number")
        return value

    store = new_store(copy=only_numbers)
    await store.set("a", 1)

    with pytest.raises(InvalidValue):
        await store.set("a", "text")
    assert await store.get("a") == 1


# -- limits, capabilities, closing -------------------------------------------------------------------------------------


async def test_max_entries_is_judged_on_the_state_after_the_commit(new_store: Any, clock: Any) -> None:
    store = new_store(max_entries=2, clock=clock)
    await store.set("a", 1)
    await store.set("b", 1, ttl=1)

    with pytest.raises(StoreFull):
        await store.set("c", 1)
    with pytest.raises(StoreFull):
        await store.commit(Delete("a"), Set("c", 1), Set("d", 1))
    await store.set("a", 2)
    await store.commit(Set("c", 1), Delete("a"))
    clock.advance(1)
    await store.set("d", 1)

    assert list(await store.scan()) == ["c", "d"]


async def test_require_names_what_is_missing(store: Any) -> None:
    assert store.require("resumable", "isolated") is not None

    with pytest.raises(Unsupported) as missing:
        store.require("resumable", "durable")
    assert missing.value.capability == "durable"


async def test_a_closed_store_refuses_every_operation(store: Any) -> None:
    await store.set("a", 1)
    await store.close()
    await store.close()

    for operation in (
        lambda: store.get("a"),
        lambda: store.get_entry("a"),
        lambda: store.get_many(["a"]),
        lambda: store.set("a", 1),
        lambda: store.set("a", 1, ttl=1),
        lambda: store.delete("a"),
        lambda: store.commit(Check("a", 1)),
        lambda: store.update("a", lambda value: value),
        lambda: store.scan(),
        lambda: store.wait_for("a", lambda value: True),
    ):
        with pytest.raises(StoreClosed):
            await operation()
    for plain in (store.watch, store.observe):
        with pytest.raises(StoreClosed):
            plain("a")


async def test_open_watches_deliver_what_they_had_and_end_with_the_store(store: Any, colour: Any) -> None:
    every, latest = store.watch("a"), store.observe("a")
    await store.set("a", 1)
    await store.set("a", 2)
    await store.close()

    assert [change.value for change in await colour.all(every)] == [1, 2]
    assert [change.value for change in await colour.all(latest)] == [2]


async def test_leaving_the_with_block_closes_the_store(new_store: Any) -> None:
    async with new_store() as store:
        await store.set("a", 1)

    with pytest.raises(StoreClosed):
        await store.get("a")


@pytest.mark.parametrize("options", [{"history": -1}, {"max_entries": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MemoryStore(**options)  # type: ignore[arg-type]
