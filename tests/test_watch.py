"""How a watch of the in-memory store is opened, how it waits, and how it ends.

What a watch of every store delivers is in `stigmergy.testing`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import pytest

from processes import PATIENCE, eventually
from stigmergy import (
    AsyncStore,
    Check,
    Compacted,
    Delete,
    Entry,
    InvalidKey,
    InvalidValue,
    MemoryStore,
    OpenWatch,
    Set,
    Snapshot,
    Unavailable,
    Watch,
    WatchClosed,
)


async def all_have_run() -> None:
    """Return when the tasks of this loop have got as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


# -- opening -----------------------------------------------------------------------------------------------------------


class Blocking(MemoryStore):
    """A store whose async interface opens watches in threads, each once it may."""

    blocking = True

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.may_open = threading.Event()
        self.opened = 0

    def open_watch(self, request: OpenWatch) -> Watch:
        self.asked.set()
        assert self.may_open.wait(PATIENCE)
        watch = super().open_watch(request)
        self.opened += 1
        return watch


def is_watched(store: Any) -> bool:
    """Whether anything is subscribed once every watch that nobody holds has gone."""
    gc.collect()
    hub = store.sync._hub if isinstance(store, AsyncStore) else store._hub
    watched: bool = hub.locked(lambda: hub.is_watched)
    return watched


async def test_a_change_counts_from_the_opening_on() -> None:
    async with MemoryStore().aio as store:
        for number, open_it in enumerate((store.watch, store.observe)):
            opening = open_it("a")
            await store.set("a", 3 * number + 1)
            async with opening as watch:
                await store.set("a", 3 * number + 2)
                assert watch.get_nowait().value == 3 * number + 2  # type: ignore[union-attr]
                assert watch.get_nowait() is None
            opening = open_it("a")
            await store.delete("a")
            watch = await opening
            await store.set("a", 3 * number + 3)
            assert watch.get_nowait().value == 3 * number + 3  # type: ignore[union-attr]
            assert watch.get_nowait() is None


async def test_the_block_of_an_opening_closes_its_watch_also_when_it_fails() -> None:
    async with MemoryStore().aio as store:
        with pytest.raises(ZeroDivisionError):
            async with store.watch("a") as watch:
                raise ZeroDivisionError
        with pytest.raises(WatchClosed):
            watch.get_nowait()
        assert not is_watched(store)


async def test_iterating_over_what_is_not_open_is_a_type_error_that_shows_what_to_write() -> None:
    async with MemoryStore().aio as store:
        for opening in (store.watch("a"), store.observe("a")):
            with pytest.raises(TypeError, match=r"`async with store.watch\(...\) as watch:`"):
                async for _ in opening:
                    pass
        del opening
        gc.collect()  # and it does not warn as well
        assert not is_watched(store)


async def test_what_is_not_open_has_nothing_of_a_watch() -> None:
    async with MemoryStore().aio as store:
        opening: Any = store.watch("a")
        for name in ("get", "aget", "get_nowait", "close", "map", "revision", "bookmark", "dropped", "__next__"):
            with pytest.raises(AttributeError):
                getattr(opening, name)
        with pytest.raises(TypeError), opening:
            pass
        (await opening).close()


async def test_an_opening_can_be_used_once() -> None:
    async with MemoryStore().aio as store:
        awaited, entered = store.watch("a"), store.observe("a")
        watch = await awaited
        async with entered:
            pass
        for used in (awaited, entered):
            with pytest.raises(RuntimeError, match="already awaited"):
                await used
            with pytest.raises(RuntimeError, match="already awaited"):
                async with used:
                    pass
        await store.set("a", 1)
        assert watch.get_nowait().value == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("blocking", [False, True])
async def test_an_opening_that_is_dropped_warns_that_it_was_never_awaited(blocking: bool) -> None:
    async with (Blocking() if blocking else MemoryStore()).aio as store:

        def open_and_drop(name: str) -> None:
            getattr(store, name)("a")
            gc.collect()

        for name in ("watch", "observe"):
            with pytest.warns(RuntimeWarning, match="open_watch' was never awaited"):
                open_and_drop(name)
        assert not is_watched(store)


async def test_bad_arguments_are_refused_before_there_is_anything_to_await() -> None:
    async with MemoryStore().aio as store:
        for wrong in ({}, {"prefix": "", "capacity": 0}, {"prefix": "", "overflow": "block"}, {"prefix": 1}):
            with pytest.raises((TypeError, ValueError)):
                store.watch(**wrong)
        for wrong_key in ("", "\n"):
            with pytest.raises(InvalidKey):
                store.watch(wrong_key)
            with pytest.raises(InvalidKey):
                store.observe(wrong_key)
        gc.collect()  # nothing warns


async def test_an_error_of_opening_is_raised_where_it_is_opened() -> None:
    async with MemoryStore().aio as store:
        opening, other = (store.watch("a", since=7) for _ in range(2))
        with pytest.raises(Compacted):
            await opening
        with pytest.raises(Compacted):
            async with other:
                pytest.fail("it is open")
        assert not is_watched(store)


