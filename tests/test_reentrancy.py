"""Re-entrancy: from every place where the library calls somebody else's code, that code may use the same store, nest,
or fail in any way, and the store stays whole.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest

from stigmergy import (
    Call,
    Change,
    Check,
    Delete,
    Flow,
    Hooks,
    InvalidValue,
    MemoryStore,
    Op,
    Operation,
    RevisionConflict,
    Set,
    Store,
    StoreClosed,
    Watch,
    WatchClosed,
    apply_middleware,
    with_hooks,
)
from stigmergy.testing import Colour

OUTER = "written by whoever called"
"""The value that tells the write during which somebody else's code ran from the writes of that code."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What finalisers raise, and what observers raise, is said elsewhere."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    caplog.set_level(logging.CRITICAL + 1)


class Stage:
    """A store, watches that hear of everything, and somebody who strikes where a place lets him."""

    def __init__(
        self, keys: tuple[str, str] = ("a", "b"), watched: tuple[str, ...] | None = None, **options: Any
    ) -> None:
        self.inner = MemoryStore(**options)
        self.store: Store = self.inner
        self.key, self.other = keys
        for key in keys:
            self.inner.set(key, 0)
        self.first = self.inner.scan().revision + 1
        self.watched = watched
        """`None`: everything. What a watch hears of, its buffer keeps from being finalised."""
        self.every = self.watch()
        self.spare = self.inner.watch(*keys)
        self.spare.close()
        self.action: Callable[[Stage], object] = lambda stage: None
        self.left = self.struck = 0

    def watch(self) -> Watch:
        if self.watched is None:
            return self.inner.watch(prefix="", capacity=None)
        return self.inner.watch(*self.watched, capacity=None)

    def strike(self, *_: object) -> Any:
        if not self.left:
            return None
        self.left -= 1
        self.struck += 1
        return self.action(self)

    def play(self, trigger: Callable[[], object], action: Callable[[Stage], object], times: int = 1) -> object:
        """Let `action` strike inside `trigger`; return what that returned or raised."""
        self.action, self.left = action, times
        try:
            return trigger()
        except BaseException as error:
            return error
        finally:
            self.left = 0

    def is_whole(self) -> list[Change]:
        """Nothing is lost, disordered or untrue, and the store goes on, or is closed; return the changes."""
        closed = False
        try:
            self.inner.set("b", "end")
        except StoreClosed:
            closed = True
        changes: list[Change] = []
        with suppress(WatchClosed):
            changes += iter(self.every.get_nowait, None)
        revisions = [change.revision for change in changes]
        if self.watched is None:
            assert revisions == list(range(self.first, self.first + len(revisions)))
        assert revisions == sorted(set(revisions))
        state = dict.fromkeys(self.watched or (self.key, self.other), 0)
        for change in changes:
            assert state.pop(change.key, None) == change.old_value
            if change.op is Op.SET:
                state[change.key] = change.value
        if closed:
            for operation in (lambda: self.inner.get("a"), self.inner.scan, lambda: self.inner.watch("a")):
                with pytest.raises(StoreClosed):
                    operation()
        else:
            snapshot = self.inner.scan()
            kept = snapshot if self.watched is None else self.watched
            assert {key: self.inner.get(key) for key in kept if key in snapshot} == state
            assert self.inner.set("b", "after the end") == snapshot.revision + 1
            assert len(self.inner._hub._members()) <= 4
        assert self.inner._lock.acquire(timeout=60)
        self.inner._lock.release()
        self.inner.close()
        return changes


Trigger = Callable[[], object]
Place = Callable[[], tuple[Stage, Trigger]]
"""A stage, and what lets somebody strike there; it returns the revision of its write, if it writes."""


def hooked(moment: str, trigger: Callable[[Store], object]) -> tuple[Stage, Trigger]:
    stage = Stage()
    stage.store = apply_middleware(stage.inner, with_hooks(Hooks(**{moment: stage.strike})))
    return stage, partial(trigger, stage.store)


def in_middleware(place: str) -> tuple[Stage, Trigger]:
    stage = Stage()

    def striking(operation: Operation[Any]) -> Flow[Any]:
        if place == "before":
            stage.strike()
        if place == "call":
            yield Call(stage.strike)
        result = yield operation
        if place == "after":
            stage.strike()
        return result

    stage.store = apply_middleware(stage.inner, striking)
    return stage, lambda: stage.store.set("a", OUTER)


