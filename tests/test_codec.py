"""Codecs: what they give back is what they took, and what they cannot give back they refuse."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stigmergy import InvalidValue
from stigmergy.codec import JSON, Codec, MsgPack, MsgspecJSON, strict_json
from stigmergy.testing.conformance.values import HOSTILE, PLAIN, alike

try:
    from msgspec import MsgspecError, Struct
except ImportError:  # CPython 3.13 without a GIL has none
    MsgspecError = ValueError  # type: ignore[assignment, misc]

    class Struct:  # type: ignore[no-redef]
        def __init__(self, *values: Any, **more: Any) -> None: ...


needs_msgspec = pytest.mark.skipif(Struct.__module__ == __name__, reason="needs msgspec")


class Step(Struct):
    name: str
    cost: float = 0.0
    notes: Any = None


@dataclass
class Plan:
    steps: list[Step] = field(default_factory=list)
    by_owner: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def cost(self) -> float:
        return sum(step.cost for step in self.steps)


class Point(NamedTuple):
    x: int
    y: float


class Task(TypedDict):
    title: str
    done: bool


class Tree(Struct):
    children: tuple[Tree, ...] = ()


class SameFields(Struct):
    name: str
    cost: float = 0.0
    notes: Any = None


PLANS = [Plan([Step("a", 1.5, {"b": [1, None]}), Step("c")], {"ann": [1, 2]}), Plan()]
BY_MSGSPEC = [pytest.param(kind, marks=needs_msgspec, id=kind.id) for kind in (MsgspecJSON, MsgPack)]

both_json = pytest.mark.parametrize("codec", [JSON, BY_MSGSPEC[0]], indirect=True, ids=lambda kind: kind.id)
typed = pytest.mark.parametrize("kind", BY_MSGSPEC)
REFUSALS = (TypeError, ValueError, RecursionError, OverflowError, MsgspecError)
unhurried = settings(suppress_health_check=list(HealthCheck))  # how many examples, the profile says


@pytest.fixture(params=[JSON, *BY_MSGSPEC], ids=lambda kind: kind.id)
def codec(request: pytest.FixtureRequest) -> Codec:
    made: Codec = request.param()
    return made


def again(codec: Codec, value: Any) -> Any:
    return codec.decode(codec.encode(value))


def refuses(codec: Codec, value: Any) -> bool:
    try:
        codec.encode(value)
    except REFUSALS:
        return True
    return False


def nested(depth: int) -> Any:
    """`depth` lists and dicts, one within the other."""
    value: Any = 1
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


# -- what comes back ---------------------------------------------------------------------------------------------------

texts = st.text()
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts
plain = st.recursive(
    scalars.filter(lambda value: value not in (math.inf, -math.inf)),
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)
anything = st.recursive(
    scalars | st.floats() | st.integers() | st.binary() | st.text(st.characters()) | st.just(1j),
    lambda inner: st.lists(inner) | st.dictionaries(texts | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_a_plain_value_comes_back_as_it_was(codec: Codec, value: Any) -> None:
    data = codec.encode(value)

    assert type(data) is bytes
    assert alike(codec.decode(data), value)


@unhurried
@given(value=plain)
def test_any_plain_value_comes_back_as_it_was(codec: Codec, value: Any) -> None:
    assert alike(again(codec, value), value)


@unhurried
@given(value=anything)
def test_any_value_comes_back_as_it_was_or_is_refused(codec: Codec, value: Any) -> None:
    assert refuses(codec, value) or alike(again(codec, value), value)


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_value_comes_back_as_it_was_or_is_refused(codec: Codec, make: Callable[[], Any]) -> None:
    value = make()

    assert refuses(codec, value) or alike(again(codec, value), value)


LOOKS = {name for name in HOSTILE if name.startswith("looks like")}


KEPT = {
    "json": {"minus zero", "2**70", *LOOKS},
    "msgspec-json": {"minus zero", "2**70", *LOOKS},
    "msgpack": {"minus zero", "NaN", "infinite", "minus infinite", "bytes", *LOOKS},
}


def test_exactly_what_the_format_can_say_is_taken(codec: Codec) -> None:
    assert {name for name, make in HOSTILE.items() if not refuses(codec, make())} == KEPT[codec.id]


def test_the_order_of_a_dict_comes_back(codec: Codec) -> None:
    assert list(again(codec, {"b": 1, "a": 2, "": 3})) == ["b", "a", ""]


def test_what_comes_back_shares_nothing_with_what_was_given(codec: Codec) -> None:
    inner = [1]

    one, other = again(codec, [inner, inner])

    assert one == other == inner
    assert len({id(one), id(other), id(inner)}) == 3


@pytest.mark.parametrize("sign", [1, -1])
def test_the_longest_number_that_is_taken_can_be_read(codec: Codec, sign: int) -> None:
    longest = sys.get_int_max_str_digits()

    for digits in (longest - 1, longest, longest + 1):
        number = sign * (10**digits - 1)
        assert refuses(codec, [number]) or again(codec, [number]) == [number]
    assert refuses(codec, 10**longest)


@pytest.mark.thread_unsafe  # the limit is the process's
@both_json
def test_without_a_limit_what_is_taken_can_be_read(codec: Codec) -> None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        assert refuses(codec, 10**5000) or again(codec, 10**5000) == 10**5000
    finally:
        sys.set_int_max_str_digits(limit)


# -- how deep ----------------------------------------------------------------------------------------------------------


def test_256_levels_are_taken_and_257_refused(codec: Codec) -> None:
    assert alike(again(codec, nested(256)), nested(256))
    with pytest.raises(ValueError, match="nested deeper than 256"):
        codec.encode(nested(257))


def test_what_was_encoded_can_be_decoded_deep_in_the_stack(codec: Codec) -> None:
    data = codec.encode(nested(256))

    def below(calls: int) -> Any:
        return below(calls - 1) if calls else codec.decode(data)

    assert alike(below(500), nested(256))


def test_a_value_inside_itself_in_two_places_is_refused_at_once(codec: Codec) -> None:
    value: list[Any] = []
    value += [value, {"a": value}]

    with pytest.raises(ValueError, match="nested"):
        codec.encode(value)


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_is_compact_and_utf_8() -> None:
    value = {"b": [1, 2.5, None, True, "é\U0001f600"], "a": -0.0}

    assert JSON().encode(value) == '{"b":[1,2.5,null,true,"é\U0001f600"],"a":-0.0}'.encode()
    assert json.loads(JSON().encode(value)) == value


@pytest.mark.parametrize("value", [None, True, False, 0, -7, 2**70, 1.5, -0.0, 1e300, "", 'é"\n\x00'], ids=repr)
def test_a_scalar_is_written_as_the_standard_library_writes_it(value: Any) -> None:
    assert JSON().encode(value) == json.dumps(value, ensure_ascii=False).encode()


@needs_msgspec
@pytest.mark.parametrize("value", [None, True, 1, 1.5, "a", [1, {"a": [None, 2.5]}]], ids=repr)
def test_both_ways_to_json_read_what_the_other_wrote(value: Any) -> None:
    assert alike(MsgspecJSON().decode(JSON().encode(value)), value)
    assert alike(JSON().decode(MsgspecJSON().encode(value)), value)


def test_a_refusal_tells_the_type_and_not_the_value() -> None:
    for value in (("secret",), {"a": [{"secret"}]}, {("secret", 1): 1}, [b"secret"]):
        with pytest.raises(TypeError, match=r"type (tuple|set|bytes) would not come back") as refusal:
            JSON().encode(value)
        assert "secret" not in str(refusal.value)


# -- what was never encoded --------------------------------------------------------------------------------------------

NO_JSON = [
    *[
        b"",
        b" ",
        b"nul",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"[NaN]",
        b"1 2",
        b"01",
        b"'a'",
        b"[1,]",
        b'{"a"}',
        b"{1:2}",
    ],
    *[b'"\xff"', b'"\xed\xa0\x80"', b'"a\x00"', b"\xef\xbb\xbf1", '"a"'.encode("utf-16"), '"a"'.encode("utf-32-le")],
    *[b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b"()", b"b'a'", b"__import__('os')", b"\x00"],
]
NO_MSGPACK = [
    *[b"", b"\xc1", b"\x91", b"\xa2a", b"\xa1\xff", b"\xa3\xed\xa0\x80", b"\x01\x01", b"\x81\x80\x01"],
    *[
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ],
]


@pytest.mark.parametrize("data", NO_JSON, ids=lambda data: repr(data[:12]))
@both_json
def test_what_is_not_json_is_refused(codec: Codec, data: bytes) -> None:
    with pytest.raises(REFUSALS):
        codec.decode(data)


@pytest.mark.parametrize("data", NO_MSGPACK, ids=lambda data: repr(data[:12]))
@needs_msgspec
def test_what_is_not_msgpack_is_refused(data: bytes) -> None:
    with pytest.raises((*REFUSALS, MemoryError)):
        MsgPack().decode(data)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [None, 1, "a", [1, 2], {"a": 1}, UUID(int=7)], ids=repr)
def test_a_pickle_is_refused(codec: Codec, value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)

    with pytest.raises(REFUSALS):
        codec.decode(data)


DAMAGED = 20_000
STORED = [*PLAIN, 2**40, -0.0, [0.1, 1e300] * 20, {"steps": [{"name": "a" * 40, "cost": 1.5}] * 5}, nested(100)]
FUZZED: dict[str, tuple[Callable[[], Codec], list[Any]]] = {
    "json": (JSON, STORED),
    "msgspec-json": (MsgspecJSON, STORED),
    "msgpack": (MsgPack, [*STORED, b"\x00\xff", math.nan]),
    "msgspec-json, typed": (lambda: MsgspecJSON(Plan), PLANS),
    "msgpack, typed": (lambda: MsgPack(Plan), PLANS),
}


class Careless(JSON):
    """What a codec must not be: here to see that it would be noticed."""

    def decode(self, data: bytes) -> Any:
        with open(os.devnull, encoding="utf-8"):
            return compile("1", "data", "eval")


def damage(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(damaged) + 1)
        match rng.randrange(4):
            case 0 if place < len(damaged):
                damaged[place] ^= 1 << rng.randrange(8)
            case 1:
                del damaged[place:]
            case 2:
                damaged[place:place] = rng.randbytes(rng.choice([1, 2, 8]))
            case _:
                del damaged[place : place + rng.choice([1, 2, 8])]
    return bytes(damaged)


def read_damaged(codec: Codec, values: list[Any], seed: str) -> dict[str, Any]:
    """Decode values that were damaged while they were stored; tell what became of it.

    Only in a process of its own: nobody can take an audit hook away again.
    """
    rng = random.Random(seed)
    stored = [codec.encode(value) for value in values]
    outcome: dict[str, Any] = {"read": 0, "refused": 0, "events": []}
    decoding = False

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if decoding:
            outcome["events"].append(event)

    sys.addaudithook(audit)
    for data in [damage(rng.choice(stored), rng) for _ in range(DAMAGED)]:
        decoding = True
        try:
            codec.decode(data)
        except Exception:
            outcome["refused"] += 1
        else:
            outcome["read"] += 1
        finally:
            decoding = False
    return outcome


def read_damaged_elsewhere(codec: str, seed: str) -> dict[str, Any]:
    program = f"import json, test_codec as t; print(json.dumps(t.read_damaged({codec}, {seed!r})))"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


@pytest.mark.thread_unsafe  # starts a process
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "json" else needs_msgspec) for name in FUZZED])
def test_damaged_bytes_are_a_value_or_an_exception_and_nothing_else_happens(name: str, seed: str) -> None:
    outcome = read_damaged_elsewhere(f"t.FUZZED[{name!r}][0](), t.FUZZED[{name!r}][1]", seed)

    assert outcome["read"] + outcome["refused"] == DAMAGED
    assert min(outcome["read"], outcome["refused"]) > DAMAGED / 100
    assert outcome["events"] == []


@pytest.mark.thread_unsafe  # starts a process
def test_it_would_be_noticed_if_anything_else_happened(seed: str) -> None:
    outcome = read_damaged_elsewhere("t.Careless(), [1]", seed)

    assert {"open", "compile"} <= set(outcome["events"])


# -- the same rule in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, True, 1, -(2**70), 1.5, "text"], ids=repr)
def test_a_scalar_is_its_own_strict_copy(value: Any) -> None:
    assert strict_json(value) is value


def test_a_strict_copy_shares_nothing_with_the_original() -> None:
    value = {"a": [1]}

    copy = strict_json(value)

    assert copy == value
    assert copy is not value
    assert copy["a"] is not value["a"]


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_strict_json_takes_exactly_what_json_takes(make: Callable[[], Any]) -> None:
    value = make()
    if refuses(JSON(), value):
        with pytest.raises((TypeError, ValueError, RecursionError)):
            strict_json(value)
    else:
        assert alike(strict_json(value), value)


async def test_a_store_that_copies_by_strict_json_gives_back_what_it_took(new_store: Callable[..., Any]) -> None:
    store = new_store(copy=strict_json)
    watch = await store.watch("a")

    for value in PLAIN:
        await store.set("a", value)
        assert alike(await store.get("a"), value)
        assert alike(watch.get_nowait().value, value)


@pytest.mark.parametrize("name", [name for name in HOSTILE if refuses(JSON(), HOSTILE[name]())])
async def test_a_store_that_copies_by_strict_json_names_key_and_type_of_what_json_refuses(
    new_store: Callable[..., Any], name: str
) -> None:
    store, value = new_store(copy=strict_json), HOSTILE[name]()

    with pytest.raises(InvalidValue) as refusal:
        await store.set("plan", value)

    assert (refusal.value.key, refusal.value.type) == ("plan", type(value).__name__)
    assert isinstance(refusal.value.__cause__, (TypeError, ValueError, RecursionError))
    assert await store.get("plan", "absent") == "absent"


# -- typed -------------------------------------------------------------------------------------------------------------


@typed
@pytest.mark.parametrize(
    ("type", "value"),
    [
        *[(Plan, plan) for plan in PLANS],
        (list[Step], [Step("a"), Step("b", 2.0)]),
        (Step, Step("a", -0.0, [1, {"b": "c"}])),
        (Point, Point(1, 2.0)),
        (Task, {"title": "a", "done": False}),
        (Tree, Tree((Tree(), Tree((Tree(),))))),
        (dict[int, tuple[int, ...]], {1: (1, 2), 2: ()}),
        (set[str], {"a"}),
        (bytes, b"\x00\xff"),
        (datetime, datetime(2024, 1, 2, tzinfo=UTC)),
        (Decimal, Decimal("1.10")),
        (UUID, UUID(int=7)),
        (Step | None, None),
        (object, {"a": [1]}),
    ],
    ids=repr,
)
def test_a_value_of_the_type_comes_back_as_it_was(kind: Callable[..., Codec], type: Any, value: Any) -> None:
    assert alike(again(kind(type), value), value)


@typed
@pytest.mark.parametrize(
    ("type", "value"),
    [
        (Step, Step("a", 1)),
        (Step, Step("a", True)),
        (Step, Step(1)),  # type: ignore[arg-type]
        (Step, Step("a", 1.0, (1, 2))),
        (Step, Step("a", 1.0, [{"b": {1}}])),
        (Step, Step("a", 1.0, Step("b"))),
        (Step, SameFields("a")),
        (SameFields, Step("a")),
        (Plan, Step("a")),
        (Plan, Plan([Step("a", 1)])),
        (list[Step], [Step("a"), SameFields("b")]),
        (list[Step], (Step("a"),)),
        (list[float], [1.0, 2]),
        (Point, (1, 2.0)),
        (Task, {"title": "a", "done": False, "more": 1}),
        (Task, {"title": "a"}),
        (int, True),
        (float, 1),
        (str, UUID(int=7)),
        (object, (1, 2)),
        (object, Step("a")),
        (Step, None),
    ],
    ids=repr,
)
def test_a_value_that_would_come_back_as_another_is_refused(kind: Callable[..., Codec], type: Any, value: Any) -> None:
    assert refuses(kind(type), value)


@typed
def test_what_the_type_leaves_out_is_not_lost_silently(kind: Callable[..., Codec]) -> None:
    with pytest.raises(TypeError, match="type dict would not come back as it was"):
        kind(Task).encode({"title": "a", "done": False, "more": 1})


@needs_msgspec
def test_typed_msgpack_keeps_what_is_no_number() -> None:
    assert alike(again(MsgPack(list[float]), [math.nan, -math.inf, -0.0]), [math.nan, -math.inf, -0.0])


@typed
def test_a_refusal_tells_both_types(kind: Callable[..., Codec]) -> None:
    with pytest.raises(TypeError, match="of type int would come back as one of type float"):
        kind(Plan).encode(Plan([Step("a", 7)]))


@typed
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_value_within_another_comes_back_or_is_refused(
    kind: Callable[..., Codec], make: Callable[[], Any]
) -> None:
    codec, value = kind(Step), Step("a", notes=make())

    assert refuses(codec, value) or alike(again(codec, value).notes, value.notes)


@typed
def test_what_is_only_remembered_is_no_part_of_a_value(kind: Callable[..., Codec]) -> None:
    plan = Plan([Step("a", 1.5)])
    assert plan.cost == 1.5

    assert again(kind(Plan), plan) == plan


@typed
def test_a_typed_value_may_be_256_levels_deep(kind: Callable[..., Codec]) -> None:
    def tree(levels: int) -> Tree:
        top = Tree()
        for _ in range(levels // 2 - 1):
            top = Tree((top,))
        return top

    assert again(kind(Tree), tree(256)) == tree(256)
    with pytest.raises(ValueError, match="nested deeper than 256"):
        kind(Tree).encode(tree(260))


@typed
def test_bytes_of_another_type_are_refused(kind: Callable[..., Codec]) -> None:
    data = kind().encode({"steps": "none"})

    with pytest.raises(MsgspecError, match="Expected `array`"):
        kind(Plan).decode(data)


# -- without the extra -------------------------------------------------------------------------------------------------


@pytest.mark.thread_unsafe  # the modules are the process's
@pytest.mark.parametrize("kind", [MsgspecJSON, MsgPack])
def test_a_codec_without_its_extra_says_what_to_install(
    kind: Callable[..., Codec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)

    with pytest.raises(ImportError, match=r"this codec needs an extra: pip install 'stigmergy\[msgspec\]'"):
        kind()


@pytest.mark.thread_unsafe  # starts a process
def test_the_default_needs_nothing_but_the_standard_library() -> None:
    program = (
        "import sys\n"
        "from stigmergy.codec import JSON\n"
        "assert JSON().decode(JSON().encode([1])) == [1]\n"
        "print(sorted({'msgspec', 'pickle', 'asyncio'} & sys.modules.keys()))\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)

    assert done.stdout == "[]\n"
