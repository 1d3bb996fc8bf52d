"""Flows: logic written once, and the two drivers that run it."""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from functools import partial
from typing import Any

import pytest

from stigmergy import (
    Call,
    Change,
    Check,
    Commit,
    Delete,
    Entry,
    Flow,
    GetEntry,
    InvalidKey,
    MemoryStore,
    Next,
    OpenWatch,
    Operation,
    RevisionConflict,
    Scan,
    Set,
    Sleep,
    Snapshot,
    Step,
    StoreClosed,
    Watch,
    WatchClosed,
)
from stigmergy import flow as flows


class Topic(StrEnum):
    PLAN = "plan"


def transfer(source: str, target: str, amount: int) -> Flow[tuple[int | None, ...]]:
    """A recipe, as a user writes one."""
    while True:
        one, other = (yield from GetEntry(source)), (yield from GetEntry(target))
        if one is None or other is None or one.value < amount:
            raise LookupError("not enough")
        try:
            return (
                yield from Commit(
                    [
                        Set(source, one.value - amount, if_revision=one.revision),
                        Set(target, other.value + amount, if_revision=other.revision),
                    ]
                )
            )
        except RevisionConflict:
            continue


# -- a user's own flow -------------------------------------------------------------------------------------------------


async def test_a_flow_runs_on_a_store_of_either_colour(store: Any) -> None:
    await store.set("one", 10)
    await store.set("other", 0)

    assert await store.run(transfer("one", "other", 4)) == (3, 4)

    assert await store.get_many(["one", "other"]) == {"one": 6, "other": 4}


async def test_what_a_flow_raises_is_raised(store: Any) -> None:
    await store.set("one", 1)

    with pytest.raises(LookupError, match="not enough"):
        await store.run(transfer("one", "other", 4))

    assert await store.get("one") == 1


async def test_a_flow_may_be_made_of_flows(store: Any) -> None:
    def both_ways() -> Flow[list[Any]]:
        there = yield from transfer("one", "other", 4)
        back = yield from transfer("other", "one", 1)
        return [*there, *back]

    await store.set("one", 10)
    await store.set("other", 0)

    assert await store.run(both_ways()) == [3, 4, 5, 6]
    assert await store.get_many(["one", "other"]) == {"one": 7, "other": 3}


@pytest.mark.parametrize("delegated", [True, False], ids=["yield from", "yield"])
async def test_an_operation_is_answered_with_its_result(store: Any, delegated: bool) -> None:
    def ask(step: Step[Any]) -> Flow[Any]:
        return (yield from step) if delegated else (yield step)

    await store.set("a", 1)

    entry = await store.run(ask(GetEntry("a")))
    assert isinstance(entry, Entry)
    assert entry.value == 1
    assert await store.run(ask(GetEntry("absent"))) is None
    snapshot = await store.run(ask(Scan("a")))
    assert isinstance(snapshot, Snapshot)
    assert list(snapshot) == ["a"]
    watch = await store.run(ask(OpenWatch(["a"])))
    assert isinstance(watch, Watch)
    assert await store.run(ask(Commit([Set("a", 2), Delete("b"), Check("a", 1)]))) == (2, None, None)
    change = await store.run(ask(Next(watch)))
    assert isinstance(change, Change)
    assert change.value == 2
    assert await store.run(ask(Sleep(0))) is None
    assert await store.run(ask(Call(divmod, 7, 2))) == (3, 1)


async def test_a_flow_that_yields_nothing_just_returns(store: Any) -> None:
    def empty() -> Flow[int]:
        yield from ()
        return 7

    assert await store.run(empty()) == 7


async def test_one_operation_may_be_yielded_again_and_again(store: Any) -> None:
    add = Commit([Set("a", 1)])

    def repeat() -> Flow[list[Any]]:
        return [(yield from add), (yield add), (yield from add)]

    assert await store.run(repeat()) == [(1,), (2,), (3,)]


