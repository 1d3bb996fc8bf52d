"""Redis servers that want a password, refuse to write, or keep what somebody else has put there."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("redis")

import redis

from processes import PATIENCE, eventually
from redis_tools import OPERATIONS, NewServer, NewStore, State, ask, performed
from redis_tools import namespace as namespace
from redis_tools import new_redis as new_redis
from servers import REDIS62, VALKEY, Engine, Server, on_every_engine, started
from stigmergy import Compacted, DamagedValue, OutcomeUnknown, RevisionConflict, Set, Unavailable, open_store
from stigmergy.testing import Colour

# -- passwords, and servers that refuse --------------------------------------------------------------------------------


PASSWORD = "s3cret:/+@ %?"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a password, and a user with the same."""
    server = started(Server(VALKEY, tmp_path_factory.mktemp("guarded")))
    ask(server, "ACL", "SETUSER", "worker", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    ask(server, "CONFIG", "SET", "requirepass", PASSWORD)
    yield server
    server.kill()


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
@pytest.mark.parametrize("user", ["", "default", "worker"])
async def test_a_password_opens_a_server(
    guarded: Server, colour: Colour, namespace: str, scheme: str, user: str
) -> None:
    url = f"{scheme}://{user}:{quote(PASSWORD, safe='')}@127.0.0.1:{guarded.port}/0?namespace={namespace}"
    with open_store(url) as store:
        face = colour.face(store)
        watch = await face.watch("a")
        assert await face.set("a", 1) == 1
        assert (await colour.get(watch)).value == 1
        assert "s3cret" not in repr(store) + repr(face) + repr(watch)


def words(error: BaseException) -> str:
    """All that is ever printed of `error`."""
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each != "close"])
@pytest.mark.parametrize("user", ["", "worker", "nobody"])
async def test_a_wrong_password_is_unavailable_and_told_to_nobody(
    guarded: Server, colour: Colour, new_redis: NewStore, operation: str, user: str
) -> None:
    store = new_redis(url=f"redis://{user}:wr0ng%20w0rd@127.0.0.1:{guarded.port}/0")

    with pytest.raises(Unavailable, match=r"refused \(NOAUTH|WRONGPASS\)") as caught:
        await performed(store, operation)

    for secret in ("wr0ng", "w0rd", "s3cret"):
        assert secret not in words(caught.value) + repr(store)


async def test_no_password_where_one_is_needed_is_unavailable(
    guarded: Server, colour: Colour, new_redis: NewStore
) -> None:
    with pytest.raises(Unavailable, match="NOAUTH"):
        await new_redis(url=guarded.url).set("a", 1)


