"""Other libraries, each used as its documentation says, on what it can do.

They are imported when first opened; the extra `bench` installs them. A statement does the work of one time: it reads
the value out of what a peer returns, and writes a value that is new each time.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from threading import RLock
from typing import Any

from benchmarks.model import SMALL, Names, Subject

__all__ = ["MODULES", "PEERS", "is_installed"]

MODULES = {
    "cachetools": "cachetools",
    "LangGraph InMemoryStore": "langgraph.store.memory",
    "py-key-value MemoryStore": "key_value.aio.stores.memory",
    "blackboardx": "blackboard",
    "diskcache": "diskcache",
    "fakeredis": "fakeredis",
    "culsans": "culsans",
    "janus": "janus",
}
"""What to import, by the title of the peer."""


def is_installed(title: str) -> bool:
    try:
        return find_spec(MODULES[title]) is not None
    except ImportError:
        return False


def _few(put: Callable[[str, int], Any]) -> None:
    """The same keys in every store: 100 below `p/`, 900 others, and `key`."""
    for number in range(1000):
        put(f"{'p' if number < 100 else 'q'}/{number:04}", number)
    put("key", 1)


@contextmanager
def _cachetools() -> Iterator[Names]:
    cache = import_module("cachetools").LRUCache(maxsize=1 << 21)
    _few(cache.__setitem__)
    cache["small"] = SMALL
    yield {"cache": cache, "lock": RLock()}


@contextmanager
def _langgraph() -> Iterator[Names]:
    store = import_module("langgraph.store.memory").InMemoryStore()
    top = ("state",)
    _few(lambda key, number: store.put((*top, *key.split("/")[:-1]), key, {"value": number}))
    store.put(top, "small", SMALL)
    put_op = import_module("langgraph.store.base").PutOp
    yield {"store": store, "top": top, "PutOp": put_op}


@contextmanager
def _py_key_value() -> Iterator[Names]:
    store = import_module("key_value.aio.stores.memory").MemoryStore()

    async def fill() -> None:
        await store.put("key", {"value": 1})
        await store.put("small", SMALL)

    asyncio.run(fill())
    yield {"store": store}


@contextmanager
def _blackboardx() -> Iterator[Names]:
    blackboard = import_module("blackboard")
    board = blackboard.InMemoryStore()
    box: list[Any] = []
    model = blackboard.create_model(
        board_id="run",
        store=board,
        regions=[blackboard.Premise(name) for name in ("key", "small")],
        premises={"key": 1, "small": SMALL},
        agents=[blackboard.Agent(name="reader", notify=box.append)],
        limits=blackboard.RunLimits(wall_clock=timedelta(days=1), idle=timedelta(days=1)),
    )
    control = model.control
    control.ack(box.pop().notification_id, agent="reader")
    try:
        yield {"board": board, "control": control, "reader": model.reader, "box": box}
    finally:
        board.delete("run")


@contextmanager
def _diskcache() -> Iterator[Names]:
    with tempfile.TemporaryDirectory() as folder, import_module("diskcache").Cache(folder) as cache:
        cache["key"] = 1
        cache["small"] = SMALL
        yield {"cache": cache}


@contextmanager
def _fakeredis() -> Iterator[Names]:
    fakeredis = import_module("fakeredis")
    server = fakeredis.FakeServer()
    with fakeredis.FakeRedis(server=server) as redis, redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        _few(redis.set)
        redis.set("small", json.dumps(SMALL))
        pubsub.subscribe("key")
        pubsub.get_message()
        names = {"redis": redis, "aredis": fakeredis.FakeAsyncRedis(server=server), "pubsub": pubsub, "json": json}
        yield {**names}


@contextmanager
def _culsans() -> Iterator[Names]:
    queue = import_module("culsans").Queue()
    yield {"queue": queue.sync_q}


@contextmanager
def _janus() -> Iterator[Names]:
    queue = import_module("janus").Queue()
    yield {"queue": queue.sync_q}
    queue.close()


_VERSION = "version = board.read_premise('run', 'key').version"
_SET = "version = board.set('run', 'key', i, version).version"

PEERS = (
    Subject(
        "cachetools",
        "store",
        _cachetools,
        {
            "get": "with lock: cache.get('key')",
            "set": "with lock: cache['key'] = i",
            "delete": "with lock: cache['gone'] = i\nwith lock: del cache['gone']",
            "update": "with lock: cache['key'] = cache['key'] + 1",
            "commit of 10": "with lock:\n    for key in ten: cache[key] = i",
            "get of a small dict": "with lock: cache.get('small')",
            "set of a small dict": "with lock: cache['small'] = SMALL",
        },
        live=True,
        gives_up="an LRU cache with a lock around it, as its docs ask for; live objects, no revision, no watch",
    ),
    Subject(
        "LangGraph InMemoryStore",
        "store",
        _langgraph,
        {
            "get": "store.get(top, 'key').value['value']",
            "set": "store.put(top, 'key', {'value': i})",
            "delete": "store.put(top, 'gone', {'value': i})\nstore.delete(top, 'gone')",
            "commit of 10": "store.batch([PutOp(top, key, {'value': i}) for key in ten])",
            "scan": "[item.value['value'] for item in store.search(('state', 'p'), limit=100)]",
            "get of a small dict": "store.get(top, 'small').value",
            "set of a small dict": "store.put(top, 'small', SMALL)",
            "async get": "(await store.aget(top, 'key')).value['value']",
            "async set": "await store.aput(top, 'key', {'value': i})",
        },
        live=True,
        gives_up="keeps dicts only, so a scalar is wrapped in one; live objects, no lock, no revision, no watch",
    ),
    Subject(
        "py-key-value MemoryStore",
        "store",
        _py_key_value,
        {
            "get": "(await store.get('key'))['value']",
            "set": "await store.put('key', {'value': i})",
            "set with a ttl": "await store.put('key', {'value': i}, ttl=60)",
            "delete": "await store.put('gone', {'value': i})\nawait store.delete('gone')",
            "commit of 10": "await store.put_many(ten, [{'value': i}] * 10)",
            "get of a small dict": "await store.get('small')",
            "set of a small dict": "await store.put('small', SMALL)",
            "async get": "(await store.get('key'))['value']",
            "async set": "await store.put('key', {'value': i})",
        },
        gives_up="async only, so awaited in all rows; keeps dicts of JSON only, as text; no revision, no watch",
        notes={"commit of 10": "not atomic"},
    ),
    Subject(
        "blackboardx",
        "store",
        _blackboardx,
        {
            "get": "board.read_premise('run', 'key').value",
            "set": (_VERSION, _SET),
            "conditional set": (_VERSION, _SET),
            "get of a small dict": "board.read_premise('run', 'small').value",
            "set of a small dict": (
                _VERSION.replace("key", "small"),
                _SET.replace("key", "small").replace(" i,", " SMALL,"),
            ),
            "set and deliver": (
                _VERSION,
                "version = control.set_premise('key', i, version, writer='writer').version\n"
                "control.ack(box.pop().notification_id, agent='reader')\nreader.read_premise('key').value",
            ),
        },
        live=True,
        gives_up="its in-memory board, without the control around it: every write is conditional, keys are declared "
        "beforehand and cannot be deleted; live objects on the way out",
        notes={"set and deliver": "here with its control: a callback, an acknowledgement, and a read"},
    ),
    Subject(
        "diskcache",
        "store",
        _diskcache,
        {
            "get": "cache.get('key')",
            "set": "cache.set('key', i)",
            "set with a ttl": "cache.set('key', i, expire=60)",
            "delete": "cache.set('gone', i)\ncache.delete('gone')",
            "conditional set": (
                "cache.set('key', -1)",
                "with cache.transact():\n    assert cache.get('key') == i - 1\n    cache.set('key', i)",
            ),
            "update": "cache.incr('key')",
            "commit of 10": "with cache.transact():\n    for key in ten: cache.set(key, i)",
            "get of a small dict": "cache.get('small')",
            "set of a small dict": "cache.set('small', SMALL)",
        },
        gives_up="gives more: it keeps everything on disk, for several processes; no watch",
    ),
    Subject(
        "fakeredis",
        "store",
        _fakeredis,
        {
            "get": "redis.get('key')",
            "set": "redis.set('key', i)",
            "set with a ttl": "redis.set('key', i, ex=60)",
            "delete": "redis.set('gone', i)\nredis.delete('gone')",
            "conditional set": "with redis.pipeline() as pipe:\n"
            "    pipe.watch('key')\n    pipe.multi()\n    pipe.set('key', i)\n    pipe.execute()",
            "update": "redis.incr('key')",
            "commit of 10": "redis.mset(dict.fromkeys(ten, i))",
            "scan": "redis.mget(sorted(redis.scan_iter('p/*', count=2000)))",
            "get of a small dict": "json.loads(redis.get('small'))",
            "set of a small dict": "redis.set('small', json.dumps(SMALL))",
            "async get": "await aredis.get('key')",
            "async set": "await aredis.set('key', i)",
            "set and deliver": "redis.set('key', i)\nredis.publish('key', i)\npubsub.get_message()",
        },
        gives_up="a Redis for tests, on which redis-py works as usual; values are bytes",
        notes={"scan": "not one consistent picture", "set and deliver": "a message is lost when nobody listens"},
    ),
    Subject(
        "culsans",
        "queue",
        _culsans,
        {"set and deliver": "queue.put(i)\nqueue.get()"},
        gives_up="a queue for threads and tasks: keeps no state, and one reader gets each item",
    ),
    Subject(
        "janus",
        "queue",
        _janus,
        {"set and deliver": "queue.put(i)\nqueue.get()"},
        gives_up="a queue between threads and tasks of one loop: keeps no state, and one reader gets each item",
    ),
)
