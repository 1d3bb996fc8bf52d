"""What stores that keep a log promise where threads meet at the worst moment: between two looks at the log.

Over SQLite, which needs no server, unless it is about Redis itself.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import pickle
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import pytest

from processes import PATIENCE, Link, Start, eventually
from servers import Server
from stigmergy import Change, Compacted, MemoryStore, Op, OpenWatch, Set, Store, Unavailable, Watch
from stigmergy.codec import JSON
from stigmergy.hub import Hub
from stigmergy.providers import _reader, _sqlite_file
from stigmergy.providers._log import Past
from stigmergy.providers.sqlite import SQLiteStore
from stigmergy.testing import VirtualClock
from test_strikes import interrupt, places_in, strike

BEYOND_HISTORY = 300
"""Commits after which a log of 100 has forgotten what was before them."""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a file that may be replaced: each request looks whether it was."""
    monkeypatch.setattr(_sqlite_file, "_LOOK_EVERY", 0.0)
    return tmp_path / "state.db"


@contextmanager
def held(store: SQLiteStore) -> Iterator[Callable[[], None]]:
    """The reader of `store` gets no turn until what this yields is called."""
    reader: Any = store._reader
    read, came, go = reader._read, threading.Event(), threading.Event()

    def wait_and_read(transport: Any) -> Any:
        came.set()
        assert go.wait(PATIENCE)
        return read(transport)

    def release() -> None:
        reader._read = read
        go.set()

    reader._read = wait_and_read
    try:
        eventually(lambda: (store._transport.interrupt(), came.is_set())[1])
        yield release
    finally:
        release()


