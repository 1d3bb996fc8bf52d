"""Observing: the latest state of each key, however slow the reader."""

from __future__ import annotations

from typing import Any

from stigmergy.model import Change, Op, Set
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.transcript import heard, take

__all__ = ["Observing"]


class Observing:
    """G14 and G17 of the guarantees."""

    async def test_observe_starts_with_the_present_state_in_the_order_of_revisions(
        self, store: Any, colour: Colour
    ) -> None:
        for key in ["b", "a", "x", "b", "y"]:
            await store.set(key, await store.get(key, 0) + 1)
        await store.delete("y")
        watch = await store.observe("a", "b", "y", "z")
        await store.set("z", 1)

        changes = await take(colour, watch, 3)

        assert [(change.op, change.key, change.value, change.revision) for change in changes] == [
            (Op.SET, "a", 1, 2),
            (Op.SET, "b", 2, 4),
            (Op.SET, "z", 1, 7),
        ]
        assert [(change.old_value, change.old_revision) for change in changes] == [(None, 0)] * 3

    async def test_observe_of_a_prefix_starts_with_what_is_below_it(self, store: Any, colour: Colour) -> None:
        for key in ["a", "a:2", "b", "a:1", "a:", "ab"]:
            await store.set(key, 0)

        changes = await take(colour, await store.observe(prefix="a:"), 3)

        assert [change.key for change in changes] == ["a:2", "a:1", "a:"]

    async def test_observe_knows_the_commits_it_begins_with(self, store: Any, colour: Colour) -> None:
        await store.commit(Set("a", 1), Set("b", 2))

        assert [change.commit for change in await take(colour, await store.observe("a", "b"), 2)] == [2, 2]

    async def test_observe_keeps_only_the_newest_of_each_key(self, store: Any, colour: Colour) -> None:
        watch = await store.observe(prefix="k")
        for number in range(100):
            await store.commit(Set("ka", number), Set("kb", number))
        await heard(store, colour)
        changes = await colour.drain(watch)

        assert [(change.key, change.value) for change in changes] == [("ka", 99), ("kb", 99)]
        assert watch.get_nowait() is None
        await store.set("ka", 100)
        (last,) = await take(colour, watch, 1)
        assert (last.old_value, last.old_revision) == (99, changes[0].revision)

    async def test_observe_delivers_the_delete_of_what_it_delivered_and_nothing_else(
        self, store: Any, colour: Colour
    ) -> None:
        watch = await store.observe(prefix="k")
        await store.set("known", 1)
        await take(colour, watch, 1)
        await store.set("kept from it", 1)
        await store.set("known", 2)
        await store.delete("kept from it")
        await store.delete("known")
        await heard(store, colour)

        (change,) = await colour.drain(watch)

        assert (change.op, change.key, change.value) == (Op.DELETE, "known", None)
        assert (change.old_value, change.old_revision) == (1, 1)

    async def test_what_was_deleted_and_set_again_is_the_newest_only(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)
        watch = await store.observe("a")
        await take(colour, watch, 1)
        await store.delete("a")
        await store.set("a", 2)
        await heard(store, colour)

        (change,) = await colour.drain(watch)

        assert (change.op, change.value, change.old_value, change.old_revision) == (Op.SET, 2, 1, 1)

    async def test_observe_converges_on_the_truth_however_slow_it_is(self, store: Any, colour: Colour) -> None:
        watch = await store.observe(prefix="k")
        seen: dict[str, int] = {}
        last = 0
        for number in range(500):
            key = f"k{number * 31 % 17}"
            if number % 5 == 0:
                await store.delete(key)
            else:
                await store.set(key, number)
            if number % 7 == 0 and (change := watch.get_nowait()) is not None:
                last = _follow(seen, change, last)
        await heard(store, colour)
        for change in await colour.drain(watch):
            last = _follow(seen, change, last)

        assert seen == {key: entry.value for key, entry in (await store.scan("k")).items()}


def _follow(seen: dict[str, int], change: Change, last: int) -> int:
    """Do to `seen` what `change` says; return its revision."""
    assert change.revision > last
    assert seen.get(change.key) == change.old_value
    if change.op is Op.SET:
        seen[change.key] = change.value
    else:
        del seen[change.key]
    return change.revision
