"""Opening a watch of an async store: awaited or entered, once, and never by anything else."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from processes import PATIENCE, eventually
from servers import VALKEY
from stigmergy import (
    AsyncStore,
    Call,
    Compacted,
    Flow,
    Hooks,
    InvalidKey,
    MemoryStore,
    OpenWatch,
    Operation,
    StoreClosed,
    Unavailable,
    Watch,
    WatchClosed,
    apply_middleware,
    open_async_store,
    scoped,
    with_hooks,
)
from stigmergy.bridge import _InlineStore
from stigmergy.threads import _pending_calls


class Blocking(MemoryStore):
    """Says of itself that it blocks: its async face makes its calls in threads."""

    blocking = True


PLACES: dict[str, Callable[[pytest.FixtureRequest], Callable[[], AsyncStore]]] = {
    "memory": lambda _: lambda: MemoryStore().aio,
    "blocking": lambda _: lambda: Blocking().aio,
    "sqlite": lambda request: at(f"sqlite:///{request.getfixturevalue('tmp_path') / 'state.db'}"),
    "valkey": lambda request: at(f"{request.getfixturevalue('valkey').url}?namespace={os.urandom(6).hex()}"),
}
"""How to get what opens a fresh place."""


def at(url: str) -> Callable[[], AsyncStore]:
    return lambda: open_async_store(url)


@pytest.fixture(params=["memory", "sqlite", "valkey"])
def make(request: pytest.FixtureRequest) -> Callable[[], AsyncStore]:
    return PLACES[request.param](request)


@pytest.fixture(params=["blocking", "sqlite", "valkey"])
def make_blocking(request: pytest.FixtureRequest) -> Callable[[], AsyncStore]:
    """One whose watches are opened in threads."""
    return PLACES[request.param](request)


def pending() -> set[Future[Any]]:
    """What threads are asked for and have not done."""
    return wait(list(_pending_calls), timeout=0).not_done


def is_watched(store: AsyncStore) -> bool:
    hub = store.sync._hub  # type: ignore[attr-defined]
    return bool(hub.locked(lambda: hub.is_watched))


async def nothing_is_left(store: AsyncStore) -> None:
    """Wait until the threads have done what was begun in them, and nothing is subscribed."""
    # Without a GIL, what a thread has made and a task has dropped is freed when that thread runs again.
    async with asyncio.timeout(PATIENCE):
        while pending() or is_watched(store):
            (await store.watch("another")).close()
            await asyncio.sleep(0)


async def awaited(opening: Awaitable[Watch]) -> Watch:
    return await opening


async def entered_and_left(opening: Any) -> Watch:
    async with opening as watch:
        assert isinstance(watch, Watch)
        return watch


both_ways = pytest.mark.parametrize("way", [awaited, entered_and_left])


@asynccontextmanager
async def silence() -> AsyncIterator[None]:
    """Nothing warns in here, not even what only the collector finds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(each.message) for each in caught] == []


async def next_value(watch: Watch) -> Any:
    async with asyncio.timeout(PATIENCE):
        return (await watch.aget()).value


# -- the two ways ------------------------------------------------------------------------------------------------------


async def test_await_opens_a_watch(make: Callable[[], AsyncStore]) -> None:
    async with make() as store:
        watch = await store.watch("a")
        state = await store.observe(prefix="")
        await store.set("a", 1)

        assert await next_value(watch) == await next_value(state) == 1


async def test_async_with_opens_a_watch_for_the_length_of_the_block(make: Callable[[], AsyncStore]) -> None:
    async with make() as store:
        async with store.watch("a") as watch, store.observe(prefix="") as state:
            await store.set("a", 1)
            assert await next_value(watch) == await next_value(state) == 1

        for each in (watch, state):
            with pytest.raises(WatchClosed):
                each.get_nowait()
        assert not is_watched(store)


async def test_a_block_that_raises_ends_its_watch(make: Callable[[], AsyncStore]) -> None:
    async with make() as store:
        with pytest.raises(ZeroDivisionError):
            async with store.watch("a"):
                raise ZeroDivisionError

        assert not is_watched(store)


async def test_several_are_opened_at_once(make: Callable[[], AsyncStore]) -> None:
    async with make() as store:
        watches = await asyncio.gather(*[store.watch(key) for key in "abc"])
        for number, key in enumerate("abc"):
            await store.set(key, number)

        assert [await next_value(watch) for watch in watches] == [0, 1, 2]


async def test_iterating_over_what_is_not_open_says_how_to_open_it(make: Callable[[], AsyncStore]) -> None:
    async with make() as store:
        opening = store.watch("a")
        for _ in range(2):
            with pytest.raises(TypeError, match=r"`async with store\.watch\(\.\.\.\) as watch:`"):
                async for _ in opening:
                    pass
        assert not is_watched(store)


