"""The Redis provider on real servers: closing, threads, loops, processes, and where its keys are."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import pytest

pytest.importorskip("redis")

import redis
from redis.crc import key_slot

from processes import PATIENCE, Link, Start, eventually
from proxy import Blackhole, Delay, Proxy
from redis_tools import (
    NewServer,
    NewStore,
    connections,
    is_blocked,
    log_of,
    named,
    run_python,
    told_until,
)
from redis_tools import namespace as namespace
from redis_tools import new_redis as new_redis
from servers import VALKEY, Engine, Server, on_every_engine
from stigmergy import Change, Set, Store, StoreClosed, Unavailable, Watch, open_store
from stigmergy.providers import _reader
from stigmergy.providers._engine import Place
from stigmergy.providers.redis import RedisEngine, RedisStore
from stigmergy.testing import Colour
from stigmergy.testing.laws import check_log
from stigmergy.testing.traffic import all_at_once

# -- closing -----------------------------------------------------------------------------------------------------------


@contextmanager
def watching(colour: Colour, url: str, namespace: str) -> Iterator[tuple[Any, list[threading.Thread]]]:
    """A store with watches that somebody waits for, and whose reader waits as well."""
    store = RedisStore(named(url, namespace), namespace=namespace, timeout=1000)
    face = colour.face(store)
    watches = [store.watch("a"), store.watch(prefix=""), store.observe("a")]
    threads = [threading.Thread(target=list, args=[watch]) for watch in watches]
    for thread in threads:
        thread.start()
    try:
        yield face, threads
    finally:
        store.close()
        for thread in threads:
            thread.join(PATIENCE)


def while_waiting(server: Server, proxy: Proxy, store: RedisStore) -> None:
    """The reader waits for something to happen."""


def while_nothing_gets_through(server: Server, proxy: Proxy, store: RedisStore) -> None:
    proxy.mode = Blackhole()


def while_asking(server: Server, proxy: Proxy, store: RedisStore) -> None:
    """The reader has asked for the log, and gets no answer."""
    with redis.Redis.from_url(server.url) as client:
        ids = [each["id"] for each in client.client_list() if "b" in each["flags"]]
        unblock = "".join(f"CLIENT UNBLOCK {each}\r\n" for each in ids)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(f"{unblock}CLIENT PAUSE 1000000 ALL\r\n".encode())
            eventually(lambda: not store._reader._transport._waiting)


def while_connecting(server: Server, proxy: Proxy, store: RedisStore) -> None:
    """The reader connects, and the other side accepts that and says nothing."""
    proxy.mode = Blackhole()
    connected = proxy.connections
    proxy.drop_all()
    eventually(lambda: proxy.connections > connected)


def while_the_server_is_down(server: Server, proxy: Proxy, store: RedisStore) -> None:
    connected = proxy.connections
    server.kill()
    eventually(lambda: proxy.connections > connected + 2)


MOMENTS = [while_waiting, while_nothing_gets_through, while_asking, while_connecting, while_the_server_is_down]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
async def test_close_waits_for_no_timeout_and_wakes_who_waits(
    new_server: NewServer, colour: Colour, namespace: str, moment: Callable[..., None]
) -> None:
    server = new_server(VALKEY)
    with Proxy(server.port) as proxy, watching(colour, f"redis://127.0.0.1:{proxy.port}", namespace) as (face, threads):
        await face.set("b", 1)
        eventually(lambda: is_blocked(server.url, namespace))
        moment(server, proxy, colour.raw(face))

        await face.close()  # a timeout takes longer than this test may

        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        with pytest.raises(StoreClosed):
            await face.get("a")
        proxy.close()  # lets the reader end, else each further call waits for it a little
        await face.close()


async def test_a_store_that_is_dropped_ends_its_thread_and_closes_its_connections(
    valkey: Server, colour: Colour, namespace: str
) -> None:
    async def use_and_drop() -> tuple[ref[Store], int]:
        store = RedisStore(named(valkey.url, namespace), namespace=namespace)
        face = colour.face(store)
        watch = await face.watch("a")
        await face.set("a", 1)
        assert (await colour.get(watch)).value == 1
        assert connections(valkey.url, namespace)
        assert store._reader._thread in sys._current_frames()
        return ref(store), store._reader._thread

    with pytest.warns(ResourceWarning, match="unclosed <RedisStore"):  # noqa: PT031
        dropped, reader = await use_and_drop()
        gc.collect()
    if colour.name == "async":
        await asyncio.sleep(0)  # a loop closes its connections itself

    assert dropped() is None
    eventually(lambda: reader not in sys._current_frames())  # before another thread has the same number
    if colour.name == "sync":
        eventually(lambda: connections(valkey.url, namespace) == [])
    else:
        await asyncio.to_thread(eventually, lambda: connections(valkey.url, namespace) == [])


def test_a_watch_keeps_its_store_alive_and_nothing_else_does(valkey: Server, namespace: str) -> None:
    store: RedisStore | None = RedisStore(named(valkey.url, namespace), namespace=namespace)
    assert store is not None
    dropped = ref(store)
    watch: Watch | None = store.watch("a")
    store = None
    gc.collect()
    with RedisStore(valkey.url, namespace=namespace) as other:
        other.set("a", 1)
    assert watch is not None
    assert watch.get(timeout=PATIENCE).value == 1
    assert dropped() is not None

    with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031
        watch = None
        gc.collect()

    assert dropped() is None
    eventually(lambda: connections(valkey.url, namespace) == [])


async def test_a_reader_that_nobody_needs_any_more_rests_and_comes_back(
    valkey: Server, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    store = new_redis(url=named(valkey.url, namespace), namespace=namespace)
    for number in range(2):
        watch = await store.watch("a")
        await store.set("a", number)
        assert (await colour.get(watch)).value == number
        eventually(lambda: is_blocked(valkey.url, namespace))
        watch.close()
        await store.set("a", "unseen")  # which wakes the reader

        eventually(lambda: not is_blocked(valkey.url, namespace))
        eventually(lambda: colour.raw(store)._reader._transport is None)


def test_a_server_may_be_away_for_as_long_as_it_likes(valkey: Server, namespace: str) -> None:
    with RedisStore(valkey.url, namespace=namespace) as store:
        reader = store._reader
        for failures in (1, 10, 1_000, 1_000_000):
            reader._pauses.put(None)  # so that the pause is none
            reader._fail(Unavailable("away"), failures)


# -- event loops -------------------------------------------------------------------------------------------------------


def test_one_store_serves_loops_one_after_the_other_and_each_closes_its_connections(
    redis_url: str, namespace: str
) -> None:
    with RedisStore(named(redis_url, namespace), namespace=namespace) as store:

        async def use(number: int, watch: Watch | None) -> Watch:
            watch = watch or await store.aio.watch("a")
            await asyncio.gather(*(store.aio.set("a", f"{number}/{each}") for each in range(5)))
            values = {(await watch.aget()).value for _ in range(5)}
            assert values == {f"{number}/{each}" for each in range(5)}
            assert 1 < len(await asyncio.to_thread(connections, redis_url, namespace)) <= 7
            return watch

        watch = None
        for number in range(3):
            watch = asyncio.run(use(number, watch))
            # what is left is of the reader, and of who opened the watch
            eventually(lambda: len(connections(redis_url, namespace)) <= 2)


def test_one_store_serves_loops_and_threads_side_by_side(redis_url: str, namespace: str) -> None:
    with RedisStore(named(redis_url, namespace), namespace=namespace) as store:

        def in_thread(number: int) -> None:
            for each in range(40):
                revision = store.set(f"{number}", each)
                assert store.get_entry(f"{number}")[:2] == (each, revision)
                store.update("sum", lambda value: value + 1, default=0)

        async def task(number: str) -> None:
            for each in range(10):
                revision = await store.aio.set(number, each)
                assert (await store.aio.get_entry(number))[:2] == (each, revision)
                await store.aio.update("sum", lambda value: value + 1, default=0)

        async def in_tasks(number: int) -> None:
            await asyncio.gather(*(task(f"{number}/{each}") for each in range(4)))

        watch = store.watch(prefix="", capacity=None)
        threads = [partial(in_thread, number) for number in range(2)]
        all_at_once([*threads, *(lambda number=number: asyncio.run(in_tasks(number)) for number in (2, 3))])

        assert store.get("sum") == 160
        eventually(lambda: len(connections(redis_url, namespace)) <= 4)
        log = told_until(watch, store.scan().revision)
        assert check_log(log) == []
        assert len(log) == 320


async def test_a_hundred_tasks_share_so_many_connections(valkey: Server, namespace: str) -> None:
    with Proxy(valkey.port) as proxy:
        url = named(f"redis://127.0.0.1:{proxy.port}", namespace)
        async with RedisStore(url, namespace=namespace).aio as store:
            proxy.mode = Delay(0.001, 0.01)
            revisions = await asyncio.gather(*(store.set(f"{number}", number) for number in range(100)))
            values = await asyncio.gather(*(store.get(f"{number}") for number in range(100)))

            assert sorted(revisions) == [*range(1, 101)]
            assert values == [*range(100)]
            assert 2 <= len(await asyncio.to_thread(connections, valkey.url, namespace)) <= 32
            assert proxy.connections <= 32


# -- several processes -------------------------------------------------------------------------------------------------


def compete(link: Link, url: str, namespace: str, number: int, keys: int, expiring: int) -> None:
    """Give `keys` keys deadlines, and say of all that expire, `expiring`, how that was told here."""
    draw = random.Random(number)
    with RedisStore(url, namespace=namespace) as store:
        watch = store.watch(prefix="", capacity=None)
        link.say("ready")
        link.hear()
        for key in range(keys):
            store.set(f"{number}/{key}", "early", ttl=draw.uniform(0, 0.1) if key % 4 else 1000)
            if key % 4 == 0:
                store.set(f"{number}/{key}", "late", ttl=draw.uniform(0, 0.1))
        expired: list[Change] = []
        while len(expired) < expiring:
            change = watch.get(timeout=PATIENCE)
            expired += [change] if change.expired else []
        link.say(expired)


@pytest.mark.parametrize(("processes", "keys"), [(3, 20), pytest.param(5, 100, marks=pytest.mark.slow)])
def test_processes_that_compete_make_each_deadline_one_change_that_all_of_them_see(
    redis_url: str, namespace: str, start: Start, processes: int, keys: int
) -> None:
    expiring = processes * keys
    children = [start(compete, redis_url, namespace, number, keys, expiring) for number in range(processes)]
    for child in children:
        assert child.hear() == "ready"

    with RedisStore(redis_url, namespace=namespace) as store:
        watch = store.watch(prefix="", capacity=None)
        for child in children:
            child.say("go")
        told = [child.hear() for child in children]
        log = log_of(redis_url, namespace)
        assert told_until(watch, len(log)) == log

    expired = [change for change in log if change.expired]
    assert check_log(log) == []
    assert Counter(each.key for each in expired) == {f"{n}/{key}": 1 for n in range(processes) for key in range(keys)}
    assert [each.old_value == "late" for each in expired] == [int(e.key.split("/")[1]) % 4 == 0 for e in expired]
    assert told == [expired] * processes


def test_deadlines_become_changes_in_their_order(redis_url: str, namespace: str) -> None:
    draw = random.Random(namespace)
    with RedisStore(redis_url, namespace=namespace) as store:
        watch = store.watch(prefix="", capacity=None)
        store.commit(*(Set(f"{number}", number, ttl=draw.uniform(0, 0.2)) for number in range(200)))
        expired: list[Change] = []
        while len(expired) < 200:
            change = watch.get(timeout=PATIENCE)
            expired += [change] if change.expired else []

    with redis.Redis.from_url(redis_url) as client:
        logged = [fields for _, fields in client.xrange(f"{{{namespace}}}:s", count=200)]
    deadlines = {fields[b"k"].decode(): int(fields[b"n"].split(b" ")[3]) / 1e6 for fields in logged}
    assert [change.key for change in expired] == sorted(deadlines, key=lambda key: (deadlines[key], key))
    assert min(change.time - deadlines[change.key] for change in expired) >= 0


def test_who_waits_for_the_next_change_waits_no_longer_than_to_the_next_deadline(
    valkey: Server, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[int, float]] = []

    def noted(engine: RedisEngine, place: Place, seconds: float, wait: Any = RedisEngine.wait) -> Any:
        waits.append((place.revision, seconds))
        return wait(engine, place, seconds)

    monkeypatch.setattr(RedisEngine, "wait", noted)
    monkeypatch.setattr(_reader, "_LONGEST_WAIT", 4 * PATIENCE)
    with RedisStore(valkey.url, namespace=namespace) as store:
        watch = store.watch(prefix="")
        store.commit(Set("soon", 1, ttl=2 * PATIENCE), Set("late", 1, ttl=3 * PATIENCE))
        eventually(lambda: any(revision == 2 for revision, _ in waits))
        watch.close()

    assert all(PATIENCE < seconds <= 2 * PATIENCE for revision, seconds in waits if revision == 2)


# -- fork --------------------------------------------------------------------------------------------------------------


FORKING = """
import asyncio, json, os, sys, threading, traceback, warnings
from stigmergy.providers.redis import RedisStore