async def test_the_flows_of_a_store_are_there_for_other_flows(store: Any) -> None:
    def count() -> Flow[Any]:
        yield from flows.update("n", lambda number: number + 1, 0)
        entry = yield from flows.wait_for("n", lambda number: number == 1)
        values = yield from flows.get_many(["n", "absent"])
        return entry.revision, values

    assert await store.run(count()) == (1, {"n": 1})


# -- errors ------------------------------------------------------------------------------------------------------------


async def test_the_error_of_an_operation_is_thrown_into_the_flow(store: Any) -> None:
    def careful() -> Flow[str]:
        try:
            yield from Commit([Set("a", 1, if_revision=7)])
        except RevisionConflict as conflict:
            return f"caught {conflict.actual}"
        return "nothing to catch"

    assert await store.run(careful()) == "caught 0"


async def test_the_error_of_a_step_is_thrown_into_the_flow(store: Any) -> None:
    def careful() -> Flow[list[str]]:
        caught = []
        for step in (Call(divmod, 1, 0), Next((yield from OpenWatch(["a"])), timeout=0)):
            try:
                yield step
            except (ZeroDivisionError, TimeoutError) as error:
                caught.append(type(error).__name__)
        return caught

    assert await store.run(careful()) == ["ZeroDivisionError", "TimeoutError"]


async def test_a_flow_goes_on_after_an_error_it_caught(store: Any) -> None:
    def stubborn() -> Flow[Any]:
        with pytest.raises(RevisionConflict):
            yield from Commit([Set("a", 1, if_revision=7)])
        with pytest.raises(ZeroDivisionError):
            yield Call(divmod, 1, 0)
        return (yield from Commit([Set("a", 1)]))

    assert await store.run(stubborn()) == (1,)


@pytest.mark.parametrize(
    "failing",
    [
        Commit([Set("a", 1, if_revision=7)]),
        Call(divmod, 1, 0),
        Call(next, iter(())),
        "no step",
    ],
    ids=["operation", "step", "StopIteration", "wrong yield"],
)
async def test_finally_runs_when_a_flow_fails(store: Any, failing: Any) -> None:
    seen = []

    def tidy() -> Flow[None]:
        try:
            yield failing
        finally:
            seen.append((yield from GetEntry("a")))

    with pytest.raises((RevisionConflict, ZeroDivisionError, RuntimeError, TypeError)):
        await store.run(tidy())

    assert seen == [None]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_what_interrupts_a_step_is_thrown_into_the_flow_too(store: Any, interrupt: type[BaseException]) -> None:
    seen = []

    def interrupted() -> None:
        raise interrupt

    def tidy() -> Flow[None]:
        try:
            yield Call(interrupted)
        except BaseException as error:
            seen.append(type(error))
            raise

    with pytest.raises(interrupt):
        await store.run(tidy())

    assert seen == [interrupt]


async def test_a_flow_may_raise_something_else_in_place_of_an_error(store: Any) -> None:
    def translate() -> Flow[None]:
        try:
            yield from Commit([Set("a", 1, if_revision=7)])
        except RevisionConflict as conflict:
            raise LookupError(conflict.key) from conflict

    with pytest.raises(LookupError) as raised:
        await store.run(translate())

    assert isinstance(raised.value.__cause__, RevisionConflict)


async def test_a_closed_store_is_an_error_inside_the_flow(store: Any) -> None:
    def ask() -> Flow[str]:
        try:
            yield from GetEntry("a")
        except StoreClosed:
            return "closed"
        return "open"

    await store.close()

    assert await store.run(ask()) == "closed"