async def test_an_opening_that_is_cancelled_leaves_nothing_though_its_store_answers_later() -> None:
    with Blocking() as store:

        async def follow(entered: bool) -> None:
            if entered:
                async with store.aio.watch("a"):
                    pytest.fail("it is open")
            await store.aio.observe("a")

        for number, entered in enumerate((True, False)):
            store.asked.clear()
            store.may_open.clear()
            task = asyncio.create_task(follow(entered))
            assert await asyncio.to_thread(store.asked.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert store.opened == number
            store.may_open.set()
            eventually(lambda number=number: store.opened == number + 1)
            eventually(lambda: not is_watched(store))


async def test_an_opening_that_fails_is_raised_once_and_leaves_nothing() -> None:
    class Away(MemoryStore):
        blocking = True
        failures = 2

        def open_watch(self, request: OpenWatch) -> Watch:
            if self.failures:
                self.failures -= 1
                raise Unavailable("no answer")
            return super().open_watch(request)

    with Away() as store:
        with pytest.raises(Unavailable):
            await store.aio.watch("a")
        with pytest.raises(Unavailable):
            async with store.aio.watch("a"):
                pytest.fail("it is open")
        assert not is_watched(store)
        watch = await store.aio.watch("a")
        store.set("a", 1)
        assert watch.get_nowait().value == 1  # type: ignore[union-attr]


async def test_an_async_store_whose_open_watch_is_no_coroutine_function_is_told_so() -> None:
    class Plain(AsyncStore):
        async def get_entry(self, key: str) -> Entry | None:
            raise NotImplementedError

        async def scan(
            self,
            prefix: str = "",
            *,
            keys: Iterable[str] | None = None,
            after: str | None = None,
            limit: int | None = None,
        ) -> Snapshot:
            raise NotImplementedError

        async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
            raise NotImplementedError

        def open_watch(self, request: OpenWatch) -> Any:
            return MemoryStore().open_watch(request)

        async def close(self) -> None: ...

    async with Plain() as store:
        for name in ("watch", "observe"):
            with pytest.raises(TypeError, match=r"Plain\.open_watch must be `async def`"):
                getattr(store, name)("a")


# -- waiting and ending ------------------------------------------------------------------------------------------------


async def test_a_full_watch_warns_once_in_the_log(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    watch = await store.watch("a", capacity=16)
    for number in range(50):
        await store.set("a", number)

    assert watch.dropped == 34
    assert [record.levelno for record in caplog.records if record.name == "stigmergy"] == [logging.WARNING]
    assert "a watch of 'a' is full (16 changes)" in caplog.text


async def test_a_watch_that_nobody_holds_unsubscribes(store: Any, colour: Any) -> None:
    raw = colour.raw(store)
    watches = [await store.watch("a", capacity=None), await store.watch(prefix="a"), await store.observe("a")]
    gone = [weakref.ref(watch) for watch in watches]
    del watches
    gc.collect()
    await store.set("a", 1)

    assert [reference() for reference in gone] == [None, None, None]
    assert raw._hub._everybody() == []
    assert raw._hub.keys == {}
    assert raw._hub.prefixes == {}


async def test_waiting_synchronously_inside_a_running_loop_raises_an_instruction() -> None:
    with MemoryStore() as store:
        watch = store.watch("a")
        store.set("a", 1)

        assert watch.get().value == 1
        with pytest.raises(RuntimeError, match="async for"):
            watch.get()
        with pytest.raises(RuntimeError, match="async for"):
            next(watch)


async def test_a_reader_in_the_same_loop_follows_a_busy_writer() -> None:
    async with MemoryStore().aio as store:
        watch = await store.watch("a", capacity=16)

        async def read() -> list[int]:
            return [(await anext(watch)).value for _ in range(1000)]

        reader = asyncio.create_task(read())
        for number in range(1000):
            await store.set("a", number)

        assert await reader == list(range(1000))
        assert watch.dropped == 0


async def test_a_cancelled_reader_loses_nothing_and_leaves_no_waiter_behind() -> None:
    async with MemoryStore().aio as store:
        watch = await store.watch("a")
        readers = [asyncio.create_task(anext(watch)) for _ in range(10)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

        assert not watch._subscription.waiters
        await store.set("a", 1)
        assert (await anext(watch)).value == 1


async def test_a_reader_cancelled_after_it_was_woken_passes_the_wake_up_on() -> None:
    async with MemoryStore().aio as store:
        watch = await store.watch("a")
        first, second = (asyncio.create_task(watch.aget()) for _ in range(2))
        await asyncio.sleep(0)
        await store.set("a", 1)
        first.cancel()
        await all_have_run()

        assert second.done()
        assert second.result().value == 1


async def test_several_readers_of_one_watch_share_its_changes() -> None:
    async with MemoryStore().aio as store:
        watch = await store.watch("a", capacity=None)
        readers = [asyncio.create_task(take_all(watch)) for _ in range(5)]
        for number in range(500):
            await store.set("a", number)
            if number % 10 == 0:
                await asyncio.sleep(0)
        watch.close()

        taken = [value for values in await asyncio.gather(*readers) for value in values]

        assert sorted(taken) == list(range(500))


async def take_all(watch: Any) -> list[int]:
    return [change.value async for change in watch]


async def test_each_of_several_changes_at_once_wakes_a_reader() -> None:
    async with MemoryStore().aio as store:
        watch = await store.watch(prefix="")
        readers = [asyncio.create_task(watch.aget()) for _ in range(3)]
        await asyncio.sleep(0)
        await store.commit(Set("a", 1), Set("b", 2), Set("c", 3))
        await all_have_run()

        assert [reader.done() for reader in readers] == [True] * 3
        assert sorted(reader.result().key for reader in readers) == ["a", "b", "c"]


def test_the_error_of_a_change_that_cannot_be_delivered_is_in_no_cycle() -> None:
    refused = iter([False])

    class Once:
        def __deepcopy__(self, memo: object) -> Once:
            if next(refused, True):
                raise LookupError("no more")
            return self

    with MemoryStore() as store:
        watch = store.watch("a")
        store.set("a", Once())
        gc.disable()
        try:
            try:
                watch.get_nowait()
            except InvalidValue as error:
                alive = weakref.ref(error)
            assert alive() is None
        finally:
            gc.enable()
