"""SQLite: files that outlive whoever is killed, several processes on one file, and worlds in which files go bad."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import count
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any
from weakref import ref

import pytest

import stigmergy
from processes import PATIENCE, Child, Link, Start, all_hear, eventually
from servers import not_exercised
from stigmergy import (
    AsyncStore,
    Change,
    Compacted,
    DamagedValue,
    Delete,
    Op,
    OutcomeUnknown,
    RevisionConflict,
    Set,
    StateError,
    Store,
    StoreClosed,
    Unavailable,
    Watch,
    WatchClosed,
    open_async_store,
    open_store,
)
from stigmergy.codec import JSON
from stigmergy.providers import _reader
from stigmergy.providers._sqlite_file import File
from stigmergy.providers.sqlite import SQLiteStore
from stigmergy.testing.laws import check_log
from stigmergy.testing.traffic import all_at_once
from test_strikes import interrupt, places_in, strike

slow = pytest.mark.slow


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def drained(watch: Watch) -> list[Change]:
    return list(iter(watch.get_nowait, None))


def compacted(watch: Watch) -> Compacted:
    """How it ends, whatever it delivers before."""
    try:
        while True:
            watch.get(timeout=PATIENCE)
    except Compacted as error:
        return error


def revisions(changes: list[Change]) -> list[int]:
    return [change.revision for change in changes]


def sql(path: Path, statement: str, *args: Any) -> list[Any]:
    """What plain SQLite, on a connection of its own, says to one statement, committed."""
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, args).fetchall()


def begin_together(children: list[Child]) -> None:
    for child in children:
        assert child.hear() == "ready"
    for child in children:
        child.say("go")


# -- killed ------------------------------------------------------------------------------------------------------------

PADDING = "x" * 1000
Written = tuple[int | None, str, Any]
"""The revision, the key and the value of a write that was acknowledged; `None` for a delete."""


def write_until_killed(link: Link, path: Path, name: str) -> None:
    store = SQLiteStore(path, timeout=PATIENCE)
    for number in count():
        value = f"{name}/{number}"
        writes: list[Set | Delete] = [Set("left", value), Set("right", value)]
        if number % 4 == 1:
            writes = [Set(f"k{number % 7}", [value, PADDING]), Delete(f"k{(number + 1) % 7}")]
        elif number % 4 in (2, 3):
            writes = [Set(name, value)]
        made = store.commit(*writes)
        link.say(
            [
                (revision, write.key, write.value if isinstance(write, Set) else None)
                for revision, write in zip(made, writes, strict=True)
            ]
        )


def kill_them_in_their_traffic(writers: list[Child], seconds: float) -> list[Written]:
    """Return what was acknowledged."""
    acknowledged: list[Written] = []
    for _, commit in all_hear(writers, seconds):
        acknowledged += commit
    for writer in writers:
        writer.kill()
    for writer in writers:
        for commit in writer.rest():
            acknowledged += commit
        assert writer.join() < 0
    return acknowledged


def check_after_kill(store: SQLiteStore, since: int | str, after: int, acknowledged: list[Written]) -> list[Change]:
    """Return the changes after `since`, among which all is that was acknowledged."""
    snapshot = store.scan()
    changes = drained(store.watch(prefix="", since=since))
    made = {change.revision: (change.key, change.value) for change in changes}
    assert list(made) == list(range(after + 1, snapshot.revision + 1))
    for revision, key, value in acknowledged:
        if revision is not None:
            assert made[revision] == (key, value)
    known = {revision for revision, _, _ in acknowledged}
    unknown = {change.commit for change in changes if change.revision not in known}
    assert len(unknown) <= 2, "one commit of each writer may have been made and not acknowledged"
    assert store.get("left") == store.get("right")
    return changes


@pytest.mark.parametrize("loops", [5, pytest.param(200, marks=slow)])
def test_what_was_acknowledged_survives_kills_of_two_writers(start: Start, path: Path, loops: int, seed: str) -> None:
    draw = random.Random(seed)
    log: list[Change] = []
    since: int | str = 0
    lingering: SQLiteStore | None = None
    for loop in range(loops):
        writers = [start(write_until_killed, path, f"{loop}-{number}") for number in range(2)]
        acknowledged = [written for writer in writers for written in writer.hear()]
        if lingering is not None:
            lingering.close()  # only now, for the last to close a file does away with its write-ahead log
        acknowledged += kill_them_in_their_traffic(writers, draw.uniform(0.02, 0.1))

        assert sql(path, "PRAGMA integrity_check") == [("ok",)]
        store = SQLiteStore(path)
        log += check_after_kill(store, since, len(log), acknowledged)
        snapshot = store.scan()
        since = snapshot.bookmark
        assert {key: entry.value for key, entry in snapshot.items()} == replayed(log)
        lingering = store if draw.random() < 0.5 else store.close()
    if lingering is not None:
        lingering.close()
    assert check_log(log) == []


def replayed(log: list[Change]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for change in log:
        if change.op is Op.SET:
            state[change.key] = change.value
        else:
            del state[change.key]
    return state


# -- what reaches the disk ---------------------------------------------------------------------------------------------

COUNT_SYNCS = """
#define _GNU_SOURCE
#include <dlfcn.h>

int synced;
typedef int sync_function(int);
int fsync(int file) { __atomic_add_fetch(&synced, 1, 5); return ((sync_function *)dlsym(RTLD_NEXT, "fsync"))(file); }
int fdatasync(int file) {
    __atomic_add_fetch(&synced, 1, 5);
    return ((sync_function *)dlsym(RTLD_NEXT, "fdatasync"))(file);
}
"""
WRITE_AND_COUNT = """
import ctypes, sys
from stigmergy import open_store
synced = ctypes.c_int.in_dll(ctypes.CDLL(None), "synced")
with open_store(sys.argv[1]) as store:
    store.set("a", 0)
    before = synced.value
    for number in range(50):
        store.set("a", number)
    print(synced.value - before)
"""


@pytest.fixture(scope="module")
def counts_syncs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that counts what is asked of the disk by whatever program it is loaded into."""
    compiler = which("cc")
    if sys.platform != "linux":
        not_exercised("fsync", "needs LD_PRELOAD", excused=True)
    if compiler is None:
        not_exercised("fsync", "there is no C compiler")
    folder = tmp_path_factory.mktemp("syncs")
    source, library = folder / "syncs.c", folder / "syncs.so"
    source.write_text(COUNT_SYNCS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=PATIENCE)
    return library


@pytest.mark.parametrize(("durability", "expected"), [("full", range(50, 200)), ("normal", range(1))])
def test_only_full_durability_syncs_each_commit(
    counts_syncs: Path, path: Path, durability: str, expected: range
) -> None:
    url = f"sqlite:///{path}?durability={durability}"
    environment = {**os.environ, "LD_PRELOAD": str(counts_syncs), "PYTHONPATH": os.pathsep.join(sys.path)}

    program = [sys.executable, "-c", WRITE_AND_COUNT, url]
    counted = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True)

    assert int(counted.stdout) in expected


# -- contention --------------------------------------------------------------------------------------------------------

COUNTERS = ("a", "b", "c", "d", "e")


def increment(store: Store, times: int, seed: object) -> None:
    draw = random.Random(str(seed))
    for number in range(times):
        key = draw.choice(COUNTERS)
        if number % 2:
            store.update(key, lambda value: value + 1, default=0)
        else:
            increment_on_condition(store, key)