async def test_iterating_over_what_is_being_opened_does_not_disturb_the_opening(
    make_blocking: Callable[[], AsyncStore],
) -> None:
    async with make_blocking() as store:
        opening = store.watch("a")
        task = asyncio.ensure_future(opening)
        await asyncio.sleep(0)
        with pytest.raises(TypeError, match="async with"):
            async for _ in opening:
                pass
        watch = await task
        await store.set("a", 1)

        assert await next_value(watch) == 1


async def test_iterating_over_what_is_not_open_is_told_once_and_does_not_warn_as_well(
    make: Callable[[], AsyncStore],
) -> None:
    async with make() as store, silence():
        with pytest.raises(TypeError, match="async with"):
            async for _ in store.watch("a"):
                pass


def test_an_opening_that_was_refused_does_not_warn_from_a_cycle_either(make: Callable[[], AsyncStore]) -> None:
    store = make()
    cycle: list[Any] = [store.watch("a")]
    cycle.append(cycle)
    with warnings.catch_warnings(action="error"), pytest.raises(TypeError):
        aiter(cycle[0])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del cycle
        gc.collect()
    assert warned == []
    asyncio.run(store.close())


@pytest.mark.parametrize("again", [awaited, entered_and_left])
@both_ways
async def test_nothing_is_opened_twice(
    make: Callable[[], AsyncStore], way: Callable[[Any], Any], again: Callable[[Any], Any]
) -> None:
    async with make() as store:
        opening = store.watch("a")
        watch = await way(opening)
        with pytest.raises(RuntimeError):
            await again(opening)

        assert is_watched(store) is (way is awaited)
        if way is awaited:
            await store.set("a", 1)
            assert await next_value(watch) == 1


async def test_of_two_tasks_that_open_the_same_one_has_the_watch(make: Callable[[], AsyncStore]) -> None:
    async with make() as store:
        opening = store.watch("a")
        outcomes = await asyncio.gather(awaited(opening), awaited(opening), return_exceptions=True)
        await store.set("a", 1)

        watch, refused = outcomes
        assert isinstance(watch, Watch)
        assert isinstance(refused, RuntimeError)
        assert await next_value(watch) == 1


async def test_one_that_is_dropped_unopened_warns(make: Callable[[], AsyncStore]) -> None:
    async with make() as store:
        for ask in (lambda: store.watch("a"), lambda: store.observe("a")):
            opening = ask()
            with pytest.warns(RuntimeWarning, match=r"open_watch' was never awaited"):
                del opening

        assert not is_watched(store)


async def test_one_that_was_opened_does_not_warn(make: Callable[[], AsyncStore]) -> None:
    async with make() as store, silence():
        await store.watch("a")
        async with store.watch("a"):
            pass


# -- from when on it hears ---------------------------------------------------------------------------------------------


async def test_a_change_counts_from_the_opening_on(make: Callable[[], AsyncStore]) -> None:
    async with make() as store:
        by_await, by_block = store.watch("a"), store.watch("a")
        await store.set("a", "before")
        watch = await by_await
        async with by_block as other:
            await store.set("a", "after")

            assert await next_value(watch) == await next_value(other) == "after"


async def test_a_watch_handed_over_to_a_task_has_what_was_written_before_the_task_ran(
    make: Callable[[], AsyncStore],
) -> None:
    begun = []

    async def read(watch: Watch) -> Any:
        begun.append(watch)
        return await next_value(watch)

    async with make() as store:
        watch = await store.watch("a")
        task = asyncio.create_task(read(watch))
        store.sync.set("a", 1)

        assert begun == []
        assert await task == 1


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda store: store.watch(), ValueError),
        (lambda store: store.watch("a", prefix="b"), ValueError),
        (lambda store: store.watch(""), InvalidKey),
        (lambda store: store.watch(7), InvalidKey),
        (lambda store: store.watch(prefix="\n"), InvalidKey),
        (lambda store: store.watch("a", since=-1), ValueError),
        (lambda store: store.watch("a", since=1.5), TypeError),
        (lambda store: store.watch("a", capacity=0), ValueError),
        (lambda store: store.watch("a", overflow="block"), ValueError),
        (lambda store: store.observe(), ValueError),
        (lambda store: store.observe(""), InvalidKey),
    ],
)
async def test_bad_arguments_are_refused_where_they_are_given(
    make: Callable[[], AsyncStore], ask: Callable[[Any], Any], error: type[Exception]
) -> None:
    asked: list[OpenWatch] = []
    async with make() as store, silence():
        store.open_watch = asked.append  # type: ignore[assignment,method-assign]
        with pytest.raises(error):
            ask(store)

    assert asked == []


