"""Every public coroutine, cancelled at every step of it: done whole or not at all, and nobody else suffers.

Coroutines are stepped by hand. At each step in turn `CancelledError` is thrown in: *early*, while that for which it
waits is still to come, and *late*, when it has come and the coroutine has not heard of it yet.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import count
from typing import Any

import pytest

import stigmergy
from processes import PATIENCE
from stigmergy import (
    AsyncStore,
    Call,
    Change,
    Check,
    Commit,
    Delete,
    Entry,
    Flow,
    GetEntry,
    Hooks,
    MemoryStore,
    Next,
    OpenWatch,
    Operation,
    Set,
    Sleep,
    Snapshot,
    Step,
    Store,
    StoreClosed,
    Watch,
    WatchClosed,
    apply_middleware,
    claim,
    with_hooks,
)
from stigmergy.flow import arun
from stigmergy.subscription import Subscription
from stigmergy.threads import _pending_calls

LONGEST = 40
"""More steps than any coroutine here takes."""


@types.coroutine
def passed_up(awaited: Any) -> Generator[Any, Any, Any]:
    """Let the task wait for what a coroutine that was stepped by hand has yielded."""
    return (yield awaited)


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def cancelled_at(
    at: int,
    coroutine: Coroutine[Any, Any, Any],
    *,
    late: bool = False,
    others: Callable[[int], Awaitable[None]],
    happen: Callable[[], None],
) -> bool:
    """Cancel `coroutine` where it suspends for the `at`-th time (0: before it has begun); whether it came so far.

    At each suspension `others` act. `happen` is what it waits for, for which somebody else has to care.
    """
    resume: Callable[[Any], Any] = coroutine.send
    argument: Any = None
    if at == 0:
        resume, argument = coroutine.throw, asyncio.CancelledError()
    try:
        for step in count(1):
            try:
                awaited = resume(argument)
            except StopIteration:
                assert step <= at, "it took no notice of being cancelled"
                return False
            except asyncio.CancelledError:
                assert step > at
                break
            await others(step)
            if step == at:
                if late:
                    happen()
                    await passed_up(awaited)
                elif awaited is not None:
                    awaited.cancel()
                resume, argument = coroutine.throw, asyncio.CancelledError()
                continue
            try:
                argument = await passed_up(awaited)
                resume = coroutine.send
            except Exception as error:
                argument, resume = error, coroutine.throw
    finally:
        del resume, argument  # the error holds this frame, and frames that hold watches
    if at == 0 or not late:
        happen()
    return True


# -- the stores --------------------------------------------------------------------------------------------------------


class Blocking(MemoryStore):
    """Says of itself that it blocks: its async face makes its calls in threads."""

    blocking = True


class Native(AsyncStore):
    """Written async: suspends before and after everything it does."""

    def __init__(self, memory: MemoryStore, pause: Callable[[], Awaitable[None]] = turns) -> None:
        self.memory = memory
        self.pause = pause

    async def get_entry(self, key: str) -> Entry | None:
        return await self._paused(partial(self.memory.get_entry, key))

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return await self._paused(partial(self.memory.scan, prefix, keys=keys, after=after, limit=limit))

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return await self._paused(partial(self.memory.commit, *writes))

    async def open_watch(self, request: OpenWatch) -> Watch:
        watch: Watch = await self._paused(partial(self.memory.open_watch, request))
        return watch

    async def close(self) -> None:
        await self._paused(self.memory.close)

    async def _paused(self, call: Callable[[], Any]) -> Any:
        await self.pause()
        result = call()
        await self.pause()
        return result


def pause_around(operation: Operation[Any]) -> Flow[Any]:
    yield from Call(asyncio.sleep, 0)
    result = yield operation
    yield from Call(asyncio.sleep, 0)
    return result


async def pause(*_: object) -> None:
    await asyncio.sleep(0)


HOOKS = with_hooks(
    Hooks(
        before_get=pause,
        after_get=pause,
        before_set=pause,
        after_set=pause,
        on_delete=pause,
        on_scan=pause,
        on_watch=pause,
    )
)
FACES: dict[str, tuple[type[MemoryStore], Callable[[MemoryStore], AsyncStore]]] = {
    "memory": (MemoryStore, lambda memory: memory.aio),
    "middleware": (MemoryStore, lambda memory: apply_middleware(memory, pause_around).aio),
    "hooks": (MemoryStore, lambda memory: apply_middleware(memory, HOOKS, pause_around).aio),
    "threads": (Blocking, lambda memory: memory.aio),
    "middleware over threads": (Blocking, lambda memory: apply_middleware(memory, pause_around).aio),
    "native": (MemoryStore, Native),
}


class Scene:
    """A store with something in it, in which an operation is cancelled."""

    def __init__(self, face: str) -> None:
        provider, make = FACES[face]
        self.memory = provider()
        self.store = make(self.memory)
        self.memory.commit(Set("a", 1), Set("b", 1))
        self.log = self.memory.watch(prefix="", capacity=None)
        self.full = self.memory.watch(prefix="", capacity=1)
        """So that writes give the loop a turn."""
        self.watch: Watch
        self.parked: list[asyncio.Task[Any]] = []
        """Those who wait while it is cancelled."""
        self.left_by: list[type[BaseException]] = []
        """How a flow was left, unless it was at its end."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))

    async def settle(self) -> None:
        """Let what the tasks have begun in threads come to its end, and what follows from that."""
        quiet = 0
        while quiet < 2:
            await turns()
            going = wait(list(_pending_calls), timeout=0).not_done
            await asyncio.to_thread(wait, going)
            quiet = 0 if going else quiet + 1
        await turns()

    def state(self) -> dict[str, Any]:
        return {key: entry.value for key, entry in self.memory.scan().items()}

    def logged(self) -> list[tuple[str, Any]]:
        return [(change.key, change.value) for change in drain(self.log)]

    async def nobody_is_left(self) -> None:
        """Nobody waits any more, and no watch was left open but those of the scene."""
        own = [self.log, self.full, *([self.watch] if hasattr(self, "watch") else ())]
        sources = [watch._subscription for watch in own]

        def left() -> list[Subscription]:
            self.memory.watch("x").close()
            return [each for each in self.memory._hub._members() if each not in sources and not each.ended]

        # A thread that has opened a watch holds it a moment longer than the task that it told. Without a GIL, what it
        # has made and a task has dropped is freed when that thread runs again.
        async with asyncio.timeout(PATIENCE):
            while left():
                await asyncio.gather(*[self.store.get("b") for _ in range(8)])
                await asyncio.sleep(0)
        assert [source.waiters for source in sources if source.waiters] == []

    async def end(self) -> None:
        self.memory.close()
        executor = asyncio.get_running_loop()._default_executor  # type: ignore[attr-defined]
        executor.shutdown()


