"""Files of the SQLite provider: connections, transactions, checkpoints, and what goes wrong with them."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import RLock
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

from stigmergy._core.fork import never_release
from stigmergy.errors import OutcomeUnknown, StateError, Unavailable
from stigmergy.flow import Operation
from stigmergy.hub import new_epoch
from stigmergy.providers._engine import Request
from stigmergy.providers._sqlite_fork import enter, join, leave

__all__ = ["Ask", "Connection", "File", "Transport", "result_code"]

T = TypeVar("T")

_APPLICATION = 0x53746967
"""Marks a file as ours: "Stig"."""
_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE meta (epoch TEXT NOT NULL, revision INTEGER NOT NULL, time REAL NOT NULL)",
    """CREATE TABLE entries (
        key TEXT PRIMARY KEY NOT NULL, codec TEXT NOT NULL, data BLOB NOT NULL, revision INTEGER NOT NULL,
        last INTEGER NOT NULL, writer TEXT, time REAL NOT NULL, expires REAL, meta TEXT
    )""",
    "CREATE INDEX deadlines ON entries (expires, key) WHERE expires IS NOT NULL",
    """CREATE TABLE log (
        revision INTEGER PRIMARY KEY, op TEXT NOT NULL, key TEXT NOT NULL, codec TEXT, data BLOB, old_codec TEXT,
        old_data BLOB, old_revision INTEGER NOT NULL, last INTEGER NOT NULL, writer TEXT, time REAL NOT NULL,
        expired INTEGER NOT NULL, meta TEXT
    )""",
)
_CHECKPOINT_BYTES = 4 << 20
_LOOK_AT_WAL_EVERY = 16
"""Transactions."""
_LOOK_EVERY = 0.1
_SHORTEST_POLL = 0.001
_LONGEST_POLL = 0.025


class Connection(sqlite3.Connection):
    """A connection to a `File`."""

    data_version = -1
    """Of the file when its log was last read here."""
    file_id: tuple[int, int] | None = None
    looked = 0.0
    """When it was last seen that the file is still at its path."""

    def __del__(self) -> None:
        # An interrupt may have struck with it in hand. From 3.13 on SQLite's own finaliser warns of what is not closed.
        with suppress(sqlite3.Error):
            self.close()


class Ask(Request[T]):
    """One transaction, or one statement: `function(connection, *args)`."""

    __slots__ = ("args", "function")
    function: Callable[..., T]
    args: tuple[Any, ...]

    def __init__(self, function: Callable[..., T], *args: Any) -> None:
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "args", args)


class File:
    """A database file, and how it is used by one store."""

    def __init__(self, path: Path, durability: str, timeout: float) -> None:
        self.path = path
        self._durability = durability
        self._timeout = timeout
        self._written = 0
        self._shared = _files.setdefault(os.path.realpath(path), _Shared())

    # -- transactions --------------------------------------------------------------------------------------------------

    def write(self, connection: Connection, function: Callable[..., T], *args: Any) -> T:
        """Return `function(connection, *args)`, committed; what it raises rolls back."""
        result = self._write(connection, function, *args)
        if self._written % _LOOK_AT_WAL_EVERY == 0:  # from the first on: a process may make no other
            self._checkpoint(connection)
        self._written += 1
        return result

    def _write(self, connection: Connection, function: Callable[..., T], *args: Any) -> T:
        deadline = time.monotonic() + self._timeout
        shared = self._shared
        with shared.lock:
            if shared.writer is not None and _is_writing(shared.writer):
                raise Unavailable("this thread is in the midst of a write to the same file, which was interrupted")
            if time.monotonic() > deadline:
                raise Unavailable("others in this process kept the file locked for too long")
            shared.writer = connection
            try:
                connection.execute("BEGIN IMMEDIATE")
                result = function(connection, *args)
                _commit(connection)
                return result
            finally:
                connection.rollback()  # nothing, after a commit
                shared.writer = None

    def _checkpoint(self, connection: Connection) -> None:
        """Move what is in the write-ahead log into the file, if that has grown.

        Only while holding the lock for writing, so that never two connections do so at once: SQLite before 3.51.3 can
        lose a commit then (its "WAL-reset bug"). SQLite's own checkpoints, which take no such lock, are off.
        """
        with suppress(OSError):
            if os.stat(f"{self.path}-wal").st_size > _CHECKPOINT_BYTES:
                with suppress(sqlite3.Error, StateError):  # somebody else's turn, then
                    self._write(connection, self._checkpoint_while_locked)

    def _checkpoint_while_locked(self, _: Connection) -> None:
        other = self.connect()
        try:
            other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        finally:
            other.close()

    # -- waiting -------------------------------------------------------------------------------------------------------

    def poll(self, connection: Connection, seconds: float) -> None:
        """Return when somebody else has committed since `connection.data_version`, or after so long."""
        calls: SimpleQueue[None] = SimpleQueue()
        self._shared.waiting.append(calls)
        try:
            deadline, pause = time.monotonic() + seconds, _SHORTEST_POLL
            while connection.execute("PRAGMA data_version").fetchone()[0] == connection.data_version:
                left = deadline - time.monotonic()
                if left <= 0 or not _passes(calls, min(pause, left)):
                    return
                pause = min(pause * 1.1, _LONGEST_POLL)
        finally:
            self._shared.waiting.remove(calls)

    def wake(self) -> None:
        """Let those who wait in this process look at once."""
        self._shared.wake()

    # -- connections ---------------------------------------------------------------------------------------------------

    def connect(self) -> Connection:
        """A new connection to a file that is one of ours. Raises `sqlite3.Error`, `Unavailable`."""
        if self._shared.is_spoiled:
            raise Unavailable(f"{self.path} was in use when this process was forked: open it in another one")
        before = self._file_id()
        connection = sqlite3.connect(
            self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False, factory=Connection
        )
        # Another file may take the place of this one at any moment. If the id were that of the file which is there
        # afterwards, a connection to the deleted file would pass for one to the new file, for ever.
        connection.file_id = before or self._file_id()
        connection.text_factory = _text
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def is_there(self, connection: Connection) -> bool:
        """Whether the file of `connection` is still the one at the path: what is written to a deleted one is lost."""
        found = self._file_id()
        if found is None:
            return False
        connection.looked = time.monotonic()
        return connection.file_id == found

    def _file_id(self) -> tuple[int, int] | None:
        """What tells the file at the path from any other; None if there is none."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def spoil(self) -> None:
        """Refuse to be used in this child process: SQLite has in memory what it did in the parent."""
        self._shared.is_spoiled = True
        never_release(self._shared)  # SQLite does not forget either

    def begin_in_child(self) -> None:
        """In a child process, part with the threads of the parent."""
        self._shared.reset()

    def _prepare(self, connection: Connection) -> None:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA synchronous = {self._durability}")
        version = self._version(connection)
        deadline = time.monotonic() + self._timeout
        while version == 0:
            try:
                self._create(connection)
            except sqlite3.OperationalError as error:
                # Setting WAL does not heed the timeout; several processes may open a fresh file at once.
                if result_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.001, 0.01))
            version = self._version(connection)
        if version > _SCHEMA_VERSION:
            raise Unavailable(f"{self.path} was written by a newer version of this library (schema {version})")

    def _version(self, connection: Connection) -> int:
        """The version of the schema; 0 if there is none yet."""
        # In one statement, for another process may create it between two.
        version, application, tables = connection.execute(
            "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_schema)"
            " FROM pragma_user_version, pragma_application_id"
        ).fetchone()
        if application != _APPLICATION and (version or tables):
            raise Unavailable(f"{self.path} is a database of something else")
        return cast("int", version)

    def _create(self, connection: Connection) -> None:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise Unavailable(f"{self.path} is where SQLite cannot write ahead (journal mode {mode})")
        self.write(connection, self._create_while_locked)

    def _create_while_locked(self, connection: Connection) -> None:
        if self._version(connection) == 0:
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES (?, 0, 0.0)", (new_epoch(),))
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


