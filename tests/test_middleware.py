"""Middleware: everything passes through it, nothing goes around, and both faces of a store share it."""

from __future__ import annotations

import asyncio
import gc
import inspect
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from typing import Any

import pytest

from stigmergy import (
    AccessDenied,
    AsyncStore,
    Call,
    Change,
    Check,
    Commit,
    Compacted,
    Delete,
    Entry,
    Flow,
    GetEntry,
    InvalidKey,
    Lagged,
    MemoryStore,
    Middleware,
    Next,
    OpenWatch,
    Operation,
    RevisionConflict,
    Scan,
    Set,
    Sleep,
    Snapshot,
    Store,
    StoreClosed,
    Unavailable,
    Unsupported,
    Watch,
    apply_middleware,
)


class Topic(StrEnum):
    PLAN = "plan"


class Blocking(MemoryStore):
    """A store of which nobody knows how long it takes."""

    blocking = True


class Native(AsyncStore):
    """A store that was written async: five primitives, and nothing else."""

    def __init__(self) -> None:
        self._memory = MemoryStore().aio
        self.capabilities = self._memory.capabilities

    async def get_entry(self, key: str) -> Entry | None:
        await asyncio.sleep(0)
        return await self._memory.get_entry(key)

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return await self._memory.scan(prefix, keys=keys, after=after, limit=limit)

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return await self._memory.commit(*writes)

    async def open_watch(self, request: OpenWatch) -> Watch:
        await asyncio.sleep(0)
        return await self._memory.open_watch(request)

    async def close(self) -> None:
        await self._memory.close()


class Count(Operation[int]):
    """An operation that the library does not know: how many entries are there?"""

    __slots__ = ()
    name = "count"

    def apply(self, store: Any) -> Any:
        if isinstance(store, Store):
            return len(store.scan())

        async def count() -> int:
            return len(await store.scan())

        return count()


class Recorder:
    """A middleware that lets everything through, and remembers it."""

    def __init__(self, name: str = "", transcript: list[str] | None = None) -> None:
        self.name = name
        self.transcript: list[str] = [] if transcript is None else transcript
        self.operations: list[Any] = []

    def __call__(self, operation: Operation[Any]) -> Flow[Any]:
        self.operations.append(operation)
        self.transcript.append(f"{self.name}>")
        try:
            return (yield operation)
        finally:
            self.transcript.append(f"<{self.name}")

    @property
    def names(self) -> list[str]:
        return [operation.name for operation in self.operations]


def wrapped(store: Any, *middleware: Middleware) -> Any:
    """`store`, of either colour, with `middleware` around it."""
    if isinstance(store, AsyncStore):
        return apply_middleware(store, *middleware)
    return type(store)(apply_middleware(store.store, *middleware))


def pass_through(operation: Operation[Any]) -> Flow[Any]:
    return (yield operation)


def refuse_writes(operation: Operation[Any]) -> Flow[Any]:
    """A guard: what it does not know it refuses."""
    if not isinstance(operation, (GetEntry, Scan, OpenWatch)):
        raise AccessDenied(operation.name, "everything")
    return (yield operation)


# -- order -------------------------------------------------------------------------------------------------------------


async def test_the_first_middleware_is_the_outermost(store: Any) -> None:
    transcript: list[str] = []
    layered = wrapped(store, *(Recorder(name, transcript) for name in "abc"))

    await layered.set("a", 1)
    await layered.watch("a")

    assert transcript == ["a>", "b>", "c>", "<c", "<b", "<a"] * 2


async def test_more_middleware_extends_the_chain_on_the_outside(store: Any) -> None:
    transcript: list[str] = []
    inner = wrapped(store, Recorder("c", transcript), Recorder("d", transcript))
    outer = wrapped(inner, Recorder("a", transcript), Recorder("b", transcript))

    await outer.get("a")
    assert transcript == ["a>", "b>", "c>", "d>", "<d", "<c", "<b", "<a"]
    transcript.clear()
    await inner.get("a")
    assert transcript == ["c>", "d>", "<d", "<c"]
    await store.get("a")
    assert transcript == ["c>", "d>", "<d", "<c"]


