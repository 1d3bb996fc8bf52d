"""Isolation: copies share nothing that can be changed, and keep the shape of the original."""

from __future__ import annotations

import copy
import datetime
import decimal
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from stigmergy.values import SCALARS, isolate


@dataclass
class Plan:
    steps: list[str] = field(default_factory=list)


class Point(NamedTuple):
    x: Any
    y: Any


class Mood(Enum):
    GOOD = 1


class Tags(list[str]):
    owner = "nobody"


SCALAR_VALUES = [None, True, 0, 1.5, 1j, "text", b"bytes", float("inf")]
OTHER_VALUES = [
    [],
    {},
    set(),
    (),
    [1, [2, [3]]],
    {"a": {"b": [1]}, 1: 2, (1, 2): 3, None: 4},
    {1, 2.5, (1, 2), frozenset({3})},
    (1, [2], {"a": (3, [4])}),
    ([],),
    frozenset({1, (2, 3)}),
    bytearray(b"abc"),
    range(3),
    deque([1, [2]], maxlen=5),
    OrderedDict(a=[1]),
    defaultdict(list, a=[1]),
    Counter("abc"),
    Plan(["a"]),
    Point(1, [2]),
    [Plan(["a"]), {"plan": Plan(["b"])}],
    Mood.GOOD,
    Tags(["a"]),
    SimpleNamespace(a=[1]),
    datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    decimal.Decimal("1.10"),
    Fraction(1, 3),
    UUID(int=7),
]


def shape(value: Any, seen: dict[int, int] | None = None) -> Any:
    """What `value` is, and which parts of it are one object; for what `==` does not tell."""
    seen = {} if seen is None else seen
    if type(value) in SCALARS:
        return value
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return (type(value), [(shape(key, seen), shape(item, seen)) for key, item in value.items()])
    if isinstance(value, (list, tuple, deque)):
        return (type(value), [shape(item, seen) for item in value])
    if hasattr(value, "__dict__") and not isinstance(value, Enum):
        return (type(value), shape(vars(value), seen))
    return (type(value), value)


def changeable(value: Any) -> set[int]:
    """The ids of everything inside `value` that can be changed."""
    found: set[int] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if id(item) in found or type(item) in SCALARS:
            continue
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            pending += item
        if hasattr(item, "__dict__") and not isinstance(item, Enum):
            pending.append(vars(item))
        if isinstance(item, (dict, list, set, deque, bytearray, Plan, SimpleNamespace)):
            found.add(id(item))
    return found


@pytest.mark.parametrize("value", SCALAR_VALUES, ids=repr)
def test_a_scalar_is_its_own_copy(value: Any) -> None:
    assert isolate(value) is value


@pytest.mark.parametrize("value", OTHER_VALUES, ids=repr)
def test_a_copy_equals_the_original_and_shares_nothing_changeable(value: Any) -> None:
    duplicate = isolate(value)

    assert duplicate == value
    assert shape(duplicate) == shape(value)
    assert not changeable(duplicate) & changeable(value)


@pytest.mark.parametrize("value", OTHER_VALUES, ids=repr)
def test_a_copy_is_what_deepcopy_returns(value: Any) -> None:
    assert shape(isolate(value)) == shape(copy.deepcopy(value))


def test_a_tuple_of_scalars_is_its_own_copy() -> None:
    value = (1, "a", None)

    assert isolate(value) is value


@pytest.mark.parametrize("empty", [list, dict, lambda: [[]][0], lambda: Plan()])
def test_what_is_shared_inside_a_value_is_shared_inside_its_copy(empty: Any) -> None:
    inner = empty()

    one, other, (third,), nested = isolate([inner, inner, (inner,), {"a": inner}])

    assert one is other is third is nested["a"]
    assert one is not inner


def test_what_plain_containers_share_with_other_objects_stays_shared() -> None:
    steps = ["a"]

    plan, same = isolate([Plan(steps), steps])
    steps_first, other = isolate([steps, Plan(steps)])

    assert plan.steps is same
    assert other.steps is steps_first


def test_a_shared_tuple_and_a_shared_set_are_copied_once() -> None:
    pair: tuple[Any, ...] = ([1],)
    tags = {1}

    one, other, first, second = isolate([pair, pair, tags, tags])

    assert one is other
    assert first is second


def test_a_cycle_through_a_list_is_a_cycle_in_the_copy() -> None:
    value: list[Any] = [1]
    value.append(value)

    duplicate = isolate(value)

    assert duplicate is not value
    assert duplicate[1] is duplicate


def test_a_cycle_through_a_dict_is_a_cycle_in_the_copy() -> None:
    value: dict[str, Any] = {}
    value["self"] = [value]

    duplicate = isolate(value)

    assert duplicate is not value
    assert duplicate["self"][0] is duplicate


def test_a_cycle_through_a_tuple_is_a_cycle_in_the_copy() -> None:
    inner: list[Any] = []
    value = (inner,)
    inner.append(value)

    duplicate = isolate(value)

    assert duplicate is not value
    assert duplicate[0][0] is duplicate


def test_a_cycle_through_an_object_is_a_cycle_in_the_copy() -> None:
    value = SimpleNamespace()
    value.items = [value, {"self": value}]

    duplicate = isolate([value])[0]

    assert duplicate is not value
    assert duplicate.items[0] is duplicate.items[1]["self"] is duplicate


def test_an_object_may_say_itself_how_it_is_copied() -> None:
    class Handle:
        def __deepcopy__(self, memo: object) -> str:
            return "a copy"

    assert isolate([Handle(), {"a": Handle()}, (Handle(),)]) == ["a copy", {"a": "a copy"}, ("a copy",)]


def test_what_an_objects_own_copier_raises_is_raised() -> None:
    class Stubborn:
        def __deepcopy__(self, memo: object) -> Stubborn:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        isolate([{"a": (Stubborn(),)}])


def test_a_value_too_deep_is_a_recursion_error() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]

    with pytest.raises(RecursionError):
        isolate(value)


def test_the_order_of_a_dict_is_kept() -> None:
    assert list(isolate({"b": [1], "a": 1, "c": (2,)})) == ["b", "a", "c"]


@pytest.mark.parametrize("value", [*SCALAR_VALUES, *OTHER_VALUES], ids=repr)
async def test_a_store_gives_back_what_it_took_and_shares_nothing(store: Any, value: Any) -> None:
    watch, observe = await store.watch("a"), await store.observe("a")

    await store.set("a", value)

    taken = [
        await store.get("a"),
        (await store.get_entry("a")).value,
        (await store.scan())["a"].value,
        watch.get_nowait().value,
        observe.get_nowait().value,
    ]
    assert all(shape(each) == shape(value) for each in taken)
    everything = [changeable(each) for each in [value, *taken]]
    assert len(set().union(*everything)) == sum(map(len, everything))