async def test_a_password_that_changes_meanwhile_silences_a_watch_only_until_it_is_back(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = new_server(VALKEY)
    ask(guarded, "CONFIG", "SET", "requirepass", PASSWORD)
    url = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{guarded.port}/0?client_name={namespace}"
    store = new_redis(url=url, namespace=namespace)
    watch = await store.watch("a")
    await store.set("a", 1)
    assert (await colour.get(watch)).value == 1
    with redis.Redis(port=guarded.port, password=PASSWORD) as admin:
        admin.config_set("requirepass", "another")
        admin.client_kill_filter(_type="normal", skipme=True)
        eventually(lambda: "watches hear nothing for now" in caplog.text)
        with pytest.raises(Unavailable):
            await store.set("a", 2)
        admin.config_set("requirepass", PASSWORD)

    assert await store.set("a", 3) == 2
    assert (await colour.get(watch, PATIENCE)).value == 3
    assert "s3cret" not in caplog.text


WRITES = ["set", "set if", "commit", "delete"]


@pytest.mark.parametrize("engine", [VALKEY, REDIS62], ids=lambda engine: engine.name)  # each says it in its own way
async def test_a_server_that_is_full_is_unavailable_and_has_changed_nothing(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str, engine: Engine
) -> None:
    server = new_server(engine)
    store = new_redis(url=server.url, namespace=namespace)
    watch = await store.watch(prefix="")
    await store.set("there", "value")
    ask(server, "CONFIG", "SET", "maxmemory", "1")

    for operation in WRITES:
        with pytest.raises(Unavailable, match="OOM"):
            await performed(store, operation)
    for operation in ("get", "entry", "scan", "watch"):
        await performed(store, operation)
    assert (await store.scan()).revision == 1
    ask(server, "CONFIG", "SET", "maxmemory", "0")

    assert await performed(store, "set") == 2
    assert [(await colour.get(watch)).revision for _ in range(2)] == [1, 2]


async def test_a_deadline_that_comes_due_while_a_server_is_full_is_made_a_change_later(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    server = new_server(VALKEY)
    store = new_redis(url=server.url, namespace=namespace)
    await store.set("a", 1, ttl=0.01)
    ask(server, "CONFIG", "SET", "maxmemory", "1")

    def is_refused() -> bool:
        try:
            return colour.raw(store).get_entry("a") is None
        except Unavailable as error:
            return "OOM" in str(error)

    eventually(is_refused)  # never a value beyond its deadline
    ask(server, "CONFIG", "SET", "maxmemory", "0")

    assert await store.get("a") is None
    since = await store.watch("a", since=1)
    change = await colour.get(since)
    assert (change.revision, change.expired, change.old_value) == (2, True, 1)


@on_every_engine
async def test_a_replica_is_read_and_refuses_writes(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str, engine: Engine
) -> None:
    # Else both look once in a second how far they are.
    at_once = {"repl-diskless-sync": "no", "repl-diskless-load": "swapdb"}
    primary, replica = (new_server(engine, options=at_once) for _ in range(2))
    writer = new_redis(url=primary.url, namespace=namespace)
    store = new_redis(url=replica.url, namespace=namespace)
    await writer.set("there", "value")
    ask(replica, "REPLICAOF", "127.0.0.1", str(primary.port))
    eventually(lambda: colour.raw(store).get("there") == "value")
    watch = await store.watch(prefix="")

    for operation in WRITES:
        with pytest.raises(Unavailable, match="READONLY"):
            await performed(store, operation)
    for operation in ("get", "entry", "scan", "watch"):
        await performed(store, operation)

    await writer.set("written", 7)
    assert (await colour.get(watch, PATIENCE)).value == 7


async def test_a_server_that_still_loads_its_data_is_unavailable_until_it_has(
    new_server: NewServer, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    slowly = {"key-load-delay": "30000", "loading-process-events-interval-bytes": "1024"}  # for half a minute
    server = new_server(VALKEY, save="3600 1", options=slowly)
    store = new_redis(url=server.url, namespace=namespace)
    watch = await store.watch("there")
    await store.set("there", "value")
    with redis.Redis.from_url(server.url) as client:
        client.mset({f"{number}": os.urandom(2000) for number in range(1000)})
        client.save()
    server.kill()
    told: set[str] = set()
    starting = threading.Thread(target=server.start)

    starting.start()
    while starting.is_alive():
        for call in (lambda: store.get("there"), lambda: store.set("there", 2, if_revision=0)):
            try:
                await call()
            except (Unavailable, OutcomeUnknown, RevisionConflict) as error:
                told |= {str(error)}
        if any("LOADING" in each for each in told):
            with suppress(redis.ConnectionError):  # it has loaded all, and goes on
                ask(server, "CONFIG", "SET", "key-load-delay", "0")
    starting.join(PATIENCE)

    assert any("LOADING" in each for each in told)
    assert await store.get("there") == "value"
    assert await store.set("there", "again") == 2
    assert [(await colour.get(watch)).value for _ in range(2)] == ["value", "again"]


# -- what others write there -------------------------------------------------------------------------------------------


def keys_of(namespace: str) -> dict[str, str]:
    return {name: f"{{{namespace}}}:{name}" for name in "vkdsm"}


JUNK = [
    b"",
    b"\x00\xff junk",
    b"1",
    b"1 1",
    b"1 1 0 - ",
    b'1 1 0 - ["json", null, null]\n{',
    b"-1 -1 -1 - []\n1",
    b"9" * 99,
]


@pytest.mark.parametrize("junk", JUNK, ids=str)
async def test_a_record_that_others_have_damaged_harms_its_key_only(
    redis_url: str, colour: Colour, new_redis: NewStore, namespace: str, junk: bytes
) -> None:
    store = new_redis(url=redis_url, namespace=namespace)
    watch, state = await store.watch(prefix="", capacity=None), State(colour, await store.observe("well"))
    await store.commit(Set("damaged", 1), Set("well", 1))
    assert [(await colour.get(watch)).key for _ in range(2)] == ["damaged", "well"]
    with redis.Redis.from_url(redis_url) as client:
        client.hset(keys_of(namespace)["v"], "damaged", junk)

    for read in (store.get, store.get_entry):
        with pytest.raises(DamagedValue) as caught:
            await read("damaged")
        assert caught.value.key == "damaged"
    snapshot = await store.scan()
    assert snapshot["well"].value == 1
    with pytest.raises(DamagedValue):
        snapshot["damaged"]
    assert await store.set("well", 2) == 3
    await state.becomes({"well": 2})
    assert (await colour.get(watch)).value == 2

    await store.set("damaged", 2)  # mends it

    with suppress(DamagedValue):
        assert (await colour.get(watch)).value == 2
    await store.set("damaged", 3)
    change = await colour.get(watch)
    assert (change.key, change.value, change.old_value) == ("damaged", 3, 2)


async def test_a_record_of_the_log_that_others_have_damaged_harms_one_delivery_only(
    redis_url: str, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    store = new_redis(url=redis_url, namespace=namespace)
    await store.commit(*(Set(f"{number}", number) for number in range(1, 8)))
    with redis.Redis.from_url(redis_url) as client:
        log = keys_of(namespace)["s"]
        records = client.xrange(log)
        client.delete(log)
        for number, (name, fields) in enumerate(records, start=1):
            planted: dict[Any, Any] = fields
            if number in (2, 4, 6):
                planted = {2: {b"x": b"y"}, 4: {**fields, b"n": b"\xff"}, 6: {**fields, b"k": b"\xff\xfe"}}[number]
            client.xadd(log, planted, id=name)
    watch = await store.watch(prefix="", since=0)

    told: list[Any] = []
    while len(told) < 7:
        try:
            told.append((await colour.get(watch)).value)
        except DamagedValue:
            told.append("damaged")

    assert told[0::2] == [1, 3, 5, 7]
    assert told[1] == told[3] == "damaged"
    await store.set("8", 8)
    assert (await colour.get(watch)).value == 8


@pytest.mark.parametrize("name", "vkdsm")
async def test_a_key_of_another_type_is_told_and_hangs_nobody(
    redis_url: str, colour: Colour, new_redis: NewStore, namespace: str, name: str
) -> None:
    store = new_redis(url=redis_url, namespace=namespace)
    await store.set("there", "value")
    with redis.Redis.from_url(redis_url) as client:
        client.set(keys_of(namespace)[name], "something else")

    for operation in OPERATIONS[:-1]:
        with suppress(Unavailable, OutcomeUnknown, Compacted, RevisionConflict):
            await performed(store, operation)
    with redis.Redis.from_url(redis_url) as client:
        client.delete(*keys_of(namespace).values())
    await store.set("there", "value")
    assert await store.get("there") == "value"
