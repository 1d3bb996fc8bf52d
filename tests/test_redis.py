"""The Redis provider on real servers, which die, come back, lose their past and refuse, and over a network that fails."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self, TypeVar
from weakref import ref

import pytest

pytest.importorskip("redis")

import redis
from proxy import Blackhole, Cut, Delay, Dribble, HalfClose, Mode, Pass, Proxy, Reset, Stall
from servers import REDIS62, VALKEY, Server, free_ports

from stigmergy import (
    Change,
    Check,
    Compacted,
    DamagedValue,
    Delete,
    Flow,
    Op,
    OpenWatch,
    OutcomeUnknown,
    RevisionConflict,
    Set,
    StateError,
    Store,
    StoreClosed,
    Unavailable,
    Watch,
    WatchClosed,
    open_store,
)
from stigmergy.flow import Sleep
from stigmergy.providers.redis import RedisStore
from stigmergy.testing import Colour, check_linearizable, check_revisions
from stigmergy.testing.history import Client, Invocation
from stigmergy.testing.laws import check_log, check_observe, check_watch
from stigmergy.testing.traffic import all_at_once

T = TypeVar("T")
NewServer = Callable[..., Server]
NewStore = Callable[..., Any]

EVERYTHING = OpenWatch(prefix="")
LATEST = OpenWatch(prefix="", latest=True)
SLOW = [pytest.mark.slow, pytest.mark.timeout(300)]

both_colours = pytest.mark.parametrize("name", ["sync", "async"])


@pytest.fixture
def namespace() -> str:
    return os.urandom(6).hex()


@pytest.fixture
def new_store(colour: Colour) -> Iterator[NewStore]:
    """`new_store(url=..., namespace=...)`: a store in this colour, closed afterwards."""
    with colour.stores(RedisStore) as new:
        yield new


def eventually(condition: Callable[[], T], seconds: float = 10) -> T:
    """What `condition` returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.003)
    return result


def log_of(url: str, namespace: str) -> list[Change]:
    """Every change since the first, as a store that was not there reads them."""
    with RedisStore(url, namespace=namespace) as store:
        return list(iter(store.watch(prefix="", since=0, capacity=None).get_nowait, None))


def drain(watch: Watch) -> list[Change]:
    return list(iter(watch.get_nowait, None))


def named(url: str, name: str) -> str:
    """The URL for connections that the server knows by that name."""
    return f"{url}?client_name={name}"


def connections(url: str, name: str) -> list[dict[str, str]]:
    """What the server says of the connections of that name."""
    with redis.Redis.from_url(url) as client:
        return [each for each in client.client_list() if each["name"] == name]


def is_blocked(url: str, name: str) -> bool:
    """Whether a reader of that name waits for something to happen."""
    return any("b" in each["flags"] for each in connections(url, name))


# -- servers that die --------------------------------------------------------------------------------------------------


class Traffic:
    """Clients, in either colour, that call a store without end, whatever becomes of the server."""

    def __init__(self, name: str, store: Store, clients: int = 4) -> None:
        self.clients = [Client(store if name == "sync" else store.aio, number, []) for number in range(clients)]
        self.failures = [0] * clients
        self.keys: list[str] = []
        self._store = store
        self._stopped = False
        run = self._run_in_threads if name == "sync" else self._run_in_tasks
        self._thread = threading.Thread(target=run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()

    @property
    def history(self) -> list[Invocation]:
        return [call for client in self.clients for call in client.history]

    def have_answers(self, number: int, seconds: float = 10) -> None:
        """Wait until each client had so many more answers."""
        before = [len(client.history) for client in self.clients]
        eventually(lambda: all(len(c.history) >= n + number for c, n in zip(self.clients, before, strict=True)), seconds)

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

    def consume() -> None:
        delivered.extend(watch)

    async def consume_async() -> None:
        async for change in watch:
            delivered.append(change)

    thread = threading.Thread(target=consume if name == "sync" else lambda: asyncio.run(consume_async()))
    thread.start()
    try:
        yield delivered
    finally:
        watch.close()
        thread.join(timeout=10)
        assert not thread.is_alive()


@both_colours
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=SLOW)])
def test_a_server_killed_under_traffic_loses_nothing_and_no_watch_misses_anything(
    new_server: NewServer, namespace: str, name: str, kills: int
) -> None:
    server = new_server(VALKEY, appendonly=True)
    options = {"namespace": namespace, "history": 10_000_000, "timeout": 2.0}
    with RedisStore(server.url, **options) as store, RedisStore(server.url, **options) as other:
        read, unread = store.watch(prefix="", capacity=None), other.watch(prefix="", capacity=None)
        observed, unobserved = store.observe(prefix=""), other.observe(prefix="")
        late: list[Change] = []
        late_states: list[Change] = []
        traffic = Traffic(name, store)

        def is_told(head: int) -> bool:
            return read.revision >= head and observed.revision >= head and other._hub.revision >= head

        with consumed(name, read) as changes, consumed(name, observed) as states:
            traffic.keys = ["start"]
            with traffic:
                for number in range(kills):
                    # An unknown write may happen at any later time: keys of its own keep each round judgeable.
                    traffic.keys = [f"{number}/{each}" for each in "abc"]
                    traffic.have_answers(40)
                    late += drain(unread)
                    late_states += drain(unobserved)
                    server.kill()
                    traffic.have_failed()
                    server.start()
                    traffic.have_answers(10, seconds=10)
                    head = other.scan(limit=1).revision
                    eventually(lambda head=head: is_told(head), seconds=10)
                    with redis.Redis.from_url(server.url) as client:
                        assert client.info("stats")["total_connections_received"] <= 20
            head = other.scan(limit=1).revision
            eventually(lambda: is_told(head))
        late += drain(unread)
        late_states += drain(unobserved)
        log = drain(other.watch(prefix="", since=0, capacity=None))

    history = traffic.history
    assert any(call.outcome == "unknown" for call in history) or kills < 20
    assert check_linearizable(history) == []
    assert check_revisions(history) == []
    assert check_log(log) == []
    assert len(log) == head
    assert check_watch(changes, log, EVERYTHING, since=0, until=head) == []
    assert check_watch(late, log, EVERYTHING, since=0, until=head) == []
    assert check_observe(states, log, LATEST) == []
    assert check_observe(late_states, log, LATEST) == []