def test_cancellation_is_thrown_into_the_flow() -> None:
    seen: list[Any] = []

    def wait(watch: Watch, parked: asyncio.Event) -> Flow[None]:
        try:
            yield Call(parked.set)
            yield from Next(watch)
        except asyncio.CancelledError:
            seen.append((yield from GetEntry("a")))
            raise
        finally:
            seen.append("finally")

    async def cancel() -> None:
        async with MemoryStore().aio as store:
            parked = asyncio.Event()
            task = asyncio.create_task(store.run(wait(await store.watch("a"), parked)))
            await parked.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())

    assert seen == [None, "finally"]


# -- calls -------------------------------------------------------------------------------------------------------------


async def test_a_call_is_answered_with_what_the_function_returns(store: Any) -> None:
    def convert() -> Flow[list[Any]]:
        return [(yield from Call(int, "7")), (yield Call(lambda: None)), (yield Call(partial(int, base=2), "11"))]

    assert await store.run(convert()) == [7, None, 3]


async def test_an_async_store_awaits_what_a_function_returns() -> None:
    async def slow(number: int) -> int:
        await asyncio.sleep(0)
        return number + 1

    def calls() -> Flow[list[int]]:
        return [(yield Call(slow, 1)), (yield Call(lambda: slow(2))), (yield Call(asyncio.ensure_future, slow(3)))]

    async with MemoryStore().aio as store:
        assert await store.run(calls()) == [2, 3, 4]
        assert await store.update("n", slow, default=0) == 1
        assert (await store.wait_for("n", slow)).value == 1


@contextmanager
def refused_unawaited(made: list[Any]) -> Iterator[None]:
    """A `TypeError` with an instruction, and nobody waits for what was made, nor warns that nobody does."""
    with pytest.raises(TypeError, match=r"is async: use it with the async store \(`\.aio`\), or make it plain"):
        yield
    assert made
    assert [inspect.getcoroutinestate(each) for each in made] == [inspect.CORO_CLOSED] * len(made)


def test_a_sync_store_refuses_an_async_function_and_closes_its_coroutine() -> None:
    made = []

    async def slow(value: Any = None) -> Any:
        return value

    def asynchronous(value: Any = None) -> Any:
        made.append(slow(value))
        return made[-1]

    def call() -> Flow[None]:
        yield Call(asynchronous)

    with MemoryStore() as store:
        store.set("n", 1)
        with refused_unawaited(made):
            store.run(call())
        with refused_unawaited(made):
            store.update("n", asynchronous)
        with refused_unawaited(made):
            store.wait_for("n", asynchronous)
        assert len(made) == 3
        assert store.scan().revision == 1


def test_the_refusal_of_an_async_function_names_it_and_may_be_caught() -> None:
    async def slow() -> None: ...

    def careful() -> Flow[str]:
        try:
            yield Call(slow)
        except TypeError as error:
            return str(error)
        return ""

    with MemoryStore() as store:
        assert "slow is async" in store.run(careful())


def test_a_sync_store_refuses_whatever_can_be_awaited() -> None:
    class Promise:
        def __await__(self) -> Generator[Any, Any, None]:
            yield

    def call() -> Flow[None]:
        yield Call(Promise)

    with MemoryStore() as store, pytest.raises(TypeError, match="Promise is async"):
        store.run(call())


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_next_waits_for_a_change_and_takes_it(store: Any) -> None:
    watch = await store.watch("a")
    await store.set("a", 1)
    await store.set("a", 2)

    def both() -> Flow[list[Any]]:
        return [(yield from Next(watch)).value, (yield Next(watch, timeout=0)).value]

    assert await store.run(both()) == [1, 2]
    assert watch.get_nowait() is None


@pytest.mark.parametrize("timeout", [0, -1, 0.001])
async def test_next_times_out(store: Any, timeout: float) -> None:
    watch = await store.watch("a")

    def wait() -> Flow[Any]:
        yield from Next(watch, timeout)

    with pytest.raises(TimeoutError):
        await store.run(wait())


async def test_next_of_an_ended_watch_is_an_error(store: Any) -> None:
    watch = await store.watch("a")
    watch.close()

    def wait() -> Flow[Any]:
        yield from Next(watch)

    with pytest.raises(WatchClosed):
        await store.run(wait())