def increment_on_condition(store: Store, key: str) -> None:
    while True:
        entry = store.get_entry(key)
        value, revision = (0, 0) if entry is None else (entry.value, entry.revision)
        try:
            store.set(key, value + 1, if_revision=revision)
        except RevisionConflict:
            continue
        return


def increment_in_threads(link: Link, path: Path, threads: int, times: int, seed: object) -> None:
    with SQLiteStore(path, timeout=PATIENCE) as store:
        link.say("ready")
        link.hear()
        all_at_once([partial(increment, store, times, (seed, thread)) for thread in range(threads)])
    link.say("done")


@pytest.mark.parametrize("times", [60, pytest.param(500, marks=slow)])
def test_conditional_increments_in_four_processes_of_four_threads_add_up(
    start: Start, path: Path, times: int, seed: str
) -> None:
    children = [start(increment_in_threads, path, 4, times, (seed, number)) for number in range(4)]
    begin_together(children)
    for child in children:
        assert child.hear() == "done"

    with SQLiteStore(path) as store:
        assert sum(store.get_many(COUNTERS).values()) == 16 * times
        assert store.scan().revision == 16 * times


def open_and_write(link: Link, number: int) -> None:
    link.say("ready")
    while (path := link.hear()) is not None:
        with SQLiteStore(path, timeout=PATIENCE) as store:
            link.say(store.set(f"k{number}", number))


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=slow)])
def test_eight_processes_may_open_a_fresh_file_at_once(start: Start, tmp_path: Path, rounds: int) -> None:
    children = [start(open_and_write, number) for number in range(8)]
    for child in children:
        assert child.hear() == "ready"
    for number in range(rounds):
        path = tmp_path / f"{number}.db"
        for child in children:
            child.say(path)
        assert sorted(child.hear() for child in children) == list(range(1, 9))
        with SQLiteStore(path) as store:
            assert store.get_many(f"k{n}" for n in range(8)) == {f"k{n}": n for n in range(8)}


# -- bad worlds --------------------------------------------------------------------------------------------------------

SECRET = "a value that no message may show"


def unavailable(operation: Callable[[], object], match: str) -> None:
    with pytest.raises(Unavailable, match=match) as caught:
        operation()
    assert SECRET not in str(caught.value)


def every_operation_is_unavailable(path: Path, match: str) -> None:
    with SQLiteStore(path, timeout=PATIENCE) as store:
        unavailable(lambda: store.set("a", SECRET), match)
        unavailable(lambda: store.get("a"), match)
        unavailable(store.scan, match)
        unavailable(lambda: store.watch("a"), match)
        unavailable(lambda: store.observe("a"), match)


def filled(path: Path, count: int = 5) -> None:
    """Make a file in which `a` is at revision `count`."""
    with SQLiteStore(path) as store:
        for number in range(1, count + 1):
            store.set("a", number)


def test_the_file_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    filled(path)
    sql(path, "PRAGMA user_version = 2")
    before = path.read_bytes()

    every_operation_is_unavailable(path, "state.db was written by a newer version")

    assert path.read_bytes() == before
    sql(path, "PRAGMA user_version = 1")
    with SQLiteStore(path) as store:
        assert (store.get("a"), store.set("b", 1)) == (5, 6)


@pytest.mark.parametrize(
    "statement",
    ["CREATE TABLE entries (name TEXT)", "PRAGMA user_version = 1", "CREATE TABLE meta (epoch, revision, time)"],
)
def test_the_database_of_somebody_else_is_refused_and_left_alone(path: Path, statement: str) -> None:
    sql(path, statement)
    before = path.read_bytes()

    every_operation_is_unavailable(path, "state.db is a database of something else")

    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["state.db"]