class _Shared:
    """What the stores of one process share that have opened the same file."""

    is_spoiled = False
    """Whether this is a child process that was forked while a thread was inside SQLite."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, in a child process."""
        self.lock = RLock()
        """Who writes. The writers of one process queue here; SQLite would let them sleep, and try again."""
        self.writer: Connection | None = None
        self.waiting: list[SimpleQueue[None]] = []
        """Those who are to be called after a commit."""

    def wake(self) -> None:
        """Let those who wait look at once."""
        for calls in self.waiting.copy():
            calls.put(None)


_files: WeakValueDictionary[str, _Shared] = WeakValueDictionary()


class Transport:
    """Connections to one file, each used by one thread at a time."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._idle: list[Connection] = []
        self._closed = False
        join(self)

    def request(self, request: Operation[Any]) -> Any:
        """Make `request`. Foreign errors become ours here."""
        assert isinstance(request, Ask)
        return self.call(request.function, *request.args)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(connection, *args)`."""
        connection: Connection | None = None
        here = object()
        try:
            enter(here)
            connection = self._take()
            result = function(connection, *args)
        except sqlite3.Error as error:
            _close(connection)
            raise _translated(error, self._file.path) from error
        except StateError:
            self._give_back(connection)
            raise
        except (TypeError, ValueError) as error:  # a row is missing, or has something else in it
            _close(connection)
            raise Unavailable(f"{self._file.path}: the file is damaged") from error
        except BaseException:
            _close(connection)
            raise
        else:
            self._give_back(connection)
            return result
        finally:
            leave(here)

    def interrupt(self) -> None:
        """Same as `_engine.Transport.interrupt`."""
        self._file.wake()

    def close(self) -> None:
        """Same as `_engine.Transport.close`."""
        # Only connections that nobody is in: closing one that another thread is in crashes the interpreter.
        self._closed = True
        self.close_idle()

    def close_idle(self) -> None:
        """Same as `_sqlite_fork.Party.close_idle`."""
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()

    def spoil(self) -> None:
        """Same as `_sqlite_fork.Party.spoil`."""
        self._file.spoil()

    def abandon(self) -> None:
        """Same as `_engine.Transport.abandon`."""
        never_release(self._idle)
        self._idle = []
        self._file.begin_in_child()

    def _take(self) -> Connection:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                break  # another thread was as quick
            if time.monotonic() - connection.looked < _LOOK_EVERY or self._file.is_there(connection):
                return connection
            connection.close()
        return self._file.connect()

    def _give_back(self, connection: Connection | None) -> None:
        if connection is not None:
            self._idle.append(connection)
        if self._closed:
            self.close()