# -- wrong yields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [None, 42, "a", GetEntry, Set("a", 1), (GetEntry("a"),), lambda: None],
    ids=["None", "int", "str", "class", "write", "tuple", "function"],
)
async def test_a_flow_that_yields_something_else_is_told_so_where_it_did(store: Any, wrong: Any) -> None:
    def told() -> Flow[str]:
        try:
            yield wrong
        except TypeError as error:
            return str(error)
        return ""

    def untold() -> Flow[None]:
        yield wrong

    assert await store.run(told()) == f"a flow may yield operations and steps, not a {type(wrong).__name__}"
    with pytest.raises(TypeError, match="a flow may yield operations"):
        await store.run(untold())
    assert (await store.scan()).revision == 0


@pytest.mark.parametrize(
    "wrong", [None, 42, [GetEntry("a")], transfer, GetEntry("a")], ids=["None", "int", "list", "function", "step"]
)
async def test_what_is_no_generator_is_no_flow(store: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"a flow is a generator, not an? .*: its function must contain a yield"):
        await store.run(wrong)


# -- drivers -----------------------------------------------------------------------------------------------------------


def test_the_drivers_hand_operations_to_perform_and_do_steps_themselves() -> None:
    performed: list[str] = []

    def perform(operation: Operation[Any]) -> str:
        performed.append(operation.name)
        return operation.name

    async def aperform(operation: Operation[Any]) -> str:
        return perform(operation)

    def mixed() -> Flow[list[Any]]:
        return [(yield GetEntry("a")), (yield Call(int, "7")), (yield Sleep(0)), (yield Scan())]

    for answers in (flows.run(mixed(), perform), asyncio.run(flows.arun(mixed(), aperform))):
        assert answers == ["get_entry", 7, None, "scan"]
    assert performed == ["get_entry", "scan"] * 2


def test_a_step_of_ones_own_is_done_by_the_driver() -> None:
    class Double(Step[int]):
        __slots__ = ("number",)
        number: int

        def __init__(self, number: int) -> None:
            object.__setattr__(self, "number", number)

        def do(self) -> int:
            return 2 * self.number

    def doubled() -> Flow[int]:
        return (yield from Double(21))

    store = MemoryStore()
    assert store.run(doubled()) == asyncio.run(store.aio.run(doubled())) == 42


# -- nothing is left behind --------------------------------------------------------------------------------------------


class Token:
    """Something whose end can be seen."""


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def plainly(token: Token) -> Flow[Token]:
    yield from GetEntry("a")
    return token


def catching(token: Token) -> Flow[Token]:
    with pytest.raises(RevisionConflict):
        yield from Commit([Set("a", 1, if_revision=7)])
    with pytest.raises(ZeroDivisionError):
        yield Call(divmod, 1, 0)
    return token


def raising(token: Token) -> Flow[Token]:
    yield from GetEntry("a")
    raise ZeroDivisionError


def conflicting(token: Token) -> Flow[Token]:
    yield from Commit([Set("a", 1, if_revision=7)])
    return token


def failing_call(token: Token) -> Flow[Token]:
    yield Call(divmod, 1, 0)
    return token


def wrong_yield(token: Token) -> Flow[Token]:
    yield 7  # type: ignore[misc]
    return token


def translating(token: Token) -> Flow[Token]:
    try:
        yield from Commit([Set("a", 1, if_revision=7)])
    except RevisionConflict as conflict:
        raise ZeroDivisionError from conflict
    return token


@pytest.mark.parametrize(
    "flow",
    [plainly, catching, raising, conflicting, failing_call, wrong_yield, translating],
    ids=lambda flow: flow.__name__,
)
async def test_a_flow_leaves_no_reference_cycle(store: Any, flow: Callable[[Token], Flow[Token]]) -> None:
    with no_collector():
        token = Token()
        seen = weakref.ref(token)

        with suppress(ZeroDivisionError, RevisionConflict, TypeError):
            await store.run(flow(token))
        del token

        assert seen() is None


