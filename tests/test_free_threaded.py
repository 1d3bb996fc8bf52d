"""Threads that truly run at once, on CPython without a GIL; elsewhere the same, as far as the interpreter lets them."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stigmergy import Change, MemoryStore, Set, StoreClosed, WatchClosed
from stigmergy.watch import _TaskWaiter, _ThreadWaiter

THREADS = 8
WRITES = 1500
pytestmark = pytest.mark.thread_unsafe(reason="has threads of its own")


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What `functions` return, each called in a thread of its own, all at the same moment."""
    start = threading.Barrier(len(functions))
    results: list[Any] = [None] * len(functions)
    failures: list[BaseException] = []

    def run(place: int, function: Callable[[], Any]) -> None:
        try:
            start.wait(timeout=60)
            results[place] = function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return results


@pytest.fixture
def shared() -> Iterator[MemoryStore]:
    with MemoryStore(history=64) as store:
        yield store


@pytest.fixture
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching_often")
def test_nobody_sees_half_a_commit(shared: MemoryStore) -> None:
    shared.commit(Set("a", 0), Set("b", 0), Set("c", 0))
    writing = threading.Event()
    writing.set()

    def write() -> None:
        try:
            for number in range(1, WRITES):
                shared.commit(Set("a", number), Set("b", number), Set("c", number))
        finally:
            writing.clear()

    def read() -> None:
        while writing.is_set():
            seen = [shared.get(key) for key in "abc"]
            assert seen == sorted(seen), "who has seen one new value sees them all"
            entries = [shared.get_entry(key) for key in "cab"]
            assert [entry.value for entry in entries if entry] == sorted(entry.value for entry in entries if entry)
            assert len(set(shared.get_many(["c", "b", "a"]).values())) == 1

    at_once(write, *[read] * 5)


@pytest.mark.usefixtures("_switching_often")
def test_a_write_that_was_acknowledged_is_what_every_thread_reads(shared: MemoryStore) -> None:
    acknowledged = [0]
    writing = threading.Event()
    writing.set()

    def write() -> None:
        try:
            for number in range(1, 4 * WRITES):
                shared.set("a", number)
                acknowledged[0] = number
        finally:
            writing.clear()

    def read() -> None:
        while writing.is_set():
            least = acknowledged[0]
            assert shared.get("a", 0) >= least

    shared.set("a", 0)
    at_once(write, *[read] * 5)


@pytest.mark.usefixtures("_switching_often")
def test_readers_of_one_watch_share_what_many_writers_write_and_none_is_left_waiting(shared: MemoryStore) -> None:
    watch = shared.watch(prefix="", capacity=None)
    every = shared.watch(prefix="", capacity=None)
    wanted = 4 * 300

    def write() -> None:
        for number in range(300):
            shared.set(f"k{number % 5}", number)

    def read() -> list[Change]:
        return [watch.get(timeout=60) for _ in range(wanted // 6)]

    def aread() -> list[Change]:
        async def main() -> list[Change]:
            async with asyncio.timeout(60):
                return [await watch.aget() for _ in range(wanted // 6)]

        return asyncio.run(main())

    read_by = at_once(*[write] * 4, read, read, read, aread, aread, aread)[4:]

    assert sorted(change.revision for changes in read_by for change in changes) == list(range(1, wanted + 1))
    assert [change.revision for change in iter(every.get_nowait, None)] == list(range(1, wanted + 1))


@pytest.mark.parametrize("make", [_ThreadWaiter, _TaskWaiter])
def test_of_many_who_wake_one_reader_at_once_one_has_woken_it(make: Callable[[], Any]) -> None:
    async def main() -> None:
        waiters = [make() for _ in range(2000)]
        woken = await asyncio.to_thread(at_once, *[lambda: [waiter.wake() for waiter in waiters]] * THREADS)
        assert all(sum(once) <= 1 for once in zip(*woken, strict=True)), "the other hints are for other readers"

    asyncio.run(main())


def test_a_task_that_a_thread_has_woken_is_not_woken_by_a_task_as_well() -> None:
    async def main() -> None:
        waiter = _TaskWaiter()
        by_thread: list[bool] = []
        thread = threading.Thread(target=lambda: by_thread.append(waiter.wake()))
        thread.start()
        thread.join()  # the loop has no turn meanwhile: it is woken, and does not run yet

        assert by_thread == [True]
        assert not waiter.wake()
        await waiter.woken

    asyncio.run(main())


def test_what_is_put_in_before_the_end_is_delivered_though_the_reader_looked_before(shared: MemoryStore) -> None:
    watch = shared.watch("a")
    source = watch._subscription
    hub = source.hub

    class Late:
        """The hub, but after this reader's first look somebody writes, and closes the store."""

        def __getattr__(self, name: str) -> Any:
            return getattr(hub, name)

        def locked(self, function: Callable[..., Any], *args: Any) -> Any:
            result = hub.locked(function, *args)
            source.hub = hub
            shared.set("a", 1)
            shared.close()
            return result

    source.hub = Late()  # type: ignore[assignment]

    assert watch.get(timeout=60).value == 1
    with pytest.raises(WatchClosed):
        watch.get_nowait()


def test_a_key_is_never_absent_because_the_store_is_being_closed() -> None:
    store = MemoryStore()
    store.set("a", 1)
    entries = store._entries

    class Closed(dict[str, Any]):
        """The entries, but the store is closed after this reader has looked whether it is, before it reads."""

        def get(self, key: str, default: Any = None) -> Any:
            store._entries = entries
            store.close()
            return entries.get(key, default)

    store._entries = Closed(entries)

    with pytest.raises(StoreClosed):
        store.get_entry("a")


def test_a_full_watch_warns_once_however_many_wake_it(
    shared: MemoryStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = shared.watch("a", capacity=1)
    source: Any = watch._subscription
    meeting = threading.Barrier(2)

    is_first_to_warn = type(source)._is_first_to_warn

    def meet(self: Any) -> bool:
        meeting.wait(timeout=60)  # both have found that nobody has warned yet
        return bool(is_first_to_warn(self))

    source.dropped = 1
    monkeypatch.setattr(type(source), "_is_first_to_warn", meet)
    at_once(source.wake, source.wake)

    assert [record.levelname for record in caplog.records if record.name == "stigmergy"] == ["WARNING"]


@pytest.mark.usefixtures("_switching_often")
def test_watches_are_opened_on_the_async_face_of_a_blocking_store_by_many_threads_at_once() -> None:
    class Blocking(MemoryStore):
        blocking = True

    with Blocking() as store:

        async def use(key: str) -> list[int]:
            heard = []
            for number in range(50):
                async with store.aio.watch(key) as watch:
                    await store.aio.set(key, number)
                    heard.append((await watch.aget()).value)
            return heard

        heard = at_once(*[lambda key=key: asyncio.run(use(key)) for key in "abcdef"])

        assert heard == [list(range(50))] * 6
        assert not store._hub.locked(lambda: store._hub.is_watched)


def test_a_child_forked_inside_a_commit_point_counts_on_from_that_commit(shared: MemoryStore) -> None:
    stored = (1, 1, None, 0.0, None, None, 1, float("inf"))
    shared._pending = (("a", stored, None, "set", False),)  # type: ignore[assignment]
    shared._live_on_in_child()
    watch = shared.watch("a")

    assert shared.set("a", 2) == 2
    assert watch.get_nowait() is not None
