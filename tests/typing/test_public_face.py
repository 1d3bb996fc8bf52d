"""What mypy --strict and pyright know of the public face. Running it shows that it is true as well."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, assert_type

from stigmergy import (
    AsyncStore,
    Call,
    Change,
    Check,
    ClaimLost,
    Commit,
    Compacted,
    Delete,
    Entry,
    Flow,
    GetEntry,
    Hooks,
    Lagged,
    MemoryStore,
    Middleware,
    Next,
    Op,
    OpenWatch,
    Operation,
    ProviderNotFound,
    RevisionConflict,
    Scan,
    Scope,
    Set,
    Sleep,
    Snapshot,
    StateError,
    Store,
    StoreFull,
    Unsupported,
    Watch,
    apply_middleware,
    compose_hooks,
    list_providers,
    open_async_store,
    open_store,
    scoped_key,
    with_hooks,
)


def test_a_store() -> None:
    with MemoryStore(history=16, copy=None, max_entries=10) as memory:
        assert_type(memory, MemoryStore)
    with open_store("memory") as store:
        assert_type(store, Store)
        assert_type(store.set("a", 1), int)
        assert_type(store.set("a", 1, if_revision=1, ttl="keep"), int)
        assert_type(store.set("a", 1, ttl=60), int)
        assert_type(store.get("a"), Any)
        assert_type(store.get("a", 7), Any)
        assert_type(store.get_entry("a"), Entry | None)
        assert_type(store.get_many(["a"]), dict[str, Any])
        assert_type(store.get_many(key for key in "a"), dict[str, Any])
        assert_type(store.scan("a", keys=None, after=None, limit=None), Snapshot)
        assert_type(store.commit(Set("b", 1), Check("a", 3), Delete("c")), tuple[int | None, ...])
        assert_type(store.update("a", lambda value: value + 1, default=0), Any)
        assert_type(store.wait_for("a", lambda value: value == 2, timeout=1), Entry)
        assert_type(store.watch("a", since=0, capacity=None, overflow="raise"), Watch)
        assert_type(store.observe(prefix="a"), Watch)
        assert_type(store.open_watch(OpenWatch(["a"])), Watch)
        assert_type(store.require("resumable"), Store)
        assert_type(store.delete("a", if_revision=None), bool)
        assert_type(store.capabilities, frozenset[str])
        assert_type(store.blocking, bool)
        assert_type(store.aio, AsyncStore)
        assert_type(store.aio.sync, Store)


def test_a_kind_of_store_stays_what_it_is() -> None:
    with MemoryStore() as store:
        assert_type(store.require("resumable"), MemoryStore)


def test_an_async_store() -> None:
    async def use() -> None:
        async with open_async_store("memory") as store:
            assert_type(store, AsyncStore)
            assert_type(await store.set("a", 1), int)
            assert_type(await store.get("a", 7), Any)
            assert_type(await store.get_entry("a"), Entry | None)
            assert_type(await store.get_many(["a"]), dict[str, Any])
            assert_type(await store.scan("a"), Snapshot)
            assert_type(await store.commit(Set("b", 1), Delete("c")), tuple[int | None, ...])
            assert_type(await store.update("a", lambda value: value + 1, default=0), Any)
            assert_type(await store.wait_for("a", lambda value: value == 2), Entry)
            assert_type(await store.watch("a", since=0, capacity=None, overflow="raise"), Watch)
            assert_type(await store.observe(prefix="a"), Watch)
            assert_type(await store.open_watch(OpenWatch(["a"])), Watch)
            async with store.observe("a") as observed:
                assert_type(observed, Watch)
            assert_type(store.require("resumable"), AsyncStore)
            assert_type(await store.delete("a"), bool)
            assert_type(store.sync, Store)

    asyncio.run(use())


def test_a_watch_in_a_thread() -> None:
    with MemoryStore() as store, store.watch("a") as watch:
        assert_type(watch, Watch)
        for number in range(4):
            store.set("a", number)
        assert_type(watch.get(timeout=1), Change)
        assert_type(watch.get_nowait(), Change | None)
        assert_type(next(watch), Change)
        assert_type(watch.map(lambda change: change), Watch)
        assert_type(watch.revision, int)
        assert_type(watch.bookmark, str)
        assert_type(watch.dropped, int)
        watch.close()
        for change in watch:
            assert_type(change, Change)


def test_a_watch_in_a_task() -> None:
    async def use() -> None:
        async with MemoryStore().aio as store, store.watch("a") as watch:
            assert_type(watch, Watch)
            for number in range(3):
                await store.set("a", number)
            assert_type(await anext(watch), Change)
            assert_type(await watch.aget(), Change)
            watch.close()
            async for change in watch:
                assert_type(change, Change)

    asyncio.run(use())


def test_what_travels() -> None:
    with MemoryStore() as store:
        store.set("a", 1)
        snapshot = store.scan()
        assert_type(snapshot["a"], Entry)
        assert_type(snapshot.revision, int)
        assert_type(snapshot.bookmark, str)
        for key, entry in snapshot.items():
            assert_type(key, str)
            assert_type(entry.value, Any)
            assert_type(entry.revision, int)
            assert_type(entry.writer, str | None)
            assert_type(entry.time, float)
            assert_type(entry.expires, float | None)
            assert_type(entry.meta, Mapping[str, str] | None)
        change = store.watch("a", since=0).get()
        assert_type(change.op, Op)
        assert_type(change.key, str)
        assert_type(change.value, Any)
        assert_type(change.old_value, Any)
        assert_type(change.revision, int)
        assert_type(change.old_revision, int)
        assert_type(change.commit, int)
        assert_type(change.writer, str | None)
        assert_type(change.time, float)
        assert_type(change.expired, bool)
        assert_type(change.missed, int)
        assert_type(change.meta, Mapping[str, str] | None)


def test_a_flow() -> None:
    def parse(text: str) -> int:
        return int(text)

    def everything() -> Flow[int]:
        assert_type((yield from GetEntry("a")), Entry | None)
        assert_type((yield from Scan("a")), Snapshot)
        assert_type((yield from Commit([Set("a", 1)])), tuple[int | None, ...])
        watch = yield from OpenWatch(["a"], since=0)
        assert_type(watch, Watch)
        assert_type((yield from Next(watch, timeout=1)), Change)
        yield from Sleep(0)
        number = yield from Call(parse, "7")
        assert_type(number, int)
        yield Sleep(0)
        return number

    def outer() -> Flow[str]:
        number = yield from everything()
        assert_type(number, int)
        return str(number)

    store = MemoryStore()
    assert_type(store.run(everything()), int)
    assert_type(store.run(outer()), str)

    async def use() -> None:
        assert_type(await store.aio.run(everything()), int)

    asyncio.run(use())


def test_middleware_and_hooks() -> None:
    def observe(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, GetEntry):
            assert_type(operation.key, str)
            assert_type((yield from operation), Entry | None)
        if isinstance(operation, Scan):
            assert_type(operation.keys, tuple[str, ...] | None)
        if isinstance(operation, Commit):
            assert_type(operation.writes, tuple[Set | Delete | Check, ...])
        if isinstance(operation, OpenWatch):
            assert_type(operation.prefix, str | None)
        return (yield operation)

    middleware: Middleware = observe
    hooks = Hooks(before_set=lambda key, value: None, on_error=(print, lambda error: None))

    assert_type(apply_middleware(MemoryStore(), middleware, with_hooks(hooks)), Store)
    assert_type(apply_middleware(MemoryStore().aio, middleware), AsyncStore)
    assert_type(compose_hooks(hooks, Hooks()), Hooks)
    assert apply_middleware(MemoryStore(), observe).get("a") is None


def test_names() -> None:
    assert_type(scoped_key(Scope.AGENT, "counter", owner="planner"), str)
    assert_type(list_providers(), list[str])


def test_errors_know_their_facts() -> None:
    conflict = RevisionConflict("a", 1, 2)
    assert_type(conflict.key, str)
    assert_type(conflict.expected, int)
    assert_type(conflict.actual, int)
    assert_type(Lagged(3).missed, int)
    assert_type(Compacted("x.1", 3).since, int | str)
    assert_type(Compacted(1, 3).oldest, int)
    assert_type(ClaimLost("a", "planner", 7).token, int)
    assert_type(ProviderNotFound("x", ()).known, tuple[str, ...])
    assert_type(StoreFull(3).max_entries, int)
    assert_type(Unsupported("durable").capability, str)
    error: StateError = conflict
    assert isinstance(error, Exception)


def test_a_provider_of_ones_own_keeps_the_contract() -> None:
    class Relay(Store):
        def __init__(self, store: Store) -> None:
            self.store = store

        def get_entry(self, key: str) -> Entry | None:
            return self.store.get_entry(key)

        def scan(
            self,
            prefix: str = "",
            *,
            keys: Iterable[str] | None = None,
            after: str | None = None,
            limit: int | None = None,
        ) -> Snapshot:
            return self.store.scan(prefix, keys=keys, after=after, limit=limit)

        def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
            return self.store.commit(*writes)

        def open_watch(self, request: OpenWatch) -> Watch:
            return self.store.open_watch(request)

        def close(self) -> None:
            self.store.close()

    with Relay(MemoryStore()) as store:
        assert_type(store, Relay)
        assert store.set("a", 1) == 1


if TYPE_CHECKING:
    # What must not pass: mypy complains about a `type: ignore` that ignores nothing.

    def wrong(store: Store, async_store: AsyncStore, entry: Entry, write: Set, operation: GetEntry) -> None:
        store.set(1, 1)  # type: ignore[arg-type]
        store.set("a", 1, 60)  # type: ignore[call-arg]
        store.set("a", 1, ttl="forever")  # type: ignore[arg-type]
        store.commit("a")  # type: ignore[arg-type]
        store.watch("a", overflow="block")  # type: ignore[arg-type]
        store.scan("a", None)  # type: ignore[call-arg]
        store.aio.set("a", 1) + 1  # type: ignore[operator]
        entry.value = 1  # type: ignore[misc]
        write.key = "b"  # type: ignore[misc]
        Hooks(print)  # type: ignore[call-arg]
        Hooks(before_everything=print)  # type: ignore[call-arg]
        apply_middleware("memory")  # type: ignore[call-overload]
        apply_middleware(store, print)  # type: ignore[arg-type]
        Store()  # type: ignore[abstract]

    async def wrong_colour(store: AsyncStore) -> None:
        with store:  # type: ignore[attr-defined]
            pass
        async with store.sync:  # type: ignore[attr-defined]
            pass
        store.watch("a").get_nowait()  # type: ignore[attr-defined]
        with store.watch("a"):  # type: ignore[attr-defined]
            pass