def in_map() -> tuple[Stage, Trigger]:
    stage = Stage()
    watch = stage.inner.watch("a")
    watch.map(lambda change: (stage.strike(), change)[1])

    def trigger() -> int:
        revision = stage.inner.set("a", OUTER)
        watch.get_nowait()
        return revision

    return stage, trigger


def in_update() -> tuple[Stage, Trigger]:
    stage = Stage()

    def trigger() -> int:
        assert stage.store.update("a", lambda value: (stage.strike(), OUTER)[1]) == OUTER
        return 0

    return stage, trigger


def in_wait_for() -> tuple[Stage, Trigger]:
    stage = Stage()
    return stage, lambda: (stage.store.wait_for("a", lambda value: (stage.strike(), True)[1], timeout=60), 0)[1]


def in_copier(place: str) -> tuple[Stage, Trigger]:
    def copier(value: Any) -> Any:
        if stages:
            stages[0].strike()
        return value

    stages: list[Stage] = []
    stage = Stage(copy=copier)
    stages.append(stage)
    watch, state = stage.inner.watch("a"), stage.inner.observe("a")
    triggers: dict[str, Trigger] = {
        "set": lambda: stage.inner.set("a", OUTER),
        "commit": lambda: stage.inner.commit(Set("a", OUTER))[0],
        "get": lambda: (stage.inner.get("a"), 0)[1],
        "snapshot": lambda: (list(stage.inner.scan().values()), 0)[1],
        "watch": lambda: (fill(), watch.get_nowait(), 0)[2],
        "observe": lambda: (fill(), state.get_nowait(), 0)[2],
    }

    def fill() -> None:
        """Write without being struck."""
        left, stage.left = stage.left, 0
        stage.inner.set("a", "seen")
        stage.left = left

    return stage, triggers[place]


def in_value(method: str) -> tuple[Stage, Trigger]:
    stage = Stage()

    class Value:
        if method == "__deepcopy__":

            def __deepcopy__(self, memo: Any) -> str:
                stage.strike()
                return OUTER

        if method == "__reduce_ex__":

            def __reduce_ex__(self, protocol: Any) -> Any:
                stage.strike()
                return str, (OUTER,)

    return stage, lambda: stage.inner.set("a", Value())


def in_comparison(method: str) -> tuple[Stage, Trigger]:
    """Copying a set hashes what is in it, and compares what has the same hash."""
    stage = Stage(watched=("a", "b"))

    class Member:
        def __deepcopy__(self, memo: Any) -> Member:
            return self

        def __hash__(self) -> int:
            if method == "__hash__":
                stage.strike()
            return 1

        def __eq__(self, other: object) -> bool:
            if method == "__eq__":
                stage.strike()
            return self is other

    members = {Member(), Member()}

    def trigger() -> int:
        stage.inner.commit(Set("gone", members), Check("z", 0))
        return stage.inner.set("a", OUTER)

    return stage, trigger


def at_the_end(cause: str) -> tuple[Stage, Trigger]:
    """The last reference to a value goes: `cause` says by what, and who hears of it."""
    stage = Stage(("gone", "b"), ("b",), copy=None, history=1 if "ring" in cause else 0)
    references = []

    class Value:
        def __del__(self) -> None:
            if "weakref" not in cause:
                stage.strike()

    def value() -> Value:
        each = Value()
        if "weakref" in cause:
            references.append(weakref.ref(each, stage.strike))
        return each

    small = stage.inner.watch("gone", capacity=1) if "buffer" in cause else None

    def trigger() -> int:
        stage.inner.set("gone", value())
        if "delete" in cause:
            stage.inner.delete("gone")
            stage.inner.set("z", 0)
        elif "commit" in cause:
            stage.inner.commit(Set("gone", 1), Set("z", 1))
        else:
            for number in range(3):
                stage.inner.set("gone", number)
        assert small is None or small.dropped
        return stage.inner.set("b", OUTER)

    return stage, trigger


def in_collector() -> tuple[Stage, Trigger]:
    stage = Stage()

    def trigger() -> int:
        thresholds = gc.get_threshold()
        callback: Any = stage.strike
        gc.callbacks.append(callback)
        gc.set_threshold(1)
        try:
            for number in range(30):
                stage.inner.set("b", [number])
                stage.inner.commit(Set("b", [[number]]), Delete("nothing"))
                stage.inner.watch("b").close()
            return stage.inner.set("a", OUTER)
        finally:
            gc.set_threshold(*thresholds)
            gc.callbacks.remove(callback)

    return stage, trigger


