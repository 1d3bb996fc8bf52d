"""The async interface of a store that blocks, and stores that have no other."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from processes import eventually
from stigmergy import (
    AsyncStore,
    Check,
    Compacted,
    Delete,
    Entry,
    Flow,
    MemoryStore,
    OpenWatch,
    Operation,
    Set,
    Snapshot,
    StoreClosed,
    Unavailable,
    Watch,
    acting_as,
    apply_middleware,
    claim,
    scoped,
)
from stigmergy.providers.sqlite import SQLiteStore


class BlockingStore(MemoryStore):
    """Says of itself that it blocks, and remembers which threads it was called in."""

    blocking = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.threads: set[int] = set()

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        self.threads.add(threading.get_ident())
        return super().commit(*writes)

    def open_watch(self, request: OpenWatch) -> Watch:
        self.threads.add(threading.get_ident())
        return super().open_watch(request)


class NativeStore(AsyncStore):
    """An async store that really suspends."""

    def __init__(self) -> None:
        self.memory = MemoryStore()
        self.capabilities = self.memory.capabilities
        self.loops: set[asyncio.AbstractEventLoop] = set()

    async def pause(self) -> None:
        self.loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0)

    async def get_entry(self, key: str) -> Entry | None:
        await self.pause()
        return self.memory.get_entry(key)

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        await self.pause()
        return self.memory.scan(prefix, keys=keys, after=after, limit=limit)

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        await self.pause()
        return self.memory.commit(*writes)

    async def open_watch(self, request: OpenWatch) -> Watch:
        await self.pause()
        return self.memory.open_watch(request)

    async def close(self) -> None:
        await self.pause()
        self.memory.close()


def test_the_faces_of_a_store_lead_to_each_other() -> None:
    for store in (MemoryStore(), BlockingStore()):
        assert store.aio.sync is store
        assert store.aio is store.aio
        assert store.aio.capabilities == store.capabilities
        store.close()


async def test_a_blocking_store_is_called_in_threads() -> None:
    store = BlockingStore()
    async with store.aio as face:
        assert await face.commit(Set("a", 1)) == (1,)
        async with face.watch("a") as watch:
            await face.commit(Set("a", 2))
            assert (await anext(watch)).value == 2
        assert threading.get_ident() not in store.threads
    with pytest.raises(StoreClosed):
        store.get("a")


async def test_a_watch_of_a_blocking_store_hears_all_that_is_written_after_its_opening() -> None:
    async with BlockingStore().aio as store:
        for number in range(100):
            watch = await store.watch("a")
            await asyncio.gather(*[store.set("a", number) for _ in range(5)])
            assert [(await watch.aget()).value for _ in range(5)] == [number] * 5


async def test_what_goes_wrong_at_an_opening_is_raised_there_and_fails_nobody_else() -> None:
    async with BlockingStore().aio as store:
        opening = store.watch("a", since=7)
        await store.set("a", 1)

        with pytest.raises(Compacted):
            await opening
        with pytest.raises(Compacted):
            async with store.watch("a", since=7):
                pass
        assert await store.get("a") == 1


async def test_an_engine_that_is_away_is_asked_once_by_each_opening_and_by_nothing_else() -> None:
    asked = []

    class Away(BlockingStore):
        def open_watch(self, request: OpenWatch) -> Watch:
            asked.append(request)
            raise Unavailable("nobody is there")

    async with Away().aio as store:
        openings = [store.watch(f"{number}") for number in range(3)]
        await store.set("a", 1)

        assert asked == []
        for opening in openings:
            with pytest.raises(Unavailable):
                await opening
        assert [request.keys for request in asked] == [("0",), ("1",), ("2",)]


async def test_the_threads_of_a_face_end_with_it_and_know_the_context_of_the_caller() -> None:
    def ours() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name.startswith("stigmergy")}

    name, before = ContextVar[str]("name"), ours()
    seen = []

    class Curious(BlockingStore):
        def get_entry(self, key: str) -> Entry | None:
            seen.append((name.get(), threading.current_thread()))
            return super().get_entry(key)

    store = Curious()
    async with store.aio as face:
        name.set("planner")
        await face.get("a")

    ((told, thread),) = seen
    assert told == "planner"
    await asyncio.to_thread(eventually, lambda: not thread.is_alive())
    with pytest.raises(StoreClosed):
        await store.aio.get("a")
    await asyncio.to_thread(eventually, lambda: not ours() - before)


async def test_calls_one_after_another_are_made_by_one_thread() -> None:
    threads: set[int] = set()

    class Curious(BlockingStore):
        def get_entry(self, key: str) -> Entry | None:
            threads.add(threading.get_ident())
            return super().get_entry(key)

    async with Curious().aio as face:
        for _ in range(1000):
            await face.get("a")

    assert len(threads) == 1


def test_a_program_ends_with_what_was_asked_for_done_though_nobody_waits(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from stigmergy import open_async_store

async def main():
    store = open_async_store(f"sqlite:///{sys.argv[1]}/state.db")
    writes = [asyncio.create_task(store.set(f"{number}", number)) for number in range(100)]
    await asyncio.sleep(0)
    for write in writes:
        write.cancel()

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with SQLiteStore(tmp_path / "state.db") as store:
        assert store.scan().revision == 100


def pass_on(operation: Operation[Any]) -> Flow[Any]:
    return (yield operation)


def test_a_store_written_for_asyncio_only_has_no_sync_interface() -> None:
    native = NativeStore()
    for store in (native, scoped(native, "a"), apply_middleware(native, pass_on)):
        with pytest.raises(TypeError, match="asyncio only"):
            store.sync


async def test_middleware_and_handles_stand_around_a_store_written_for_asyncio_only() -> None:
    native = NativeStore()
    handle = acting_as(scoped(apply_middleware(native, pass_on), "agent"), "planner")
    async with handle.watch("plan") as watch:
        await handle.set("plan", 1)
        change = await watch.aget()
        async with claim(handle, "task", "planner", 60) as held:
            await held.set("plan", 2)

        assert (change.key, change.writer) == ("plan", "planner")
        assert await native.get("agent:plan") == 2
        await handle.close()
        with pytest.raises(StoreClosed):
            await handle.get("plan")
    assert await native.get("agent:plan") == 2