async def test_no_middleware_at_all_is_a_chain_too(store: Any) -> None:
    bare = wrapped(store)

    assert await bare.set("a", 1) == 1
    assert await bare.get("a") == 1
    assert (await bare.watch("a", since=0)).get_nowait().value == 1


async def test_what_is_no_function_is_refused_at_once(store: Any) -> None:
    for wrong in (None, "log", [pass_through], GetEntry("a")):
        with pytest.raises(TypeError, match="a middleware is a generator function, not a"):
            wrapped(store, pass_through, wrong)


@pytest.mark.parametrize(
    ("ask", "result", "told"),
    [
        (lambda store: store.scan(), None, r"returned None for Scan\(.*\): it must `return \(yield operation\)`"),
        (lambda store: store.scan(), {}, r"returned a dict for Scan\(.*\), and not a Snapshot"),
        (lambda store: store.watch("a"), None, r"returned None for OpenWatch\("),
        (lambda store: store.watch("a"), [], r"returned a list for OpenWatch\(.*\), and not a Watch"),
        (lambda store: store.set("a", 1), None, r"returned None for Commit\("),
    ],
)
async def test_a_result_that_cannot_be_one_is_told_with_the_name_of_the_middleware(
    store: Any, ask: Callable[[Any], Any], result: Any, told: str
) -> None:
    def careless(operation: Operation[Any]) -> Flow[Any]:
        yield operation
        return result

    with pytest.raises(TypeError, match=f"the middleware .*careless {told}"):
        await ask(wrapped(store, pass_through, careless, pass_through))


async def test_a_snapshot_may_be_changed_by_one_around_it(store: Any) -> None:
    def shouting(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        if isinstance(operation, Scan):
            return Snapshot(result, lambda key, entry: entry._replace(value="!"), result.revision, result.bookmark)
        return result

    loud = wrapped(store, shouting)
    await loud.set("a", "?")
    snapshot = await loud.scan()
    assert (snapshot["a"].value, snapshot.revision, snapshot.bookmark) == ("!", 1, (await store.scan()).bookmark)
    assert await loud.get_many(["a"]) == {"a": "!"}


# -- everything passes through, and nothing goes around ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "names"),
    [
        (lambda store: store.get("a"), ["get_entry"]),
        (lambda store: store.get("a", 7), ["get_entry"]),
        (lambda store: store.get_entry("a"), ["get_entry"]),
        (lambda store: store.get_many(["a", "b"]), ["scan"]),
        (lambda store: store.scan("a"), ["scan"]),
        (lambda store: store.set("a", 1), ["commit"]),
        (lambda store: store.set("a", 1, if_revision=1, ttl=1), ["commit"]),
        (lambda store: store.delete("a"), ["commit"]),
        (lambda store: store.delete("a", if_revision=1), ["commit"]),
        (lambda store: store.commit(Set("b", 1), Delete("a"), Check("c", 0)), ["commit"]),
        (lambda store: store.update("a", lambda value: value), ["get_entry", "commit"]),
        (lambda store: store.watch("a"), ["open_watch"]),
        (lambda store: store.observe("a"), ["open_watch"]),
        (lambda store: store.open_watch(OpenWatch(["a"])), ["open_watch"]),
        (lambda store: store.wait_for("a", lambda value: True), ["get_entry"]),
        (lambda store: store.run(pass_through(Count())), ["count"]),
    ],
)
async def test_everything_that_is_asked_of_a_store_passes_through_once(
    store: Any, ask: Callable[[Any], Any], names: list[str]
) -> None:
    await store.set("a", 1)
    outer, inner = Recorder(), Recorder()

    await ask(wrapped(store, outer, inner))

    assert outer.names == inner.names == names


async def test_a_middleware_is_handed_the_operation_as_it_was_asked(store: Any) -> None:
    recorder = Recorder()
    recorded = wrapped(store, recorder)

    await recorded.set("a", 1, ttl=60)
    await recorded.set("a", 2, if_revision=1, ttl="keep")
    await recorded.delete("a", if_revision=2)
    await recorded.scan("a", after="ab", limit=3)
    await recorded.scan(keys=["b", "a"])
    await recorded.watch("a", "b", since=0, capacity=None, overflow="raise")
    await recorded.watch(prefix="a")
    await recorded.observe(prefix="a")

    assert list(map(repr, recorder.operations)) == list(
        map(
            repr,
            [
                Commit([Set("a", 1, ttl=60)]),
                Commit([Set("a", 2, 1, "keep")]),
                Commit([Delete("a", 2)]),
                Scan("a", after="ab", limit=3),
                Scan(keys=["b", "a"]),
                OpenWatch(["a", "b"], since=0, capacity=None, overflow="raise"),
                OpenWatch(prefix="a"),
                OpenWatch(prefix="a", latest=True),
            ],
        )
    )
    assert [operation.writes for operation in recorder.operations[:3]] == [
        (Set("a", 1, ttl=60),),
        (Set("a", 2, 1, "keep"),),
        (Delete("a", 2),),
    ]