async def test_an_update_that_had_to_try_again_leaves_no_reference_cycle(colour: Any) -> None:
    raw = MemoryStore()
    interfering = iter([10])

    def add(token: Token, number: int) -> int:
        for interference in interfering:
            raw.set("n", interference)
        return number + 1

    with no_collector():
        token = Token()
        seen = weakref.ref(token)

        assert await colour.face(raw).update("n", partial(add, token), default=0) == 11
        del token

        assert seen() is None


# -- operations --------------------------------------------------------------------------------------------------------

OPERATIONS: list[Operation[Any]] = [
    GetEntry("a"),
    Scan("a", after="b", limit=3),
    Scan(keys=["a"]),
    Commit([Set("a", 1)]),
    OpenWatch(["a"], since=3, capacity=4, overflow="raise"),
    OpenWatch(prefix="a", latest=True),
]
STEPS: list[Step[Any]] = [Call(int, "7"), Next(MemoryStore().watch("a"), 3), Sleep(3)]


@pytest.mark.parametrize("step", [*OPERATIONS, *STEPS], ids=repr)
def test_a_step_is_immutable_and_slotted(step: Any) -> None:
    for name in (*step.__slots__, "other"):
        with pytest.raises(AttributeError, match=f"{type(step).__name__} is immutable"):
            setattr(step, name, 1)
    assert not hasattr(step, "__dict__")


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_an_operation_has_the_name_of_the_primitive_it_asks_for(operation: Operation[Any]) -> None:
    assert callable(getattr(MemoryStore, operation.name))


