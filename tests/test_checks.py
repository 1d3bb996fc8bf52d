"""Bad input: a typed error, and nothing has changed."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from typing import Any

import pytest

from stigmergy import (
    Check,
    Compacted,
    Delete,
    Entry,
    Flow,
    GetEntry,
    InvalidKey,
    InvalidValue,
    RevisionConflict,
    Set,
    StateError,
    StoreClosed,
    StoreFull,
)

Ask = Callable[[Any, Any], Any]

# What can be asked about one key. Whatever comes back can be awaited, a watch too.
KEYED: dict[str, Ask] = {
    "get": lambda store, key: store.get(key),
    "get with a default": lambda store, key: store.get(key, 7),
    "get_entry": lambda store, key: store.get_entry(key),
    "get_many": lambda store, key: store.get_many(["a", key]),
    "set": lambda store, key: store.set(key, 1),
    "set if absent": lambda store, key: store.set(key, 1, if_revision=0),
    "set with a ttl": lambda store, key: store.set(key, 1, ttl=60),
    "delete": lambda store, key: store.delete(key),
    "update": lambda store, key: store.update(key, lambda value: value),
    "wait_for": lambda store, key: store.wait_for(key, lambda value: True, timeout=0),
    "watch": lambda store, key: store.watch(key),
    "watch several": lambda store, key: store.watch("a", key),
    "observe": lambda store, key: store.observe("a", key),
    "scan": lambda store, key: store.scan(keys=["a", key]),
    "commit a Set": lambda store, key: store.commit(Set("b", 1), Set(key, 1)),
    "commit a Delete": lambda store, key: store.commit(Set("b", 1), Delete(key)),
    "commit a Check": lambda store, key: store.commit(Set("b", 1), Check(key, 0)),
    "run": lambda store, key: store.run(reading(key)),
}
PREFIXED: dict[str, Ask] = {
    "scan": lambda store, prefix: store.scan(prefix),
    "scan after": lambda store, prefix: store.scan("a", after=prefix),
    "watch": lambda store, prefix: store.watch(prefix=prefix),
    "observe": lambda store, prefix: store.observe(prefix=prefix),
}
BAD_PREFIXES = [42, b"a", ["a"], "k" * 513, "é" * 257, "\x00", "a\n", "a\x1fb", "\x7f", "\x80", "\x9f", "\ud800"]
BAD_KEYS = [*BAD_PREFIXES, None, ""]

keyed = pytest.mark.parametrize("ask", KEYED.values(), ids=KEYED)
prefixed = pytest.mark.parametrize("ask", PREFIXED.values(), ids=PREFIXED)


def reading(key: str) -> Flow[Entry | None]:
    return (yield from GetEntry(key))


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


class Uncopyable:
    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise ZeroDivisionError


@asynccontextmanager
async def unchanged(store: Any) -> AsyncIterator[None]:
    """Nothing changes in here: no revision, no entry, and no open watch hears of anything."""
    if await store.get("a") is None:
        await store.set("a", {"old": [1]})
    every, latest = store.watch(prefix=""), store.observe("a")
    latest.get_nowait()
    before = await store.scan()

    yield

    after = await store.scan()
    assert (after.revision, after.bookmark) == (before.revision, before.bookmark)
    assert dict(after) == dict(before)
    assert (every.get_nowait(), latest.get_nowait()) == (None, None)
    assert await store.set("a", 2) == before.revision + 1
    assert (every.get_nowait().revision, latest.get_nowait().revision) == (before.revision + 1, before.revision + 1)


# -- keys and prefixes -------------------------------------------------------------------------------------------------


@keyed
async def test_a_bad_key_is_refused_by_every_operation(store: Any, ask: Ask) -> None:
    async with unchanged(store):
        for key in BAD_KEYS:
            with pytest.raises(InvalidKey):
                await ask(store, key)


@prefixed
async def test_a_bad_prefix_is_refused_by_every_operation(store: Any, ask: Ask) -> None:
    async with unchanged(store):
        for prefix in BAD_PREFIXES:
            with pytest.raises(InvalidKey):
                await ask(store, prefix)


@prefixed
async def test_an_empty_prefix_is_every_key(store: Any, ask: Ask) -> None:
    await ask(store, "")


@pytest.mark.parametrize("key", [Topic.PLAN, Liar("plan")], ids=["StrEnum", "liar"])
@keyed
async def test_a_key_of_a_subclass_of_str_is_taken_as_its_plain_str(
    store: Any, ask: Ask, key: Any, colour: Any
) -> None:
    await store.set("plan", 1)
    watch = store.watch(prefix="")

    with suppress(RevisionConflict):
        await ask(store, key)

    for each in (*await store.scan(), *(change.key for change in await colour.drain(watch))):
        assert type(each) is str
        assert each in ("plan", "b")


@pytest.mark.parametrize("key", [Topic.PLAN, Liar("plan")], ids=["StrEnum", "liar"])
async def test_a_subclass_of_str_and_its_plain_str_are_one_key(store: Any, key: Any, colour: Any) -> None:
    every, latest, below = store.watch(key), store.observe(key), store.watch(prefix=key)

    assert await store.set(key, 1) == 1
    assert await store.set("plan", 2, if_revision=1) == 2

    assert await store.get(key) == await store.get("plan") == 2
    assert await store.get_many([key, "plan"]) == {"plan": 2}
    assert [change.revision for change in await colour.drain(every)] == [1, 2]
    assert [change.revision for change in await colour.drain(below)] == [1, 2]
    assert [change.revision for change in await colour.drain(latest)] == [2]
    assert list(await store.scan(key)) == list(await store.scan(keys=[key, "plan"])) == ["plan"]
    with pytest.raises(ValueError, match="twice"):
        await store.commit(Set(key, 3), Delete("plan"))
    with pytest.raises(RevisionConflict) as conflict:
        await store.set(key, 3, if_revision=7)
    assert type(conflict.value.key) is str
    assert await store.delete(key) is True
    assert await store.get("plan") is None


async def test_one_key_in_place_of_many_is_refused(store: Any) -> None:
    async with unchanged(store):
        with pytest.raises(TypeError, match=r"write \[key\]"):
            await store.get_many("abc")
        with pytest.raises(TypeError, match=r"write \[key\]"):
            await store.scan(keys="abc")


# -- values ------------------------------------------------------------------------------------------------------------


def too_deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(50_000):
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
    store: Any, make: Callable[[], Any], type: str
) -> None:
    async with unchanged(store):
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


async def test_a_copier_may_say_itself_which_value_it_refuses(new_store: Any) -> None:
    def only_texts(value: Any) -> Any:
        if value == 7:
            raise InvalidValue("somewhere", "seven")
        return value

    store = new_store(copy=only_texts)
    async with unchanged(store):
        with pytest.raises(InvalidValue, match="seven"):
            await store.set("b", 7)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [0, 0.0, -0.0, -1, -0.001, math.nan, math.inf, -math.inf])
async def test_a_ttl_that_is_not_positive_and_finite_is_refused(store: Any, ttl: float) -> None:
    async with unchanged(store):
        with pytest.raises(ValueError, match="ttl must be a positive, finite number of seconds"):
            await store.set("a", 1, ttl=ttl)
        with pytest.raises(ValueError, match="ttl must be"):
            await store.commit(Set("b", 1), Set("a", 1, ttl=ttl))


@pytest.mark.parametrize("ttl", ["5", "forever", b"keep", [5]])
async def test_a_ttl_that_is_no_number_is_refused(store: Any, ttl: Any) -> None:
    async with unchanged(store):
        with pytest.raises(TypeError, match="ttl is a number of seconds or 'keep'"):
            await store.set("a", 1, ttl=ttl)


@pytest.mark.parametrize("capacity", [0, -1, -1024])
async def test_a_capacity_below_one_is_refused(store: Any, capacity: int) -> None:
    async with unchanged(store):
        with pytest.raises(ValueError, match=f"capacity must be at least 1, not {capacity}"):
            store.watch("a", capacity=capacity)


@pytest.mark.parametrize("overflow", ["block", "", None])
async def test_an_overflow_that_does_not_exist_is_refused(store: Any, overflow: Any) -> None:
    async with unchanged(store):
        with pytest.raises(ValueError, match="overflow must be 'drop' or 'raise'"):
            store.watch("a", overflow=overflow)


async def test_a_watch_takes_either_keys_or_a_prefix(store: Any) -> None:
    async with unchanged(store):
        for ask in (
            lambda: store.watch(),
            lambda: store.observe(),
            lambda: store.watch("a", prefix="b"),
            lambda: store.observe("a", prefix="b"),
            lambda: store.watch("a", prefix=""),
            lambda: store.observe("a", prefix=""),
        ):
            with pytest.raises(ValueError, match="either keys or a prefix"):
                ask()


async def test_a_scan_takes_keys_or_a_prefix(store: Any) -> None:
    async with unchanged(store):
        with pytest.raises(ValueError, match="keys or a prefix, not both"):
            await store.scan("a", keys=["a"])


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_page_of_nothing_is_refused(store: Any, limit: int) -> None:
    async with unchanged(store):
        with pytest.raises(ValueError, match="limit must be at least 1"):
            await store.scan(limit=limit)


@pytest.mark.parametrize("if_revision", [-1, -100])
async def test_a_negative_if_revision_is_refused(store: Any, if_revision: int) -> None:
    async with unchanged(store):
        for ask in (
            lambda: store.set("a", 1, if_revision=if_revision),
            lambda: store.delete("a", if_revision=if_revision),
            lambda: store.delete("absent", if_revision=if_revision),
            lambda: store.commit(Set("a", 1, if_revision=if_revision)),
            lambda: store.commit(Set("a", 1), Delete("b", if_revision=if_revision)),
            lambda: store.commit(Set("a", 1), Check("b", if_revision)),
        ):
            with pytest.raises(ValueError, match="if_revision must not be negative"):
                await ask()


@pytest.mark.parametrize("if_revision", ["1", 1.0, b"1", [1]])
async def test_an_if_revision_that_is_no_int_is_refused(store: Any, if_revision: Any) -> None:
    async with unchanged(store):
        for ask in (
            lambda: store.set("a", 1, if_revision=if_revision),
            lambda: store.delete("a", if_revision=if_revision),
            lambda: store.commit(Set("a", 1), Check("b", if_revision)),
        ):
            with pytest.raises(TypeError, match="if_revision is an int"):
                await ask()


async def test_a_check_has_a_revision(store: Any) -> None:
    async with unchanged(store):
        with pytest.raises(TypeError, match="if_revision is an int"):
            await store.commit(Set("a", 1), Check("a", None))  # type: ignore[arg-type]


@pytest.mark.parametrize("since", [-1, "", "nonsense", "a.b", ".1", "1.-1"])
async def test_a_since_that_names_no_moment_is_refused(store: Any, since: Any) -> None:
    async with unchanged(store):
        with pytest.raises(ValueError, match="since"):
            store.watch("a", since=since)


async def test_a_moment_that_the_store_never_saw_is_refused(store: Any, new_store: Any) -> None:
    other = await new_store().scan()
    async with unchanged(store):
        for since in (2, 1_000_000, other.bookmark):
            with pytest.raises(Compacted):
                store.watch("a", since=since)


async def test_a_timeout_that_is_not_a_number_is_refused(store: Any) -> None:
    async with unchanged(store):
        with pytest.raises(ValueError, match="timeout must not be NaN"):
            await store.wait_for("a", lambda value: True, timeout=math.nan)


# -- commits -----------------------------------------------------------------------------------------------------------


async def test_an_empty_commit_is_refused(store: Any) -> None:
    async with unchanged(store):
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
)
async def test_a_key_written_twice_in_a_commit_is_refused(store: Any, writes: tuple[Any, ...]) -> None:
    async with unchanged(store):
        with pytest.raises(ValueError, match="is written twice in one commit"):
            await store.commit(*writes)


@pytest.mark.parametrize("write", ["a", None, ("a", 1), {"a": 1}, [Set("a", 1)], Set, GetEntry("a")])
async def test_what_is_no_write_is_refused(store: Any, write: Any) -> None:
    async with unchanged(store):
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
    store: Any, meta: Any, error: type[Exception]
) -> None:
    async with unchanged(store):
        for write in (Set("a", 1, meta=meta), Delete("a", meta=meta)):
            with pytest.raises(error, match="meta"):
                await store.commit(Set("b", 1), write)


async def test_a_meta_of_one_kibibyte_is_taken(store: Any) -> None:
    meta = {"trace": "x" * 1019}

    await store.commit(Set("a", 1, meta=meta))

    assert (await store.get_entry("a")).meta == meta


@pytest.mark.parametrize("writer", ["", 7, "a\n", "\ud800"])
async def test_a_writer_that_is_no_name_is_refused(store: Any, writer: Any) -> None:
    async with unchanged(store):
        for write in (Set("a", 1, writer=writer), Delete("a", writer=writer)):
            with pytest.raises(InvalidKey):
                await store.commit(Set("b", 1), write)


# -- limits and closed stores ------------------------------------------------------------------------------------------


async def test_more_entries_than_fit_are_refused(new_store: Any) -> None:
    store = new_store(max_entries=2)
    await store.set("b", 1)

    async with unchanged(store):
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


@keyed
async def test_every_operation_about_a_key_is_refused_by_a_closed_store(store: Any, ask: Ask) -> None:
    await store.set("a", 1)
    await store.close()

    with pytest.raises(StoreClosed):
        await ask(store, "a")


@prefixed
async def test_every_operation_about_a_prefix_is_refused_by_a_closed_store(store: Any, ask: Ask) -> None:
    await store.set("a", 1)
    await store.close()

    with pytest.raises(StoreClosed):
        await ask(store, "a")


@keyed
async def test_bad_input_is_a_typed_error_on_a_closed_store_too(store: Any, ask: Ask) -> None:
    await store.close()

    with pytest.raises(StateError):
        await ask(store, "")