def when_its_past_is_fetched(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` when the next watch to be opened knows what it begins with, and was not opened yet."""
    run, left = store._run, [act]

    def run_and_act(flow: Any) -> Any:
        result = run(flow)
        if isinstance(result, Past) and left:
            left.pop()()
        return result

    monkeypatch.setattr(store, "_run", run_and_act)


def emptied(path: Path) -> None:
    """Another life: the file is gone, all parts of it at once, and the next one who comes makes a new one."""
    path.parent.rename(path.parent.with_name(uuid4().hex))
    path.parent.mkdir()


def sql(path: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement).fetchall()


def watched(store: SQLiteStore) -> bool:
    return store._hub.locked(lambda: store._hub.is_watched)


def drained(watch: Watch) -> list[Change]:
    return list(iter(watch.get_nowait, None))


def compacted(watch: Watch) -> Compacted:
    """How it ends, whatever it delivers before."""
    try:
        while True:
            watch.get(timeout=PATIENCE)
    except Compacted as error:
        return error


def converges(watch: Watch, state: dict[str, Any], truth: Callable[[], dict[str, Any]]) -> bool:
    """Whether `state`, with what `watch` has told since, is what there is."""
    for change in drained(watch):
        state.pop(change.key, None)
        if change.op is Op.SET:
            state[change.key] = change.value
    return state == truth()


def values(store: Store) -> dict[str, Any]:
    return {key: entry.value for key, entry in store.scan().items()}


def write_beyond_history(store: Store, key: str) -> int:
    return [store.set(key, number) for number in range(BEYOND_HISTORY)][-1]


# -- a watch that is being opened --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["observe", "since"])
def test_a_gap_while_a_watch_is_being_opened_is_told_or_bridged(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with SQLiteStore(path, history=100) as store, SQLiteStore(path, history=100) as other:
        store.set("a", "before")
        keep = store.observe("keep")
        with held(store) as release:

            def forget_what_it_begins_with() -> None:
                head = write_beyond_history(other, "a")
                release()
                eventually(lambda: store._hub.revision >= head)

            bookmark = other.scan().bookmark
            when_its_past_is_fetched(store, monkeypatch, forget_what_it_begins_with)
            if kind == "since":
                with pytest.raises(Compacted):
                    drained(store.watch("a", since=bookmark))
            else:
                state: dict[str, Any] = {}
                watch = store.observe("a")
                eventually(lambda: converges(watch, state, lambda: values(other)))
                other.set("a", "after")
                assert watch.get(timeout=PATIENCE).value == "after"
        keep.close()


def test_an_observer_that_joins_between_the_look_for_observers_and_the_restart_converges(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, go = threading.Event(), threading.Event()
    locked = Hub.locked

    def locked_when_told(hub: Hub, function: Callable[..., Any], *args: Any) -> Any:
        if hub is store._hub and function.__name__ == "restart":
            looked.set()
            assert go.wait(PATIENCE)
        return locked(hub, function, *args)

    def begin_another_life() -> None:
        emptied(path)
        with SQLiteStore(path) as other:
            other.set("a", "second life")
        eventually(lambda: (store._transport.interrupt(), looked.is_set())[1])

    with SQLiteStore(path) as store:
        store.commit(Set("a", "first life"), Set("gone", "first life"))
        keep = store.observe("a")
        keep.get(timeout=PATIENCE)
        store.set("a", "first life, as the reader tells: it has opened the file")
        keep.get(timeout=PATIENCE)
        monkeypatch.setattr(Hub, "locked", locked_when_told)
        when_its_past_is_fetched(store, monkeypatch, begin_another_life)
        try:
            watch, state = store.observe("a", "gone"), dict[str, Any]()
        finally:
            go.set()

        eventually(lambda: converges(watch, state, lambda: values(store)))
        assert state == {"a": "second life"}
        keep.close()


def test_a_watch_opened_in_a_new_life_before_the_reader_noticed_it_hears_what_follows(path: Path) -> None:
    with SQLiteStore(path) as store:
        keep = store.watch("other")
        store.set("a", "first life")
        with held(store):
            emptied(path)
            snapshot = store.scan()
            watch, since = store.watch("a"), store.watch("a", since=snapshot.bookmark)
            bookmark = watch.bookmark
            store.set("a", "second life")

        assert watch.get(timeout=PATIENCE).value == "second life"
        assert since.get(timeout=PATIENCE).value == "second life"
        assert bookmark == snapshot.bookmark
        assert store.watch("a", since=bookmark).get(timeout=PATIENCE).value == "second life"
        compacted(keep)


class Readers:
    """The threads that read logs, each from before it starts until it has ended."""

    def __init__(self) -> None:
        self._start = _reader.start_new_thread
        self._alive: SimpleQueue[None] = SimpleQueue()

    @property
    def alive(self) -> int:
        return self._alive.qsize()

    def start(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._alive.put(None)
        self._start(self._run, (function, args))

    def _run(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        finally:
            self._alive.get()


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Readers:
    readers = Readers()
    monkeypatch.setattr(_reader, "start_new_thread", readers.start)
    return readers


def test_wherever_an_interrupt_strikes_the_opening_of_a_watch_nothing_is_left_of_it(
    path: Path, readers: Readers
) -> None:
    with SQLiteStore(path) as store:
        store.set("a", 0)

        def open_and_drop() -> None:
            store.observe("a")

        def nothing_is_left() -> bool:
            store._transport.interrupt()
            return not watched(store) and readers.alive == 0

        open_and_drop()
        eventually(nothing_is_left)
        for place in places_in(open_and_drop):
            eventually(nothing_is_left)  # so that a reader is started again
            with suppress(KeyboardInterrupt):
                strike(open_and_drop, place, interrupt)
            gc.collect(0)
        eventually(nothing_is_left)

        watch = store.watch("a")
        revisions = [store.set("a", number) for number in range(20)]
        assert [watch.get(timeout=PATIENCE).revision for _ in revisions] == revisions
        assert readers.alive == 1


def test_an_interrupt_while_the_reader_is_started_makes_no_second_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_new_thread, go, ended = _reader.start_new_thread, threading.Event(), threading.Event()

    def start_and_be_struck(function: Callable[..., object], args: tuple[Any, ...]) -> None:
        def run_when_told() -> None:
            assert go.wait(PATIENCE)
            function(*args)
            ended.set()

        start_new_thread(run_when_told, ())
        raise KeyboardInterrupt

    with SQLiteStore(path) as store, SQLiteStore(path) as other:
        monkeypatch.setattr(_reader, "start_new_thread", start_and_be_struck)
        with pytest.raises(KeyboardInterrupt):
            store.watch("a")
        monkeypatch.setattr(_reader, "start_new_thread", start_new_thread)
        watch = store.watch("a")
        go.set()

        assert ended.wait(PATIENCE)
        revisions = [other.set("a", number) for number in range(20)]
        assert [watch.get(timeout=PATIENCE).revision for _ in revisions] == revisions


def open_a_watch_and_fork(link: Link, path: Path) -> None:
    store: Any = SQLiteStore(path)
    opening, go = threading.Event(), threading.Event()
    open_watch = store.open_watch

    def open_when_told(request: OpenWatch) -> Watch:
        opening.set()
        assert go.wait(PATIENCE)
        return open_watch(request)

    async def watch() -> None:
        async with store.aio.watch("a"):
            pass

    async def read() -> Any:
        return await store.aio.get("a", "nothing")

    store.open_watch = open_when_told
    thread = threading.Thread(target=lambda: asyncio.run(watch()))
    thread.start()
    assert opening.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE))
        os._exit(0 if asyncio.run(read()) == "nothing" else 1)
    status = os.waitpid(child, 0)[1]
    go.set()
    thread.join(PATIENCE)
    store.close()
    link.say(os.waitstatus_to_exitcode(status))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_forked_while_a_thread_opens_a_watch_has_an_async_face_that_works(path: Path, start: Start) -> None:
    assert start(open_a_watch_and_fork, path).hear() == 0


# -- the reader --------------------------------------------------------------------------------------------------------


def test_a_reader_that_notices_first_that_all_is_gone_goes_on_above_what_its_process_has_seen(path: Path) -> None:
    with SQLiteStore(path) as store:
        watch = store.watch("a")
        first_life = store._hub.epoch
        with held(store):
            seen = [store.set("a", "first life") for _ in range(50)][-1]
            emptied(path)
        eventually(lambda: (store._transport.interrupt(), store._hub.epoch != first_life)[1])

        with SQLiteStore(path) as other:
            assert other.set("a", "second life") > seen
        assert compacted(watch).since.startswith(first_life)


def test_a_hole_in_the_log_is_compacted_for_who_comes_back(path: Path) -> None:
    with SQLiteStore(path) as store:
        for number in range(10):
            store.set("a", number)
        sql(path, "DELETE FROM log WHERE revision BETWEEN 4 AND 6")
        with pytest.raises(Compacted):
            store.watch("a", since=0)


def test_a_hole_in_the_log_ends_watches_and_the_reader_goes_on_behind_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SQLiteStore(path) as store:
        watch, observer, state = store.watch("a"), store.observe("a"), dict[str, Any]()
        with held(store):
            for number in range(10):
                store.set("a", number)
            sql(path, "DELETE FROM log WHERE revision BETWEEN 4 AND 6")
        compacted(watch)
        eventually(lambda: converges(observer, state, lambda: values(store)))

        restarted: list[object] = []
        restart = Hub.restart
        monkeypatch.setattr(Hub, "restart", lambda *args: (restarted.append(args), restart(*args))[1])
        watch = store.watch("a")
        store.set("a", "behind it")
        assert watch.get(timeout=PATIENCE).value == "behind it"
        assert restarted == []


def test_the_reader_rests_when_nobody_watches_although_others_write_on(
    path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SQLiteStore(path) as store, SQLiteStore(path) as other:
        log, looked = store._log.engine.log, threading.Event()

        def log_with_more_in_it(*args: Any) -> Any:
            other.set("b", 1)
            looked.set()
            return log(*args)

        watch = store.watch("a")
        assert readers.alive == 1
        monkeypatch.setattr(store._log.engine, "log", log_with_more_in_it)
        eventually(lambda: (other.set("b", 1), looked.is_set())[1])
        watch.close()

        eventually(lambda: (other.set("b", 1), readers.alive == 0)[1])


def test_what_is_gone_after_a_gap_is_told_in_the_order_of_keys(path: Path) -> None:
    keys = [f"key {number}" for number in range(10)]
    with SQLiteStore(path, history=100) as store, SQLiteStore(path, history=100) as other:
        other.commit(*[Set(key, 1) for key in keys])
        watch = store.observe(prefix="")
        assert [change.key for change in drained(watch)] == keys
        with held(store):
            for key in reversed(keys):
                other.delete(key)
            head = write_beyond_history(other, "other")
        eventually(lambda: watch.revision >= head or store._hub.revision >= head)

        assert [change.key for change in drained(watch) if change.op is Op.DELETE] == keys


def raise_instead(record: logging.LogRecord) -> bool:
    raise RuntimeError("the filter of a program")


def test_a_logging_filter_that_raises_does_not_silence_the_watches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLiteStore(path) as other:
        store = SQLiteStore(path)  # closed only where it can be: this is about a thread that has died
        watch = store.watch("a")
        log, failed = store._log.engine.log, threading.Event()

        def log_that_fails_once(*args: Any) -> Any:
            if not failed.is_set():
                failed.set()
                raise Unavailable("for once")
            return log(*args)

        logger = logging.getLogger("stigmergy")
        logger.addFilter(raise_instead)
        try:
            monkeypatch.setattr(store._log.engine, "log", log_that_fails_once)
            eventually(lambda: (store._transport.interrupt(), failed.is_set())[1])
            revision = other.set("a", 1)
            assert watch.get(timeout=PATIENCE).revision == revision
        finally:
            logger.removeFilter(raise_instead)
        store.close()


def test_a_store_is_closed_soon_although_its_reader_hangs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SQLiteStore(path)
    watch = store.watch("a")
    log, hangs, go = store._log.engine.log, threading.Event(), threading.Event()

    def log_that_hangs(*args: Any) -> Any:
        hangs.set()
        go.wait()
        return log(*args)

    monkeypatch.setattr(store._log.engine, "log", log_that_hangs)
    eventually(lambda: (store._transport.interrupt(), hangs.is_set())[1])
    clock, asked = VirtualClock(), list[float]()

    class Moment:
        """A lock that nobody releases: what it is asked to wait passes at once, by the clock."""

        def acquire(self, timeout: float = 0.0) -> None:
            asked.append(timeout)
            clock.advance(timeout)

    monkeypatch.setattr(_reader, "allocate_lock", Moment)
    monkeypatch.setattr(_reader, "monotonic", clock)
    closer = threading.Thread(target=store.close)
    closer.start()
    try:
        closer.join(PATIENCE)
        assert not closer.is_alive()
        assert 0 < sum(asked) < 1.0
        assert list(watch) == []
    finally:
        go.set()
        closer.join(PATIENCE)


# -- the file ----------------------------------------------------------------------------------------------------------


def use_short_leases(store: Store, reads: bool) -> None:
    """Leases that are over at once, and expire by the next read, or by the next write."""
    for number in range(400):
        store.set("lease", number, ttl=1e-6)
        if reads:
            store.get_entry("lease")


@pytest.mark.parametrize("reads", [True, False])
def test_short_leases_leave_few_more_records_than_are_remembered(path: Path, reads: bool) -> None:
    with SQLiteStore(path, history=100) as store:
        use_short_leases(store, reads)

        assert sql(path, "SELECT count(*) FROM log")[0][0] < 200


@pytest.mark.parametrize("reads", [True, False])
def test_short_leases_keep_the_write_ahead_log_short(path: Path, monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    monkeypatch.setattr(_sqlite_file, "_CHECKPOINT_BYTES", 1 << 18)
    with SQLiteStore(path, history=100) as store:
        use_short_leases(store, reads)

        assert os.stat(f"{path}-wal").st_size < 2 << 20


def test_what_a_signal_handler_lets_escape_leaves_no_connection_in_a_transaction(path: Path) -> None:
    with SQLiteStore(path) as store:
        operate = partial(store.set, "a", 1)
        operate()
        refused = 0
        for place in places_in(operate):
            try:
                strike(operate, place, lambda: store.set("inner", 1))
            except Unavailable:
                refused += 1
            assert not any(connection.in_transaction for connection in store._transport._idle), place
        assert refused
        with SQLiteStore(path, timeout=PATIENCE) as other:
            other.set("a", 2)


# -- what is given out, and what is asked ------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [lambda path: MemoryStore(), SQLiteStore], ids=["memory", "sqlite"])
def test_a_snapshot_says_that_it_cannot_be_copied_or_pickled(path: Path, new: Callable[[Path], Store]) -> None:
    with new(path) as store:
        store.set("a", 1)
        snapshot = store.scan()
        for each in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"Snapshot .* take dict\(snapshot\)"):
                each(snapshot)
        assert pickle.loads(pickle.dumps(dict(snapshot)))["a"].value == 1


def test_a_limit_beyond_what_sqlite_can_count_to_is_none(path: Path) -> None:
    with SQLiteStore(path) as store:
        store.set("a", 1)
        assert list(store.scan(limit=2**64)) == ["a"]


@pytest.mark.parametrize("moment", [2**70, "{epoch}.1000000000000000000000000000000"])
def test_a_moment_beyond_what_sqlite_can_count_to_is_compacted(path: Path, moment: int | str) -> None:
    with SQLiteStore(path) as store:
        epoch, _, _ = store.scan().bookmark.partition(".")
        with pytest.raises(Compacted):
            store.watch("a", since=moment.format(epoch=epoch) if isinstance(moment, str) else moment)


@pytest.mark.parametrize("limit", [sys.maxsize, 2**64])
def test_a_limit_beyond_what_redis_can_count_to_is_none(valkey: Server, limit: int) -> None:
    redis = pytest.importorskip("stigmergy.providers.redis")
    with redis.RedisStore(valkey.url, namespace=os.urandom(6).hex()) as store:
        store.set("a", 1)
        assert list(store.scan(limit=limit)) == ["a"]


@pytest.fixture(params=["sqlite", "redis"])
def new_store(request: pytest.FixtureRequest, path: Path) -> Callable[..., Store]:
    """A function that makes a store over an engine."""
    if request.param == "sqlite":
        return partial(SQLiteStore, path)
    redis = pytest.importorskip("stigmergy.providers.redis")
    server: Server = request.getfixturevalue("valkey")
    return partial(redis.RedisStore, server.url, namespace=os.urandom(6).hex())


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"history": 99}, ValueError, "history must be at least 100, not 99"),
        ({"history": "500"}, TypeError, "history is an int, not a str"),
        ({"history": 1e9}, TypeError, "history is an int, not a float"),
        ({"history_seconds": 0}, ValueError, "history_seconds must be a positive, finite number of seconds, not 0.0"),
        ({"history_seconds": "60"}, TypeError, "history_seconds is a number of seconds, not a str"),
        ({"timeout": -1}, ValueError, "timeout must be a positive, finite number of seconds, not -1.0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be a positive, finite number of seconds, not nan"),
        ({"timeout": None}, TypeError, "timeout is a number of seconds, not a NoneType"),
        ({"codec": "json"}, TypeError, "a codec is an object that encodes and decodes"),
        ({"codec": JSON}, TypeError, "a codec is an object that encodes and decodes"),
    ],
)
def test_a_bad_option_is_refused(
    new_store: Callable[..., Store], path: Path, options: dict[str, Any], kind: type[Exception], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        new_store(**options)
    assert not path.exists()


def test_an_option_beyond_what_an_engine_can_count_to_is_as_much_as_it_can(new_store: Callable[..., Store]) -> None:
    with new_store(history=10**30, history_seconds=1e300, timeout=1e300) as store:
        for number in range(1, 130):
            assert store.set("a", number) == number
        watch = store.watch("a", since=0)
        assert [watch.get(PATIENCE).revision for _ in range(129)] == list(range(1, 130))


def test_a_long_timeout_waits_for_others_who_write(path: Path) -> None:
    with SQLiteStore(path, timeout=1e300) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        store.set("a", 1)
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as writer:
            written = writer.submit(store.set, "a", 2)
            eventually(lambda: written.done() or is_being_written())
            other.execute("ROLLBACK")
            assert written.result(PATIENCE) == 2


def is_being_written() -> bool:
    """Whether a thread is in a transaction that writes, or waits for its turn."""
    return _sqlite_file.File._write.__code__ in {frame.f_code for frame in sys._current_frames().values()}


@pytest.fixture
def user(valkey: Server) -> Iterator[tuple[str, str]]:
    """A user of the server: name and password."""
    redis = pytest.importorskip("redis")
    name, password = os.urandom(6).hex(), os.urandom(12).hex()
    with redis.Redis.from_url(valkey.url) as client:
        client.execute_command("ACL", "SETUSER", name, "on", f">{password}", "~*", "&*", "+@all")
        yield name, password
        client.execute_command("ACL", "DELUSER", name)


def test_a_password_is_in_nothing_that_can_be_pickled_or_printed(valkey: Server, user: tuple[str, str]) -> None:
    redis = pytest.importorskip("stigmergy.providers.redis")
    name, password = user
    place = valkey.url.partition("://")[2]
    url, wrong = f"redis://{name}:{password}@{place}", f"redis://nobody:{password}@{place}"
    with redis.RedisStore(url, namespace=os.urandom(6).hex()) as store, redis.RedisStore(wrong) as refused:
        watch = store.watch("a")
        store.set("a", 1)
        with pytest.raises(Unavailable) as caught:
            refused.get("a")
        for each in (store, store.aio, watch, store.scan(), store.get_entry("a"), watch.get(PATIENCE), caught.value):
            assert password not in f"{each} {each!r}"
            assert password.encode() not in pickled(each)


def pickled(each: object) -> bytes:
    """Nothing if it cannot be pickled."""
    try:
        return pickle.dumps(each)
    except TypeError:
        return b""
