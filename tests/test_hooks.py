"""Hooks: what is called, when, and what its errors do."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from stigmergy import (
    AccessDenied,
    AsyncStore,
    Check,
    Commit,
    Compacted,
    Delete,
    Flow,
    GetEntry,
    Hooks,
    InvalidKey,
    InvalidValue,
    MemoryStore,
    Middleware,
    OpenWatch,
    Operation,
    RevisionConflict,
    Scan,
    Set,
    StoreClosed,
    apply_middleware,
    compose_hooks,
    with_hooks,
)

Hook = Callable[..., Any]
MOMENTS = ("before_get", "after_get", "before_set", "after_set", "on_delete", "on_scan", "on_watch", "on_error")
BEFORE = ("before_get", "before_set", "on_delete", "on_scan", "on_watch")

# What is asked of the store, and the hooks that fire for it: with their arguments, in order. `a` holds 1 at revision 1.
ASKED: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "get": (lambda store: store.get("a"), [("before_get", "a"), ("after_get", "a", 1, None)]),
    "get absent": (lambda store: store.get("x", 7), [("before_get", "x"), ("after_get", "x", None, None)]),
    "get_entry": (lambda store: store.get_entry("a"), [("before_get", "a"), ("after_get", "a", 1, None)]),
    "get_many": (lambda store: store.get_many(["a", "x"]), [("on_scan", "Scan", ("a", "x"))]),
    "scan": (lambda store: store.scan("a"), [("on_scan", "Scan", None)]),
    "set": (lambda store: store.set("a", 2), [("before_set", "a", 2), ("after_set", "a", 2, None)]),
    "set None": (lambda store: store.set("a", None), [("before_set", "a", None), ("after_set", "a", None, None)]),
    "set if_revision": (
        lambda store: store.set("a", 2, if_revision=1),
        [("before_set", "a", 2), ("after_set", "a", 2, None)],
    ),
    "delete": (lambda store: store.delete("a"), [("on_delete", "a")]),
    "delete absent": (lambda store: store.delete("x"), [("on_delete", "x")]),
    "delete if_revision": (lambda store: store.delete("a", if_revision=1), [("on_delete", "a")]),
    "commit": (
        lambda store: store.commit(Set("b", 2), Check("c", 0), Delete("a"), Set("d", 4), Check("a", 1)),
        [
            ("before_set", "b", 2),
            ("on_delete", "a"),
            ("before_set", "d", 4),
            ("after_set", "b", 2, None),
            ("after_set", "d", 4, None),
        ],
    ),
    "commit of checks": (lambda store: store.commit(Check("a", 1)), []),
    "update": (
        lambda store: store.update("a", lambda value: value + 1),
        [("before_get", "a"), ("after_get", "a", 1, None), ("before_set", "a", 2), ("after_set", "a", 2, None)],
    ),
    "watch": (lambda store: store.watch("a"), [("on_watch", "OpenWatch", ("a",))]),
    "observe": (lambda store: store.observe("a"), [("on_watch", "OpenWatch", ("a",))]),
    "wait_for what holds": (
        lambda store: store.wait_for("a", lambda value: True),
        [("before_get", "a"), ("after_get", "a", 1, None)],
    ),
}

# Hooks are plain in either colour, and may be async on an async store.
in_every_way = pytest.mark.parametrize(
    ("colour", "hook"), [("sync", "plain"), ("async", "plain"), ("async", "async")], indirect=True
)


@pytest.fixture
def hook(request: pytest.FixtureRequest, colour: Any) -> Callable[[Hook], Hook]:
    """What makes a hook of a plain function: itself, or an async one that suspends before and after."""
    return in_async if request.param == "async" else lambda function: function


def in_async(function: Hook) -> Hook:
    async def asynchronous(*args: Any) -> Any:
        await asyncio.sleep(0)
        try:
            return function(*args)
        finally:
            await asyncio.sleep(0)

    return asynchronous


def wrapped(store: Any, *layers: Hooks | Middleware) -> Any:
    """`store`, of either colour, with hooks and middleware around it."""
    middleware = [with_hooks(layer) if isinstance(layer, Hooks) else layer for layer in layers]
    if isinstance(store, AsyncStore):
        return apply_middleware(store, *middleware)
    return type(store)(apply_middleware(store.store, *middleware))


def recording(transcript: list[Any], hook: Callable[[Hook], Hook] = lambda function: function) -> Hooks:
    """All hooks, each of which notes its name and arguments."""

    def note(moment: str) -> Hook:
        def noted(*args: Any) -> None:
            request = args[0]
            if isinstance(request, (Scan, OpenWatch)):
                args = (type(request).__name__, request.keys)
            transcript.append((moment, *args))

        return hook(noted)

    return Hooks(**{moment: note(moment) for moment in MOMENTS})


def fail(*_: object) -> None:
    raise ZeroDivisionError("the hook failed")


@asynccontextmanager
async def unchanged(store: Any) -> AsyncIterator[None]:
    """Nothing changes in here: no revision, no entry, and no watch hears of anything."""
    watch, before = await store.watch(prefix=""), await store.scan()
    yield
    after = await store.scan()
    assert (after.revision, dict(after)) == (before.revision, dict(before))
    assert watch.get_nowait() is None


# -- when they fire ----------------------------------------------------------------------------------------------------


@in_every_way
async def test_hooks_fire_in_order_with_what_was_asked(new_store: Any, hook: Any) -> None:
    for question, (ask, fired) in ASKED.items():
        store = new_store()
        await store.set("a", 1)
        transcript: list[Any] = []

        await ask(wrapped(store, recording(transcript, hook)))

        assert transcript == fired, question


@in_every_way
async def test_hooks_change_no_answer(new_store: Any, hook: Any) -> None:
    silent = Hooks(**{moment: hook(lambda *_: 7) for moment in MOMENTS})
    for question, (ask, _) in ASKED.items():
        store, other = new_store(), new_store()
        await store.set("a", 1)
        await other.set("a", 1)

        answers = [await ask(wrapped(store, silent)), await ask(other)]

        assert repr(answers[0]) == repr(answers[1]), question
        assert await store.get_many(list("abd")) == await other.get_many(list("abd")), question
        assert (await store.scan()).revision == (await other.scan()).revision, question


@in_every_way
async def test_a_hook_that_was_not_given_is_not_called(store: Any, hook: Any) -> None:
    transcript: list[Any] = []
    hooked = wrapped(store, Hooks(after_set=hook(lambda *args: transcript.append(args))))

    await hooked.set("a", 1)
    await hooked.get("a")
    await hooked.delete("a")
    await hooked.scan()
    await hooked.watch("a")

    assert transcript == [("a", 1, None)]


async def test_no_hooks_at_all_let_everything_through(store: Any) -> None:
    hooked = wrapped(store, Hooks())

    assert await hooked.set("a", 1) == 1
    assert (await hooked.watch("a", since=0)).get_nowait().value == 1


@in_every_way
async def test_hooks_fire_for_every_attempt_of_an_update(store: Any, hook: Any) -> None:
    transcript: list[Any] = []
    interfering = iter([10])

    def interfere(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit):
            for interference in interfering:
                yield Commit([Set("n", interference)])
        return (yield operation)

    inner = store if isinstance(store, AsyncStore) else store.store
    hooked = (
        type(store)(apply_middleware(inner, interfere)) if inner is not store else apply_middleware(inner, interfere)
    )

    assert await wrapped(hooked, recording(transcript, hook)).update("n", lambda number: number + 1, default=0) == 11

    assert [entry[:3] for entry in transcript] == [
        ("before_get", "n"),
        ("after_get", "n", None),
        ("before_set", "n", 1),
        ("after_set", "n", 1),
        ("on_error", transcript[4][1]),
        ("before_get", "n"),
        ("after_get", "n", 10),
        ("before_set", "n", 11),
        ("after_set", "n", 11),
    ]
    assert isinstance(transcript[4][1], RevisionConflict)
    assert transcript[3][3] is transcript[4][1]


@in_every_way
async def test_expiry_fires_no_hook(new_store: Any, hook: Any, clock: Any, colour: Any) -> None:
    store = new_store(clock=clock)
    transcript: list[Any] = []
    hooked = wrapped(store, recording(transcript, hook))
    await hooked.set("a", 1, ttl=1)
    watch = await store.watch("a")
    transcript.clear()
    clock.advance(1)

    assert await hooked.get("a") is None

    assert [change.expired for change in await colour.drain(watch)] == [True]
    assert transcript == [("before_get", "a"), ("after_get", "a", None, None)]


async def test_hooks_fire_on_the_other_face_too(store: Any) -> None:
    transcript: list[Any] = []
    hooked = wrapped(store, recording(transcript))

    if isinstance(hooked, AsyncStore):
        hooked.sync.set("a", 1)
    else:
        asyncio.run(hooked.aio.set("a", 1))

    assert transcript == [("before_set", "a", 1), ("after_set", "a", 1, None)]


async def test_scan_and_watch_hooks_are_handed_the_request(store: Any) -> None:
    requests: list[Any] = []
    hooked = wrapped(store, Hooks(on_scan=requests.append, on_watch=requests.append))

    await hooked.scan("a", after="ab", limit=3)
    await hooked.watch(prefix="a", since=0, capacity=4, overflow="raise")
    await hooked.observe("b")

    assert [repr(request) for request in requests] == [
        repr(Scan("a", after="ab", limit=3)),
        repr(OpenWatch(prefix="a", since=0, capacity=4, overflow="raise")),
        repr(OpenWatch(["b"], latest=True)),
    ]


@in_every_way
async def test_an_operation_of_an_unknown_type_passes_through_and_its_error_is_seen(store: Any, hook: Any) -> None:
    class Explode(Operation[int]):
        __slots__ = ()
        name = "explode"

        def apply(self, store: Any) -> Any:
            raise ZeroDivisionError

    def flow() -> Flow[int]:
        return (yield from Explode())

    transcript: list[Any] = []

    with pytest.raises(ZeroDivisionError) as raised:
        await wrapped(store, recording(transcript, hook)).run(flow())

    assert transcript == [("on_error", raised.value)]


@in_every_way
async def test_bad_input_never_reaches_a_hook(store: Any, hook: Any) -> None:
    transcript: list[Any] = []
    hooked = wrapped(store, recording(transcript, hook))

    with pytest.raises(InvalidKey):
        await hooked.set("", 1)
    with pytest.raises(ValueError, match="ttl"):
        await hooked.set("a", 1, ttl=0)

    assert transcript == []


# -- before anything has happened --------------------------------------------------------------------------------------


@in_every_way
async def test_a_hook_that_fails_before_leaves_everything_as_it_was(store: Any, hook: Any) -> None:
    await store.set("a", 1)

    for ask, fired in ASKED.values():
        for moment in {entry[0] for entry in fired}.intersection(BEFORE):
            hooked = wrapped(store, Hooks(**{moment: hook(fail)}))
            async with unchanged(store):
                with pytest.raises(ZeroDivisionError, match="the hook failed"):
                    await ask(hooked)


@in_every_way
async def test_a_hook_is_called_when_nothing_has_happened_yet(store: Any, hook: Any) -> None:
    watch = await store.watch("a")
    heard = []

    async def set_through(hooks: Hooks) -> None:
        await wrapped(store, hooks).set("a", 1)

    await set_through(Hooks(before_set=hook(lambda *_: heard.append(watch.get_nowait()))))
    assert heard == [None]
    watch.get_nowait()
    await set_through(Hooks(after_set=hook(lambda *_: heard.append(watch.get_nowait().revision))))
    assert heard == [None, 2]


@in_every_way
async def test_the_hooks_before_a_commit_are_all_called_before_the_first_write(store: Any, hook: Any) -> None:
    def refuse_b(key: str, value: Any) -> None:
        if key == "b":
            raise AccessDenied("set", key)

    async with unchanged(store):
        with pytest.raises(AccessDenied):
            await wrapped(store, Hooks(before_set=hook(refuse_b))).commit(Set("a", 1), Set("b", 2))
        with pytest.raises(ZeroDivisionError):
            await wrapped(store, Hooks(on_delete=hook(fail))).commit(Set("a", 1), Delete("b"))


@in_every_way
async def test_what_was_aborted_is_not_observed_but_its_error_is_seen(store: Any, hook: Any) -> None:
    transcript: list[Any] = []
    hooked = wrapped(
        store, compose_hooks(recording(transcript, hook), Hooks(before_set=hook(fail), before_get=hook(fail)))
    )

    for ask in (lambda: hooked.set("a", 1), lambda: hooked.get("a")):
        with pytest.raises(ZeroDivisionError) as raised:
            await ask()
        assert [entry[0] for entry in transcript] == [transcript[0][0], "on_error"]
        assert transcript[1][1] is raised.value
        transcript.clear()


@in_every_way
async def test_a_hook_that_refuses_a_watch_refuses_what_is_built_on_one(store: Any, hook: Any) -> None:
    hooked = wrapped(store, Hooks(on_watch=hook(fail)))

    for ask in (
        lambda: hooked.watch("a"),
        lambda: hooked.observe("a"),
        lambda: hooked.wait_for("a", lambda value: True),  # of an absent key
    ):
        with pytest.raises(ZeroDivisionError):
            await ask()


# -- after it happened -------------------------------------------------------------------------------------------------


@in_every_way
@pytest.mark.parametrize("moment", ["after_get", "after_set"])
async def test_what_observes_cannot_fail_an_operation_and_is_logged(
    store: Any, hook: Any, moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    hooked, watch = wrapped(store, Hooks(**{moment: hook(fail)})), await store.watch("a")

    assert await hooked.set("a", 1) == 1
    assert await hooked.get("a") == 1

    assert watch.get_nowait().value == 1
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("stigmergy", logging.ERROR)
    assert "'a'" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


@in_every_way
@pytest.mark.parametrize("moment", ["after_get", "after_set"])
async def test_what_observes_a_failure_cannot_replace_it(
    store: Any, hook: Any, moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    hooked = wrapped(store, Hooks(**{moment: hook(fail)}))
    await store.close()

    for ask in (lambda: hooked.set("a", 1), lambda: hooked.get("a")):
        with pytest.raises(StoreClosed):
            await ask()

    assert len(caplog.records) == 1


@in_every_way
async def test_what_failed_is_observed_with_its_error(store: Any, hook: Any) -> None:
    transcript: list[Any] = []
    hooked = wrapped(store, recording(transcript, hook))

    with pytest.raises(RevisionConflict) as conflict:
        await hooked.commit(Set("a", 1, if_revision=7), Delete("b"), Set("c", 3))
    with pytest.raises(InvalidValue) as invalid:
        await hooked.set("a", generator := (number for number in range(3)))
    await store.close()
    with pytest.raises(StoreClosed) as closed:
        await hooked.get("a")

    assert transcript == [
        ("before_set", "a", 1),
        ("on_delete", "b"),
        ("before_set", "c", 3),
        ("after_set", "a", 1, conflict.value),
        ("after_set", "c", 3, conflict.value),
        ("on_error", conflict.value),
        ("before_set", "a", generator),
        ("after_set", "a", generator, invalid.value),
        ("on_error", invalid.value),
        ("before_get", "a"),
        ("after_get", "a", None, closed.value),
        ("on_error", closed.value),
    ]


@in_every_way
async def test_one_observer_that_fails_does_not_hide_the_other_writes_of_a_commit(
    store: Any, hook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    observed = []

    def observe(key: str, value: Any, error: Exception | None) -> None:
        observed.append(key)
        raise ZeroDivisionError

    assert await wrapped(store, Hooks(after_set=hook(observe))).commit(Set("a", 1), Set("b", 2)) == (1, 2)

    assert observed == ["a", "b"]
    assert len(caplog.records) == 2


@in_every_way
async def test_after_get_cannot_be_used_to_change_state(store: Any, hook: Any) -> None:
    await store.set("a", [1])

    await wrapped(store, Hooks(after_get=hook(lambda key, value, error: value.append(2)))).get("a")

    assert await store.get("a") == [1]


# -- errors ------------------------------------------------------------------------------------------------------------


@in_every_way
@pytest.mark.parametrize(
    ("ask", "fails"),
    [
        (lambda store: store.set("a", 1, if_revision=7), RevisionConflict),
        (lambda store: store.delete("a", if_revision=7), RevisionConflict),
        (lambda store: store.commit(Check("a", 7)), RevisionConflict),
        (lambda store: store.set("a", (letter for letter in "a")), InvalidValue),
        (lambda store: store.run(forbidden()), AccessDenied),
    ],
    ids=["set", "delete", "commit", "value", "unknown"],
)
async def test_on_error_sees_what_is_about_to_be_raised(store: Any, hook: Any, ask: Any, fails: Any) -> None:
    seen: list[Exception] = []

    with pytest.raises(fails) as raised:
        await ask(wrapped(store, Hooks(on_error=hook(seen.append))))

    assert seen == [raised.value]
    assert raised.value.__cause__ is not raised.value


def forbidden() -> Flow[int]:
    class Forbidden(Operation[int]):
        __slots__ = ()
        name = "forbidden"

        def apply(self, store: Any) -> Any:
            raise AccessDenied("ask", "a")

    return (yield from Forbidden())


@in_every_way
async def test_on_error_sees_what_another_hook_raised(store: Any, hook: Any) -> None:
    seen: list[Exception] = []

    for moment, ask in (
        ("before_get", lambda store: store.get("a")),
        ("before_set", lambda store: store.set("a", 1)),
        ("on_delete", lambda store: store.delete("a")),
        ("on_scan", lambda store: store.scan()),
        ("on_watch", lambda store: store.watch("a")),
    ):
        with pytest.raises(ZeroDivisionError) as raised:
            await ask(wrapped(store, Hooks(**{moment: hook(fail)}, on_error=hook(seen.append))))
        assert seen.pop() is raised.value
        assert not seen


@in_every_way
async def test_on_error_sees_why_a_watch_was_not_opened(store: Any, hook: Any) -> None:
    seen: list[Exception] = []
    hooked = wrapped(store, Hooks(on_error=hook(seen.append)))

    with pytest.raises(Compacted) as raised:
        await hooked.watch("a", since=99)

    assert seen == [raised.value]


@in_every_way
async def test_on_error_is_not_called_when_nothing_went_wrong(store: Any, hook: Any) -> None:
    seen: list[Exception] = []
    hooked = wrapped(store, Hooks(on_error=hook(seen.append)))

    await hooked.set("a", 1)
    await hooked.get("absent")
    await hooked.delete("absent")

    assert seen == []


@in_every_way
async def test_on_error_may_return_another_exception_to_raise(store: Any, hook: Any) -> None:
    hooked = wrapped(store, Hooks(before_set=hook(fail), on_error=hook(lambda error: LookupError("not today"))))

    with pytest.raises(LookupError, match="not today") as raised:
        await hooked.set("a", 1)

    assert isinstance(raised.value.__cause__, ZeroDivisionError)


@in_every_way
async def test_on_error_may_replace_the_error_of_a_watch(store: Any, hook: Any) -> None:
    with pytest.raises(LookupError):
        await wrapped(store, Hooks(on_error=hook(lambda error: LookupError("gone")))).watch("a", since=99)


@in_every_way
async def test_on_error_cannot_make_a_failure_look_like_a_success(store: Any, hook: Any) -> None:
    answers = [None, True, False, 0, "fine", LookupError, KeyboardInterrupt(), Set("a", 1)]
    for answer in answers:
        on_error = hook(lambda error, answer=answer: answer)
        hooked = wrapped(store, Hooks(before_set=hook(fail), before_get=hook(fail), on_error=on_error))

        async with unchanged(store):
            for ask in (hooked.set, hooked.get):
                with pytest.raises(ZeroDivisionError, match="the hook failed"):
                    await ask("a", 7)


@in_every_way
async def test_on_error_sees_a_conflict_but_cannot_replace_it(store: Any, hook: Any) -> None:
    seen: list[Exception] = []

    def replace(error: Exception) -> Exception:
        seen.append(error)
        return LookupError("something else")

    with pytest.raises(RevisionConflict) as raised:
        await wrapped(store, Hooks(on_error=hook(replace))).set("a", 1, if_revision=7)

    assert seen == [raised.value]


@in_every_way
async def test_update_tries_again_whatever_on_error_returns(store: Any, hook: Any) -> None:
    interfering = iter([10])

    def interfere(key: str, value: Any) -> None:
        for interference in interfering:
            raw.set(key, interference)

    raw = store.sync if isinstance(store, AsyncStore) else store.store
    hooks = Hooks(before_set=hook(interfere), on_error=hook(lambda error: LookupError("something else")))

    assert await wrapped(store, hooks).update("n", lambda number: number + 1, default=0) == 11


@in_every_way
async def test_an_on_error_that_fails_is_logged_and_changes_nothing(
    store: Any, hook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_too(error: Exception) -> None:
        raise LookupError

    with pytest.raises(ZeroDivisionError, match="the hook failed"):
        await wrapped(store, Hooks(before_set=hook(fail), on_error=hook(fail_too))).set("a", 1)

    (record,) = caplog.records
    assert record.name == "stigmergy"
    assert record.exc_info is not None
    assert record.exc_info[0] is LookupError


async def test_on_error_sees_no_interrupt(store: Any) -> None:
    seen: list[Exception] = []

    def interrupt(key: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await wrapped(store, Hooks(before_get=interrupt, on_error=seen.append)).get("a")

    assert seen == []


@in_every_way
async def test_the_error_of_an_inner_layer_is_seen_by_the_outer_as_the_inner_left_it(store: Any, hook: Any) -> None:
    seen: list[Exception] = []
    outer = Hooks(on_error=hook(seen.append))
    inner = Hooks(before_set=hook(fail), on_error=hook(lambda error: LookupError("not today")))

    with pytest.raises(LookupError) as raised:
        await wrapped(store, outer, inner).set("a", 1)

    assert seen == [raised.value]


# -- async hooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_async_hook_on_a_sync_store_is_refused_before_anything_has_happened(moment: str) -> None:
    called = []

    async def asynchronous(*_: object) -> None:
        called.append(moment)

    with MemoryStore() as store:
        store.set("a", 1)
        others = Hooks(before_set=called.append, before_get=called.append)
        hooked = apply_middleware(store, with_hooks(compose_hooks(Hooks(**{moment: asynchronous}), others)))
        watch = store.watch(prefix="")

        for question, (ask, _) in ASKED.items():
            with pytest.raises(TypeError, match=r"asynchronous is async: use it with the async store"):
                ask(hooked)

            assert called == [], question
            assert (store.scan().revision, watch.get_nowait()) == (1, None), question


@pytest.mark.parametrize(
    "make",
    [
        lambda function: functools.partial(function, "bound"),
        lambda function: type("Bound", (), {"method": function})().method,
        lambda function: lambda *args: function(*args),
    ],
    ids=["partial", "method", "lambda"],
)
def test_an_async_hook_in_disguise_is_refused_before_anything_has_happened(make: Callable[[Hook], Hook]) -> None:
    async def asynchronous(*_: object) -> None: ...

    with MemoryStore() as store:
        hooked = apply_middleware(store, with_hooks(Hooks(before_set=make(asynchronous))))

        with pytest.raises(TypeError, match="is async"):
            hooked.set("a", 1)

        assert store.scan().revision == 0


def test_a_coroutine_that_a_hook_returned_unexpectedly_is_closed() -> None:
    made = []

    async def asynchronous(*_: object) -> None: ...

    def disguised(*args: Any) -> Any:
        made.append(asynchronous(*args))
        return made[-1]

    with MemoryStore() as store, pytest.raises(TypeError):
        apply_middleware(store, with_hooks(Hooks(before_set=disguised))).set("a", 1)

    assert [inspect.getcoroutinestate(each) for each in made] == [inspect.CORO_CLOSED]


async def test_the_hooks_of_a_watch_are_called_when_it_is_opened_and_not_when_it_is_asked_for() -> None:
    transcript: list[Any] = []
    async with MemoryStore().aio as store:
        for hook in (lambda function: function, in_async):
            opening = wrapped(store, recording(transcript, hook)).watch("a")

            assert transcript == []
            await opening
            assert transcript == [("on_watch", "OpenWatch", ("a",))]
            transcript.clear()


async def test_an_async_on_watch_is_awaited_before_the_watch_is_opened() -> None:
    parked, let_through = asyncio.Event(), asyncio.Event()

    async def wait(request: OpenWatch) -> None:
        parked.set()
        await let_through.wait()

    async with MemoryStore().aio as store:
        task = asyncio.create_task(wrapped(store, Hooks(on_watch=wait)).open_watch(OpenWatch(["a"])))
        await parked.wait()
        await store.set("a", 1)
        let_through.set()
        watch = await task
        await store.set("a", 2)

        assert watch.get_nowait().value == 2


async def test_cancelling_an_async_on_watch_opens_no_watch() -> None:
    parked = asyncio.Event()

    async def for_ever(request: OpenWatch) -> None:
        parked.set()
        await asyncio.get_running_loop().create_future()

    memory = MemoryStore()
    async with memory.aio as store:
        task = asyncio.create_task(wrapped(store, Hooks(on_watch=for_ever)).open_watch(OpenWatch(["a"])))
        await parked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not memory._hub.locked(lambda: memory._hub.is_watched)


async def test_an_async_hook_is_awaited_before_the_operation_goes_on() -> None:
    let_through = asyncio.Event()

    async def wait(key: str, value: Any) -> None:
        await let_through.wait()

    async with MemoryStore().aio as store:
        task = asyncio.create_task(wrapped(store, Hooks(before_set=wait)).set("a", 1))
        for _ in range(5):
            await asyncio.sleep(0)
        assert await store.get("a") is None
        let_through.set()
        assert await task == 1


async def test_cancelling_an_async_hook_before_a_write_leaves_everything_as_it_was() -> None:
    parked = asyncio.Event()

    async def for_ever(key: str, value: Any) -> None:
        parked.set()
        await asyncio.get_running_loop().create_future()

    async with MemoryStore().aio as store, unchanged(store):
        task = asyncio.create_task(wrapped(store, Hooks(before_set=for_ever)).set("a", 1))
        await parked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# -- composing ---------------------------------------------------------------------------------------------------------


def numbered(transcript: list[str], number: int, hook: Callable[[Hook], Hook]) -> Hooks:
    def note(moment: str) -> Hook:
        def noted(*_: object) -> None:
            transcript.append(f"{moment} {number}")

        return hook(noted)

    return Hooks(**{moment: note(moment) for moment in MOMENTS})


@in_every_way
async def test_composed_hooks_are_called_in_order(store: Any, hook: Any) -> None:
    transcript: list[str] = []
    hooked = wrapped(store, compose_hooks(*(numbered(transcript, number, hook) for number in (1, 2, 3))))

    async def moments(ask: Callable[[], Awaitable[Any]]) -> list[str]:
        transcript.clear()
        await ask()
        return transcript.copy()

    async def fail_to_set() -> None:
        with pytest.raises(RevisionConflict):
            await hooked.set("a", 1, if_revision=7)

    def three(*names: str) -> list[str]:
        return [f"{name} {number}" for name in names for number in (1, 2, 3)]

    assert await moments(lambda: hooked.set("a", 1)) == three("before_set", "after_set")
    assert await moments(lambda: hooked.get("a")) == three("before_get", "after_get")
    assert await moments(lambda: hooked.delete("a")) == three("on_delete")
    assert await moments(hooked.scan) == three("on_scan")
    assert await moments(lambda: hooked.watch("a")) == three("on_watch")
    assert await moments(fail_to_set) == three("before_set", "after_set", "on_error")


@in_every_way
async def test_the_first_hook_that_fails_stops_the_chain(
    store: Any, hook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    transcript: list[str] = []
    failing = Hooks(**{moment: hook(fail) for moment in MOMENTS if moment != "on_error"})
    first, last = numbered(transcript, 1, hook), numbered(transcript, 2, hook)
    hooked = wrapped(store, compose_hooks(first, failing, last))

    for ask in (
        lambda: hooked.set("a", 1),
        lambda: hooked.get("a"),
        lambda: hooked.delete("a"),
        hooked.scan,
        lambda: hooked.watch("a"),
    ):
        with pytest.raises(ZeroDivisionError):
            await ask()

    assert [entry for entry in transcript if "on_error" not in entry] == [
        "before_set 1",
        "before_get 1",
        "on_delete 1",
        "on_scan 1",
        "on_watch 1",
    ]
    transcript.clear()
    observers = compose_hooks(Hooks(after_set=hook(fail)), last)
    await wrapped(store, observers).set("a", 1)
    assert transcript == ["before_set 2"]


@in_every_way
async def test_composed_error_hooks_hand_on_the_error_to_raise(store: Any, hook: Any) -> None:
    seen: list[Exception] = []

    def replace(error: Exception) -> Exception:
        seen.append(error)
        return LookupError(len(seen))

    hooks = compose_hooks(Hooks(before_set=hook(fail)), *[Hooks(on_error=hook(replace))] * 2)

    with pytest.raises(LookupError) as raised:
        await wrapped(store, hooks).set("a", 1)

    assert raised.value.args == (2,)
    assert [type(error) for error in seen] == [ZeroDivisionError, LookupError]


async def test_composing_is_associative_and_composes_nothing_to_nothing(store: Any) -> None:
    transcript: list[str] = []
    one, two, three = (numbered(transcript, number, lambda function: function) for number in (1, 2, 3))

    for hooks in (
        compose_hooks(compose_hooks(one, two), three),
        compose_hooks(one, compose_hooks(two, three)),
        compose_hooks(one, compose_hooks(), two, Hooks(), three),
    ):
        await wrapped(store, hooks).delete("a")
    await wrapped(store, compose_hooks()).delete("a")

    assert transcript == ["on_delete 1", "on_delete 2", "on_delete 3"] * 3


@in_every_way
async def test_a_tuple_of_functions_is_called_in_order(store: Any, hook: Any) -> None:
    transcript: list[str] = []
    hooks = Hooks(on_delete=tuple(hook(lambda key, name=name: transcript.append(name)) for name in "abc"))

    await wrapped(store, hooks).delete("a")

    assert transcript == ["a", "b", "c"]


def test_hooks_are_given_by_keyword_and_are_functions() -> None:
    with pytest.raises(TypeError):
        Hooks(print)  # type: ignore[misc]
    with pytest.raises(TypeError):
        Hooks(before_everything=print)  # type: ignore[call-arg]
    for wrong in ("print", 7, (print, None), GetEntry("a")):
        with pytest.raises(TypeError, match="a hook is a function, not a"):
            Hooks(before_set=wrong)  # type: ignore[arg-type]