async def test_a_middleware_never_meets_a_bad_operation_nor_a_key_that_is_not_plain(store: Any) -> None:
    recorder = Recorder()
    recorded = wrapped(store, recorder)

    for ask in (
        lambda: recorded.get(""),
        lambda: recorded.set("a", 1, ttl=0),
        lambda: recorded.commit(),
        lambda: recorded.scan("\n"),
    ):
        with pytest.raises((InvalidKey, ValueError)):
            await ask()
    with pytest.raises(ValueError, match="either keys or a prefix"):
        await recorded.watch()
    assert recorder.operations == []
    await recorded.get(Topic.PLAN)
    assert type(recorder.operations[0].key) is str


async def test_conditional_writes_pass_through(store: Any) -> None:
    layered = wrapped(store, pass_through, pass_through)
    await layered.set("a", 1, if_revision=0)

    for ask in (
        lambda: layered.set("a", 2, if_revision=0),
        lambda: layered.set("a", 2, if_revision=7),
        lambda: layered.delete("a", if_revision=7),
        lambda: layered.commit(Set("b", 1), Check("a", 7)),
    ):
        with pytest.raises(RevisionConflict) as conflict:
            await ask()
        assert (conflict.value.key, conflict.value.actual) == ("a", 1)
    assert await layered.commit(Check("a", 1), Set("b", 1), Delete("c")) == (None, 2, None)
    assert await layered.delete("a", if_revision=1) is True
    assert await layered.delete("a") is False
    assert await store.get_many(["a", "b"]) == {"b": 1}


async def test_scans_pass_through_with_all_their_parameters(store: Any) -> None:
    layered = wrapped(store, pass_through, pass_through)
    for key in ["a1", "a2", "a3", "b1"]:
        await layered.set(key, key)

    assert list(await layered.scan()) == ["a1", "a2", "a3", "b1"]
    assert list(await layered.scan("a", after="a1", limit=1)) == ["a2"]
    assert list(await layered.scan(keys=["b1", "x", "a3"])) == ["a3", "b1"]
    assert await layered.get_many(["a1", "x"]) == {"a1": "a1"}
    snapshot = await layered.scan("a")
    assert (snapshot.revision, snapshot.bookmark) == (4, (await store.scan()).bookmark)


async def test_watches_pass_through_with_all_their_parameters(store: Any, colour: Any) -> None:
    layered = wrapped(store, pass_through, pass_through)
    await store.set("a", 1)
    bookmark = (await layered.scan()).bookmark
    resumed, continued = await layered.watch("a", since=0), await layered.watch(prefix="", since=bookmark)
    dropping, raising = await layered.watch("a", capacity=1), await layered.watch("a", capacity=1, overflow="raise")
    latest = await layered.observe(prefix="a")

    await layered.set("a", 2)
    await store.set("a", 3)

    assert [change.value for change in await colour.drain(resumed)] == [1, 2, 3]
    assert [change.value for change in await colour.drain(continued)] == [2, 3]
    assert [(change.value, change.missed) for change in await colour.drain(dropping)] == [(3, 1)]
    assert dropping.dropped == 1
    with pytest.raises(Lagged):
        raising.get_nowait()
    assert raising.get_nowait().value == 3
    assert [(change.value, change.old_value) for change in await colour.drain(latest)] == [(3, None)]
    with pytest.raises(Compacted):
        await layered.watch("a", since=99)