@pytest.mark.parametrize("content", [b"words, " * 1000, b"words", bytes(4096), b"SQLite format 3\0" + b"w" * 5000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    every_operation_is_unavailable(path, "state.db")

    assert path.read_bytes() == content


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()

    with SQLiteStore(path) as store:
        assert store.set("a", 1) == 1


def test_a_file_may_come_to_be_later(tmp_path: Path) -> None:
    with SQLiteStore(tmp_path / "folder" / "state.db") as store:
        unavailable(
            lambda: store.set("a", SECRET), f"{re.escape(str(tmp_path))}/folder/state.db: the file cannot be opened"
        )

        (tmp_path / "folder").mkdir()
        assert store.set("a", 1) == 1


def test_what_cannot_be_opened_is_unavailable(path: Path) -> None:
    path.touch()
    every_operation_is_unavailable(path / "below-a-file.db", "below-a-file.db")
    every_operation_is_unavailable(path.parent, "cannot be opened")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can enter and cannot write to."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_nobody() -> None:
    """Become somebody to whom nothing belongs. Whoever is nobody special already must lock the doors instead."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def use_what_is_read_only(link: Link, path: Path) -> None:
    as_nobody()
    with SQLiteStore(path, timeout=PATIENCE) as store:
        for operation in (lambda: store.set("a", SECRET), lambda: store.delete("a")):
            unavailable(operation, "state.db")
        try:
            link.say(store.get("a"))
        except Unavailable as error:
            link.say(str(error))
    link.hear()


@pytest.mark.parametrize("what", ["a folder", "a file", "a file in use"])
def test_what_is_read_only_is_unavailable_for_writing(start: Start, public_folder: Path, what: str) -> None:
    path = public_folder / "state.db"
    with ExitStack() as stack:
        if what != "a folder":
            filled(path)
        if what == "a file in use":
            stack.enter_context(SQLiteStore(path)).set("b", 1)
        for each in public_folder.iterdir():
            each.chmod(0o444)
        public_folder.chmod(0o555)
        stack.callback(public_folder.chmod, 0o755)

        child = start(use_what_is_read_only, path)

        assert "cannot be" in (said := str(child.hear())) or said == "5"
        child.say()
        assert child.join() == 0


def fill_the_disk(link: Link, path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    refused: list[str] = []
    with SQLiteStore(path) as store, store.watch(prefix="", capacity=None) as watch:
        for room in range(100_000, 600_000, 7_000):  # ends in the midst of each kind of page
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            try:
                for number in range(room, room + 100):
                    store.commit(Set("left", number), Set("right", [number, SECRET * 100]), Delete(f"k{number - 5}"))
                    store.set(f"k{number}", number)
            except (Unavailable, OutcomeUnknown) as error:
                refused.append(str(error))
            assert store.get("left") == store.get("right")[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            store.set("went on", room)
        last = store.set("end", None)
        changes = [watch.get(timeout=PATIENCE) for _ in range(last)]
        assert check_log(changes) == []
        assert replayed(changes) == {key: entry.value for key, entry in store.scan().items()}
    link.say(refused)


def test_a_full_disk_refuses_whole_commits_and_when_there_is_room_again_all_goes_on(start: Start, path: Path) -> None:
    refused = start(fill_the_disk, path).hear()

    assert len(refused) > 10
    assert not any(SECRET in each for each in refused)
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def hold(link: Link, path: Path, statement: str) -> None:
    """Keep a transaction of plain SQLite open until told to end it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA busy_timeout = 10000")
        connection.execute(statement)
        held = connection.execute("SELECT count(*), max(revision) FROM log").fetchone()
        link.say("held")
        link.hear()
        assert connection.execute("SELECT count(*), max(revision) FROM log").fetchone() == held
        connection.execute("ROLLBACK")
    link.say("let go")


def set_if_available(store: Store) -> int | None:
    """The revision; nothing if this was suspended for as long as `store` waits for its turn."""
    with suppress(Unavailable):
        return store.set("a", 6)
    return None


def test_a_file_that_others_keep_locked_is_unavailable_in_time_and_works_afterwards(
    start: Start, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path)
    statements: list[str] = []
    connect = File.connect

    def connect_traced(file: File) -> Any:
        connection = connect(file)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(File, "connect", connect_traced)
    holder = start(hold, path, "BEGIN IMMEDIATE")
    assert holder.hear() == "held"
    with SQLiteStore(path, timeout=0.1) as store, store.watch("a") as watch:
        with closing(store._file.connect()) as connection:
            assert connection.execute("PRAGMA busy_timeout").fetchall() == [(100,)]
        begun = time.monotonic()
        unavailable(lambda: store.set("a", SECRET), "kept the file locked for too long")
        assert time.monotonic() - begun > 0.08
        assert statements.count("BEGIN IMMEDIATE") == 1, "it waits once"
        assert store.get("a") == 5
        assert store.scan().revision == 5

        holder.say()
        assert holder.hear() == "let go"
        assert eventually(partial(set_if_available, store)) == 6
        assert watch.get(timeout=PATIENCE).old_value == 5


def test_threads_that_wait_for_a_locked_file_wait_no_longer_than_one(start: Start, path: Path) -> None:
    filled(path)
    holder = start(hold, path, "BEGIN IMMEDIATE")
    assert holder.hear() == "held"
    waited: list[object] = []
    with SQLiteStore(path, timeout=0.3) as store, SQLiteStore(path, timeout=0.3) as other:

        def write(store: SQLiteStore) -> None:
            with pytest.raises(Unavailable, match="locked for too long") as caught:
                store.set("a", SECRET)
            if caught.value.__cause__ is not None:  # SQLite has waited; else the turn came too late
                waited.append(caught.value)

        all_at_once([partial(write, each) for each in (store, other)] * 12)
        assert len(waited) < 12
        holder.say()
        assert holder.hear() == "let go"
        assert eventually(partial(set_if_available, store)) == 6


def test_a_reader_that_holds_an_old_picture_disturbs_no_writer(start: Start, path: Path) -> None:
    filled(path)
    holder = start(hold, path, "BEGIN")
    assert holder.hear() == "held"

    with SQLiteStore(path) as store, store.watch("a", capacity=None) as watch:
        for number in range(1000):
            store.set("a", [number, PADDING])
        assert [watch.get(timeout=PATIENCE).revision for _ in range(1000)] == list(range(6, 1006))

        holder.say()
        assert holder.hear() == "let go"
        assert store.set("a", 1) == 1006


# -- a file that is no longer what it was ------------------------------------------------------------------------------


def put_in_place(path: Path, other: Path | None) -> None:
    """Do away with the file, and put another in its place."""
    for each in path.parent.glob(f"{path.name}-*"):
        each.unlink()
    # At last, and at once: no reader, which comes when the file is gone, makes one of which a part is done away with.
    if other is None:
        path.unlink()
    else:
        os.replace(other, path)


@pytest.mark.parametrize("by", [None, 2, 5, 9])
def test_a_file_that_was_replaced_is_a_new_life_above_all_that_was_seen(path: Path, by: int | None) -> None:
    filled(path)
    other = None
    if by is not None:
        filled(other := path.with_name("other.db"), by)
    with SQLiteStore(path) as store:
        watch, state = store.watch(prefix=""), store.observe(prefix="")
        bookmark = watch.bookmark
        assert state.get(timeout=PATIENCE).value == 5
        store.set("b", 1)
        assert [each.get(timeout=PATIENCE).key for each in (watch, state)] == ["b", "b"]

        put_in_place(path, other)

        eventually(lambda: store.get("b") is None)
        assert store.get("a") == by
        first = max(6, by or 0) + 1
        assert store.set("c", 1) == first
        with pytest.raises(Compacted):
            watch.get(timeout=PATIENCE)
        with pytest.raises(Compacted):
            store.watch("a", since=bookmark)
        told: dict[str, Any] = {"a": 5, "b": 1}
        expected = {"c": 1} if by is None else {"a": by, "c": 1}
        while told != expected:
            change = state.get(timeout=PATIENCE)
            told[change.key] = change.value
            told = {key: value for key, value in told.items() if value is not None}

    with SQLiteStore(path) as store:
        assert {key: entry.value for key, entry in store.scan().items()} == expected
        assert store.set("d", 1) == first + 1


def test_a_file_replaced_while_it_is_opened_is_not_taken_for_the_new_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path)
    filled(other := path.with_name("other.db"), 2)
    connect = sqlite3.connect

    def replaced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        if other.exists():
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # it has the old file open
            put_in_place(path, other)
        return connection

    monkeypatch.setattr(sqlite3, "connect", replaced)
    with SQLiteStore(path) as store:
        eventually(lambda: store.get("a") == 2)


def test_all_that_is_acknowledged_after_a_file_was_replaced_is_in_the_new_one(path: Path, start: Start) -> None:
    with SQLiteStore(path) as store, SQLiteStore(path) as other:
        watches = [each.watch(prefix="", capacity=None) for each in (store, other)]
        all_at_once([partial(each.set, f"k{n}", n) for n in range(4) for each in (store, other)])
        for watch in watches:  # so the readers have opened the file
            assert revisions([watch.get(timeout=PATIENCE) for _ in range(8)]) == list(range(1, 9))
        put_in_place(path, None)
        eventually(lambda: store.get("k0") is None and other.get("k0") is None)

        for number in range(50):
            store.set("a", number)
            other.set("b", number)
        for watch in watches:
            compacted(watch)

        child = start(say_what_is_there, path)
        assert child.hear() == {"a": 49, "b": 49}
        assert child.join() == 0


def say_what_is_there(link: Link, path: Path) -> None:
    with SQLiteStore(path) as store:
        link.say({key: entry.value for key, entry in store.scan().items()})


def copied(path: Path, to: Path) -> None:
    """Make `to` what `path` is, as backups are made and restored."""
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def test_a_file_that_was_set_back_is_a_new_life_above_all_that_was_seen(path: Path) -> None:
    filled(path)
    copied(path, copy := path.with_name("copy.db"))
    with SQLiteStore(path) as store:
        watch, state = store.watch(prefix=""), store.observe(prefix="")
        store.set("b", 1)
        assert store.set("a", 6) == 7
        assert [watch.get(timeout=PATIENCE).revision for _ in range(2)] == [6, 7]
        eventually(lambda: (change := state.get_nowait()) and change.revision == 7)

        copied(copy, path)

        assert store.set("c", 1) > 7
        with pytest.raises(Compacted):
            watch.get(timeout=PATIENCE)
        told: dict[str, Any] = {"a": 6, "b": 1}
        while told != {"a": 5, "b": None, "c": 1}:
            change = state.get(timeout=PATIENCE)
            told[change.key] = change.value
        assert store.get_many(["a", "b", "c"]) == {"a": 5, "c": 1}


def follow_a_past(link: Link, path: Path) -> None:
    with SQLiteStore(path) as store:
        watch, state = store.watch(prefix=""), store.observe(prefix="")
        told: dict[str, Any] = {}
        while told.get("a") != 9:
            change = state.get(timeout=PATIENCE)
            told[change.key] = change.value
        while watch.revision < 9:
            watch.get(timeout=PATIENCE)
        link.say("ready")
        compacted(watch)
        while told.get("end") != 1:
            change = state.get(timeout=PATIENCE)
            told[change.key] = change.value
        link.say({key: value for key, value in told.items() if value is not None})
        link.say(store.set("mine", 1))


def test_a_file_that_was_set_back_and_written_to_while_nobody_looked_is_another_life(path: Path, start: Start) -> None:
    filled(path)
    copied(path, copy := path.with_name("copy.db"))
    child = start(follow_a_past, path)
    with SQLiteStore(path) as store:
        for number in range(6, 10):
            store.set("a", number)
    assert child.hear() == "ready"
    child.stop()

    copied(copy, path)
    with SQLiteStore(path) as store:
        for number in range(20):
            store.set(f"k{number % 3}", number)
        last = store.set("end", 1)

    child.go_on()
    assert child.hear() == {"a": 5, "k0": 18, "k1": 19, "k2": 17, "end": 1}
    assert child.hear() > last


# -- damage ------------------------------------------------------------------------------------------------------------

ENTRY_DAMAGE: dict[str, str] = {
    "bytes that are no JSON": "data = x'80ff7b'",
    "half a value": "data = CAST('{\"a\":' AS BLOB)",
    "what strict JSON does not have": "data = CAST('NaN' AS BLOB)",
    "nesting without end": "data = CAST(replace(hex(zeroblob(50000)), '00', '[') AS BLOB)",
    "nothing": "data = x''",
    "text for bytes": "data = 'text'",
    "a number for bytes": "data = 7",
    "an unknown codec": "codec = 'pickle'",
    "a codec of bytes": "codec = x'ff'",
    "a codec that is not UTF-8": "codec = CAST(x'ff41' AS TEXT)",
    "meta that is no JSON": "meta = '{'",
    "meta that is not a mapping": "meta = '[1]'",
    "meta that is a number": "meta = 7",
    "meta that is not UTF-8": "meta = CAST(x'ff41' AS TEXT)",
}
every_damage = pytest.mark.parametrize("damage", ENTRY_DAMAGE.values(), ids=ENTRY_DAMAGE.keys())


def damaged(operation: Callable[[], object], key: str) -> None:
    with pytest.raises(DamagedValue) as caught:
        operation()
    assert caught.value.key == key


def test_a_value_of_a_codec_that_was_not_given_names_it(path: Path) -> None:
    class Other(JSON):
        id = "other"

    with SQLiteStore(path, codec=Other()) as store, SQLiteStore(path) as reader:
        store.set("a", 1)
        with pytest.raises(DamagedValue) as caught:
            reader.get("a")
    assert str(caught.value.__cause__) == "it was written with the codec 'other': pass that one as codec="


@every_damage
def test_a_damaged_entry_harms_nothing_but_reads_of_its_key(path: Path, damage: str) -> None:
    with SQLiteStore(path) as store:
        store.commit(Set("a", 1), Set("b", 2, meta={"of": "b"}), Set("c", 3))
        sql(path, f"UPDATE entries SET {damage} WHERE key = 'b'")

        damaged(lambda: store.get_entry("b"), "b")
        if "meta" not in damage:
            damaged(lambda: store.get("b"), "b")
        snapshot = store.scan()
        assert [*snapshot] == ["a", "b", "c"]
        damaged(lambda: snapshot["b"], "b")
        assert (snapshot["a"].value, snapshot["c"].value) == (1, 3)
        assert store.get_many(["a", "c"]) == {"a": 1, "c": 3}

        state = store.observe(prefix="")
        assert state.get(timeout=PATIENCE).key == "a"
        damaged(lambda: state.get(timeout=PATIENCE), "b")
        assert state.get(timeout=PATIENCE).key == "c"

        watch = store.watch(prefix="")
        store.set("b", 4)
        if "meta" in damage:
            assert watch.get(timeout=PATIENCE).old_value == 2
        else:
            damaged(lambda: watch.get(timeout=PATIENCE), "b")  # its old value
        assert store.set("c", 5) == 5
        assert watch.get(timeout=PATIENCE).old_value == 3
        assert store.get("b") == 4


@every_damage
def test_a_damaged_record_harms_nothing_but_its_own_delivery(path: Path, damage: str) -> None:
    with SQLiteStore(path) as store:
        with store.watch("a"):  # has a reader
            store.commit(Set("a", 1), Set("b", 2, meta={"of": "b"}), Set("c", 3))
        sql(path, f"UPDATE log SET {damage} WHERE key = 'b'")

        watch = store.watch(prefix="", since=0)
        assert watch.get(timeout=PATIENCE).key == "a"
        damaged(lambda: watch.get(timeout=PATIENCE), "b")
        assert watch.get(timeout=PATIENCE).key == "c"
        assert store.set("b", 4) == 4
        assert watch.get(timeout=PATIENCE).old_value == 2


WRONG_TYPES = {
    "op": "'z'",
    "op ": "x'00'",
    "old_codec": "7",
    "old_data": "'text'",
    "old_revision": "'text'",
    "last": "'text'",
    "writer": "x'00'",
    "writer ": "CAST(x'ff' AS TEXT)",
    "time": "'text'",
    "expired": "'text'",
    "meta": "x'00'",
    "key": "x'00'",
    "key ": "CAST(x'ff' AS TEXT)",
    "key  ": "7",
    "key   ": "''",
}


@pytest.mark.parametrize(("column", "value"), WRONG_TYPES.items())
def test_a_record_of_wrong_types_harms_no_other_delivery(path: Path, column: str, value: str) -> None:
    with SQLiteStore(path) as store, SQLiteStore(path) as other:
        living = store.watch(prefix="", capacity=None)
        with closing(sqlite3.connect(path, isolation_level=None)) as plain:
            # In one transaction, so that the damage is there when the reader comes.
            plain.execute("BEGIN IMMEDIATE")
            for revision, key in enumerate(["a", "b", "c"], start=1):
                row = (revision, "set", key, "json", b"0", None, None, 0, 3, None, 1.0, 0, None)
                plain.execute(f"INSERT INTO log VALUES ({','.join('?' * 13)})", row)
            plain.execute(f"UPDATE log SET {column} = {value} WHERE revision = 2")
            plain.execute("UPDATE meta SET revision = 3, time = 1.0")
            plain.execute("COMMIT")
        other.set("a", 1)

        for watch in (living, store.watch(prefix="", since=0)):
            keys = []
            for _ in range(4):
                try:
                    keys.append(watch.get(timeout=PATIENCE).key)
                except DamagedValue:
                    keys.append("damaged")
            assert [keys[0], keys[2], keys[3]] == ["a", "c", "a"]


@pytest.mark.parametrize("column", ["revision", "last", "writer", "time", "expires"])
@pytest.mark.parametrize("value", ["'text'", "x'00'", "CAST(x'ff41' AS TEXT)"])
def test_an_entry_of_wrong_types_harms_no_other_key(path: Path, column: str, value: str) -> None:
    with SQLiteStore(path) as store:
        store.commit(Set("a", 1), Set("b", 2, ttl=1000), Set("c", 3))
        sql(path, f"UPDATE entries SET {column} = {value} WHERE key = 'b'")

        assert (store.get("a"), store.get("c")) == (1, 3)
        with suppress(DamagedValue):
            store.get("b")
        with suppress(DamagedValue):
            store.get_entry("b")
        snapshot = store.scan()
        assert (snapshot["a"].value, snapshot["c"].value) == (1, 3)
        watch, state = store.watch("a", "c"), store.observe(prefix="")
        store.set("a", 4)
        assert watch.get(timeout=PATIENCE).value == 4
        told: dict[str, Any] = {}
        while told != {"a": 4, "c": 3}:
            with suppress(DamagedValue):
                change = state.get(timeout=PATIENCE)
                if change.key != "b":
                    told[change.key] = change.value
        store.set("b", 5)
        assert store.get("b") == 5
        assert store.delete("b")


@pytest.mark.parametrize(
    "key", ["x'ff41'", "CAST(x'8041' AS TEXT)", "CAST(x'ff41' AS TEXT)", "7", "''", "'x' || char(0)"]
)
def test_a_key_that_none_can_be_harms_no_other(path: Path, key: str) -> None:
    with SQLiteStore(path) as store:
        store.commit(Set("a", 1), Set("b", 2), Set("~", 3))
        sql(path, f"UPDATE entries SET key = {key} WHERE key = 'b'")

        assert (store.get("a"), store.get("~")) == (1, 3)
        snapshot = store.scan()
        assert (snapshot["a"].value, snapshot["~"].value) == (1, 3)
        state = store.observe(prefix="")
        keys = set()
        while not keys >= {"a", "~"}:
            with suppress(DamagedValue):
                keys.add(state.get(timeout=PATIENCE).key)
        store.set("c", 5)
        assert state.get(timeout=PATIENCE).value == 5


def test_an_entry_whose_key_is_damaged_expires_once(path: Path) -> None:
    with SQLiteStore(path) as store:
        store.commit(Set("a", 1), Set("b", 2, ttl=1000))
        sql(path, "UPDATE entries SET key = CAST(x'ff41' AS TEXT), expires = 1.0 WHERE key = 'b'")

        assert store.scan().revision == 3
        assert store.scan().revision == 3
        watch = store.watch(prefix="", since=2)
        assert store.set("a", 4) == 4
        assert [change.expired for change in (watch.get(timeout=PATIENCE), watch.get(timeout=PATIENCE))] == [
            True,
            False,
        ]


HUGE = 2**70


def test_numbers_beyond_those_of_the_engine_are_like_any_others_of_their_size(path: Path) -> None:
    filled(path)
    with SQLiteStore(path) as store:
        with pytest.raises(RevisionConflict):
            store.set("a", 1, if_revision=HUGE)
        with pytest.raises(Compacted):
            store.watch("a", since=HUGE)
        with pytest.raises(Compacted):
            store.watch("a", since=store.scan().bookmark.rpartition(".")[0] + f".{HUGE}")
        assert [*store.scan(limit=HUGE)] == ["a"]
        assert store.set("a", HUGE) == 6
        assert store.get("a") == HUGE
        store.set("a", 1, ttl=1e300)
        assert store.get("a") == 1


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM meta",
        "UPDATE meta SET revision = 'text'",
        "UPDATE meta SET revision = -5",
        "UPDATE meta SET time = 'text'",
        "UPDATE meta SET time = 1e300",
        "UPDATE meta SET epoch = x'00'",
        "UPDATE meta SET epoch = CAST(x'ff' AS TEXT)",
        "INSERT INTO meta SELECT * FROM meta",
        "DROP TABLE log",
        "DROP TABLE entries",
        "ALTER TABLE log DROP COLUMN meta",
        "DELETE FROM log",
        "DELETE FROM log WHERE revision = 2",
        "UPDATE log SET revision = 100 WHERE revision = 3",
        "UPDATE entries SET revision = 100",
    ],
)
def test_a_damaged_file_is_a_typed_error_or_none(path: Path, statement: str, caplog: pytest.LogCaptureFixture) -> None:
    filled(path)
    sql(path, statement)

    use_all_of_it(path)