def test_the_repr_of_a_step_shows_what_it_asks_for_and_no_value() -> None:
    commit = Commit([Set("a", "xyzzy", if_revision=3), Delete("b"), Check("c", 0)])

    assert repr(GetEntry("a")) == "GetEntry(key='a')"
    assert repr(Scan("a", limit=3)) == "Scan(after=None, keys=None, limit=3, prefix='a')"
    assert repr(commit) == "Commit(writes=(Set('a', if_revision=3), Delete('b'), Check('c', if_revision=0)))"
    assert repr(Call(print, "xyzzy")) == "Call(print)"
    assert repr(Sleep(3)) == "Sleep(seconds=3)"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: GetEntry(""), InvalidKey),
        (lambda: GetEntry(7), InvalidKey),  # type: ignore[arg-type]
        (lambda: Scan("\n"), InvalidKey),
        (lambda: Scan(keys=["a", ""]), InvalidKey),
        (lambda: Scan(after="\n"), InvalidKey),
        (lambda: Scan("a", keys=["a"]), ValueError),
        (lambda: Scan(limit=0), ValueError),
        (lambda: Scan(keys="abc"), TypeError),
        (lambda: Commit([]), ValueError),
        (lambda: Commit([Set("a", 1), Delete("a")]), ValueError),
        (lambda: Commit([Set("", 1)]), InvalidKey),
        (lambda: Commit([Set("a", 1, if_revision=-1)]), ValueError),
        (lambda: Commit([Set("a", 1, ttl=math.nan)]), ValueError),
        (lambda: Commit(["a"]), TypeError),  # type: ignore[list-item]
        (lambda: OpenWatch(), ValueError),
        (lambda: OpenWatch(["a"], "b"), ValueError),
        (lambda: OpenWatch([""]), InvalidKey),
        (lambda: OpenWatch(prefix="\n"), InvalidKey),
        (lambda: OpenWatch(["a"], since=-1), ValueError),
        (lambda: OpenWatch(["a"], capacity=0), ValueError),
        (lambda: OpenWatch(["a"], overflow="block"), ValueError),  # type: ignore[arg-type]
        (lambda: OpenWatch("abc"), TypeError),
    ],
)
def test_an_operation_that_exists_is_a_valid_one(make: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


def test_operations_hold_their_keys_in_plain_form() -> None:
    plain = [
        GetEntry(Topic.PLAN).key,
        Scan(Topic.PLAN, after=Topic.PLAN).prefix,
        Scan(Topic.PLAN, after=Topic.PLAN).after,
        *(Scan(keys=[Topic.PLAN]).keys or ()),
        *OpenWatch([Topic.PLAN]).keys,
        OpenWatch(prefix=Topic.PLAN).prefix,
        *(write.key for write in Commit([Set(Topic.PLAN, 1), Check(Topic.PLAN, 0)]).writes),
        *(write.key for write in Commit([Delete(Topic.PLAN)]).writes),
    ]

    assert [(type(key), key) for key in plain] == [(str, "plan")] * len(plain)


def test_operations_hold_tuples_of_what_they_were_given_and_each_key_once() -> None:
    keys = ["b", "a", "b"]
    writes: list[Any] = [Set("a", 1)]
    scan, watch, commit = Scan(keys=keys), OpenWatch(keys), Commit(writes)
    keys.append("c")
    writes.append(Set("b", 1))

    assert scan.keys == watch.keys == Scan(keys=iter(["b", "a"])).keys == ("b", "a")
    assert commit.writes == (Set("a", 1),)
    assert Commit(write for write in writes).writes == (Set("a", 1), Set("b", 1))


def test_a_commit_holds_writes_in_their_exact_types() -> None:
    class Sneaky(Set):
        pass

    class Seven(int):
        pass

    (write,) = Commit([Sneaky("a", 1, Seven(7), 60, Topic.PLAN, {Topic.PLAN: Topic.PLAN})]).writes

    assert isinstance(write, Set)
    assert write == Set("a", 1, 7, 60.0, "plan", {"plan": "plan"})
    assert [type(write), type(write.if_revision), type(write.ttl), type(write.writer)] == [Set, int, float, str]
    assert [type(text) for pair in (write.meta or {}).items() for text in pair] == [str, str]


def test_a_scan_and_a_watch_hold_exact_types_as_well() -> None:
    class Five(int):
        pass

    class Text(str):
        __slots__ = ()

    scan, watch = Scan(limit=Five(5)), OpenWatch(["a"], None, Five(5), Five(5), Text("raise"), Five(1))  # type: ignore[arg-type]
    resumed = OpenWatch(["a"], since=Text("a.1"))

    assert [type(each) for each in (scan.limit, watch.since, watch.capacity, watch.overflow, watch.latest)] == [
        *[int] * 3,
        str,
        bool,
    ]
    assert type(resumed.since) is str
    assert (scan.limit, watch.since, watch.capacity, watch.overflow, watch.latest) == (5, 5, 5, "raise", True)


def test_a_commit_holds_a_meta_of_its_own() -> None:
    meta = {"trace": "1"}
    (write,) = Commit([Set("a", 1, meta=meta)]).writes
    meta["trace"] = "2"

    assert isinstance(write, Set)
    assert write.meta == {"trace": "1"}


def test_an_operation_applies_itself_to_a_store_of_either_colour() -> None:
    store = MemoryStore()

    assert Commit([Set("a", 1)]).apply(store) == (1,)
    entry = GetEntry("a").apply(store)
    assert entry.value == 1

    async def both() -> None:
        assert (await GetEntry("a").apply(store.aio)).value == 1
        assert list(await Scan().apply(store.aio)) == ["a"]
        assert isinstance(await OpenWatch(["a"]).apply(store.aio), Watch)

    asyncio.run(both())


def test_a_step_without_a_way_to_do_it_says_so() -> None:
    class Nothing(Step[None]):
        pass

    def flow() -> Flow[None]:
        yield Nothing()

    with pytest.raises(NotImplementedError):
        MemoryStore().run(flow())
