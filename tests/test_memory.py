"""What is particular to the in-memory store: its options, what it costs, and that nothing in it is ever late.

What every store does is in `stigmergy.testing`, and `test_conformance.py` has it judge this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stigmergy import Compacted, Delete, InvalidValue, MemoryStore, Op, Set, StoreFull
from stigmergy.testing.conformance.transcript import revisions, unchanged


@pytest.mark.parametrize("options", [{"history": -1}, {"max_entries": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MemoryStore(**options)  # type: ignore[arg-type]


async def test_a_change_is_there_when_the_write_returns(store: Any) -> None:
    every, latest = await store.watch("a"), await store.observe("a")
    await store.set("a", 1)

    assert every.get_nowait().value == latest.get_nowait().value == 1
    assert (every.get_nowait(), latest.get_nowait()) == (None, None)


async def test_scan_pages_through_thousands_of_keys(store: Any) -> None:
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


async def test_the_order_of_a_thousand_keys_follows_creations_and_deletions(store: Any) -> None:
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


# -- ttl ---------------------------------------------------------------------------------------------------------------


async def test_an_entry_is_there_until_its_deadline_and_not_at_it(new_store: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    await store.set("a", 1, ttl=10)
    clock.advance(9.999)
    assert await store.get("a") == 1
    assert (await store.get_entry("a")).value == 1

    clock.advance(0.001)
    assert await store.get("a") is None


async def test_a_timer_expires_what_nobody_asks_for(store: Any, colour: Any) -> None:
    watch = await store.watch("soon")
    await store.set("late", 1, ttl=3600)
    await store.set("soon", 1, ttl=0.01)

    changes = [await colour.get(watch), await colour.get(watch)]

    assert [(change.op, change.expired) for change in changes] == [(Op.SET, False), (Op.DELETE, True)]


async def test_renewing_one_entry_for_ever_costs_no_memory(new_store: Any, colour: Any, clock: Any) -> None:
    store = new_store(clock=clock)
    for _ in range(5000):
        await store.set("lease", 1, ttl=100)

    assert len(colour.raw(store)._deadlines.heap) < 200
    clock.advance(100)
    assert await store.get("lease") is None


# -- copy --------------------------------------------------------------------------------------------------------------


async def test_copy_none_shares_live_objects(new_store: Any) -> None:
    store = new_store(copy=None)
    value = [1]
    await store.set("a", value)

    assert await store.get("a") is value
    assert "isolated" not in store.capabilities


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


async def test_a_copier_may_say_itself_which_value_it_refuses(new_store: Any, colour: Any) -> None:
    def only_texts(value: Any) -> Any:
        if value == 7:
            raise InvalidValue("somewhere", "seven")
        return value

    store = new_store(copy=only_texts)
    async with unchanged(store, colour):
        with pytest.raises(InvalidValue, match="seven"):
            await store.set("b", 7)


class Uncopyable:
    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise ZeroDivisionError


def too_deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("make", "type"),
    [
        (lambda: (number for number in range(3)), "generator"),
        (lambda: [iter("ab"), (number for number in range(3))], "list"),
        (lambda: {"a": (Uncopyable(),)}, "dict"),
        (Uncopyable, "Uncopyable"),
        (too_deep, "list"),
    ],
)
async def test_a_value_that_cannot_be_copied_is_refused_by_every_write(
    store: Any, colour: Any, make: Callable[[], Any], type: str
) -> None:
    async with unchanged(store, colour):
        for write in (
            lambda: store.set("b", make()),
            lambda: store.set("b", make(), if_revision=0),
            lambda: store.set("b", make(), ttl=1),
            lambda: store.update("b", lambda _: make()),
            lambda: store.commit(Set("a", 1), Set("b", make())),
        ):
            with pytest.raises(InvalidValue) as refused:
                await write()
            assert (refused.value.key, refused.value.type) == ("b", type)
            assert refused.value.__cause__ is not None


# -- history -----------------------------------------------------------------------------------------------------------


async def test_since_beyond_what_is_remembered_is_compacted(new_store: Any, colour: Any) -> None:
    store = new_store(history=10)
    for number in range(25):
        await store.set("a", number)

    with pytest.raises(Compacted) as compacted:
        await store.watch("a", since=14)
    assert (compacted.value.since, compacted.value.oldest) == (14, 16)
    assert revisions(await colour.drain(await store.watch("a", since=15))) == list(range(16, 26))


async def test_history_zero_remembers_nothing_but_the_present(new_store: Any) -> None:
    store = new_store(history=0)
    revision = await store.set("a", 1)

    with pytest.raises(Compacted):
        await store.watch("a", since=0)
    watch = await store.watch("a", since=revision)
    await store.set("a", 2)
    assert watch.get_nowait().value == 2
    assert "resumable" not in store.capabilities


# -- max_entries -------------------------------------------------------------------------------------------------------


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


async def test_more_entries_than_fit_are_refused(new_store: Any, colour: Any) -> None:
    store = new_store(max_entries=2)
    await store.set("b", 1)

    async with unchanged(store, colour):
        for write in (
            lambda: store.set("c", 1),
            lambda: store.set("c", 1, if_revision=0),
            lambda: store.set("c", 1, ttl=1),
            lambda: store.update("c", lambda _: 1),
            lambda: store.commit(Set("a", 1), Set("c", 1)),
            lambda: store.commit(Delete("a"), Set("c", 1), Set("d", 1)),
            lambda: store.commit(Delete("absent"), Set("c", 1)),
        ):
            with pytest.raises(StoreFull) as full:
                await write()
            assert full.value.max_entries == 2


@given(
    st.lists(st.text("ab/", max_size=5), max_size=12),
    st.lists(st.text("ab/", min_size=1, max_size=6), max_size=8),
    st.data(),
)
def test_a_watch_of_a_prefix_hears_of_exactly_the_keys_that_begin_with_it(
    prefixes: list[str], keys: list[str], data: st.DataObject
) -> None:
    with MemoryStore() as store:
        watches = [(prefix, store.watch(prefix=prefix)) for prefix in prefixes]
        for prefix, watch in watches:
            if data.draw(st.booleans()):  # the prefix may be watched by another one still
                watch.close()
                watches.remove((prefix, watch))
                break
        for key in keys:
            store.set(key, 1)
        for prefix, watch in watches:
            heard = [change.key for change in iter(watch.get_nowait, None)]
            assert heard == [key for key in keys if key.startswith(prefix)], prefix