def is_told_by(watch: Watch, revision: int) -> Callable[[], bool]:
    return lambda: watch.revision >= revision


@pytest.mark.parametrize("engine", [VALKEY, REDIS62], ids=lambda engine: engine.name)
async def test_a_plain_restart_continues_the_same_life(
    new_server: NewServer, colour: Colour, new_store: NewStore, namespace: str, engine: Any
) -> None:
    server = new_server(engine, appendonly=True)
    store = new_store(url=server.url, namespace=namespace)
    watch = store.watch(prefix="", capacity=None)
    observe = store.observe("a")
    assert await store.set("a", 0) == 1
    bookmark = (await store.scan()).bookmark

    for number in range(1, 4):
        server.restart()
        assert await store.set("a", number) == number + 1
        assert (await store.scan()).bookmark == bookmark.replace(".1", f".{number + 1}")

    assert [(await colour.get(watch)).revision for _ in range(4)] == [1, 2, 3, 4]
    assert watch.bookmark == bookmark.replace(".1", ".4")
    while (await colour.get(observe)).value != 3:
        pass
    since = store.watch(prefix="", since=bookmark)
    assert [(await colour.get(since)).value for _ in range(3)] == [1, 2, 3]


async def test_a_watch_hears_of_a_server_that_was_away_though_nobody_else_asks_it(
    new_server: NewServer, colour: Colour, new_store: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY, appendonly=True)
    store = new_store(url=server.url, namespace=namespace)
    watch = store.watch("a")
    await store.set("a", 1)
    assert (await colour.get(watch)).value == 1
    server.restart()

    with RedisStore(server.url, namespace=namespace) as other:
        other.set("a", 2)

    assert (await colour.get(watch, timeout=10)).value == 2


# -- servers that lose their past --------------------------------------------------------------------------------------


def flush(server: Server) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


async def ended(colour: Colour, watch: Watch, seconds: float = 10) -> Compacted:
    """How `watch` ends after all that it has buffered."""
    with pytest.raises(Compacted) as caught:
        while True:
            await colour.get(watch, seconds)
    return caught.value


async def test_after_an_emptied_server_revisions_go_on_above_all_seen(
    new_server: NewServer, colour: Colour, new_store: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY)
    store = new_store(url=server.url, namespace=namespace)
    watch, observe = store.watch(prefix=""), store.observe(prefix="")
    for number in range(5):
        await store.set("a", number)
    await store.set("b", 0)
    bookmark = (await store.scan()).bookmark
    for _ in range(6):
        await colour.get(watch)
    eventually(lambda: observe.reached >= 6 if hasattr(observe, "reached") else True)
    seen = {change.key: change async for change in states_until(colour, observe, "b")}
    flush(server)

    assert await store.set("c", 1) == 7

    compacted = await ended(colour, watch)
    assert compacted.since == bookmark
    assert compacted.oldest == 7
    left = {change.key: change async for change in states_until(colour, observe, "b")}
    assert set(seen) == {"a", "b"}
    assert {key: change.op for key, change in left.items()} | {"c": Op.SET} == {"a": "delete", "b": "delete", "c": "set"}
    assert left["b"].old_value == 0
    with pytest.raises(Compacted) as caught:
        await opened(store.watch(prefix="", since=bookmark))
    assert (caught.value.since, caught.value.oldest) == (bookmark, 7)
    assert dict((await store.scan()).items()).keys() == {"c"}