@both_ways
async def test_what_cannot_be_opened_is_raised_at_the_opening_and_leaves_nothing(
    make: Callable[[], AsyncStore], way: Callable[[Any], Any]
) -> None:
    async with make() as store:
        opening = store.watch("a", since=99)
        with pytest.raises(Compacted):
            await way(opening)

        assert not is_watched(store)
        with pytest.raises(RuntimeError):
            await way(opening)
        await way(store.watch("a", since=0))


@both_ways
async def test_opening_on_a_closed_store_is_store_closed(
    make: Callable[[], AsyncStore], way: Callable[[Any], Any]
) -> None:
    async with make() as store:
        await store.get("a")
        early = store.watch("a")
    late = store.watch("a")

    for opening in (early, late):
        with pytest.raises(StoreClosed):
            await way(opening)


@both_ways
async def test_opening_while_the_folder_is_not_there_is_unavailable_and_later_it_works(
    tmp_path: Path, way: Callable[[Any], Any]
) -> None:
    folder = tmp_path / "later"
    async with open_async_store(f"sqlite:///{folder}/state.db") as store:
        await away_and_back(store, way, folder.mkdir)


@both_ways
async def test_opening_while_the_server_is_away_is_unavailable_and_later_it_works(
    new_server: Callable[..., Any], way: Callable[[Any], Any]
) -> None:
    server = new_server(VALKEY)
    async with open_async_store(server.url) as store:
        server.kill()
        await away_and_back(store, way, server.start)


async def away_and_back(store: AsyncStore, way: Callable[[Any], Any], come_back: Callable[[], None]) -> None:
    asked: list[OpenWatch] = []
    open_watch = store.sync.open_watch

    def counting(request: OpenWatch) -> Watch:
        asked.append(request)
        return open_watch(request)

    store.sync.open_watch = counting  # type: ignore[method-assign]
    opening, later = store.watch("a"), store.watch("a")
    with pytest.raises(Unavailable):
        await way(opening)
    assert len(asked) == 1
    assert not is_watched(store)

    await asyncio.to_thread(come_back)
    async with asyncio.timeout(PATIENCE):
        assert isinstance(await way(later), Watch)
        watch = await store.watch("a")
        await store.set("a", 1)
    assert await next_value(watch) == 1
    assert len(asked) == 3


async def test_a_provider_whose_open_watch_is_plain_is_told_so_by_name() -> None:
    class Plain(_InlineStore):
        def open_watch(self, request: OpenWatch) -> Watch:  # type: ignore[override]
            return self._store.open_watch(request)

    async with Plain(MemoryStore()) as store:
        for ask in (store.watch, store.observe):
            with pytest.raises(TypeError, match=r"Plain\.open_watch must be `async def`"):
                ask("a")
        for view in (store, scoped(store, "x"), apply_middleware(store, with_hooks(Hooks()))):
            with pytest.raises(TypeError, match=r"Plain\.open_watch must be `async def`"):
                await view.wait_for("a", bool)

        assert not is_watched(store)


# -- cancelled ---------------------------------------------------------------------------------------------------------


@both_ways
async def test_an_opening_cancelled_after_any_number_of_steps_leaves_no_watch(
    make: Callable[[], AsyncStore], way: Callable[[Any], Any]
) -> None:
    async def open_one(store: AsyncStore) -> None:
        await way(store.watch("a"))

    async def is_cancelled_after(steps: int, store: AsyncStore) -> bool:
        task = asyncio.create_task(open_one(store))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    async with make() as store:
        steps = 0
        while await is_cancelled_after(steps, store):
            await nothing_is_left(store)
            steps += 1 + steps // 8  # a thread may take thousands
        await nothing_is_left(store)

        assert steps > 0
        await way(store.watch("a"))


class HeldUp:
    """Holds up the watches of `store` in their threads, until `go_on` is set."""

    def __init__(self, store: AsyncStore) -> None:
        self.begun, self.go_on = Event(), Event()
        self.was_watched: list[bool] = []
        self._store = store
        self._open_watch = store.sync.open_watch
        store.sync.open_watch = self._open_late  # type: ignore[method-assign]

    async def opening(self, way: Callable[[Any], Any]) -> asyncio.Task[None]:
        """A task that opens a watch in this `way`, held up in its thread by now."""

        async def open_one(store: AsyncStore) -> None:
            await way(store.watch("a"))

        task = asyncio.create_task(open_one(self._store))
        assert await asyncio.to_thread(self.begun.wait, PATIENCE)
        return task

    def _open_late(self, request: OpenWatch) -> Watch:
        self.begun.set()
        assert self.go_on.wait(PATIENCE)
        watch = self._open_watch(request)
        self.was_watched.append(is_watched(self._store))
        return watch