def under_the_lock(strike: Callable[[Stage], object]) -> tuple[Stage, Trigger]:
    def clock() -> float:
        if stages:
            strike(stages[0])
        return 0.0

    stages: list[Stage] = []
    stage = Stage(clock=clock)
    stages.append(stage)
    return stage, lambda: stage.inner.set("a", OUTER, ttl=3600)


def in_signal_handler() -> tuple[Stage, Trigger]:
    stage, trigger = under_the_lock(lambda stage: signal.raise_signal(signal.SIGUSR1) if stage.left else None)
    handler = stage.strike

    def trigger_with_handler() -> object:
        before = signal.signal(signal.SIGUSR1, handler)
        try:
            return trigger()
        finally:
            signal.signal(signal.SIGUSR1, before)

    return stage, trigger_with_handler


def conflict(store: Store) -> int:
    with pytest.raises(RevisionConflict):
        store.set("a", "never", if_revision=10**9)
    return 0


ABORTING: dict[str, Place] = {
    "before_get": lambda: hooked("before_get", lambda store: (store.get("a"), 0)[1]),
    "before_set": lambda: hooked("before_set", lambda store: store.set("a", OUTER)),
    "on_delete": lambda: hooked("on_delete", lambda store: (store.delete("a"), 0)[1]),
    "on_scan": lambda: hooked("on_scan", lambda store: (store.get_many(["a"]), 0)[1]),
    "on_watch": lambda: hooked("on_watch", lambda store: (store.watch("a").close(), 0)[1]),
    "middleware, before": lambda: in_middleware("before"),
    "middleware, call": lambda: in_middleware("call"),
    "update": in_update,
    "wait_for": in_wait_for,
    "copier, set": lambda: in_copier("set"),
    "copier, commit": lambda: in_copier("commit"),
    "copier, get": lambda: in_copier("get"),
    "copier, snapshot": lambda: in_copier("snapshot"),
    "copier, watch": lambda: in_copier("watch"),
    "copier, observe": lambda: in_copier("observe"),
    "__deepcopy__": lambda: in_value("__deepcopy__"),
    "__reduce_ex__": lambda: in_value("__reduce_ex__"),
    "__hash__": lambda: in_comparison("__hash__"),
    "__eq__": lambda: in_comparison("__eq__"),
    "clock": lambda: under_the_lock(Stage.strike),
    "signal handler": in_signal_handler,
}
"""What is raised there fails the operation, and nothing has changed."""
AFTERWARDS: dict[str, Place] = {
    "middleware, after": lambda: in_middleware("after"),
    "map": in_map,
}
"""What is raised there is raised, though the write has happened."""
OBSERVING: dict[str, Place] = {
    "after_get": lambda: hooked("after_get", lambda store: (store.get("a"), 0)[1]),
    "after_set": lambda: hooked("after_set", lambda store: store.set("a", OUTER)),
    "on_error": lambda: hooked("on_error", conflict),
}
"""What is raised there is logged; only what no `except Exception` stops goes on."""
UNHEARD: dict[str, Place] = {
    "finaliser, replaced": lambda: at_the_end("replaced"),
    "finaliser, delete": lambda: at_the_end("delete"),
    "finaliser, commit": lambda: at_the_end("commit"),
    "finaliser, ring": lambda: at_the_end("ring"),
    "finaliser, buffer": lambda: at_the_end("buffer"),
    "weakref, replaced": lambda: at_the_end("weakref replaced"),
    "weakref, delete": lambda: at_the_end("weakref delete"),
    "weakref, buffer": lambda: at_the_end("weakref buffer"),
    "collector": in_collector,
}
"""What is raised there goes to `sys.unraisablehook`."""
PLACES = ABORTING | AFTERWARDS | OBSERVING | UNHEARD
if sysconfig.get_config_var("Py_GIL_DISABLED"):  # the collector of that build cannot be made to strike here and now
    del PLACES["collector"], UNHEARD["collector"]
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


def set_on_condition(stage: Stage) -> None:
    entry = stage.inner.get_entry(stage.key)
    with suppress(RevisionConflict):  # whoever strikes in here was faster
        stage.store.set(stage.key, "inner", if_revision=0 if entry is None else entry.revision)


def read_a_watch(stage: Stage) -> None:
    with stage.store.watch(stage.key) as watch:
        revision = stage.store.set(stage.key, "watched")
        assert revision in [change.revision for change in iter(watch.get_nowait, None)]