async def test_update_passes_through_and_loses_no_write(store: Any) -> None:
    recorder = Recorder()
    interfering = iter([10])

    def interfere(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit):
            for interference in interfering:
                yield Commit([Set("n", interference)])
        return (yield operation)

    assert await wrapped(store, recorder, interfere).update("n", lambda number: number + 1, default=0) == 11

    assert recorder.names == ["get_entry", "commit", "get_entry", "commit"]


async def test_wait_for_passes_through(store: Any) -> None:
    layered = wrapped(store, pass_through, pass_through)
    await layered.set("a", 1)

    assert (await layered.wait_for("a", lambda value: value == 1)).revision == 1
    with pytest.raises(TimeoutError):
        await layered.wait_for("a", lambda value: value == 2, timeout=0)


async def test_the_default_of_get_and_the_ttl_of_set_pass_through(new_store: Any, clock: Any) -> None:
    layered = wrapped(new_store(clock=clock), pass_through)
    await layered.set("a", 1, ttl=10)
    await layered.update("a", lambda number: number + 1)

    assert await layered.get("a", 7) == 2
    clock.advance(10)
    assert await layered.get("a", 7) == 7


async def test_capabilities_pass_through(new_store: Any) -> None:
    for options in ({}, {"history": 0}, {"copy": None}):
        store = new_store(**options)
        layered = wrapped(store, pass_through)
        assert layered.capabilities == store.capabilities
    layered = wrapped(new_store(), pass_through)
    assert layered.require("resumable", "isolated").capabilities == layered.capabilities
    with pytest.raises(Unsupported):
        layered.require("durable")


async def test_steps_of_a_flow_are_seen_by_nobody(store: Any) -> None:
    recorder = Recorder()
    watch = await store.watch("a")

    def flow() -> Flow[int]:
        yield Commit([Set("a", 1)])
        change = yield from Next(watch, 5)
        yield Sleep(0)
        return (yield from Call(int, change.value))

    assert await wrapped(store, recorder).run(flow()) == 1
    assert recorder.names == ["commit"]


async def test_errors_pass_through_every_layer(store: Any) -> None:
    transcript: list[str] = []
    layered = wrapped(store, Recorder("a", transcript), Recorder("b", transcript))

    with pytest.raises(RevisionConflict):
        await layered.set("a", 1, if_revision=7)
    with pytest.raises(Compacted):
        await layered.watch("a", since=99)

    assert transcript == ["a>", "b>", "<b", "<a"] * 2


# -- what a middleware may do ------------------------------------------------------------------------------------------


def retry(operation: Operation[Any]) -> Flow[Any]:
    for _ in range(2):
        try:
            return (yield operation)
        except Unavailable:
            yield Sleep(0)
    return (yield operation)


