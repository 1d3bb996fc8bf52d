"""Values and keys: what a store takes comes back as it was, and is nobody else's.

The other laws use plain JSON values only (None, bool, int, float, str, list, dict with str keys), which every store
takes. What else it takes is the store's choice; here it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum, IntEnum, StrEnum
from typing import Any, ClassVar

import pytest

from stigmergy.errors import InvalidKey, InvalidValue
from stigmergy.model import Set
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.transcript import needs, refused, take, take_one, unchanged

__all__ = ["Values"]

PLAIN = [
    *[None, True, False, 0, -1, 2**53, 0.0, -1.5, 1e300, 5e-324, "", "text", "é\U0001f600\x00\n"],
    *[[], {}, [1, [2, [3]]], {"a": {"b": [None]}}, {"": 0}, [{"x": 1.5}, "1", 1, 1.0, True, None]],
    {"b": 1, "a": 2},
]


class _Colour(Enum):
    RED = 1


class _Number(IntEnum):
    ONE = 1


class _Word(StrEnum):
    ONE = "one"


class _Text(str):
    __slots__ = ()


class _Items(list[int]):
    pass


def _deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(10_000):
        value = [value]
    return value


def _cyclic() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


# Each is made anew for every use.
HOSTILE: dict[str, Callable[[], Any]] = {
    "NaN": lambda: math.nan,
    "infinite": lambda: math.inf,
    "minus infinite": lambda: [-math.inf],
    "minus zero": lambda: -0.0,
    "2**70": lambda: 2**70,
    "a huge int": lambda: 10**5000,
    "bytes": lambda: b"\x00\xff",
    "bytearray": lambda: bytearray(b"abc"),
    "complex": lambda: 1j,
    "tuple": lambda: (1, [2]),
    "tuple inside": lambda: {"a": [(1, 2)]},
    "set": lambda: {1, "a"},
    "frozenset": lambda: frozenset({1}),
    "dict with int keys": lambda: {1: "a"},
    "dict with equal texts for keys": lambda: {1: "a", "1": "b"},
    "dict with None, bool and float keys": lambda: {None: 1, True: 2, 1.5: 3},
    "enum": lambda: _Colour.RED,
    "int enum": lambda: [_Number.ONE],
    "str enum": lambda: _Word.ONE,
    "str enum for a key": lambda: {_Word.ONE: 1},
    "subclass of str": lambda: _Text("a"),
    "subclass of list": lambda: _Items([1]),
    "lone surrogate": lambda: "\ud800",
    "lone surrogate for a key": lambda: {"\udfff": 1},
    "depth 10,000": _deep,
    "itself inside": _cyclic,
    "looks like a class": lambda: {"__class__": "builtins.object", "__module__": "os", "value": [1]},
    "looks like a constructor": lambda: {"lc": 2, "type": "constructor", "id": ["os", "system"], "kwargs": {}},
    "looks like a reference": lambda: {"$ref": "#", "$type": "System.Object", "py/object": "os.system"},
    "looks like a pickle": lambda: "cos\nsystem\n(S'true'\ntR.",
    "object": object,
    "class": lambda: dict,
    "function": lambda: len,
    "generator": lambda: (number for number in range(3)),
    "exception": lambda: ValueError("a"),
}

KEYS = [
    *[
        "a",
        "ab",
        "a:b",
        "a::b",
        "a.b",
        "a/b",
        "a%",
        "a_",
        "a*",
        "a?",
        "a\\",
        "a'b",
        'a"b',
        "a b",
        " ",
        "*",
        ">",
        "%",
        "_",
    ],
    *["A", "b", "[ab]", "a{b}", "é", "e\u0301", "\u212b", "\xc5", "\u00a0", "\u200b", "\u2028", "\ufeff", "\ue000"],
    *["\uffff", "\U0001f600", "\U0010ffff", "k" * 512, "k" * 511, "é" * 256, "\U0001f600" * 128, "None", "0", "00"],
]
NO_KEYS = ["", "\x00", "a\x00", "a\n", "\ta", "a\x7f", "a\x85", "\ud800", "a\udfff", "k" * 513, "é" * 256 + "k"]


class Values:
    """G11 of the guarantees, and that different keys are different."""

    @pytest.mark.parametrize("value", PLAIN, ids=repr)
    async def test_a_plain_value_comes_back_as_it_was(self, store: Any, colour: Colour, value: Any) -> None:
        watch, latest = await store.watch("a"), await store.observe("a")
        await store.set("a", value)
        (change,) = await take(colour, watch, 1)
        (seen,) = await take(colour, latest, 1)
        await store.commit(Set("a", value))
        (again,) = await take(colour, watch, 1)

        entry, snapshot = await store.get_entry("a"), await store.scan()
        several = await store.get_many(["a"])

        for each in (entry.value, snapshot["a"].value, several["a"], change.value, seen.value, again.old_value):
            assert alike(each, value), f"{each!r} is not {value!r}"
        assert alike(await store.get("a", "absent"), value)

    async def test_the_order_of_a_dict_is_kept(self, store: Any, colour: Colour) -> None:
        await store.set("a", {"b": 1, "a": 2, "c": 3})

        assert list(await store.get("a")) == ["b", "a", "c"]

    @pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
    async def test_a_value_comes_back_as_it_was_or_is_refused_before_anything_changed(
        self, store: Any, colour: Colour, make: Callable[[], Any]
    ) -> None:
        value = make()
        try:
            await store.set("a", value)
        except InvalidValue as error:
            _names(error, "a")
            assert (await store.scan()).revision == 0
            async with unchanged(store, colour):
                await refused(
                    InvalidValue,
                    lambda: store.set("a", make(), if_revision=1),
                    lambda: store.set("b", make(), ttl=60),
                    lambda: store.update("a", lambda _: make()),
                    lambda: store.commit(Set("b", 1), Set("c", make())),
                )
            return
        got, found = await store.get("a"), (await store.scan())["a"].value

        assert alike(got, value), "get returned something else"
        assert alike(found, value), "scan returned something else"

    async def test_nobody_changes_state_by_changing_an_object(self, store: Any, colour: Colour) -> None:
        needs(store, "isolated")
        value: dict[str, Any] = {"list": [1], "dict": {"a": {}}}
        watch, latest = await store.watch("a"), await store.observe("a")
        await store.set("a", value)
        snapshot = await store.scan()
        value["list"].append(2)
        value["new"] = 1

        for copy in (
            await store.get("a"),
            (await store.get_entry("a")).value,
            snapshot["a"].value,
            snapshot["a"].value,
            (await store.scan())["a"].value,
            (await store.get_many(["a"]))["a"],
            (await take_one(colour, watch)).value,
            (await take_one(colour, latest)).value,
        ):
            assert copy == {"list": [1], "dict": {"a": {}}}
            copy["list"].append(3)
            copy["dict"]["a"]["b"] = 4

        assert await store.get("a") == {"list": [1], "dict": {"a": {}}}

    async def test_two_watches_never_share_a_value(self, store: Any, colour: Colour) -> None:
        needs(store, "isolated")
        one, other = await store.watch("a"), await store.watch("a")
        await store.set("a", [1])
        await store.set("a", [2])

        for change in await take(colour, one, 2):
            change.value.append("x")
            if change.old_value is not None:
                change.old_value.append("x")

        changes = await take(colour, other, 2)
        assert [(change.value, change.old_value) for change in changes] == [([1], None), ([2], [1])]

    async def test_update_gets_a_copy(self, store: Any, colour: Colour) -> None:
        needs(store, "isolated")
        await store.set("a", [1])

        def spoil(value: list[int]) -> list[int]:
            value.append(2)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await store.update("a", spoil)
        assert await store.get("a") == [1]

    async def test_meta_is_isolated(self, store: Any, colour: Colour) -> None:
        needs(store, "isolated")
        meta = {"trace": "1"}
        one, other = await store.watch("a"), await store.watch("a")
        await store.commit(Set("a", 1, meta=meta))
        meta["trace"] = "2"
        (await store.get_entry("a")).meta["trace"] = "3"
        (await take_one(colour, one)).meta["trace"] = "4"  # type: ignore[index]

        assert (await store.get_entry("a")).meta == {"trace": "1"}
        assert (await take_one(colour, other)).meta == {"trace": "1"}

    # -- keys ----------------------------------------------------------------------------------------------------------

    longest_key: ClassVar[int] = 512
    """In bytes of UTF-8. Below a scope it is less."""

    async def test_different_keys_stay_different(self, store: Any, colour: Colour) -> None:
        keys = [key for key in KEYS if len(key.encode()) <= self.longest_key]
        watches = {key: await store.watch(key) for key in keys}
        below = {key: await store.watch(prefix=key) for key in keys}
        for number, key in enumerate(keys):
            await store.set(key, number)

        for number, key in enumerate(keys):
            assert await store.get(key) == number
            assert list(await store.scan(keys=[key])) == [key]
            assert list(await store.scan(key)) == sorted(each for each in keys if each.startswith(key))
            assert (await take_one(colour, watches[key])).value == number
            under = [each for each in keys if each.startswith(key)]
            assert [change.key for change in await take(colour, below[key], len(under))] == under
        assert list(await store.scan()) == sorted(keys)
        for key in reversed(keys):
            assert await store.delete(key) is True
            assert [change.key for change in await take(colour, watches[key], 1)] == [key]
        assert dict(await store.scan()) == {}

    @pytest.mark.parametrize("key", NO_KEYS, ids=ascii)
    async def test_what_is_no_key_is_refused_before_anything_changed(
        self, store: Any, colour: Colour, key: str
    ) -> None:
        async with unchanged(store, colour):
            with pytest.raises(InvalidKey) as error:
                await store.set(key, 1)
            with pytest.raises(InvalidKey):
                await store.get(key)
        assert len(error.value.key) <= 60


def _names(error: InvalidValue, key: str) -> None:
    assert error.key == key
    assert isinstance(error.type, str)


def alike(one: Any, other: Any) -> bool:
    """Whether two values are of one type and equal, all the way down. NaN is like NaN, and -0.0 is not like 0.0."""
    pending, seen = [(one, other)], {}
    while pending:
        one, other = pending.pop()
        if one is other or (id(one), id(other)) in seen:
            continue
        seen[id(one), id(other)] = (one, other)  # alive as long as their ids stand for them
        if type(one) is not type(other):
            return False
        if isinstance(one, (list, tuple)):
            if len(one) != len(other):
                return False
            pending += zip(one, other, strict=True)
        elif isinstance(one, dict):
            if len(one) != len(other):
                return False
            pending += [
                pair for items in zip(one.items(), other.items(), strict=True) for pair in zip(*items, strict=True)
            ]
        elif isinstance(one, float):
            if repr(one) != repr(other):
                return False
        elif vars(object)["__eq__"] is type(one).__eq__ or isinstance(one, BaseException):
            pending.append((_state(one), _state(other)))
        elif one != other:
            return False
    return True


def _state(value: Any) -> Any:
    """What there is to compare of an object that compares by identity."""
    return (getattr(value, "args", ()), dict(getattr(value, "__dict__", {})))
