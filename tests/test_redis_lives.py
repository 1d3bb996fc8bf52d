"""Redis servers that die and come back, with all they had or less, and what becomes of calls and watches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Self

import pytest

pytest.importorskip("redis")

import redis

from processes import PATIENCE, eventually
from proxy import Pass, Proxy, Reset
from redis_tools import NewServer, NewStore, State, both_colours, drain, ended, named, unblock
from redis_tools import namespace as namespace
from redis_tools import new_redis as new_redis
from servers import VALKEY, Engine, Server, on_every_engine
from stigmergy import Change, Check, Compacted, Delete, Flow, OpenWatch, RevisionConflict, Set, Store, Watch
from stigmergy.flow import Sleep
from stigmergy.providers.redis import RedisStore
from stigmergy.testing import Colour, check_linearizable, check_revisions
from stigmergy.testing.history import Client, Invocation
from stigmergy.testing.laws import check_log, check_observe, check_watch
from stigmergy.testing.traffic import all_at_once

EVERYTHING = OpenWatch(prefix="")
LATEST = OpenWatch(prefix="", latest=True)


# -- servers that die --------------------------------------------------------------------------------------------------


class Traffic:
    """Clients, in either colour, that call a store without end, whatever becomes of the server."""

    def __init__(self, name: str, store: Store, clients: int = 4) -> None:
        self.clients = [Client(store if name == "sync" else store.aio, number, []) for number in range(clients)]
        self.failures = [0] * clients
        self.keys = ["before"]
        self._store = store
        self._stopped = False
        run = self._run_in_threads if name == "sync" else self._run_in_tasks
        self._thread = threading.Thread(target=run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    @property
    def history(self) -> list[Invocation]:
        return [call for client in self.clients for call in client.history]

    def have_answers(self, number: int) -> None:
        """Wait until each client had so many more answers."""
        before = [len(client.history) for client in self.clients]
        eventually(lambda: all(len(c.history) >= n + number for c, n in zip(self.clients, before, strict=True)))

    def have_failed(self) -> None:
        """Wait until each client has met the failure that there is now."""
        before = self.failures.copy()
        eventually(lambda: all(now > then for now, then in zip(self.failures, before, strict=True)))

    def _call(self, client: Client) -> Flow[None]:
        calls = 0
        while not self._stopped:
            known, calls = len(client.history), calls + 1
            yield from client.traffic(self.keys, 1, calls)
            if len(client.history) == known or client.history[-1].outcome == "unknown":
                self.failures[client.number] += 1
                yield from Sleep(0.02)

    def _run_in_threads(self) -> None:
        all_at_once([lambda client=client: self._store.run(self._call(client)) for client in self.clients])

    def _run_in_tasks(self) -> None:
        async def run() -> None:
            await asyncio.gather(*(self._store.aio.run(self._call(client)) for client in self.clients))

        asyncio.run(run())


@contextmanager
def consumed(name: str, watch: Watch) -> Iterator[list[Change]]:
    """What `watch` delivers to somebody who always waits for the next change; closes it at the end."""
    delivered: list[Change] = []

    async def consume() -> None:
        async for change in watch:
            delivered.append(change)  # noqa: PERF401 - somebody else reads on

    def run() -> None:
        delivered.extend(watch) if name == "sync" else asyncio.run(consume())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield delivered
    finally:
        watch.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def forget_connections(server: Server) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_resetstat()


def connections_received(server: Server) -> int:
    """Since they were forgotten."""
    with redis.Redis.from_url(server.url) as client:
        received: int = client.info("stats")["total_connections_received"]
        return received


@both_colours
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_server_killed_under_traffic_loses_nothing_and_no_watch_misses_anything(
    new_server: NewServer, namespace: str, name: str, kills: int
) -> None:
    server = new_server(VALKEY, appendonly=True)
    options = {"namespace": namespace, "history": 10_000_000, "timeout": PATIENCE}
    with (
        Proxy(server.port) as proxy,
        RedisStore(server.url, **options) as store,
        RedisStore(f"redis://127.0.0.1:{proxy.port}", **options) as other,
    ):
        traffic = Traffic(name, store)
        read, observed = store.watch(prefix="", capacity=None), store.observe(prefix="")
        unread, unobserved = other.watch(prefix="", capacity=None), other.observe(prefix="")
        late: list[Change] = []
        late_states: list[Change] = []

        def are_told(head: int) -> bool:
            return read.revision >= head and observed.revision >= head and other._hub.revision >= head

        with consumed(name, read) as changes, consumed(name, observed) as states:
            with traffic:
                for number in range(kills):
                    # An unknown write may happen at any later time: with keys of its own each round can be judged.
                    traffic.keys = [f"{number}/{each}" for each in "abc"]
                    traffic.have_answers(40)
                    late += drain(unread)
                    late_states += drain(unobserved)
                    connected, began = proxy.connections, monotonic()
                    server.kill()
                    traffic.have_failed()
                    server.start()
                    forget_connections(server)
                    traffic.have_answers(10)
                    head = store.scan(limit=1).revision
                    eventually(partial(are_told, head))
                    assert connections_received(server) <= 60
                    # Of a reader, when the server was down and afterwards: without pauses it would be hundreds.
                    assert proxy.connections - connected <= 20 + 5 * (monotonic() - began)
            head = store.scan(limit=1).revision
            eventually(partial(are_told, head))
        late += drain(unread)
        late_states += drain(unobserved)
        log = drain(other.watch(prefix="", since=0, capacity=None))

    history = traffic.history
    assert kills < 20 or any(call.outcome == "unknown" for call in history)
    assert check_linearizable(history) == []
    assert check_revisions(history) == []
    assert check_log(log) == []
    assert len(log) == head
    assert check_watch(changes, log, EVERYTHING, since=0, until=head) == []
    assert check_watch(late, log, EVERYTHING, since=0, until=head) == []
    assert check_observe(states, log, LATEST) == []
    assert check_observe(late_states, log, LATEST) == []


@on_every_engine
async def test_a_plain_restart_continues_the_same_life(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str, engine: Engine
) -> None:
    server = new_server(engine, appendonly=True)
    store = new_redis(url=server.url, namespace=namespace)
    watch = await store.watch(prefix="", capacity=None)
    observe = await store.observe("a")
    assert await store.set("a", 0) == 1
    bookmark = (await store.scan()).bookmark

    for number in range(1, 3):
        server.restart()
        assert await store.set("a", number) == number + 1
        assert (await store.scan()).bookmark == bookmark.replace(".1", f".{number + 1}")

    assert [(await colour.get(watch, PATIENCE)).revision for _ in range(3)] == [1, 2, 3]
    assert watch.bookmark == bookmark.replace(".1", ".3")
    while (await colour.get(observe, PATIENCE)).value != 2:
        pass
    since = await store.watch(prefix="", since=bookmark)
    assert [(await colour.get(since)).value for _ in range(2)] == [1, 2]


async def test_a_watch_hears_of_a_server_that_was_away_though_nobody_else_asks_it(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY, appendonly=True)
    store = new_redis(url=server.url, namespace=namespace)
    watch = await store.watch("a")
    await store.set("a", 1)
    assert (await colour.get(watch)).value == 1
    server.restart()

    with RedisStore(server.url, namespace=namespace) as other:
        other.set("a", 2)

    assert (await colour.get(watch, PATIENCE)).value == 2


# -- servers that lose their past --------------------------------------------------------------------------------------


def flush(server: Server) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


async def test_after_an_emptied_server_revisions_go_on_above_all_seen_and_watches_are_told(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY)
    store = new_redis(url=server.url, namespace=namespace)
    watch = await store.watch(prefix="")
    state = State(colour, await store.observe(prefix=""))
    for number in range(5):
        await store.set("a", number)
    await store.set("b", 0)
    bookmark = (await store.scan()).bookmark
    for _ in range(6):
        await colour.get(watch)
    await state.becomes({"a": 4, "b": 0})
    flush(server)

    assert await store.set("c", 1) == 7

    compacted = await ended(colour, watch)
    assert (compacted.since, compacted.oldest) == (bookmark, 7)
    await state.becomes({"c": 1})
    assert dict((await store.scan()).items()).keys() == {"c"}
    for since in (bookmark, 5):
        with pytest.raises(Compacted) as caught:
            await colour.get(await store.watch(prefix="", since=since))
        assert (caught.value.since, caught.value.oldest) == (since, 7)
    assert await store.set("a", 5, if_revision=0) == 8
    await state.becomes({"a": 5, "c": 1})


@pytest.mark.parametrize("waits", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["unblocked", "waits"])
async def test_an_emptied_server_is_noticed_though_nobody_writes_any_more(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str, waits: bool
) -> None:
    server = new_server(VALKEY)
    store = new_redis(url=named(server.url, namespace), namespace=namespace)
    watch = await store.watch("a", "b")
    state = State(colour, await store.observe(prefix=""))
    await store.commit(Set("a", 1), Set("b", 2))
    await state.becomes({"a": 1, "b": 2})
    flush(server)
    if not waits:
        unblock(server.url, namespace)

    await state.becomes({})

    compacted = await ended(colour, watch)
    assert compacted.oldest == 3
    assert await store.set("a", 2) == 3
    await state.becomes({"a": 2})


def set_back(server: Server, copy: bytes) -> None:
    """Start the server with what it had once."""
    server.kill()
    (server.folder / "dump.rdb").write_bytes(copy)
    server.start()


def saved(server: Server) -> bytes:
    """What the server has now."""
    with redis.Redis.from_url(server.url) as client:
        client.save()
    return (server.folder / "dump.rdb").read_bytes()


@on_every_engine
async def test_a_server_set_back_to_an_older_copy_begins_a_new_life_with_what_it_has(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str, engine: Engine
) -> None:
    server = new_server(engine, save="3600 1")
    store = new_redis(url=server.url, namespace=namespace)
    watch = await store.watch(prefix="")
    state = State(colour, await store.observe(prefix=""))
    await store.commit(Set("kept", 1), Set("changed", 1), Set("deleted", 1))
    copy = saved(server)
    await store.commit(Set("changed", 2), Delete("deleted"), Set("new", 1))
    bookmark = (await store.scan()).bookmark
    await state.becomes({"kept": 1, "changed": 2, "new": 1})
    for _ in range(6):
        await colour.get(watch)
    set_back(server, copy)

    await state.becomes({"kept": 1, "changed": 1, "deleted": 1})

    compacted = await ended(colour, watch)
    assert (compacted.since, compacted.oldest) == (bookmark, 7)
    with pytest.raises(Compacted):
        await colour.get(await store.watch(prefix="", since=bookmark))
    assert await store.set("changed", 3, if_revision=2) == 7
    await state.becomes({"kept": 1, "changed": 3, "deleted": 1})


async def test_a_server_set_back_and_written_past_what_was_seen_is_found_out_by_another_record(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY, save="3600 1")
    with Proxy(server.port) as proxy:
        store = new_redis(url=f"redis://127.0.0.1:{proxy.port}", namespace=namespace)
        watch = await store.watch(prefix="")
        state = State(colour, await store.observe(prefix=""))
        await store.set("a", 1)
        copy = saved(server)
        await store.commit(Set("a", 2), Set("b", 2))
        bookmark = (await store.scan()).bookmark
        await state.becomes({"a": 2, "b": 2})
        for _ in range(3):
            await colour.get(watch)
        proxy.mode = Reset()
        set_back(server, copy)
        with RedisStore(server.url, namespace=namespace) as other:  # it knows of nothing that was lost
            assert [other.set("c", number) for number in range(2, 10)] == [*range(2, 10)]
        proxy.mode = Pass()

        await state.becomes({"a": 1, "c": 9})

        compacted = await ended(colour, watch)
        assert compacted.since == bookmark
        assert compacted.oldest == 10
        with pytest.raises(Compacted):
            await colour.get(await store.watch(prefix="", since=bookmark))
        assert await store.set("c", 10, if_revision=9) == 10
        await state.becomes({"a": 1, "c": 10})


async def test_what_was_read_in_a_lost_life_is_no_condition_in_another(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY)
    store = new_redis(url=server.url, namespace=namespace)
    await store.set("a", "mine")
    entry = await store.get_entry("a")
    flush(server)
    with RedisStore(server.url, namespace=namespace) as other:  # it knows of nothing that was lost
        assert other.set("a", "of somebody else") == entry.revision

    with pytest.raises(RevisionConflict):
        await store.set("a", "mine again", if_revision=entry.revision)

    assert await store.get("a") == "of somebody else"
    assert await store.update("a", lambda value: [value]) == ["of somebody else"]
    assert await store.set("a", 3, if_revision=2) == 3
    assert await store.set("b", 4, if_revision=0) == 4


async def test_what_a_store_has_read_first_of_all_is_no_condition_in_another_life(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY)
    with RedisStore(server.url, namespace=namespace) as other:
        other.set("a", "read")
    store = new_redis(url=server.url, namespace=namespace)
    entry = await store.get_entry("a")
    flush(server)
    with RedisStore(server.url, namespace=namespace) as other:
        assert other.set("a", "of somebody else") == entry.revision

    with pytest.raises(RevisionConflict):
        await store.set("a", "because of what was there", if_revision=entry.revision)

    assert await store.get("a") == "of somebody else"


async def test_what_was_read_and_then_lost_is_no_condition_on_a_server_set_back(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY, save="3600 1")
    store = new_redis(url=server.url, namespace=namespace)
    await store.set("a", 1)
    copy = saved(server)
    assert await store.set("a", "mine") == 2
    set_back(server, copy)
    with RedisStore(server.url, namespace=namespace) as other:
        assert other.set("a", "of somebody else") == 2

    with pytest.raises(RevisionConflict):
        await store.commit(Check("a", 2), Set("b", "because of what was there"))

    assert await store.get("a") == "of somebody else"
    assert await store.get("b") is None
    assert await store.update("a", lambda value: [value]) == ["of somebody else"]


# -- the end of memory -------------------------------------------------------------------------------------------------


async def test_a_watch_goes_on_from_the_oldest_moment_that_is_remembered_and_from_none_before(
    redis_url: str, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    store = new_redis(url=redis_url, namespace=namespace, history=100)
    for _ in range(10):
        await store.commit(*(Set(f"{number}", number) for number in range(100)))
    await store.delete("0")
    head = (await store.scan()).revision
    with pytest.raises(Compacted) as caught:
        await colour.get(await store.watch(prefix="", since=0))
    oldest = caught.value.oldest

    assert 100 <= head - oldest + 1 <= 300
    for since in (oldest - 1, oldest, head - 1):
        watch = await store.watch(prefix="", since=since, capacity=None)
        told = [(await colour.get(watch)).revision for _ in range(head - since)]
        assert told == [*range(since + 1, head + 1)]
    for since in (oldest - 2, 1, head + 1, head + 1000):
        with pytest.raises(Compacted) as caught:
            await colour.get(await store.watch(prefix="", since=since))
        assert (caught.value.since, caught.value.oldest) == (since, oldest)
    now = await store.watch(prefix="", since=head)
    assert await store.set("a", 1) == head + 1
    assert (await colour.get(now)).revision == head + 1


async def test_a_watch_that_was_cut_off_for_longer_than_is_remembered_is_told(
    valkey: Server, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    with Proxy(valkey.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        store = new_redis(url=url, namespace=namespace, history=100, timeout=PATIENCE)
        watch, state = await store.watch(prefix=""), State(colour, await store.observe("a", "b", "c"))
        await store.commit(Set("a", 0), Set("b", 0))
        await state.becomes({"a": 0, "b": 0})
        assert [(await colour.get(watch)).revision for _ in range(2)] == [1, 2]
        bookmark = watch.bookmark
        proxy.mode = Reset()
        with RedisStore(valkey.url, namespace=namespace, history=100) as other:
            other.delete("b")
            for number in range(1000):
                other.set("a" if number % 2 else "c", number)
        proxy.mode = Pass()

        await state.becomes({"a": 999, "c": 998})

        compacted = await ended(colour, watch)
        assert compacted.since == bookmark
        assert compacted.oldest > 3
        await store.set("a", "new")
        await state.becomes({"a": "new", "c": 998})