@both_ways
async def test_an_answer_that_comes_after_the_cancellation_leaves_no_watch(
    make_blocking: Callable[[], AsyncStore], way: Callable[[Any], Any]
) -> None:
    async with make_blocking() as store:
        held_up = HeldUp(store)
        task = await held_up.opening(way)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held_up.go_on.set()
        await nothing_is_left(store)

        assert held_up.was_watched[0]
        watch = await store.watch("a")
        await store.set("a", 1)
        assert await next_value(watch) == 1


@both_ways
async def test_an_answer_that_comes_just_before_the_cancellation_leaves_no_watch_though_the_task_is_kept(
    make_blocking: Callable[[], AsyncStore], way: Callable[[Any], Any]
) -> None:
    async with make_blocking() as store:
        held_up = HeldUp(store)
        task = await held_up.opening(way)
        held_up.go_on.set()
        eventually(lambda: all(call.done() for call in _pending_calls))  # blocks the loop: the task has not resumed yet
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        async with store.watch("b"):  # so the thread has let go of what it opened before
            pass

        assert task.cancelled()
        assert held_up.was_watched == [True, True]
        assert not is_watched(store)


# -- many --------------------------------------------------------------------------------------------------------------


async def test_thousands_that_nobody_opens_are_nothing_to_the_store(make: Callable[[], AsyncStore]) -> None:
    asked: list[OpenWatch] = []
    async with make() as store:
        store.sync.open_watch = asked.append  # type: ignore[method-assign,assignment]
        openings = [store.watch("a") for _ in range(5000)]
        await store.set("a", 1)
        assert not is_watched(store)
    for opening in openings:
        opening.__await__().close()  # type: ignore[attr-defined]  # so that it does not warn

    assert asked == []


# -- what is left when somebody keeps the error ------------------------------------------------------------------------


def failing(operation: Operation[Any]) -> Flow[Any]:
    result = yield operation
    if isinstance(operation, OpenWatch):
        raise ZeroDivisionError
    return result


@pytest.mark.parametrize("sync", [True, False])
async def test_openings_that_failed_leave_nothing_though_their_errors_are_kept(
    make: Callable[[], AsyncStore], sync: bool
) -> None:
    async with make() as store:
        view = apply_middleware(store, failing)
        asks: list[Callable[[], Any]] = [lambda: store.watch("a", since=10**9), lambda: view.watch("a")]
        if sync:
            asks = [lambda: store.sync.watch("a", since=10**9), lambda: view.sync.watch("a")]
        errors = []
        for ask in asks:
            with pytest.raises((Compacted, ZeroDivisionError)) as failed:
                await (asyncio.to_thread(ask) if sync else ask())
            errors.append(failed.value)

        assert not is_watched(store)
        assert len(errors) == 2


@both_ways
async def test_an_opening_cancelled_in_a_middleware_behind_it_leaves_nothing_though_its_task_is_kept(
    make: Callable[[], AsyncStore], way: Callable[[Any], Any]
) -> None:
    parked = asyncio.Event()

    async def for_ever() -> None:
        parked.set()
        await asyncio.get_running_loop().create_future()

    def waiting(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        yield Call(for_ever)
        return result

    async def open_one() -> None:
        await way(apply_middleware(store, waiting).watch("a"))

    async with make() as store:
        task = asyncio.create_task(open_one())
        await parked.wait()
        assert is_watched(store)
        task.cancel()
        await asyncio.wait([task])

        assert not is_watched(store)
        assert task.cancelled()


async def test_a_handle_that_is_closed_while_its_watch_is_opened_says_so(make: Callable[[], AsyncStore]) -> None:
    def closing(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        yield Call(handle.close)
        return result

    async with make() as store:
        handle = scoped(apply_middleware(store, closing), "a")
        with pytest.raises(StoreClosed):
            await handle.watch("k")
        assert not is_watched(store)


async def test_a_close_does_not_wait_for_the_openings_that_are_under_way(
    request: pytest.FixtureRequest,
) -> None:
    store = PLACES["valkey"](request)()
    held_up = HeldUp(store)
    openings = [asyncio.create_task(awaited(store.watch("a"))) for _ in range(40)]
    assert await asyncio.to_thread(held_up.begun.wait, PATIENCE)
    await store.close()
    held_up.go_on.set()

    assert [type(error) for error in await asyncio.gather(*openings, return_exceptions=True)] == [StoreClosed] * 40


def test_an_opening_cannot_be_copied_or_pickled() -> None:
    async def copied() -> None:
        opening = MemoryStore().aio.watch("a")
        for ask in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="an opening cannot be copied or pickled"):
                ask(opening)
        await opening

    asyncio.run(copied())
