"""Writes: revisions, conditions, commits, updates."""

from __future__ import annotations

from typing import Any

import pytest

from stigmergy.errors import RevisionConflict
from stigmergy.model import Check, Delete, Set
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.transcript import take, unchanged

__all__ = ["Writes"]


class Writes:
    """G1 to G4 of the guarantees, and G5 of one writer."""

    async def test_every_write_that_changes_something_takes_the_next_revision(self, store: Any, colour: Colour) -> None:
        assert await store.set("a", 1) == 1
        assert await store.set("b", 1) == 2
        assert await store.delete("a") is True
        assert await store.delete("a") is False
        assert await store.set("a", 1) == 4
        assert await store.set("a", 1) == 5
        assert (await store.get_entry("a")).revision == (await store.scan()).revision == 5

    async def test_delete_says_whether_the_key_was_there(self, store: Any, colour: Colour) -> None:
        await store.set("a", None)

        assert [await store.delete("a"), await store.delete("a")] == [True, False]
        assert await store.get_entry("a") is None

    async def test_deleting_an_absent_key_changes_nothing(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            assert await store.delete("absent") is False
            assert await store.commit(Delete("absent")) == (None,)

    # -- conditions ----------------------------------------------------------------------------------------------------

    async def test_a_conditional_set_succeeds_only_at_its_revision(self, store: Any, colour: Colour) -> None:
        revision = await store.set("a", 1)

        assert await store.set("a", 2, if_revision=revision) == 2
        with pytest.raises(RevisionConflict) as conflict:
            await store.set("a", 3, if_revision=revision)

        assert (conflict.value.key, conflict.value.expected, conflict.value.actual) == ("a", 1, 2)
        assert await store.get("a") == 2

    async def test_if_revision_zero_means_the_key_must_be_absent(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1, if_revision=0)

        with pytest.raises(RevisionConflict):
            await store.set("a", 2, if_revision=0)
        assert await store.get("a") == 1

    async def test_a_conditional_delete_succeeds_only_at_its_revision(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)

        with pytest.raises(RevisionConflict):
            await store.delete("a", if_revision=7)
        with pytest.raises(RevisionConflict):
            await store.delete("b", if_revision=7)
        assert await store.delete("a", if_revision=1) is True
        assert await store.delete("a", if_revision=0) is False

    async def test_after_delete_and_recreate_an_old_revision_never_matches_again(
        self, store: Any, colour: Colour
    ) -> None:
        old: list[int] = []
        for _ in range(20):
            old.append(await store.set("a", 1))
            await store.delete("a")
            old.append(await store.set("a", 1))
            for revision in old[:-1]:
                with pytest.raises(RevisionConflict):
                    await store.set("a", 2, if_revision=revision)
            await store.delete("a")

        assert old == sorted(set(old))

    # -- commits -------------------------------------------------------------------------------------------------------

    async def test_a_commit_takes_consecutive_revisions_in_the_order_given(self, store: Any, colour: Colour) -> None:
        await store.set("gone", 0)

        revisions = await store.commit(Set("b", 1), Check("x", 0), Delete("gone"), Delete("never"), Set("a", 2))

        assert revisions == (2, None, 3, None, 4)
        assert await store.get_many(["a", "b", "gone"]) == {"a": 2, "b": 1}
        assert [(await store.get_entry(key)).revision for key in "ab"] == [4, 2]

    @pytest.mark.parametrize(
        "failing",
        [Check("a", 9), Check("a", 0), Check("absent", 1), Set("a", 5, if_revision=9), Delete("a", if_revision=9)],
        ids=repr,
    )
    async def test_a_commit_with_one_condition_that_fails_changes_nothing(
        self, store: Any, colour: Colour, failing: Any
    ) -> None:
        async with unchanged(store, colour):
            with pytest.raises(RevisionConflict) as conflict:
                await store.commit(Set("b", 2), failing, Set("c", 3))

        actual = 1 if failing.key == "a" else 0
        assert conflict.value.args == (failing.key, failing.if_revision, actual)

    async def test_a_commit_of_checks_that_hold_changes_nothing(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)

        async with unchanged(store, colour):
            assert await store.commit(Check("a", 1), Check("absent", 0)) == (None, None)

    async def test_a_key_may_be_checked_and_written_in_one_commit(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)

        assert await store.commit(Check("a", 1), Set("a", 2)) == (None, 2)
        with pytest.raises(RevisionConflict):
            await store.commit(Set("a", 3), Check("a", 3))

    async def test_changes_of_one_commit_share_its_last_revision(self, store: Any, colour: Colour) -> None:
        watch = await store.watch(prefix="")
        await store.set("x", 0)
        await store.commit(Set("a", 1), Check("y", 0), Delete("x"), Set("b", 2))

        changes = await take(colour, watch, 4)

        assert [(change.key, change.revision, change.commit) for change in changes] == [
            ("x", 1, 1),
            ("a", 2, 4),
            ("x", 3, 4),
            ("b", 4, 4),
        ]

    async def test_a_commit_carries_writer_and_meta(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a")
        await store.commit(Set("a", 1, writer="planner", meta={"trace": "1"}))
        entry = await store.get_entry("a")
        await store.commit(Delete("a", writer="worker", meta={"trace": "2"}))
        await store.set("a", 2)

        changes = await take(colour, watch, 3)

        assert (entry.writer, entry.meta) == ("planner", {"trace": "1"})
        assert [(change.writer, change.meta) for change in changes] == [
            ("planner", {"trace": "1"}),
            ("worker", {"trace": "2"}),
            (None, None),
        ]

    async def test_a_commit_may_have_many_writes(self, store: Any, colour: Colour) -> None:
        revisions = await store.commit(*[Set(f"k{number}", number) for number in range(100)])

        assert revisions == tuple(range(1, 101))
        assert len(await store.scan("k")) == 100

    # -- updates -------------------------------------------------------------------------------------------------------

    async def test_update_returns_the_new_value(self, store: Any, colour: Colour) -> None:
        assert await store.update("n", lambda value: value + 1, default=0) == 1
        assert await store.update("n", lambda value: value + 1, default=0) == 2
        assert await store.get("n") == 2

    async def test_update_runs_again_when_somebody_wrote_in_between(self, store: Any, colour: Colour) -> None:
        await store.set("n", 0)
        seen = []

        def add(value: int) -> int:
            seen.append(value)
            if len(seen) == 1:
                colour.raw(store).set("n", 10)
            return value + 1

        assert await store.update("n", add) == 11
        assert seen == [0, 10]
        assert await store.get("n") == 11

    async def test_update_of_an_absent_key_runs_again_when_somebody_created_it(
        self, store: Any, colour: Colour
    ) -> None:
        seen = []

        def add(value: int) -> int:
            seen.append(value)
            if len(seen) == 1:
                colour.raw(store).set("n", 10)
            return value + 1

        assert await store.update("n", add, default=0) == 11
        assert seen == [0, 10]

    async def test_update_writes_nothing_when_the_function_raises(self, store: Any, colour: Colour) -> None:
        await store.set("a", 0)

        async with unchanged(store, colour):
            with pytest.raises(ZeroDivisionError):
                await store.update("a", lambda value: 1 // value)
