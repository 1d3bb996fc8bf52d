"""Hostile keys and values: kept apart, given back as they were, or refused before anything has changed."""

from __future__ import annotations

import enum
import math
import random
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stigmergy import Delete, InvalidKey, InvalidValue, MemoryStore, Scope, Set, Store, scoped_key

unhurried = settings(suppress_health_check=list(HealthCheck))  # how many examples, the profile says

# -- keys --------------------------------------------------------------------------------------------------------------

PARTS = [
    *[
        "a",
        "A",
        "ab",
        "b",
        "a.b",
        "a%",
        "a_",
        "a*",
        "*",
        ">",
        "?",
        "[a]",
        "a\\",
        "..",
        ".",
        "-",
        "~",
        "$a",
        "{}",
        "{0}",
    ],
    *["%s", "%2F", "%3A", "agent", "session", "global", "agent:a", "agent/a:a", "global:a", "a:b", "a::b", ":", "::"],
    *["/", "//", "a/b", "a/", "/a", "a:", ":a", " ", "  ", " a", "a ", "0", "00", "None", "true", "\u00e9", "e\u0301"],
    *["\u212b", "\u00c5", "A\u030a", "\ufb01", "fi", "\u200b", "\u200da", "\u202e", "\ufeff", "\uffff", "\U0010ffff"],
    *[
        "\u0130",
        "i",
        "I",
        "\u0131",
        "\u00df",
        "ss",
        "\u2028",
        "\u2029",
        "\u00a0",
        "a" * 200,
        "\U0001f41c" * 50,
        "'",
        '"',
    ],
    *["; DROP TABLE state; --", "__class__", "__proto__", "$where", "../../etc/passwd", "key = ?", "\u0661", "1"],
]


def test_ten_thousand_hostile_scopes_owners_and_keys_stay_distinct(seed: str) -> None:
    triples = list(product(Scope, [None, *PARTS], PARTS))
    random.Random(seed).shuffle(triples)
    named: dict[str, tuple[Any, ...]] = {}
    with MemoryStore(history=0) as store:
        for triple in triples:
            scope, owner, part = triple
            try:
                key = scoped_key(scope, part, owner=owner)
            except InvalidKey:  # an owner with a separator: refused is as good as kept apart
                continue
            assert store.set(key, [*triple], if_revision=0), "nobody else has this key"
            named[key] = triple

        assert len(named) >= 10_000
        assert all(tuple(store.get(key)) == triple for key, triple in named.items())
        assert {key: tuple(entry.value) for key, entry in store.scan().items()} == named
        assert list(store.scan()) == sorted(named)


def test_a_prefix_of_hostile_text_means_that_text_and_nothing_else() -> None:
    with MemoryStore() as store:
        for part in PARTS:
            store.set(part, 0)
        for prefix in PARTS:
            expected = sorted(part for part in PARTS if part.startswith(prefix))
            assert list(store.scan(prefix)) == expected

            watch = store.watch(prefix=prefix, since=0, capacity=None)
            assert sorted(change.key for change in iter(watch.get_nowait, None)) == expected


KEY_OPERATIONS: list[Callable[[Store, Any], object]] = [
    lambda store, key: store.set(key, 1),
    lambda store, key: store.set(key, 1, if_revision=0, ttl=10),
    lambda store, key: store.commit(Set("other", 1), Set(key, 1)),
    lambda store, key: store.commit(Set("other", 1), Delete(key)),
    lambda store, key: store.update(key, lambda value: 1),
    lambda store, key: store.delete(key),
    lambda store, key: store.get(key),
    lambda store, key: store.get_entry(key),
    lambda store, key: store.get_many([key]),
    lambda store, key: store.scan(keys=[key]),
    lambda store, key: store.watch(key),
    lambda store, key: store.observe(key),
    lambda store, key: store.wait_for(key, lambda value: True, timeout=0),
]


def refused_everywhere(store: Store, key: object) -> None:
    for operate in KEY_OPERATIONS:
        with pytest.raises(InvalidKey) as refused:
            operate(store, key)
        assert len(str(refused.value)) < 200
        str(refused.value).encode()  # can be logged