def observe(stage: Stage) -> None:
    with stage.store.observe(prefix="") as watch:
        list(iter(watch.get_nowait, None))


def hand_over(stage: Stage) -> None:
    stage.spare.close()
    stage.spare = stage.store.watch(stage.other)


ACTIONS: dict[str, Callable[[Stage], object]] = {
    "get": lambda stage: stage.store.get_many([stage.key, stage.other]),
    "get_entry": lambda stage: stage.store.get_entry(stage.key),
    "scan": lambda stage: stage.store.scan("a"),
    "set": lambda stage: stage.store.set(stage.key, "inner"),
    "set another": lambda stage: stage.store.set(stage.other, "inner"),
    "set with ttl": lambda stage: stage.store.set(stage.key, "inner", ttl=3600),
    "conditional set": set_on_condition,
    "conflict": lambda stage: conflict(stage.inner),
    "delete": lambda stage: stage.store.delete(stage.key),
    "delete another": lambda stage: stage.store.delete(stage.other),
    "commit": lambda stage: stage.store.commit(Set(stage.key, "inner"), Set(stage.other, "inner"), Check("z z", 0)),
    "update": lambda stage: stage.store.update(stage.other, lambda value: "updated"),
    "wait_for": lambda stage: stage.store.wait_for(stage.other, lambda value: True, timeout=60),
    "watch": read_a_watch,
    "observe": observe,
    "unwatch": hand_over,
    "close": lambda stage: stage.store.close(),
    "close and write": lambda stage: (stage.store.set(stage.key, "inner"), stage.store.close()),
}


