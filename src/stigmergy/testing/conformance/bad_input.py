"""Bad input: a typed error, and nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import suppress
from enum import StrEnum
from functools import partial
from typing import Any

import pytest

from stigmergy.errors import Compacted, InvalidKey, RevisionConflict, StateError, StoreClosed
from stigmergy.flow import GetEntry
from stigmergy.model import Check, Delete, Entry, Set
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.transcript import refused, revisions, take, take_one, unchanged

__all__ = ["BadInput"]

Ask = Callable[[Any, Any], Any]

# What can be asked about one key. Whatever comes back can be awaited, a watch too.
KEYED: list[Ask] = [
    lambda store, key: store.get(key),
    lambda store, key: store.get(key, 7),
    lambda store, key: store.get_entry(key),
    lambda store, key: store.get_many(["a", key]),
    lambda store, key: store.set(key, 1),
    lambda store, key: store.set(key, 1, if_revision=0),
    lambda store, key: store.set(key, 1, ttl=60),
    lambda store, key: store.delete(key),
    lambda store, key: store.update(key, lambda value: value),
    lambda store, key: store.wait_for(key, lambda value: True, timeout=0),
    lambda store, key: store.watch(key),
    lambda store, key: store.watch("a", key),
    lambda store, key: store.observe("a", key),
    lambda store, key: store.scan(keys=["a", key]),
    lambda store, key: store.commit(Set("b", 1), Set(key, 1)),
    lambda store, key: store.commit(Set("b", 1), Delete(key)),
    lambda store, key: store.commit(Set("b", 1), Check(key, 0)),
    lambda store, key: store.run(_reading(key)),
]
PREFIXED: list[Ask] = [
    lambda store, prefix: store.scan(prefix),
    lambda store, prefix: store.scan("a", after=prefix),
    lambda store, prefix: store.watch(prefix=prefix),
    lambda store, prefix: store.observe(prefix=prefix),
]
BAD_PREFIXES = [42, b"a", ["a"], "k" * 513, "é" * 257, "\x00", "a\n", "a\x1fb", "\x7f", "\x80", "\x9f", "\ud800"]
BAD_KEYS = [*BAD_PREFIXES, None, ""]


class Topic(StrEnum):
    PLAN = "plan"


class Liar(str):
    """A `str` that is `plan`, and tells everybody that it is something else."""

    __slots__ = ()

    def __str__(self) -> str:
        return "other"

    def __eq__(self, other: object) -> bool:
        return other == "other"

    def __hash__(self) -> int:
        return hash("other")

    def isascii(self) -> bool:
        return False

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"other"


plans = pytest.mark.parametrize("key", [Topic.PLAN, Liar("plan")], ids=["StrEnum", "liar"])


class BadInput:
    """G6 of the guarantees."""

    # -- keys and prefixes ---------------------------------------------------------------------------------------------

    async def test_a_bad_key_is_refused_by_every_operation(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            await refused(InvalidKey, *[partial(ask, store, key) for ask in KEYED for key in BAD_KEYS])

    async def test_a_bad_prefix_is_refused_by_every_operation(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            await refused(InvalidKey, *[partial(ask, store, prefix) for ask in PREFIXED for prefix in BAD_PREFIXES])

    async def test_an_empty_prefix_is_every_key(self, store: Any, colour: Colour) -> None:
        watches = await store.watch(prefix=""), await store.observe(prefix="")
        await store.set("a", 1)

        assert list(await store.scan("")) == list(await store.scan(after="")) == ["a"]
        assert [(await take_one(colour, watch)).key for watch in watches] == ["a", "a"]

    @plans
    async def test_a_key_of_a_subclass_of_str_is_taken_as_its_plain_str(
        self, store: Any, colour: Colour, key: Any
    ) -> None:
        watch = await store.watch(prefix="", capacity=None)
        for ask in KEYED:
            await store.set("plan", 1)
            with suppress(RevisionConflict, TimeoutError):
                await ask(store, key)
        await store.set("last", 0)

        seen = [*await store.scan()]
        while (change := await take_one(colour, watch)).key != "last":
            seen.append(change.key)
        assert {type(each) for each in seen} == {str}
        assert set(seen) == {"plan", "b", "last"}

    @plans
    async def test_a_subclass_of_str_and_its_plain_str_are_one_key(self, store: Any, colour: Colour, key: Any) -> None:
        every, latest, below = await store.watch(key), await store.observe(key), await store.watch(prefix=key)

        assert await store.set(key, 1) == 1
        assert await store.set("plan", 2, if_revision=1) == 2

        assert await store.get(key) == await store.get("plan") == 2
        assert await store.get_many([key, "plan"]) == {"plan": 2}
        assert revisions(await take(colour, every, 2)) == [1, 2]
        assert revisions(await take(colour, below, 2)) == [1, 2]
        assert revisions(await take(colour, latest, 1)) in ([1], [2])
        assert list(await store.scan(key)) == list(await store.scan(keys=[key, "plan"])) == ["plan"]
        with pytest.raises(ValueError, match="twice"):
            await store.commit(Set(key, 3), Delete("plan"))
        with pytest.raises(RevisionConflict) as conflict:
            await store.set(key, 3, if_revision=7)
        assert type(conflict.value.key) is str
        assert await store.delete(key) is True
        assert await store.get("plan") is None

    async def test_one_key_in_place_of_many_is_refused(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            with pytest.raises(TypeError, match=r"write \[key\]"):
                await store.get_many("abc")
            with pytest.raises(TypeError, match=r"write \[key\]"):
                await store.scan(keys="abc")

    # -- numbers -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ttl", [0, 0.0, -0.0, -1, -0.001, math.nan, math.inf, -math.inf])
    async def test_a_ttl_that_is_not_positive_and_finite_is_refused(
        self, store: Any, colour: Colour, ttl: float
    ) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match="ttl must be a positive, finite number of seconds"):
                await store.set("a", 1, ttl=ttl)
            with pytest.raises(ValueError, match="ttl must be"):
                await store.commit(Set("b", 1), Set("a", 1, ttl=ttl))

    @pytest.mark.parametrize("ttl", ["5", "forever", b"keep", [5]])
    async def test_a_ttl_that_is_no_number_is_refused(self, store: Any, colour: Colour, ttl: Any) -> None:
        async with unchanged(store, colour):
            with pytest.raises(TypeError, match="ttl is a number of seconds or 'keep'"):
                await store.set("a", 1, ttl=ttl)

    @pytest.mark.parametrize("capacity", [0, -1, -1024])
    async def test_a_capacity_below_one_is_refused(self, store: Any, colour: Colour, capacity: int) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match=f"capacity must be at least 1, not {capacity}"):
                await store.watch("a", capacity=capacity)

    @pytest.mark.parametrize("overflow", ["block", "", None])
    async def test_an_overflow_that_does_not_exist_is_refused(self, store: Any, colour: Colour, overflow: Any) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match="overflow must be 'drop' or 'raise'"):
                await store.watch("a", overflow=overflow)

    async def test_a_watch_takes_either_keys_or_a_prefix(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            await refused(
                ValueError,
                lambda: store.watch(),
                lambda: store.observe(),
                lambda: store.watch("a", prefix="b"),
                lambda: store.observe("a", prefix="b"),
                lambda: store.watch("a", prefix=""),
                lambda: store.observe("a", prefix=""),
                match="either keys or a prefix",
            )

    async def test_a_scan_takes_keys_or_a_prefix(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match="keys or a prefix, not both"):
                await store.scan("a", keys=["a"])

    @pytest.mark.parametrize("limit", [0, -1])
    async def test_a_page_of_nothing_is_refused(self, store: Any, colour: Colour, limit: int) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match="limit must be at least 1"):
                await store.scan(limit=limit)

    @pytest.mark.parametrize("if_revision", [-1, -100])
    async def test_a_negative_if_revision_is_refused(self, store: Any, colour: Colour, if_revision: int) -> None:
        async with unchanged(store, colour):
            await refused(
                ValueError,
                lambda: store.set("a", 1, if_revision=if_revision),
                lambda: store.delete("a", if_revision=if_revision),
                lambda: store.delete("absent", if_revision=if_revision),
                lambda: store.commit(Set("a", 1, if_revision=if_revision)),
                lambda: store.commit(Set("a", 1), Delete("b", if_revision=if_revision)),
                lambda: store.commit(Set("a", 1), Check("b", if_revision)),
                match="if_revision must not be negative",
            )

    @pytest.mark.parametrize("if_revision", ["1", 1.0, b"1", [1]])
    async def test_an_if_revision_that_is_no_int_is_refused(self, store: Any, colour: Colour, if_revision: Any) -> None:
        async with unchanged(store, colour):
            await refused(
                TypeError,
                lambda: store.set("a", 1, if_revision=if_revision),
                lambda: store.delete("a", if_revision=if_revision),
                lambda: store.commit(Set("a", 1), Check("b", if_revision)),
                match="if_revision is an int",
            )

    async def test_a_check_has_a_revision(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            with pytest.raises(TypeError, match="if_revision is an int"):
                await store.commit(Set("a", 1), Check("a", None))  # type: ignore[arg-type]

    @pytest.mark.parametrize("since", [-1, "", "nonsense", "a.b", ".1", "1.-1"])
    async def test_a_since_that_names_no_moment_is_refused(self, store: Any, colour: Colour, since: Any) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match="since"):
                await store.watch("a", since=since)

    async def test_a_moment_that_the_store_never_saw_is_refused(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            for since in (2, 1_000_000):
                with pytest.raises(Compacted):
                    await store.watch("a", since=since)

    async def test_a_timeout_that_is_not_a_number_is_refused(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match="timeout must not be NaN"):
                await store.wait_for("a", lambda value: True, timeout=math.nan)

    # -- commits -------------------------------------------------------------------------------------------------------

    async def test_an_empty_commit_is_refused(self, store: Any, colour: Colour) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match="at least one write"):
                await store.commit()

    @pytest.mark.parametrize(
        "writes",
        [
            (Set("b", 1), Set("b", 2)),
            (Set("b", 1), Delete("b")),
            (Delete("b"), Delete("b")),
            (Set("a", 1), Set("b", 1), Check("b", 0), Set("a", 2)),
            (Set("plan", 1), Set(Topic.PLAN, 2)),
        ],
        ids=str,
    )
    async def test_a_key_written_twice_in_a_commit_is_refused(
        self, store: Any, colour: Colour, writes: tuple[Any, ...]
    ) -> None:
        async with unchanged(store, colour):
            with pytest.raises(ValueError, match="is written twice in one commit"):
                await store.commit(*writes)

    @pytest.mark.parametrize("write", ["a", None, ("a", 1), {"a": 1}, [Set("a", 1)], Set, GetEntry("a")])
    async def test_what_is_no_write_is_refused(self, store: Any, colour: Colour, write: Any) -> None:
        async with unchanged(store, colour):
            with pytest.raises(TypeError, match="a write is a Set, a Delete or a Check"):
                await store.commit(Set("a", 1), write)

    @pytest.mark.parametrize(
        ("meta", "error"),
        [
            ({"trace": "x" * 1020}, ValueError),
            ({"é" * 512: "x"}, ValueError),
            ({str(number): "x" * 10 for number in range(100)}, ValueError),
            ({"trace": 1}, TypeError),
            ({1: "trace"}, TypeError),
            ({"trace": None}, TypeError),
            ([("trace", "1")], TypeError),
            ("trace", TypeError),
        ],
    )
    async def test_a_meta_that_is_not_a_small_mapping_of_texts_is_refused(
        self, store: Any, colour: Colour, meta: Any, error: type[Exception]
    ) -> None:
        async with unchanged(store, colour):
            for write in (Set("a", 1, meta=meta), Delete("a", meta=meta)):
                with pytest.raises(error, match="meta"):
                    await store.commit(Set("b", 1), write)

    async def test_a_meta_of_one_kibibyte_is_taken(self, store: Any, colour: Colour) -> None:
        meta = {"trace": "x" * 1019}

        await store.commit(Set("a", 1, meta=meta))

        assert (await store.get_entry("a")).meta == meta

    @pytest.mark.parametrize("writer", ["", 7, "a\n", "\ud800"], ids=ascii)
    async def test_a_writer_that_is_no_name_is_refused(self, store: Any, colour: Colour, writer: Any) -> None:
        async with unchanged(store, colour):
            for write in (Set("a", 1, writer=writer), Delete("a", writer=writer)):
                with pytest.raises(InvalidKey):
                    await store.commit(Set("b", 1), write)

    # -- closed stores -------------------------------------------------------------------------------------------------

    async def test_every_operation_is_refused_by_a_closed_store(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)
        await store.close()

        await refused(StoreClosed, *[partial(ask, store, "a") for ask in [*KEYED, *PREFIXED]])

    async def test_bad_input_is_a_typed_error_on_a_closed_store_too(self, store: Any, colour: Colour) -> None:
        await store.close()

        await refused(StateError, *[partial(ask, store, "") for ask in KEYED])


def _reading(key: str) -> Generator[Any, Any, Entry | None]:
    return (yield from GetEntry(key))