warnings.simplefilter("ignore", DeprecationWarning)  # that a fork beside threads may hang; here it may not
url, namespace, patience = sys.argv[1:]
store = RedisStore(url, namespace=namespace)
store.aio  # its module is imported before anybody forks in the midst of that
watch = store.watch(prefix="", capacity=None)
stopped, counts, wrong = threading.Event(), [0] * 5, []

def use(number):
    while not stopped.is_set():
        counts[number] += 1
        store.set(f"{number}", f"{number} {counts[number]}")
        if store.get(f"{number}") != f"{number} {counts[number]}":
            wrong.append(number)

async def use_in_loop(number):
    while not stopped.is_set():
        counts[number] += 1
        await store.aio.set(f"{number}", f"{number} {counts[number]}")
        if await store.aio.get(f"{number}") != f"{number} {counts[number]}":
            wrong.append(number)

def run_loop():
    async def both():
        await asyncio.gather(use_in_loop(2), use_in_loop(3))
    asyncio.run(both())

def crowd():  # so that there are idle connections
    together = threading.Barrier(8)
    def meet():
        together.wait()
        store.get("absent")
    crowd = [threading.Thread(target=meet) for _ in range(8)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()

def be_child(name):
    list(watch)  # the parent's has ended here
    mine = store.watch(name)
    for number in range(30):
        store.set(name, number)
        assert store.get(name) == number
        assert mine.get(timeout=float(patience)).value == number
    async def again():
        for number in range(30, 60):
            await store.aio.set(name, number)
            assert await store.aio.get(name) == number
            assert (await mine.aget()).value == number
    asyncio.run(again())
    store.close()

threads = [threading.Thread(target=each) for each in (lambda: use(0), lambda: use(1), run_loop)]
for thread in threads:
    thread.start()
children = []
for number in range(3):
    crowd()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            be_child(f"child {number}")
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    children.append(child)
statuses = []
for child in children:
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        counts[4] += 1
        store.set("4", f"4 {counts[4]}")
        if store.get("4") != f"4 {counts[4]}":
            wrong.append(4)
    statuses.append(ended[1])
stopped.set()
for thread in threads:
    thread.join()
head = store.set("last", "value")
seen = []
while not seen or seen[-1] < head:
    seen.append(watch.get(timeout=float(patience)).revision)
store.close()
print(json.dumps([statuses, wrong, seen == list(range(1, head + 1)), sum(counts)]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_and_their_parent_go_on_apart(valkey: Server, namespace: str) -> None:
    url = named(valkey.url, namespace)

    statuses, wrong, complete, written = run_python(FORKING, url, namespace, str(PATIENCE))

    assert (statuses, wrong, complete) == ([0] * 3, [], True)
    log = log_of(valkey.url, namespace)
    assert check_log(log) == []
    assert len(log) == written + 3 * 60 + 1
    for child in range(3):
        assert [change.value for change in log if change.key == f"child {child}"] == [*range(60)]
    eventually(lambda: connections(valkey.url, namespace) == [])


# -- where it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["redis://h?histroy=1000", "valkey://h/0?x=", "redis://h?retry_on_error=1"])
def test_an_option_that_nobody_knows_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match=r"has no option '(histroy|x|retry_on_error)' in its URL"):
        open_store(url)


def test_options_may_be_in_the_url(valkey: Server, namespace: str) -> None:
    with open_store(f"valkey://127.0.0.1:{valkey.port}?namespace={namespace}&history=100&timeout=2.5") as store:
        store.set("a", 1)
        assert repr(store) == f"<RedisStore 127.0.0.1:{valkey.port}/0, namespace {namespace!r}>"
    with RedisStore(valkey.url, namespace=namespace) as same:
        assert same.get("a") == 1


ODD = ["a", "a b", "ä✓🐜", "*?[]", "x" * 300, "%7B", "a:b", "$1", "\\", "'\""]


def use_all_keys(url: str, namespace: str) -> list[bytes]:
    """Those that the server then has for the namespace."""
    with redis.Redis.from_url(url) as client, RedisStore(url, namespace=namespace) as store:
        watch = store.watch("a")
        store.commit(Set("a", 1, ttl=1000), Set("b", 2))
        assert watch.get(timeout=PATIENCE).value == 1
        assert dict(store.get_many(["a", "b"])) == {"a": 1, "b": 2}
        keys = [key for key in client.keys("*") if key.startswith(f"{{{namespace}}}:".encode())]
    assert len(keys) == 5
    return keys


def test_all_keys_of_a_namespace_share_a_slot(valkey: Server, namespace: str) -> None:
    slots = {odd: {*map(key_slot, use_all_keys(valkey.url, odd + namespace))} for odd in ODD}
    assert {odd: len(each) for odd, each in slots.items()} == dict.fromkeys(ODD, 1)
    assert len(set(map(frozenset, slots.values()))) > 5


@pytest.mark.slow  # a cluster serves after two seconds
@on_every_engine
def test_a_cluster_serves_a_store(new_server: NewServer, engine: Engine) -> None:
    server = new_server(engine, options={"cluster-enabled": "yes"})
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        eventually(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))
    for odd in ODD:
        use_all_keys(server.url, odd)


@pytest.mark.parametrize("namespace", ["", "a}", "{a", "a\n", "a\x7f"])
def test_a_namespace_that_would_not_stay_in_its_slot_is_refused(namespace: str) -> None:
    with pytest.raises(ValueError, match="a namespace"):
        RedisStore(namespace=namespace)


async def test_namespaces_do_not_see_each_other(
    redis_url: str, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    one, other = (new_redis(url=redis_url, namespace=f"{namespace}{end}") for end in ("", ":"))
    watch, observe = await other.watch(prefix=""), await other.observe(prefix="")
    await one.commit(Set("a", 1), Set("b", 2, ttl=0.01))
    eventually(lambda: colour.raw(one).get("b") is None)

    assert await other.get("a") is None
    assert list(await other.scan()) == []
    assert await other.delete("a") is False
    assert await other.set("c", 3) == 1
    assert (await colour.get(watch)).key == "c"
    assert (await colour.get(observe)).key == "c"
    assert list(await one.scan()) == ["a"]