async def nothing(*_: object) -> None:
    pass


def drain(watch: Watch) -> list[Change]:
    return list(iter(watch.get_nowait, None))


def moments() -> list[tuple[int, bool]]:
    return [(at, late) for at in range(LONGEST) for late in (False, True)]


# -- operations --------------------------------------------------------------------------------------------------------


async def add_one(value: int) -> int:
    await asyncio.sleep(0)
    return value + 1


def flow(scene: Scene) -> Flow[Any]:
    try:
        entry = yield from GetEntry("a")
        yield from Sleep(0)
        value = yield from Call(add_one, entry.value if entry else 0)
        yield from Commit([Set("a", 2), Delete("b")])
        yield from Sleep(0)
        return value
    except BaseException as error:
        scene.left_by.append(type(error))
        raise


BOTH = {"a": 1, "b": 1}
Operate = Callable[[Scene], Coroutine[Any, Any, Any]]
# What to call; the state after it; what its watches hear of it.
OPERATIONS: dict[str, tuple[Operate, dict[str, Any], list[tuple[str, Any]]]] = {
    "AsyncStore.get": (lambda scene: scene.store.get("a"), BOTH, []),
    "AsyncStore.get_entry": (lambda scene: scene.store.get_entry("a"), BOTH, []),
    "AsyncStore.get_many": (lambda scene: scene.store.get_many(["a", "b"]), BOTH, []),
    "AsyncStore.scan": (lambda scene: scene.store.scan(), BOTH, []),
    "AsyncStore.set": (lambda scene: scene.store.set("a", 2), {"a": 2, "b": 1}, [("a", 2)]),
    "AsyncStore.delete": (lambda scene: scene.store.delete("a"), {"b": 1}, [("a", None)]),
    "AsyncStore.commit": (
        lambda scene: scene.store.commit(Set("a", 2), Delete("b"), Check("c", 0)),
        {"a": 2},
        [("a", 2), ("b", None)],
    ),
    "AsyncStore.update": (lambda scene: scene.store.update("a", add_one), {"a": 2, "b": 1}, [("a", 2)]),
    "AsyncStore.run": (lambda scene: scene.store.run(flow(scene)), {"a": 2}, [("a", 2), ("b", None)]),
    "AsyncStore.wait_for": (lambda scene: scene.store.wait_for("a", bool), BOTH, []),
    "AsyncStore.open_watch": (lambda scene: scene.store.open_watch(OpenWatch(["a"])), BOTH, []),
    "AsyncStore.__aenter__": (lambda scene: scene.store.__aenter__(), BOTH, []),
    "arun": (
        lambda scene: arun(flow(scene), lambda operation: operation.apply(scene.store)),
        {"a": 2},
        [("a", 2), ("b", None)],
    ),
    "Call.ado": (lambda scene: Call(add_one, 1).ado(), BOTH, []),
    "Sleep.ado": (lambda scene: Sleep(0).ado(), BOTH, []),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_operation_cancelled_at_any_step_is_whole_or_not_at_all(name: str, face: str) -> None:
    call, after, heard = OPERATIONS[name]
    outcomes = set()
    for at, late in moments():
        scene = Scene(face)
        came_so_far = await cancelled_at(at, call(scene), late=late, others=nothing, happen=int)
        await scene.settle()

        whole = scene.state() == after
        assert whole or scene.state() == BOTH
        assert scene.logged() == (heard if whole else [])
        await scene.nobody_is_left()
        if "run" in name and at > 0:
            assert scene.left_by == [asyncio.CancelledError] * came_so_far
        if whole and heard:
            scene.memory.commit(Set("a", 1), Set("b", 1))
            drain(scene.log)
        reader = asyncio.create_task(scene.log.aget())
        async with asyncio.timeout(60):
            await call(scene)
            assert scene.state() == after
            if not heard:
                await scene.store.set("b", 2)
            assert (await reader).key == (heard[0][0] if heard else "b")
        await scene.end()
        outcomes.add(whole)
        if not came_so_far:
            break
    else:
        pytest.fail(f"it takes more than {LONGEST} steps")
    assert at > 0
    assert outcomes == ({False, True} if heard else {True})


# -- waiting -----------------------------------------------------------------------------------------------------------


def until_next(scene: Scene) -> Flow[Change]:
    return (yield from Next(scene.watch))


WAITS: dict[str, Operate] = {
    "Watch.aget": lambda scene: scene.watch.aget(),
    "Watch.__anext__": lambda scene: scene.watch.__anext__(),
    "Next.ado": lambda scene: Next(scene.watch).ado(),
    "Next.ado with a timeout": lambda scene: Next(scene.watch, 60).ado(),
    "AsyncStore.run of a flow that waits": lambda scene: scene.store.run(until_next(scene)),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", WAITS)
async def test_a_reader_cancelled_at_any_step_loses_nothing_and_the_next_one_wakes(name: str, face: str) -> None:
    wait = WAITS[name]
    for at, late in moments():
        scene = Scene(face)
        scene.watch = watch = await scene.store.watch("a")
        got: list[int] = []

        async def read(watch: Watch = watch, got: list[int] = got) -> None:
            async for change in watch:
                got.append(change.value)  # noqa: PERF401, it is looked at meanwhile

        async def others(step: int, scene: Scene = scene, at: int = at) -> None:
            if step == at:
                scene.parked.append(asyncio.create_task(read()))
                await scene.settle()
            else:
                scene.watch._subscription.wake()  # a hint, and nothing behind it
                if step > 3:
                    scene.memory.set("a", 2)

        happen = partial(scene.memory.set, "a", 2)
        async with asyncio.timeout(60):
            came_so_far = await cancelled_at(at, wait(scene), late=late, others=others, happen=happen)
            if came_so_far:
                await scene.settle()
                if scene.parked:
                    assert got == [2]  # the reader that waited all along was woken
                scene.parked.append(asyncio.create_task(read()))
                await scene.settle()
                scene.memory.set("a", 3)
                await scene.settle()
                assert got == [2, 3] == [value for _, value in scene.logged()]
            watch.close()
            await asyncio.gather(*scene.parked)
        await scene.nobody_is_left()
        await scene.end()
        if not came_so_far:
            break
    else:
        pytest.fail(f"it takes more than {LONGEST} steps")
    assert at > 3


@pytest.mark.parametrize("face", FACES)
async def test_a_wait_for_cancelled_at_any_step_leaves_nothing_and_the_next_one_wakes(face: str) -> None:
    def is_great(value: int) -> bool:
        return value >= 100

    for at, late in moments():
        scene = Scene(face)

        async def others(step: int, scene: Scene = scene, at: int = at) -> None:
            if step == at:
                scene.parked.append(asyncio.create_task(scene.store.wait_for("a", is_great)))
                await scene.settle()
            else:
                scene.memory.set("a", step if step < 15 else 200)

        happen = partial(scene.memory.set, "a", 100)
        async with asyncio.timeout(60):
            wait = scene.store.wait_for("a", is_great)
            came_so_far = await cancelled_at(at, wait, late=late, others=others, happen=happen)
            if came_so_far:
                assert (await scene.store.wait_for("a", is_great)).value == 100
                assert len(scene.parked) == (at > 0)
                assert all([is_great((await each).value) for each in scene.parked])
        await scene.settle()
        await scene.nobody_is_left()
        await scene.end()
        if not came_so_far:
            break
    else:
        pytest.fail(f"it takes more than {LONGEST} steps")
    assert at > 3


# -- opening -----------------------------------------------------------------------------------------------------------


async def awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


OPENINGS: dict[str, Operate] = {
    "Opening.__await__": lambda scene: awaiting(scene.store.watch("a")),
    "Opening.__aenter__": lambda scene: scene.store.watch("a").__aenter__(),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", OPENINGS)
async def test_an_opening_cancelled_at_any_step_leaves_no_watch_and_the_next_one_opens(name: str, face: str) -> None:
    for at, late in moments()[2:]:  # one that has not begun was never awaited, and says so
        scene = Scene(face)
        came_so_far = await cancelled_at(at, OPENINGS[name](scene), late=late, others=nothing, happen=int)
        await scene.settle()
        await scene.nobody_is_left()
        async with asyncio.timeout(60):
            scene.watch = await OPENINGS[name](scene)
            await scene.store.set("a", 2)
            assert (await scene.watch.aget()).value == 2
        assert scene.watch.get_nowait() is None
        await scene.nobody_is_left()
        await scene.end()
        if not came_so_far:
            break
    else:
        pytest.fail(f"it takes more than {LONGEST} steps")
    assert at > (face != "memory")


# -- closing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", ["AsyncStore.close", "AsyncStore.__aexit__"])
async def test_a_close_that_is_cancelled_has_closed_all_or_nothing(name: str, face: str) -> None:
    for at, late in moments():
        scene = Scene(face)
        scene.watch = await scene.store.watch("a")
        readers = [asyncio.create_task(scene.watch.aget()) for _ in range(3)]
        await scene.settle()
        close = scene.store.close() if name == "AsyncStore.close" else scene.store.__aexit__(None, None, None)
        came_so_far = await cancelled_at(at, close, late=late, others=nothing, happen=int)
        await scene.settle()

        async with asyncio.timeout(60):
            try:
                scene.memory.set("a", 2)
            except StoreClosed:
                ended = await asyncio.gather(*readers, return_exceptions=True)
                assert [type(each) for each in ended] == [WatchClosed] * 3
            else:
                assert came_so_far
                first, *rest = readers
                assert (await first).value == 2
                await scene.store.close()
                ended = await asyncio.gather(*rest, return_exceptions=True)
                assert [type(each) for each in ended] == [WatchClosed] * 2
            await scene.store.close()
        await scene.end()
        if not came_so_far:
            break
    assert at > 0


async def test_entering_the_block_of_an_open_watch_never_suspends() -> None:
    with MemoryStore() as store, store.watch("a") as watch:
        assert not await cancelled_at(1, watch.__aenter__(), others=nothing, happen=int)
        assert await watch.__aenter__() is watch


@pytest.mark.parametrize("kind", ["Opening", "Watch"])
@pytest.mark.parametrize("face", FACES)
async def test_leaving_the_block_of_a_watch_never_suspends_and_ends_its_readers(face: str, kind: str) -> None:
    scene = Scene(face)
    opening = scene.store.watch("a")
    scene.watch = await opening.__aenter__()
    block = opening if kind == "Opening" else scene.watch
    reader = asyncio.create_task(scene.watch.aget())
    await scene.settle()

    assert not await cancelled_at(1, block.__aexit__(None, None, None), others=nothing, happen=int)

    async with asyncio.timeout(60):
        with pytest.raises(WatchClosed):
            await reader
    await scene.end()


async def test_a_step_that_does_not_wait_never_suspends() -> None:
    class Plain(Step[int]):
        __slots__ = ()

        def do(self) -> int:
            return 1

    assert not await cancelled_at(1, Plain().ado(), others=nothing, happen=int)
    assert await Plain().ado() == 1


# -- from a thread -----------------------------------------------------------------------------------------------------


# -- claims ------------------------------------------------------------------------------------------------------------


async def work_under_a_claim(scene: Scene) -> None:
    async with claim(scene.store, "task", "w", 3600) as held:
        await held.set("a", 2)
        await held.commit(Set("b", 2), Check("c", 0))
        await held.delete("a")


AT_WORK = [BOTH, {"a": 2, "b": 1}, {"a": 2, "b": 2}, {"b": 2}]


@pytest.mark.parametrize("face", FACES)
async def test_a_claim_that_is_cancelled_at_any_step_leaves_nothing_behind(face: str) -> None:
    seen = []
    for at, late in ((at, late) for at in range(20 * LONGEST) for late in (False, True)):
        scene = Scene(face)
        came_so_far = await cancelled_at(at, work_under_a_claim(scene), late=late, others=nothing, happen=int)
        if leaving := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(leaving, timeout=60)
        await scene.settle()

        state = scene.state()
        left = state.pop("task", None)
        assert state in AT_WORK
        assert left is None or "threads" in face, "a call that is cancelled there goes on in its thread"
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await scene.nobody_is_left()
        await scene.end()
        seen.append(AT_WORK.index(state))
        if not came_so_far:
            break
    else:
        pytest.fail("it takes too many steps")
    assert set(seen) >= ({0, 3} if face == "memory" else {0, 1, 2, 3})


# -- nothing is left out -----------------------------------------------------------------------------------------------

ELSEWHERE = {
    "AsyncClaim.__aenter__": test_a_claim_that_is_cancelled_at_any_step_leaves_nothing_behind,
    "AsyncClaim.__aexit__": test_a_claim_that_is_cancelled_at_any_step_leaves_nothing_behind,
    "AsyncClaim.commit": test_a_claim_that_is_cancelled_at_any_step_leaves_nothing_behind,
    "AsyncClaim.delete": test_a_claim_that_is_cancelled_at_any_step_leaves_nothing_behind,
    "AsyncClaim.set": test_a_claim_that_is_cancelled_at_any_step_leaves_nothing_behind,
    "AsyncStore.close": test_a_close_that_is_cancelled_has_closed_all_or_nothing,
    "AsyncStore.__aexit__": test_a_close_that_is_cancelled_has_closed_all_or_nothing,
    "Threads.call": test_an_operation_cancelled_at_any_step_is_whole_or_not_at_all,
    "Threads.open_watch": test_an_opening_cancelled_at_any_step_leaves_no_watch_and_the_next_one_opens,
    "Opening.__aexit__": test_leaving_the_block_of_a_watch_never_suspends_and_ends_its_readers,
    "Watch.__aenter__": test_entering_the_block_of_an_open_watch_never_suspends,
    "Watch.__aexit__": test_leaving_the_block_of_a_watch_never_suspends_and_ends_its_readers,
    "Step.ado": test_a_step_that_does_not_wait_never_suspends,
}


def public_coroutines() -> set[str]:
    """All there are, by the names they are called by; what a class takes over from another one counts there."""
    found = set()
    for info in pkgutil.walk_packages(stigmergy.__path__, "stigmergy."):
        if any(part.startswith("_") for part in info.name.split(".")[1:]):
            continue
        if info.name.split(".")[1] in ("cli", "demo", "pytest_plugin", "testing"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.iscoroutinefunction(thing):
                found.add(name)
            elif inspect.isclass(thing):
                found |= {f"{thing.__qualname__}.{method}" for method in own_coroutines(thing)}
    return found


def own_coroutines(cls: type) -> set[str]:
    names = {name for name in vars(cls) if not name.startswith("_") or name.endswith("__")}
    return {name for name in names if inspect.iscoroutinefunction(vars(cls)[name]) or name == "__await__"}


def test_every_public_coroutine_is_cancelled_here() -> None:
    covered = {name.split(" ")[0] for name in (*OPERATIONS, *WAITS, *OPENINGS, *ELSEWHERE)}

    assert public_coroutines() == covered
    assert not own_coroutines(Store)


def test_a_new_coroutine_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def peek(self: Watch) -> None: ...

    monkeypatch.setattr(Watch, "peek", peek, raising=False)

    assert "Watch.peek" in public_coroutines()
