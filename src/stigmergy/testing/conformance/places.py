"""Places: what a store keeps outside of itself, where the durable leave it behind, and the distributed share it.

The second store that a test makes opens the place of the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stigmergy.errors import RevisionConflict, StoreClosed
from stigmergy.model import Delete, Set
from stigmergy.store import Store
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.concurrency import THREADS, in_threads
from stigmergy.testing.conformance.transcript import needs, revisions, take
from stigmergy.testing.report import Figures

__all__ = ["Places"]


class Places:
    """What "durable" and "distributed" declare."""

    async def test_what_was_written_is_there_after_closing_and_opening_again(
        self, store: Any, colour: Colour, new_store: Callable[[], Any]
    ) -> None:
        needs(store, "durable")
        await store.commit(Set("a", {"b": [1, None]}, writer="planner", meta={"trace": "1"}), Set("c", None))
        await store.set("gone", 1)
        await store.delete("gone")
        before = await store.scan()
        await store.close()

        again = new_store()

        after = await again.scan()
        assert dict(after) == dict(before)
        assert (after.revision, after.bookmark) == (before.revision, before.bookmark)
        with pytest.raises(StoreClosed):
            await store.get("a")

    async def test_revisions_go_on_after_opening_again_and_never_come_back(
        self, store: Any, colour: Colour, new_store: Callable[[], Any]
    ) -> None:
        needs(store, "durable")
        old = await store.set("a", 1)
        await store.delete("a")
        await store.close()

        again = new_store()

        assert await again.set("a", 1) == 3
        with pytest.raises(RevisionConflict):
            await again.set("a", 2, if_revision=old)
        await again.delete("a")
        await again.close()
        assert await new_store().set("b", 1) == 5

    async def test_a_bookmark_resumes_after_opening_again(
        self, store: Any, colour: Colour, new_store: Callable[[], Any]
    ) -> None:
        needs(store, "durable", "resumable")
        await store.set("a", 1)
        bookmark = (await store.scan()).bookmark
        await store.set("a", 2)
        await store.commit(Delete("a"), Set("b", 3))
        await store.close()

        again = new_store()
        watch = await again.watch(prefix="", since=bookmark)
        await again.set("a", 4)

        changes = await take(colour, watch, 4)
        assert revisions(changes) == [2, 3, 4, 5]
        assert [(change.key, change.value, change.old_value) for change in changes] == [
            ("a", 2, 1),
            ("a", None, 2),
            ("b", 3, None),
            ("a", 4, None),
        ]

    async def test_a_deadline_is_kept_while_nobody_has_the_place_open(
        self, store: Any, colour: Colour, clock: Any, new_store: Callable[[], Any]
    ) -> None:
        needs(store, "durable")
        await store.set("a", 1, ttl=clock.unit)
        await store.set("b", 1, ttl=3600)
        await store.close()
        clock.advance(1.5 * clock.unit)

        again = new_store()

        assert await again.get("a") is None
        assert await again.get("b") == 1
        assert (await again.scan()).revision == 3

    async def test_closing_one_store_leaves_the_others_of_its_place_open(
        self, store: Any, colour: Colour, new_store: Callable[[], Any]
    ) -> None:
        needs(store, "distributed")
        other = new_store()
        watch = await other.watch("a")
        await store.set("a", 1)
        await store.close()

        await other.set("a", 2)

        assert revisions(await take(colour, watch, 2)) == [1, 2]

    async def test_stores_of_one_place_see_each_others_writes(
        self, store: Any, colour: Colour, new_store: Callable[[], Any]
    ) -> None:
        needs(store, "distributed")
        other = new_store()

        assert await store.set("a", 1) == 1
        assert await other.get("a") == 1
        assert await other.set("a", 2, if_revision=1) == 2
        with pytest.raises(RevisionConflict):
            await store.set("a", 3, if_revision=1)
        assert await store.delete("a") is True
        assert await other.delete("a") is False
        assert (await store.scan()).bookmark == (await other.scan()).bookmark

    async def test_watches_hear_of_the_writes_of_other_stores_of_their_place(
        self, store: Any, colour: Colour, new_store: Callable[[], Any]
    ) -> None:
        needs(store, "distributed")
        other = new_store()
        mine, theirs = await store.watch(prefix=""), await other.watch(prefix="")
        for number in range(10):
            await (store, other)[number % 2].set("a", number)

        for watch in (mine, theirs):
            changes = await take(colour, watch, 10)
            assert [change.value for change in changes] == list(range(10))
            assert [change.old_value for change in changes] == [None, *range(9)]

    def test_updates_through_several_stores_of_one_place_add_up_exactly(
        self, new_sync_store: Callable[[], Store], figures: Figures
    ) -> None:
        first = new_sync_store()
        needs(first, "distributed")
        stores = [first, *(new_sync_store() for _ in range(THREADS - 1))]
        each = 25

        def add(store: Store) -> Callable[[], None]:
            def adds() -> None:
                for _ in range(each):
                    store.update("n", lambda value: value + 1, default=0)

            return adds

        in_threads(*map(add, stores))

        assert first.get("n") == THREADS * each
        figures.note("updates through several stores that added up", THREADS * each)