def is_legal(key: str) -> bool:
    """The grammar, said in another way than the library says it."""
    if any(0xD800 <= ord(char) <= 0xDFFF or ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in key):
        return False
    return 1 <= sum(1 + (ord(char) > 0x7F) + (ord(char) > 0x7FF) + (ord(char) > 0xFFFF) for char in key) <= 512


any_text = st.text(st.characters(exclude_categories=()), max_size=8)
nasty_text = st.lists(st.sampled_from([*PARTS, "\0", "\n", "\x7f", "\x85", "\ud800", "\udfff", ""]), max_size=4).map(
    "".join
)


@unhurried
@given(st.lists(any_text | nasty_text, max_size=8, unique=True))
@example(["\ud83d\udc1c", "\U0001f41c"])
@example(["\0", "a\0", "a"])
@example(["k" * 512, "k" * 513, "\u00e9" * 256, "\u00e9" * 257, "\U0001f41c" * 128, "\U0001f41c" * 129])
def test_any_text_is_a_key_of_its_own_or_refused_before_anything_changed(keys: list[str]) -> None:
    with MemoryStore() as store:
        kept = {}
        for number, key in enumerate(keys):
            if is_legal(key):
                kept[key] = number
                store.set(key, number, if_revision=0)
            else:
                refused_everywhere(store, key)

        snapshot = store.scan()
        assert {key: entry.value for key, entry in snapshot.items()} == kept
        assert list(snapshot) == sorted(kept)
        assert snapshot.revision == len(kept)
        assert all(store.get(key) == number for key, number in kept.items())