class Flaky:
    """A middleware that fails so many times before it lets an operation through."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def __call__(self, operation: Operation[Any]) -> Flow[Any]:
        if self.failures:
            self.failures -= 1
            raise Unavailable("no answer")
        return (yield operation)


async def test_a_middleware_may_try_again(store: Any) -> None:
    assert await wrapped(store, retry, Flaky(2)).set("a", 1) == 1

    with pytest.raises(Unavailable):
        await wrapped(store, retry, Flaky(3)).set("a", 2)
    assert await store.get("a") == 1


async def test_a_middleware_may_ask_something_else(store: Any) -> None:
    def elsewhere(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, GetEntry):
            return (yield from GetEntry("other:" + operation.key))
        if isinstance(operation, OpenWatch):
            return (yield from OpenWatch(["other:" + key for key in operation.keys]))
        if isinstance(operation, Commit):
            return (yield from Commit([write._replace(key="other:" + write.key) for write in operation.writes]))
        return (yield operation)

    elsewhere_store = wrapped(store, elsewhere)
    watch = await elsewhere_store.watch("a")

    await elsewhere_store.set("a", 1)

    assert await elsewhere_store.get("a") == 1
    assert list(await elsewhere_store.scan()) == ["other:a"]
    assert watch.get_nowait().key == "other:a"


async def test_a_middleware_may_stamp_what_is_written(store: Any) -> None:
    def stamp(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit):
            writes = [write._replace(writer="planner", meta={"trace": "1"}) for write in operation.writes]
            return (yield Commit(writes))
        return (yield operation)

    stamped, watch = wrapped(store, stamp), await store.watch("a")
    await stamped.set("a", 1)
    await stamped.delete("a")

    for change in (watch.get_nowait(), watch.get_nowait()):
        assert (change.writer, change.meta) == ("planner", {"trace": "1"})


async def test_a_middleware_may_answer_by_itself(store: Any) -> None:
    def absent(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, GetEntry):
            return None
        return (yield operation)

    silent = wrapped(store, absent)
    await silent.set("a", 1)

    assert await silent.get("a", 7) == 7
    assert await store.get("a") == 1


async def test_a_middleware_may_ask_several_things(store: Any) -> None:
    def audit(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        if isinstance(operation, Commit):
            seen = yield from GetEntry("audit")
            yield Commit([Set("audit", [*(seen.value if seen else []), result])])
        return result

    audited = wrapped(store, audit)
    assert await audited.set("a", 1) == 1
    assert await audited.commit(Set("b", 1), Delete("a")) == (3, 4)

    assert await store.get("audit") == [(1,), (3, 4)]


async def test_what_a_middleware_asks_passes_only_what_is_inside_of_it(store: Any) -> None:
    outer, inner = Recorder(), Recorder()

    def look_first(operation: Operation[Any]) -> Flow[Any]:
        yield GetEntry("a")
        return (yield operation)

    await wrapped(store, outer, look_first, inner).scan()

    assert outer.names == ["scan"]
    assert inner.names == ["get_entry", "scan"]


async def test_a_middleware_may_change_the_answer(store: Any) -> None:
    def double(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        if isinstance(operation, GetEntry) and result is not None:
            return result._replace(value=2 * result.value)
        return result

    doubled = wrapped(store, double)
    await doubled.set("a", 21)

    assert await doubled.get("a") == 42
    assert await store.get("a") == 21


async def test_a_middleware_that_refuses_leaves_everything_as_it_was(store: Any) -> None:
    await store.set("a", 1)
    guarded, watch = wrapped(store, refuse_writes), await store.watch(prefix="")

    for ask in (
        lambda: guarded.set("a", 2),
        lambda: guarded.set("b", 2, if_revision=0),
        lambda: guarded.delete("a"),
        lambda: guarded.commit(Check("a", 1), Set("b", 1)),
        lambda: guarded.update("a", lambda number: number + 1),
        lambda: guarded.run(pass_through(Commit([Set("a", 2)]))),
    ):
        with pytest.raises(AccessDenied):
            await ask()

    assert await guarded.get_many(["a", "b"]) == {"a": 1}
    assert (await store.scan()).revision == 1
    assert watch.get_nowait() is None


async def test_a_middleware_that_fails_afterwards_does_not_undo_what_happened(store: Any) -> None:
    def fail_after(operation: Operation[Any]) -> Flow[Any]:
        yield operation
        raise ZeroDivisionError

    watch = await store.watch("a")

    with pytest.raises(ZeroDivisionError):
        await wrapped(store, fail_after).set("a", 1)

    assert await store.get("a") == 1
    assert watch.get_nowait().value == 1


async def test_a_middleware_may_translate_an_error(store: Any) -> None:
    def translate(operation: Operation[Any]) -> Flow[Any]:
        try:
            return (yield operation)
        except RevisionConflict as conflict:
            raise LookupError(conflict.key) from conflict

    with pytest.raises(LookupError) as raised:
        await wrapped(store, translate).set("a", 1, if_revision=7)

    assert isinstance(raised.value.__cause__, RevisionConflict)


async def test_a_middleware_may_call_a_function(store: Any) -> None:
    seen = []

    def log(operation: Operation[Any]) -> Flow[Any]:
        yield Call(seen.append, operation.name)
        return (yield operation)

    logged = wrapped(store, log)
    await logged.set("a", 1)
    await logged.watch("a")

    assert seen == ["commit", "open_watch"]


# -- wrong middleware --------------------------------------------------------------------------------------------------


async def test_a_plain_function_as_middleware_is_told_to_yield(store: Any) -> None:
    plain = wrapped(store, lambda operation: None)

    for ask in (lambda: plain.set("a", 1), lambda: plain.get("a")):
        with pytest.raises(
            TypeError, match=r"a flow is a generator, not a NoneType: its function must contain a yield"
        ):
            await ask()
    with pytest.raises(TypeError, match="must contain a yield"):
        await plain.watch("a")

    assert (await store.scan()).revision == 0


async def test_a_middleware_that_yields_no_step_is_told_so(store: Any) -> None:
    def wrong(operation: Operation[Any]) -> Flow[Any]:
        yield operation.name  # type: ignore[misc]

    misled = wrapped(store, wrong)

    with pytest.raises(TypeError, match="a flow may yield operations and steps, not a str"):
        await misled.set("a", 1)
    with pytest.raises(TypeError, match="a flow may yield operations and steps, not a str"):
        await misled.watch("a")

    assert (await store.scan()).revision == 0


# -- operations of unknown types ---------------------------------------------------------------------------------------


async def test_an_operation_of_an_unknown_type_passes_through(store: Any) -> None:
    recorder = Recorder()
    await store.set("a", 1)

    assert await wrapped(store, recorder, pass_through).run(pass_through(Count())) == 1

    assert recorder.names == ["count"]


async def test_a_guard_refuses_an_operation_of_an_unknown_type(store: Any) -> None:
    with pytest.raises(AccessDenied):
        await wrapped(store, pass_through, refuse_writes).run(pass_through(Count()))


# -- watches -----------------------------------------------------------------------------------------------------------


async def test_a_middleware_may_touch_what_a_watch_delivers(store: Any, colour: Any) -> None:
    def double(change: Change) -> Change:
        return change._replace(value=2 * change.value)

    def add_one(change: Change) -> Change:
        return change._replace(value=change.value + 1)

    def mapping(function: Callable[[Change], Change]) -> Middleware:
        def map_watches(operation: Operation[Any]) -> Flow[Any]:
            result = yield operation
            return result.map(function) if isinstance(operation, OpenWatch) else result

        return map_watches

    mapped = wrapped(store, mapping(double), mapping(add_one))
    every, latest, plain = await mapped.watch("a"), await mapped.observe("a"), await store.watch("a")
    await mapped.set("a", 1)

    assert (await colour.get(every)).value == 4, "the innermost comes first"
    assert (await colour.get(latest)).value == 4
    assert plain.get_nowait().value == 1
    await mapped.set("a", 2)
    assert every.get_nowait().value == 6
    assert (await mapped.wait_for("a", lambda value: value == 2)).value == 2


async def test_a_watch_through_middleware_is_subscribed_when_it_returns(store: Any, colour: Any) -> None:
    watch = await wrapped(store, pass_through).watch("a")

    await store.set("a", 1)

    assert watch.get_nowait().value == 1


@pytest.mark.parametrize(
    "step", [GetEntry("b"), Scan(), Commit([Set("b", 1)]), Sleep(0)], ids=lambda step: type(step).__name__
)
async def test_anything_may_stand_around_a_watch(store: Any, step: Any) -> None:
    done = []

    def slow(operation: Operation[Any]) -> Flow[Any]:
        if not isinstance(operation, OpenWatch):
            return (yield operation)
        yield step
        watch = yield operation
        yield step
        done.append(operation.latest)
        return watch

    slowed = wrapped(store, pass_through, slow, pass_through)
    every, latest = await slowed.watch("a"), await slowed.observe("a")
    await store.set("a", 1)

    assert every.get_nowait().value == latest.get_nowait().value == 1
    with pytest.raises(TimeoutError):
        await slowed.wait_for("a", lambda value: value == 2, timeout=0)
    assert done == [False, True, True]
    assert await store.get("b") == (1 if isinstance(step, Commit) else None)


async def test_around_a_watch_an_async_function_is_awaited_on_an_async_store() -> None:
    transcript = []

    async def slow() -> None:
        transcript.append("begun")
        await asyncio.sleep(0)
        transcript.append("ended")

    def waiting(operation: Operation[Any]) -> Flow[Any]:
        yield Call(slow)
        return (yield operation)

    async with MemoryStore().aio as store:
        watch = await apply_middleware(store, waiting).watch("a")
        assert transcript == ["begun", "ended"]
        await store.set("a", 1)
        assert watch.get_nowait().value == 1  # type: ignore[union-attr]


def test_around_a_watch_an_async_function_is_refused_on_a_sync_store_and_leaves_no_coroutine() -> None:
    made = []

    async def slow() -> None: ...

    def ask() -> Any:
        made.append(slow())
        return made[-1]

    def waiting(operation: Operation[Any]) -> Flow[Any]:
        yield Call(ask)
        return (yield operation)

    with MemoryStore() as store:
        with pytest.raises(TypeError, match="ask is async"):
            apply_middleware(store, waiting).watch("a")
        assert store._hub._members() == []

    assert [inspect.getcoroutinestate(each) for each in made] == [inspect.CORO_CLOSED]


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "failing"])
async def test_an_opening_that_fails_behind_its_watch_leaves_no_subscription(cancelled: bool) -> None:
    opened = asyncio.Event()

    async def follow_up() -> None:
        opened.set()
        if not cancelled:
            raise Unavailable("no answer")
        await asyncio.get_running_loop().create_future()

    def late(operation: Operation[Any]) -> Flow[Any]:
        watch = yield operation
        yield Call(follow_up)
        return watch

    async with MemoryStore().aio as store:
        task = asyncio.create_task(apply_middleware(store, late).open_watch(OpenWatch(["a"])))
        await opened.wait()
        if cancelled:
            task.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else Unavailable):
            await task
        del task
        await asyncio.sleep(0)  # the callback that runs now holds the task
        gc.collect()
        assert not store.sync._hub.is_watched  # type: ignore[attr-defined]


# -- the other face ----------------------------------------------------------------------------------------------------


def test_the_faces_of_a_wrapped_store_lead_to_each_other() -> None:
    store = MemoryStore()
    layered = apply_middleware(store, pass_through)
    async_layered = apply_middleware(store.aio, pass_through)

    assert isinstance(layered, Store)
    assert layered.aio.sync is layered
    assert layered.aio is layered.aio
    assert isinstance(async_layered, AsyncStore)
    assert async_layered.sync.aio is async_layered
    assert layered.require("resumable") is layered
    assert layered.aio.require("resumable") is layered.aio


async def test_the_other_face_is_wrapped_by_the_same_chain(store: Any) -> None:
    transcript: list[str] = []
    layered = wrapped(store, Recorder("a", transcript), Recorder("b", transcript))

    if isinstance(layered, AsyncStore):
        layered.sync.set("a", 1)
        layered.sync.watch("a")
        layered.sync.update("a", lambda number: number + 1)
    else:
        asyncio.run(layered.aio.set("a", 1))
        asyncio.run(layered.aio.open_watch(OpenWatch(["a"])))
        asyncio.run(layered.aio.update("a", lambda number: number + 1))

    assert transcript == ["a>", "b>", "<b", "<a"] * 4
    assert await store.get("a") == 2


async def test_an_async_function_may_be_called_on_the_async_face() -> None:
    async def slow(name: str) -> str:
        await asyncio.sleep(0)
        return name

    def ask(operation: Operation[Any]) -> Flow[Any]:
        assert (yield from Call(slow, operation.name)) == operation.name
        return (yield operation)

    with MemoryStore() as store:
        layered = apply_middleware(store, ask)
        assert await layered.aio.set("a", 1) == 1
        assert (await layered.aio.watch("a", since=0)).get_nowait().value == 1  # type: ignore[union-attr]
        for ask_plainly in (lambda: layered.set("a", 2), lambda: layered.watch("a")):
            with pytest.raises(TypeError, match="is async"):
                ask_plainly()
        assert store.get("a") == 1


async def test_middleware_interleaves_but_never_mixes_up_operations() -> None:
    def slow(operation: Operation[Any]) -> Flow[Any]:
        yield Sleep(0)
        result = yield operation
        yield Sleep(0)
        return result

    async with MemoryStore().aio as store:
        slowed = apply_middleware(store, slow, slow)
        revisions = await asyncio.gather(*(slowed.set(f"k{number}", number) for number in range(20)))
        values = await asyncio.gather(*(slowed.get(f"k{number}") for number in range(20)))

    assert sorted(revisions) == list(range(1, 21))
    assert values == list(range(20))


async def test_cancellation_reaches_a_middleware() -> None:
    transcript: list[str] = []
    parked = asyncio.Event()

    async def for_ever() -> None:
        parked.set()
        await asyncio.get_running_loop().create_future()

    def waiting(operation: Operation[Any]) -> Flow[Any]:
        yield Call(for_ever)
        return (yield operation)

    async with MemoryStore().aio as store:
        task = asyncio.create_task(apply_middleware(store, Recorder("a", transcript), waiting).set("a", 1))
        await parked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert transcript == ["a>", "<a"]
        assert await store.get("a") is None


# -- stores that block, and stores that were written async -------------------------------------------------------------


async def test_a_store_that_blocks_still_does_so_behind_middleware() -> None:
    with Blocking() as store:
        recorder = Recorder()
        layered = apply_middleware(store, recorder)
        assert (layered.blocking, apply_middleware(MemoryStore(), recorder).blocking) == (True, False)

        watch = await layered.aio.watch("a")
        await layered.aio.set("a", 1)

        assert (await anext(watch)).value == 1
        assert recorder.names == ["open_watch", "commit"]


async def test_a_watch_of_a_store_that_blocks_is_mapped_before_it_is_returned() -> None:
    def double(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        if isinstance(operation, OpenWatch):
            result.map(lambda change: change._replace(value=2 * change.value))
        return result

    with Blocking() as store:
        async with apply_middleware(store, double).aio.watch("a") as watch:
            store.set("a", 21)
            assert (await anext(watch)).value == 42


async def test_a_store_that_was_written_for_asyncio_only_is_wrapped_as_it_is() -> None:
    recorder = Recorder()
    native = Native()
    layered = apply_middleware(native, recorder, pass_through)

    watch = await layered.watch("a")
    assert await layered.set("a", 1) == 1
    assert (await anext(watch)).value == 1
    assert await layered.get("a") == 1
    assert recorder.names == ["open_watch", "commit", "get_entry"]
    await layered.close()
    with pytest.raises(StoreClosed):
        await native.get("a")


# -- closing -----------------------------------------------------------------------------------------------------------


async def test_closing_a_wrapped_store_closes_the_store(store: Any, colour: Any) -> None:
    layered = wrapped(store, refuse_writes, pass_through)
    watch, other = await layered.watch("a"), await store.watch("a")

    await layered.close()
    await layered.close()

    for each in (layered, store):
        with pytest.raises(StoreClosed):
            await each.get("a")
        with pytest.raises(StoreClosed):
            await each.watch("a")
    assert await colour.all(watch) == await colour.all(other) == []


async def test_closing_the_store_closes_what_is_wrapped_around_it(store: Any) -> None:
    layered = wrapped(store, pass_through)

    await store.close()

    with pytest.raises(StoreClosed):
        await layered.get("a")
    with pytest.raises(StoreClosed):
        await layered.observe("a")


async def test_leaving_the_with_block_of_a_wrapped_store_closes_the_store(store: Any) -> None:
    async with wrapped(store, pass_through) as layered:
        await layered.set("a", 1)

    with pytest.raises(StoreClosed):
        await store.get("a")


def test_leaving_the_with_block_closes_in_either_colour() -> None:
    with apply_middleware(MemoryStore(), pass_through) as layered:
        layered.set("a", 1)
    with pytest.raises(StoreClosed):
        layered.get("a")

    async def leave() -> None:
        async with apply_middleware(MemoryStore().aio, pass_through) as layered:
            await layered.set("a", 1)
        with pytest.raises(StoreClosed):
            await layered.get("a")

    asyncio.run(leave())


# -- nothing is left behind --------------------------------------------------------------------------------------------


class Token:
    """Something whose end can be seen."""


def conflicting(token: Token) -> Flow[Any]:
    return (yield Commit([Set("a", 1, if_revision=7)]))


def refused(token: Token) -> Flow[Any]:
    return (yield Count())


@pytest.mark.parametrize("flow", [conflicting, refused], ids=lambda flow: flow.__name__)
async def test_an_error_through_middleware_leaves_no_reference_cycle(
    store: Any, flow: Callable[[Token], Flow[Any]]
) -> None:
    def guard(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Count):
            raise AccessDenied("count", "everything")
        return (yield operation)

    layered = wrapped(store, pass_through, retry, guard, pass_through)
    token = Token()
    seen = weakref.ref(token)
    gc.disable()
    try:
        with suppress(RevisionConflict, AccessDenied):
            await layered.run(flow(token))
        del token
        assert seen() is None
    finally:
        gc.enable()