def use_all_of_it(path: Path) -> int:
    """Whatever the file is, operations return, or raise what they may; return how many did."""
    done = 0

    def attempt(operation: Callable[[], object]) -> None:
        nonlocal done
        with suppress(StateError):
            operation()
            done += 1

    def watch(open: Callable[[], Watch]) -> None:
        with open() as watch, suppress(TimeoutError, WatchClosed):
            for _ in range(300):
                with suppress(DamagedValue):
                    watch.get_nowait()

    with SQLiteStore(path, timeout=0.5) as store:
        for key in ("a", "k3", "k77", "absent"):
            attempt(lambda key=key: store.get(key))
            attempt(lambda key=key: store.get_entry(key))
        attempt(lambda: dict(store.scan()))
        attempt(lambda: dict(store.scan("k", after="k3", limit=10)))
        attempt(lambda: watch(lambda: store.watch(prefix="", since=0)))
        attempt(lambda: watch(lambda: store.watch(prefix="", since=90)))
        attempt(lambda: watch(lambda: store.observe(prefix="")))
        for key in ("a", "k3", "k77", "new"):
            attempt(lambda key=key: store.set(key, [key] * 100))
            attempt(lambda key=key: store.update(key, lambda value: [value]))
            attempt(lambda key=key: store.delete(key))
        attempt(lambda: store.commit(Set("k5", 1), Set("k6", 2), Delete("k7")))
        attempt(lambda: dict(store.scan()))
    return done


