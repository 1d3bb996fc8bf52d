"""Reducers: merged, atomically, and never twice."""

from __future__ import annotations

import threading
from operator import add
from typing import Any

import pytest

from stigmergy import Check, InvalidKey, MemoryStore, RevisionConflict, Set, apply_middleware, scoped, with_reducers
from stigmergy.testing import Colour


def merging(store: Any, colour: Colour, *args: Any, **kwargs: Any) -> Any:
    raw = colour.raw(store)
    made = apply_middleware(raw.aio if colour.name == "async" else raw, with_reducers(*args, **kwargs))
    return colour.face(made)


async def test_an_unconditional_set_merges_and_other_keys_are_replaced(store: Any, colour: Colour) -> None:
    tally = merging(store, colour, {"n": add})
    watch = await store.watch("n")
    await tally.set("n", 2)
    await tally.set("n", 3)
    await tally.set("other", 2)
    await tally.set("other", 3)

    assert await tally.get("n") == 5
    assert await tally.get("other") == 3
    assert [change.value for change in await colour.drain(watch)] == [2, 5]


async def test_in_a_commit_each_set_merges_with_what_was_there_before(store: Any, colour: Colour) -> None:
    tally = merging(store, colour, {"n": add}, default=lambda old, new: f"{old},{new}")
    await tally.set("n", 1)
    await tally.set("a", "x")

    revisions = await tally.commit(Check("a", 2), Set("n", 10), Set("a", "y"), Set("b", "z"))

    assert revisions == (None, 3, 4, 5)
    assert await tally.get_many(["n", "a", "b"]) == {"n": 11, "a": "x,y", "b": "z"}


async def test_a_conditional_set_replaces_and_update_does_not_merge_twice(store: Any, colour: Colour) -> None:
    tally = merging(store, colour, {"n": add})
    revision = await tally.set("n", 5)
    await tally.set("n", 1, if_revision=revision)
    assert await tally.get("n") == 1
    assert await tally.update("n", lambda value: value + 1) == 2
    assert await tally.get("n") == 2
    with pytest.raises(RevisionConflict):
        await tally.set("n", 1, if_revision=revision)


async def test_a_reducer_may_change_the_old_value_in_place(store: Any, colour: Colour) -> None:
    def extend(old: list[int], new: list[int]) -> list[int]:
        old += new
        return old

    tally = merging(store, colour, {"n": extend})
    await tally.set("n", [1])
    await tally.set("n", [2])
    assert await tally.get("n") == [1, 2]


async def test_an_error_of_a_reducer_is_that_of_the_write(store: Any, colour: Colour) -> None:
    tally = merging(store, colour, {"n": add})
    await tally.set("n", 1)
    with pytest.raises(TypeError):
        await tally.commit(Set("a", 1), Set("n", "text"))
    assert await store.get_many(["n", "a"]) == {"n": 1}


async def test_a_condition_of_the_callers_own_is_a_conflict(store: Any, colour: Colour) -> None:
    tally = merging(store, colour, {"n": add})
    await tally.set("n", 1)
    for condition in (Check("n", 7), Check("a", 7)):
        with pytest.raises(RevisionConflict) as conflict:
            await tally.commit(Set("n", 1), condition)
        assert (conflict.value.key, conflict.value.expected) == (condition.key, 7)
    assert await tally.get("n") == 1


async def test_a_merge_keeps_the_ttl_the_writer_and_the_meta_of_the_write(store: Any, colour: Colour) -> None:
    tally = merging(store, colour, {"n": add})
    await tally.set("n", 1)
    await tally.commit(Set("n", 1, ttl=60, writer="w", meta={"a": "b"}))
    entry = await tally.get_entry("n")
    assert (entry.value, entry.writer, entry.meta) == (2, "w", {"a": "b"})
    assert entry.expires is not None


async def test_an_async_reducer_on_an_async_store() -> None:
    async def later(old: int, new: int) -> int:
        return old + new

    async with MemoryStore().aio as store:
        tally = apply_middleware(store, with_reducers({"n": later}))
        await tally.set("n", 1)
        await tally.set("n", 2)
        assert await tally.get("n") == 3
        with pytest.raises(TypeError, match="async"):
            tally.sync.set("n", 1)


def test_of_many_concurrent_merges_none_is_lost() -> None:
    with MemoryStore() as root:
        tally = apply_middleware(scoped(root, "s"), with_reducers({"n": add, "list": add}))
        barrier = threading.Barrier(8)

        def work(number: int) -> None:
            barrier.wait()
            for each in range(100):
                tally.commit(Set("n", 1), Set("list", [(number, each)]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert root.get("s:n") == 800
        assert sorted(root.get("s:list")) == [(number, each) for number in range(8) for each in range(100)]


def test_bad_reducers_are_refused() -> None:
    with pytest.raises(TypeError):
        with_reducers({"n": 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        with_reducers({}, default=1)  # type: ignore[arg-type]
    for key in ("", "notes:"):
        with pytest.raises(InvalidKey):
            with_reducers({key: add})