@contextmanager
def case(what: object) -> Iterator[None]:
    """Let a failure say with what it came."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {what}")
        raise


@every_place
def test_whoever_is_called_may_use_the_store(place: Place) -> None:
    for name, action in ACTIONS.items():
        with case(name):
            stage, trigger = place()
            outcome = stage.play(trigger, action)

            assert stage.struck
            changes = stage.is_whole()
            if isinstance(outcome, BaseException):
                assert name in ("close", "close and write")
                assert isinstance(outcome, (StoreClosed, WatchClosed, InvalidValue)), outcome
                assert place in AFTERWARDS.values() or OUTER not in [change.value for change in changes]
            elif outcome:
                assert [change.revision for change in changes if change.value == OUTER] == [outcome]


@pytest.mark.parametrize(
    "place", sorted({"collector", "clock", "signal handler", "finaliser, buffer", "copier, set"} & set(PLACES))
)
def test_whoever_is_called_again_and_again_may_use_the_store_each_time(place: str) -> None:
    for name, action in ACTIONS.items():
        if not name.startswith("close"):
            with case(name):
                stage, trigger = PLACES[place]()
                for _ in range(3):
                    revision = stage.play(trigger, action, times=20)
                    assert isinstance(revision, int), revision

                assert stage.struck >= 3
                changes = stage.is_whole()
                assert sum(change.value == OUTER for change in changes) == 3


every_place_that_nests = pytest.mark.parametrize("place", [place for place in PLACES if place != "collector"])


@every_place_that_nests
def test_calls_nest_a_hundred_deep(place: str) -> None:
    stage, trigger = PLACES[place]()
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        outcome = stage.play(trigger, lambda stage: trigger(), times=100)
    finally:
        sys.setrecursionlimit(before)

    assert not isinstance(outcome, BaseException), outcome
    assert stage.struck == 100
    changes = stage.is_whole()
    assert not outcome or sum(change.value == OUTER for change in changes) in (100, 101)


@every_place_that_nests
def test_calls_that_nest_without_end_are_a_recursion_error_and_leave_the_store_whole(place: str) -> None:
    stage, trigger = PLACES[place]()
    outcome = stage.play(trigger, lambda stage: trigger(), times=3000)

    if isinstance(outcome, BaseException):
        chain: list[BaseException | None] = [outcome]
        while chain[-1] is not None:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        assert any(isinstance(each, RecursionError) for each in chain), outcome
    assert stage.struck > 20
    stage.is_whole()


# -- whoever fails -----------------------------------------------------------------------------------------------------


class Nasty(BaseException):
    pass


ERRORS: list[type[BaseException]] = [
    *(ValueError, StopIteration, StopAsyncIteration, StoreClosed, RevisionConflict, TimeoutError, RecursionError),
    *(Nasty, GeneratorExit, SystemExit, KeyboardInterrupt),
]


def failing(error: type[BaseException]) -> Callable[[Stage], object]:
    def fail(stage: Stage) -> None:
        raise error("a", 1, 2) if error is RevisionConflict else error()

    return fail


@every_place
def test_whoever_fails_harms_no_other_watch_and_the_result_of_the_write_is_true(place: Place) -> None:
    for error in ERRORS:
        with case(error):
            failure_is_harmless(place, error)


def failure_is_harmless(place: Place, error: type[BaseException]) -> None:
    stage, trigger = place()
    others = [stage.watch(), stage.inner.observe("b")]
    outcome = stage.play(trigger, failing(error))
    for watch in others:
        watch.close()

    assert stage.struck == 1
    changes = stage.is_whole()
    written = [change.revision for change in changes if change.value == OUTER]
    if place in ABORTING.values():
        assert isinstance(outcome, BaseException)
        assert not written
    elif place in AFTERWARDS.values():
        assert isinstance(outcome, BaseException)
        assert written
    elif place in OBSERVING.values() and not issubclass(error, Exception):
        assert isinstance(outcome, error)
    else:
        assert not isinstance(outcome, BaseException), outcome
        assert not outcome or written == [outcome]
    heard = [change.revision for change in others[0] if change.value != "seen"]
    assert heard == [change.revision for change in changes if change.value not in ("end", "seen")]


@every_place
def test_whoever_fails_after_having_written_has_written(place: Place) -> None:
    for error in (KeyboardInterrupt, ValueError):
        stage, trigger = place()

        def write_and_fail(stage: Stage, error: type[BaseException] = error) -> None:
            stage.store.set(stage.other, "inner")
            failing(error)(stage)

        stage.play(trigger, write_and_fail)

        assert [change.value for change in stage.is_whole()].count("inner") == 1, error


@pytest.mark.parametrize("ends_a_loop", [True, False])
async def test_a_function_that_fails_in_map_does_not_pass_for_the_end_of_the_watch(
    store: Any, colour: Colour, ends_a_loop: bool
) -> None:
    end = StopIteration if colour.name == "sync" else StopAsyncIteration
    error = end if ends_a_loop else WatchClosed

    def fail(change: Change) -> Change:
        raise error

    watch = (await store.watch("a")).map(fail)
    await store.set("a", 1)
    with pytest.raises(RuntimeError, match="a function given to map raised"):
        await colour.all(watch)


COROUTINES: dict[str, Callable[[Stage, Callable[..., Any]], object]] = {
    "update": lambda stage, function: stage.inner.update("a", function),
    "wait_for": lambda stage, function: stage.inner.wait_for("a", function, timeout=60),
    "before_set": lambda stage, function: hooked_by(stage, before_set=function).set("a", OUTER),
    "on_scan": lambda stage, function: hooked_by(stage, on_scan=function).scan(),
    "on_watch": lambda stage, function: hooked_by(stage, on_watch=function).watch("a"),
    "middleware": lambda stage, function: apply_middleware(stage.inner, function).set("a", OUTER),
    "call": lambda stage, function: stage.inner.run(calling(function)),
}


def hooked_by(stage: Stage, **hooks: Any) -> Store:
    return apply_middleware(stage.inner, with_hooks(Hooks(**hooks)))


def calling(function: Callable[..., Any]) -> Flow[Any]:
    return (yield from Call(function))


async def nothing() -> None:
    pass


def nothing_was_left_unawaited(warned: pytest.WarningsRecorder) -> None:
    gc.collect()
    assert [each for each in warned if "coroutine 'nothing'" in str(each.message)] == []


def test_whoever_returns_a_coroutine_where_nobody_awaits_it_is_told_so(recwarn: pytest.WarningsRecorder) -> None:
    for name, ask in COROUTINES.items():
        with case(name):
            stage = Stage()
            with pytest.raises(TypeError):
                ask(stage, lambda *_: nothing())
            assert [change.value for change in stage.is_whole()] == ["end"]

    nothing_was_left_unawaited(recwarn)


def test_a_coroutine_that_an_observer_returns_changes_no_result(recwarn: pytest.WarningsRecorder) -> None:
    for hook in ("after_set", "on_error"):
        stage = Stage()
        store = hooked_by(stage, **{hook: lambda *_: nothing()})
        revision = store.set("a", OUTER)
        conflict(store)
        assert [change.revision for change in stage.is_whole() if change.value == OUTER] == [revision], hook

    nothing_was_left_unawaited(recwarn)


def test_the_methods_that_show_and_compare_a_value_are_never_called_by_the_library() -> None:
    called: list[str] = []

    class Value:
        def __repr__(self) -> str:
            called.append("__repr__")
            return ""

        __str__ = __repr__

        def __eq__(self, other: object) -> bool:
            called.append("__eq__")
            return True

        def __hash__(self) -> int:
            called.append("__hash__")
            return 1

        def __bool__(self) -> bool:
            called.append("__bool__")
            return False

        def __deepcopy__(self, memo: Any) -> Any:
            if memo is None or refuse:
                raise ValueError("no")
            return Value()

    refuse: list[bool] = []
    with MemoryStore() as store:
        watch, small, state = store.watch("a"), store.watch("a", capacity=1), store.observe("a")
        for _ in range(3):
            store.set("a", Value())
            store.commit(Set("a", Value()), Check("b", 0))
            store.update("a", lambda value: value)
        shown = [store.get_entry("a"), store.scan(), Set("a", Value()), store.scan()["a"], store.get_many(["a"]).keys()]
        shown += [each.get(timeout=0) for each in (watch, small, state)]
        refuse.append(True)
        for write in (lambda: store.set("a", Value()), lambda: store.commit(Set("a", [Value()]))):
            with pytest.raises(InvalidValue) as refused:
                write()
            shown += [str(refused.value)]
        assert all(map(repr, shown))

    assert not called


# -- in both colours ---------------------------------------------------------------------------------------------------

MOMENTS: dict[str, Callable[[Any], Any]] = {
    "before_get": lambda store: store.get("a"),
    "after_get": lambda store: store.get("a"),
    "before_set": lambda store: store.set("a", OUTER),
    "after_set": lambda store: store.set("a", OUTER),
    "on_delete": lambda store: store.delete("a"),
    "on_scan": lambda store: store.get_many(["a"]),
    "on_watch": lambda store: store.watch("a"),
    "on_error": lambda store: store.set("a", OUTER, if_revision=10**9),
    "update": None,  # type: ignore[dict-item]
    "wait_for": None,  # type: ignore[dict-item]
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("closing", [False, True])
async def test_whoever_is_awaited_may_await_the_store(moment: str, closing: bool) -> None:
    inner = MemoryStore()
    every = inner.watch(prefix="", capacity=None)
    inner.set("a", 0)
    depth = 0

    async def strike(*args: Any) -> Any:
        nonlocal depth
        if depth < 20:
            depth += 1
            mine = f"key {depth}"
            await store.set(mine, depth)
            await store.update("a", lambda value: depth, default=0)
            with suppress(RevisionConflict):
                await ask()
            watch = await store.watch(mine)
            assert await store.delete(mine)
            assert (await anext(watch)).op is Op.DELETE
            if closing and depth == 20:
                await store.close()
        return True if moment == "wait_for" else OUTER

    hooks = {} if moment in ("update", "wait_for") else {moment: strike}
    store = apply_middleware(inner, with_hooks(Hooks(**hooks))).aio  # type: ignore[arg-type]

    async def ask() -> None:
        if moment == "update":
            await store.update("a", strike)
        elif moment == "wait_for":
            await store.wait_for("a", strike)
        else:
            await MOMENTS[moment](store)

    if closing:
        with suppress(StoreClosed, RevisionConflict):
            await ask()
        with pytest.raises(StoreClosed):
            await store.get("a")
    else:
        with suppress(RevisionConflict):
            await ask()
    assert depth == 20
    changes = []
    with suppress(WatchClosed):
        changes += iter(every.get_nowait, None)
    assert [change.revision for change in changes] == list(range(1, len(changes) + 1))
    assert len(changes) == inner._revision
    inner.close()


async def test_a_watch_may_be_read_closed_and_opened_by_the_function_that_maps_it(store: Any, colour: Colour) -> None:
    opened: list[Watch] = []

    def through(change: Change) -> Change:
        behind = watch.get_nowait() if change.value == 1 else None
        if behind is not None:
            assert behind.value == 2
        if change.value == 3:
            opened.append(colour.raw(store).watch("a"))
            watch.close()
        return change

    watch = (await store.watch("a")).map(through)
    for number in range(1, 5):
        await store.set("a", number)

    assert [change.value for change in await colour.all(watch)] == [1, 3, 4]
    await store.set("a", 5)
    assert (await colour.get(opened[0])).value == 5