@pytest.mark.parametrize("files", [15, pytest.param(200, marks=slow)])
def test_whatever_bytes_are_flipped_operations_return_or_raise_what_they_may(
    path: Path, tmp_path: Path, files: int, seed: str, caplog: pytest.LogCaptureFixture
) -> None:
    with SQLiteStore(path) as store:
        for number in range(300):
            store.set(f"k{number % 100}", ["value", number] * (number % 40), ttl=1000 if number % 5 == 0 else None)
    whole = path.read_bytes()
    done = 0
    for number in range(files):
        draw = random.Random(f"{seed}/{number}")
        content = bytearray(whole)
        for _ in range(draw.choice([1, 3, 30, 300])):
            content[draw.randrange(100, len(content))] = draw.randrange(256)
        if draw.random() < 0.2:
            del content[draw.randrange(len(content)) :]
        copy = tmp_path / f"{number}.db"
        copy.write_bytes(content)
        done += use_all_of_it(copy)
    assert done > 2 * files


# -- event loops -------------------------------------------------------------------------------------------------------


def hold_fresh(link: Link, path: Path) -> None:
    """Keep a file that is no store yet from being read."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        link.say("held")
        link.hear()
        connection.execute("ROLLBACK")
    link.say("let go")


async def open_and_close(store: AsyncStore) -> None:
    async with store.watch("a"):
        pass


async def open_by_writing(store: AsyncStore) -> None:
    watch = await store.watch("a")
    await store.set("a", SECRET)
    watch.close()


ASKED: dict[str, Callable[[AsyncStore], Awaitable[Any]]] = {
    "set": lambda store: store.set("a", SECRET),
    "update": lambda store: store.update("a", lambda value: SECRET),
    "delete": lambda store: store.delete("a"),
    "set with a watch": open_by_writing,
    "get": lambda store: store.get("a"),
    "scan": lambda store: store.scan(),
    "watch": open_and_close,
    "await watch": lambda store: store.watch("a"),
}
WRITES = ("set", "update", "delete", "set with a watch")


def someone_is_locked_out() -> bool:
    """Whether a thread is where a request waits until others let go of the file."""
    codes = {frame.f_code for frame in sys._current_frames().values()}
    return not codes.isdisjoint(each.__code__ for each in (File._write, File._prepare, File._version))


async def waits_beside_its_loop(awaitable: Awaitable[Any], holder: Child) -> None:
    """It is `holder`, which keeps the file locked, that this waits for; the loop turns, and lets it go."""
    asking = asyncio.ensure_future(awaitable)
    while not (asking.done() or someone_is_locked_out()):  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert not asking.done()
    holder.say()
    assert holder.hear() == "let go"
    await asking


@pytest.mark.parametrize("asked", WRITES)
async def test_a_loop_turns_while_its_task_waits_for_a_locked_file(start: Start, path: Path, asked: str) -> None:
    filled(path)
    holder = start(hold, path, "BEGIN IMMEDIATE")
    assert holder.hear() == "held"
    async with SQLiteStore(path, timeout=30).aio as store:
        await waits_beside_its_loop(ASKED[asked](store), holder)

        assert await store.set("a", 6) == 7


@pytest.mark.parametrize("asked", ASKED)
async def test_a_loop_turns_while_its_task_waits_for_its_first_connection(start: Start, path: Path, asked: str) -> None:
    holder = start(hold_fresh, path)
    assert holder.hear() == "held"
    async with SQLiteStore(path, timeout=30).aio as store:
        await waits_beside_its_loop(ASKED[asked](store), holder)

        assert await store.set("a", 1) <= 2


# -- struck ------------------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Store], object]] = {
    "set": lambda store: store.set("a", 1),
    "commit": lambda store: store.commit(Set("left", 1), Set("right", 1)),
    "delete": lambda store: (store.set("b", 1), store.delete("b")),
    "get": lambda store: store.get("a"),
    "scan": lambda store: dict(store.scan("a")),
    "watch": lambda store: store.watch("a", since=store.scan().bookmark).close(),
}


def all_changes(store: Store) -> list[Change]:
    return drained(store.watch(prefix="", since=0))


@pytest.mark.parametrize("outer", OPERATIONS)
def test_whoever_writes_in_the_midst_of_an_operation_has_written_or_is_refused_at_once(path: Path, outer: str) -> None:
    with (
        SQLiteStore(path, timeout=PATIENCE) as store,
        SQLiteStore(path, timeout=PATIENCE) as other,
        store.watch(prefix="", capacity=None),
    ):
        operate = partial(OPERATIONS[outer], store)
        operate()
        made: list[tuple[int, int]] = []
        refused = 0

        def write(number: int) -> None:
            nonlocal refused
            try:
                made.append((store.set("inner", number), number))
            except Unavailable as error:
                if "this thread is in the midst" not in str(error):  # it has waited for itself
                    raise
                refused += 1

        for number, place in enumerate(places_in(operate)):
            strike(operate, place, partial(write, number))
            assert store.get("a", 1) == 1
            other.set("other", number)

        changes = all_changes(store)
        assert check_log(changes) == []
        assert [(each.revision, each.value) for each in changes if each.key == "inner"] == made
        assert len(made) > 10
        assert (refused > 0) == (outer in ("set", "commit", "delete"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_wherever_an_interrupt_strikes_nothing_is_left_half_done_or_locked(path: Path, operation: str) -> None:
    with SQLiteStore(path, timeout=PATIENCE) as store, SQLiteStore(path, timeout=PATIENCE) as other:
        operate = partial(OPERATIONS[operation], store)
        operate()
        with store.watch(prefix="", since=0, capacity=None) as watch:
            for number, place in enumerate(places_in(operate)):
                with suppress(KeyboardInterrupt):
                    strike(operate, place, interrupt)
                other.set("other", number)
                store.set("store", number)
            last = store.set("end", 1)
            changes = [watch.get(timeout=PATIENCE)]
            while changes[-1].revision < last:
                changes.append(watch.get(timeout=PATIENCE))

        assert check_log(changes) == []
        assert changes == all_changes(other)
        halves = [change.commit for change in changes if change.key in ("left", "right")]
        assert all(halves.count(commit) == 2 for commit in halves)


def write_under_strikes(link: Link, path: Path, kind: str, count: int, seed: str) -> None:
    draw, strikes, made = random.Random(seed), 0, 0
    library = str(Path(stigmergy.__file__).parent)

    def again() -> None:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.00002, 0.001))

    def struck(_: int, frame: FrameType | None) -> None:
        nonlocal strikes, made
        if kind == "raise":
            again()
            if frame is not None and frame.f_code.co_filename.startswith(library):
                strikes += 1
                raise KeyboardInterrupt
        else:
            strikes += 1
            with suppress(Unavailable):
                store.set("struck", strikes)
                made += 1
            again()

    signal.signal(signal.SIGALRM, struck)
    with SQLiteStore(path, timeout=PATIENCE) as store, store.watch(prefix="", since=0, capacity=None) as watch:
        again()
        while strikes < count:
            with suppress(KeyboardInterrupt):
                store.commit(Set("left", strikes), Set("right", strikes))
                store.update("n", lambda value: value + 1, default=0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        last = store.set("end", 1)
        changes = [watch.get(timeout=PATIENCE)]
        while changes[-1].revision < last:
            changes.append(watch.get(timeout=PATIENCE))
        assert check_log(changes) == []
        assert made == sum(change.key == "struck" for change in changes)
        assert store.get("left") == store.get("right")
    link.say(made)


@pytest.mark.parametrize("signals", [200, pytest.param(1000, marks=slow)])
@pytest.mark.parametrize("kind", ["raise", "write"])
def test_signals_leave_every_commit_whole_and_the_store_usable(
    start: Start, path: Path, kind: str, signals: int, seed: str
) -> None:
    made = start(write_under_strikes, path, kind, signals, seed).hear()

    assert (made > 0) == (kind == "write")
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


# -- forked ------------------------------------------------------------------------------------------------------------


def forked(function: Callable[[], object]) -> int:
    """Call `function` in a child of this process; return its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(int(PATIENCE))
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def joined(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork_with_a_store(link: Link, path: Path) -> None:
    store = SQLiteStore(path)
    watch = store.watch(prefix="")
    store.set("a", 0)
    assert watch.get(timeout=PATIENCE).revision == 1

    def child() -> None:
        assert list(watch) == []  # the parent's
        assert store.get("a") == 0
        mine = store.watch("a", "parent")
        store.update("a", lambda value: value + 1)
        assert mine.get(timeout=PATIENCE).value == 1
        store.wait_for("parent", lambda value: value == 1, timeout=PATIENCE)
        assert mine.get(timeout=PATIENCE).key == "parent"
        store.set("child", 1)
        store.close()

    pid = forked(child)
    assert watch.get(timeout=PATIENCE).value == 1
    store.set("parent", 1)
    store.wait_for("child", lambda value: value == 1, timeout=PATIENCE)
    assert joined(pid) == 0
    assert [watch.get(timeout=PATIENCE).revision for _ in range(2)] == [3, 4]
    assert store.set("a", 5) == 5
    store.close()


def test_a_forked_child_has_a_store_and_so_has_its_parent(start: Start, path: Path) -> None:
    child = start(fork_with_a_store, path)

    assert child.rest() == []
    assert child.join() == 0
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def fork_and_leave(link: Link, path: Path) -> None:
    store = SQLiteStore(path)
    store.set("a", 0)
    reading, writing = os.pipe()

    def child() -> None:
        store.set("child", 0)
        os.close(writing)
        assert os.read(reading, 1) == b""  # the parent has closed its store
        link.say("left alone")
        link.hear()
        for number in range(1, 11):
            store.set("child", number)
        link.say("written")
        link.hear()
        store.set("child", 11)

    pid = forked(child)
    store.wait_for("child", lambda value: value == 0, timeout=PATIENCE)
    store.close()
    os.close(writing)
    assert joined(pid) == 0


def test_what_a_forked_child_writes_is_kept_when_its_parent_has_closed_the_store(start: Start, path: Path) -> None:
    child = start(fork_and_leave, path)
    assert child.hear() == "left alone"
    with SQLiteStore(path) as store:
        assert store.set("b", 0) == 3
    child.say()
    assert child.hear() == "written"
    with SQLiteStore(path) as store:
        assert store.get("child") == 10
        assert store.set("b", 1) == 14
    child.say()
    assert child.rest() == []
    assert child.join() == 0
    with SQLiteStore(path) as store:
        assert store.scan().revision == 15
        assert store.get("child") == 11


def fork_under_load(link: Link, path: Path, forks: int) -> None:
    stop = threading.Event()
    store = SQLiteStore(path, timeout=PATIENCE, history=1_000_000)

    def load() -> None:
        while not stop.is_set():
            store.commit(Set("left", 1), Set("right", 1))
            store.get("left")

    def child(number: int) -> None:
        mine = store.watch("child", capacity=None)
        revision = store.set("child", number)
        assert mine.get(timeout=PATIENCE).revision == revision
        store.close()

    with store.watch("left", capacity=1, overflow="raise"):
        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(forks):
                assert joined(forked(partial(child, number))) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    changes = all_changes(store)
    assert [change.value for change in changes if change.key == "child"] == list(range(forks))
    assert revisions(changes) == list(range(changes[0].revision, changes[-1].revision + 1))
    link.say("well")


@pytest.mark.parametrize("forks", [8, pytest.param(30, marks=slow)])
def test_a_fork_while_threads_write_gives_the_child_a_store_that_works(start: Start, path: Path, forks: int) -> None:
    assert start(fork_under_load, path, forks).hear() == "well"
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def fork_in_several_threads(link: Link, path: Path) -> None:
    store = SQLiteStore(path, timeout=PATIENCE)

    def child() -> None:
        for number in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # that of the listing itself
                assert str(path) not in os.readlink(f"/proc/self/fd/{number}")
        assert store.get("a") is not None

    def write_and_fork() -> None:
        for number in range(10):
            store.set("a", number)
            assert joined(forked(child)) == 0

    all_at_once([write_and_fork] * 3)
    link.say(store.scan().revision)


def test_of_threads_that_fork_at_the_same_time_no_child_gets_a_connection_of_its_parent(
    start: Start, path: Path
) -> None:
    assert start(fork_in_several_threads, path).hear() == 30
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


# -- closing -----------------------------------------------------------------------------------------------------------


def close_in_the_midst(link: Link, path: Path, rounds: int, seed: str) -> None:
    faulthandler.enable()
    draw = random.Random(seed)
    for _ in range(rounds):
        store = SQLiteStore(path)
        begun = [threading.Event() for _ in range(6)]

        def use(number: int, store: SQLiteStore = store, begun: list[threading.Event] = begun) -> int:
            for done in count():
                try:
                    OPERATIONS_IN_THREADS[number](store)
                except StoreClosed:
                    return done
                begun[number].set()
            raise AssertionError

        def close(store: SQLiteStore = store, begun: list[threading.Event] = begun) -> None:
            for each in begun:
                assert each.wait(PATIENCE)
            for _ in range(draw.randrange(200)):
                draw.random()
            store.close()

        all_at_once([*(partial(use, number) for number in range(6)), close])
        for operation in OPERATIONS.values():
            with pytest.raises(StoreClosed):
                operation(store)
    link.say("well")


OPERATIONS_IN_THREADS: list[Callable[[Store], object]] = [
    lambda store: store.set("a", 1),
    lambda store: store.commit(Set("left", 1), Set("right", 1)),
    lambda store: store.get("a"),
    lambda store: dict(store.scan()),
    lambda store: store.watch("a").close(),
    lambda store: store.update("n", lambda value: value + 1, default=0),
]


@pytest.mark.parametrize("rounds", [6, pytest.param(100, marks=slow)])
def test_a_store_may_be_closed_while_threads_are_in_its_midst(start: Start, path: Path, rounds: int, seed: str) -> None:
    child = start(close_in_the_midst, path, rounds, seed)

    assert child.hear() == "well"
    assert child.join() == 0
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_store_with_watches_is_closed_and_they_end(path: Path) -> None:
    store = SQLiteStore(path)
    watches = [store.watch(f"k{number}") for number in range(50)] + [store.observe(prefix="")]
    store.set("k7", 1)
    assert watches[7].get(timeout=PATIENCE).value == 1
    readers = [threading.Thread(target=list, args=[watch]) for watch in watches]
    for reader in readers:
        reader.start()

    store.close()

    for reader in readers:
        reader.join(PATIENCE)
        assert not reader.is_alive()


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


def held(path: Path) -> tuple[set[str], int]:
    """The threads that this process has, and how many descriptors of the files of a store."""
    descriptors = 0
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            descriptors += str(path) in os.readlink(each)
    return set(os.listdir("/proc/self/task")), descriptors


@linux
@pytest.mark.parametrize("closed", [True, False])
def test_a_store_that_is_closed_or_dropped_lets_go_of_its_thread_and_its_file(path: Path, closed: bool) -> None:
    before, descriptors = held(path)
    assert descriptors == 0
    store = SQLiteStore(path)
    watch = store.watch("a")
    all_at_once([partial(store.set, "a", 1)] * 4)
    assert watch.get(timeout=PATIENCE).value == 1
    threads, descriptors = held(path)
    assert threads - before
    assert descriptors > 0

    if closed:
        store.close()
    else:
        with pytest.warns(ResourceWarning, match=r"unclosed <SQLiteStore '.*state\.db'"):  # noqa: PT031
            del store, watch
            gc.collect()

    eventually(lambda: not held(path)[0] - before and not held(path)[1])


@linux
def test_a_thread_rests_when_its_last_watch_is_gone_and_begins_again_with_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reader, "_LONGEST_WAIT", 0.05)
    before, _ = held(path)
    with SQLiteStore(path) as store:
        for number in range(2):
            with store.watch("a") as watch:
                store.set("a", number)
                assert watch.get(timeout=PATIENCE).value == number
                assert len(held(path)[0] - before) == 1
            eventually(lambda: not held(path)[0] - before)