def result_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code, the low byte of the extended one; 0 for an error of the module's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _text(data: bytes) -> str | bytes:
    """Text as it is stored. What is not UTF-8 stays bytes: damage of its own row, and not of all that are read."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _commit(connection: Connection) -> None:
    try:
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        if result_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
            raise
        raise OutcomeUnknown(f"the commit was interrupted: {error}") from error


def _is_writing(connection: Connection) -> bool:
    try:
        return connection.in_transaction
    except sqlite3.ProgrammingError:  # it is closed
        return False


def _close(connection: Connection | None) -> None:
    if connection is not None:
        connection.close()


def _passes(calls: SimpleQueue[None], seconds: float) -> bool:
    """Wait so long; `False` if somebody called."""
    try:
        calls.get(timeout=seconds)
    except Empty:
        return True
    return False


def _translated(error: sqlite3.Error, path: Path) -> Unavailable:
    return Unavailable(f"{path}: {_REASONS.get(result_code(error), str(error))}")


_REASONS: Mapping[int, str] = {
    sqlite3.SQLITE_BUSY: "others kept the file locked for too long",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened, or its folder cannot be written to",
    sqlite3.SQLITE_CORRUPT: "the file is damaged",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_NOTADB: "the file is not a database",
    sqlite3.SQLITE_READONLY: "the file, or its folder, cannot be written to",
}
