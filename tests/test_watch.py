"""How a watch of the in-memory store waits, and how it ends. How it is opened is in `test_opening.py`.

What a watch of every store delivers is in `stigmergy.testing`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from typing import Any

import pytest

from stigmergy import InvalidValue, MemoryStore, Set


async def all_have_run() -> None:
    """Return when the tasks of this loop have got as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


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
    assert raw._hub._members() == []
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