def test_a_watch_keeps_its_store_alive(path: Path, start: Start) -> None:
    watch, state = SQLiteStore(path).watch("a"), SQLiteStore(path).observe("a")
    gc.collect()

    with SQLiteStore(path) as store:
        store.set("a", 1)

    assert watch.get(timeout=PATIENCE).value == state.get(timeout=PATIENCE).value == 1
    with pytest.warns(ResourceWarning, match="unclosed"):
        del watch, state


def test_a_store_that_was_dropped_is_freed_at_once_and_one_that_was_closed_does_not_warn(path: Path) -> None:
    gc.disable()
    try:
        for close in (True, False):
            store = SQLiteStore(path)
            with store.watch("a") as watch:
                store.set("a", 1)
                store.update("a", lambda value: value + 1)
                assert watch.get(timeout=PATIENCE).value == 1
            del watch
            freed = ref(store)
            if close:
                store.close()
                del store
            else:
                with pytest.warns(ResourceWarning, match="unclosed"):
                    del store
            assert freed() is None
    finally:
        gc.enable()


# -- what is remembered ------------------------------------------------------------------------------------------------


def oldest(store: Store) -> int:
    with pytest.raises(Compacted) as caught:
        store.watch("a", since=0)
    return caught.value.oldest


def test_the_last_changes_are_remembered_and_few_more(path: Path) -> None:
    with SQLiteStore(path, history=100) as store:
        for number in range(1, 501):
            store.set("a", number)
            if number > 164:
                assert 100 <= number - oldest(store) + 1 <= 164
        first = oldest(store)
        assert revisions(drained(store.watch("a", since=first - 1))) == list(range(first, 501))
        with pytest.raises(Compacted):
            store.watch("a", since=first - 2)
        assert len(sql(path, "SELECT 1 FROM log")) <= 164