def work(function: Callable[[], object]) -> tuple[int, int]:
    """The calls that a call of `function` makes, and the most bytes it has allocated at any one time."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    tracemalloc.start()
    try:
        function()
        return calls, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("char", ["k", "\u00e9", "\0", "\ud800", "\U0001f41c"], ids=ascii)
def test_a_key_of_a_mebibyte_is_refused_with_little_work(char: str) -> None:
    with MemoryStore() as store:
        key = char * 2**20
        refused_everywhere(store, key)

        def refuse() -> None:
            with suppress(InvalidKey):
                store.set(key, 1)

        calls, allocated = work(refuse)
        assert calls < 100
        assert allocated < 20 * 2**20
        assert store.scan().revision == 0


# -- values ------------------------------------------------------------------------------------------------------------


class Mood(enum.Enum):
    GOOD = 1
    BAD = "bad"


class Flag(enum.IntFlag):
    A = 1
    B = 2


class Name(enum.StrEnum):
    ANT = "ant"


@dataclass
class Plan:
    steps: Any = None
    notes: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Point:
    x: Any
    y: Any


class Tags(list[Any]):
    pass


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([2**70, -0.0, math.nan, math.inf, -math.inf, True, 1, 1.0, "", b"", *Mood, *Flag, *Name])
    | st.just({"lc": 2, "type": "constructor", "id": ["os", "system"]}).map(repr)
)
hashable = st.recursive(
    scalars,
    lambda inner: (
        st.tuples(inner, inner) | st.frozensets(inner, max_size=3) | st.builds(Point, inner, inner) | st.tuples(inner)
    ),
    max_leaves=4,
)
values = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | hashable, inner, max_size=4)
        | st.sets(hashable, max_size=3)
        | st.builds(Plan, inner, st.dictionaries(hashable, inner, max_size=2))
        | st.lists(inner, max_size=3).map(Tags)
        | st.binary(max_size=4).map(bytearray)
    ),
    max_leaves=12,
)


def shape(value: Any) -> Any:
    """What tells `value` from all others: the types all the way down, the sign of a zero, a NaN as itself."""
    kind = type(value)
    if isinstance(value, enum.Enum):
        return kind, value.name
    if isinstance(value, (float, complex)):
        return kind, repr(value)
    if isinstance(value, dict):
        return kind, [(shape(key), shape(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted((shape(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return kind, [shape(item) for item in value]
    if isinstance(value, Plan):
        return kind, shape(value.steps), shape(value.notes)
    if isinstance(value, Point):
        return kind, shape(value.x), shape(value.y)
    return kind, bytes(value) if isinstance(value, bytearray) else value


@unhurried
@given(values, values)
def test_any_value_comes_back_as_it_was_type_and_all(value: Any, next_value: Any) -> None:
    with MemoryStore() as store:
        watch, state = store.watch("a"), store.observe("a")
        store.set("a", value)
        expected = shape(value)

        assert shape(store.get("a")) == expected
        assert shape(store.scan()["a"].value) == expected
        assert shape(watch.get(timeout=0).value) == expected
        assert shape(state.get(timeout=0).value) == expected
        store.update("a", lambda seen: next_value if shape(seen) == expected else None)
        change = watch.get(timeout=0)
        assert (shape(change.value), shape(change.old_value)) == (shape(next_value), expected)
        assert shape(value) == expected, "what was put in is as it was"


def refuses_values(store: Store, value: Any, error: type[Exception] = InvalidValue) -> None:
    for write in (
        lambda: store.set("a", value),
        lambda: store.set("a", value, ttl=1),
        lambda: store.set("new", [value], if_revision=0),
        lambda: store.commit(Set("other", 1), Set("a", {"value": value})),
        lambda: store.update("a", lambda _: value),
    ):
        with pytest.raises(error):
            write()


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = wrap(value)
    return value


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda value: [value],
    "tuple": lambda value: (value, []),
    "dict": lambda value: {"a": value},
    "object": lambda value: Plan(value),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_a_value_ten_thousand_deep_is_refused_before_anything_changed(wrap: Callable[[Any], Any]) -> None:
    with MemoryStore() as store:
        store.set("a", "old")
        watch = store.watch(prefix="")
        refuses_values(store, nested(10_000, wrap))

        assert {key: entry.value for key, entry in store.scan().items()} == {"a": "old"}
        assert watch.get_nowait() is None
        assert store.set("a", nested(20, wrap)) == 2


def test_a_value_ten_thousand_deep_is_kept_by_a_store_that_shares() -> None:
    deep = nested(10_000, lambda value: [value])
    with MemoryStore(copy=None) as store:
        watch = store.watch("a")
        store.set("a", deep)

        assert store.get("a") is deep
        assert watch.get(timeout=0).value is deep


def test_a_value_that_contains_itself_comes_back_containing_itself() -> None:
    loop: dict[str, Any] = {"list": []}
    loop["self"] = loop
    loop["list"] += [loop, (loop, loop["list"])]
    plan = Plan()
    plan.steps = [plan, loop]
    with MemoryStore() as store:
        store.set("loop", loop)
        store.set("plan", plan)
        kept, kept_plan = store.get("loop"), store.get("plan")

        assert kept is not loop
        assert kept["self"] is kept
        assert kept["list"][0] is kept
        assert kept["list"][1][1] is kept["list"]
        assert kept_plan.steps[0] is kept_plan is not plan
        assert kept_plan.steps[1]["self"] is kept_plan.steps[1]


class Uncopyable:
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("no")


def test_a_value_that_cannot_be_copied_anywhere_inside_is_refused_before_anything_changed() -> None:
    with MemoryStore() as store:
        store.set("a", "old")
        watch = store.watch(prefix="")
        for value in (Uncopyable(), (1, [Uncopyable()]), {"a": {Uncopyable()}}, (each for each in ()), sys._getframe()):
            refuses_values(store, value)

        assert store.scan().revision == 1
        assert watch.get_nowait() is None


@pytest.mark.parametrize(
    "value",
    [
        "x" * 2**20,
        "\ud800" * 2**20,
        b"\0" * 2**20,
        bytearray(2**20),
        list(range(2**17)),
        {str(n): n for n in range(2**16)},
    ],
    ids=["str", "surrogates", "bytes", "bytearray", "list", "dict"],
)
def test_a_value_of_a_mebibyte_is_kept(value: Any) -> None:
    with MemoryStore() as store:
        watch = store.watch("a")
        store.set("a", value)

        assert store.get("a") == value
        assert watch.get(timeout=0).value == value
        assert type(store.get("a")) is type(value)