def test_large_commits_are_forgotten_as_whole_as_they_were_made(path: Path) -> None:
    with SQLiteStore(path, history=100) as store:
        for number in range(10):
            store.commit(*(Set(f"k{each}", number) for each in range(90)))
            assert len(sql(path, "SELECT 1 FROM log")) < 100 + 90 + 64


def test_changes_are_remembered_for_so_many_seconds(path: Path) -> None:
    with SQLiteStore(path) as store:
        for number in range(200):
            store.set("a", number)
    sql(path, "UPDATE log SET time = time - 3600 WHERE revision <= 100")
    with SQLiteStore(path, history_seconds=1800) as store:
        for number in range(64):
            store.set("a", number)

        assert oldest(store) == 101
        assert store.get("a") == 63


def fall_behind(link: Link, path: Path) -> None:
    with SQLiteStore(path, history=100) as store:
        watch, state = store.watch(prefix=""), store.observe(prefix="")
        store.set("begin", 1)
        assert watch.get(timeout=PATIENCE).key == "begin"
        first = state.get(timeout=PATIENCE)
        told = {first.key: first.value}
        link.say("ready")
        while told.get("end") is None or told["gone"] is not None:
            change = state.get(timeout=PATIENCE)
            told[change.key] = change.value
        link.say((told, compacted(watch).oldest))


def test_who_falls_behind_what_is_remembered_is_told_so_and_observers_converge(start: Start, path: Path) -> None:
    with SQLiteStore(path, history=100) as store:
        store.set("gone", 1)
        child = start(fall_behind, path)
        assert child.hear() == "ready"
        child.stop()
        for number in range(300):
            store.set(f"k{number % 10}", number)
        store.delete("gone")
        store.set("end", 1)
        child.go_on()

        told, first = child.hear()
        assert first > 100
        present = {key: entry.value for key, entry in store.scan().items()}
        assert {key: value for key, value in told.items() if value is not None} == present
        assert told["gone"] is None


# -- URLs --------------------------------------------------------------------------------------------------------------


def test_a_url_names_a_file_from_where_the_process_is_or_from_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for url, name in {
        "sqlite:///relative.db": "relative.db",
        "sqlite:///folder/below.db": "folder/below.db",
        f"sqlite:///{tmp_path}/absolute.db": "absolute.db",
        "sqlite:///with%20space%3F%23%25.db": "with space?#%.db",
        "sqlite:///p%C3%A4th.db?timeout=1.5": "p\xe4th.db",
        "SQLite:///upper.db": "upper.db",
    }.items():
        with open_store(url) as store:
            assert store.set("a", url) == 1
        assert (tmp_path / name).is_file()
        with SQLiteStore(tmp_path / name) as store:
            assert store.get("a") == url


def test_a_store_stays_with_its_file_when_its_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store("sqlite:///state.db") as store:
        (tmp_path / "folder").mkdir()
        monkeypatch.chdir(tmp_path / "folder")
        store.set("a", 1)
    assert (tmp_path / "state.db").is_file()


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("durability=none", "durability"),
        ("durability=", "durability"),
        ("history=99", "history"),
        ("history=many", "history"),
        ("history_seconds=0", "history_seconds"),
        ("history_seconds=inf", "history_seconds"),
        ("history_seconds=nan", "history_seconds"),
        ("timeout=-1", "timeout"),
        ("timeout=soon", "timeout"),
        ("timeout=", "timeout"),
        ("mode=memory", "mode"),
        ("codec=json", "codec"),
        ("path=other.db", "path"),
    ],
)
def test_a_wrong_option_of_a_url_is_named(path: Path, query: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        open_store(f"sqlite:///{path}?{query}")
    assert not path.exists()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite",
        "sqlite:",
        "sqlite://",
        "sqlite:///",
        "sqlite://host/a.db",
        "sqlite:a.db",
        "sqlite:/a.db",
        "sqlite:///a#b.db",
    ],
)
def test_a_url_without_a_path_says_how_to_write_one(url: str) -> None:
    with pytest.raises(ValueError, match="sqlite:///"):
        open_store(url)


async def test_the_async_store_of_a_url_is_the_other_face_of_the_same(path: Path) -> None:
    async with open_async_store(f"sqlite:///{path}") as store:
        assert await store.set("a", 1) == 1
        assert store.sync.aio is store
        assert await asyncio.to_thread(store.sync.get, "a") == 1


# -- the write-ahead log -----------------------------------------------------------------------------------------------


def write_many(store: SQLiteStore, path: Path, writes: int) -> int:
    """Return the size of the largest write-ahead log seen."""
    wal = Path(f"{path}-wal")
    largest = 0
    with store.watch(prefix="", capacity=None) as watch:
        for number in range(writes):
            store.set(f"k{number % 100}", number)
            if number % 100 == 0:
                largest = max(largest, wal.stat().st_size)
        last = store.set("end", 1)
        while watch.get(timeout=PATIENCE).revision < last:
            pass
    return largest


def times_begun_anew(path: Path) -> int:
    """How often the write-ahead log was overwritten from its beginning, because all of it was in the file.

    A reader that is just reading puts that off, so how large the log is by then says nothing.
    """
    return int.from_bytes(Path(f"{path}-wal").read_bytes()[12:16])  # "checkpoint sequence number", of its header


def test_the_write_ahead_log_is_moved_into_the_file_again_and_again(path: Path) -> None:
    with SQLiteStore(path) as store:
        eventually(lambda: write_many(store, path, 500) and times_begun_anew(path) >= 2)
        assert Path(f"{path}-wal").stat().st_size > 4 << 20
        assert path.stat().st_size > 30_000
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def test_writers_that_come_and_go_let_the_write_ahead_log_begin_anew(path: Path) -> None:
    def has_begun_anew_after_a_writer() -> bool:
        with SQLiteStore(path) as writer:
            for number in range(5):
                writer.set("a", f"{number}" * 100_000)
        return times_begun_anew(path) > 0

    with SQLiteStore(path) as store, store.watch("nothing"):
        assert not has_begun_anew_after_a_writer()
        eventually(has_begun_anew_after_a_writer)


@slow
def test_the_write_ahead_log_stays_below_32_megabytes_in_fifty_thousand_writes(path: Path) -> None:
    with SQLiteStore(path) as store:
        assert write_many(store, path, 50_000) < 32 << 20


def test_no_connection_makes_checkpoints_by_itself(path: Path) -> None:
    with SQLiteStore(path) as store, closing(store._file.connect()) as connection:
        assert connection.execute("PRAGMA wal_autocheckpoint").fetchall() == [(0,)]
        assert connection.execute("PRAGMA mmap_size").fetchall() == [(0,)]
