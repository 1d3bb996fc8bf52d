"""The SQLite provider: durable, and shared by the processes of one machine. Needs nothing but the standard library.

Entries, their log and the revision are in one file, written in one `BEGIN IMMEDIATE` transaction per commit, in WAL
mode. Whoever watches in another process polls `PRAGMA data_version`, one millisecond after something happened, less
and less often while nothing does; in the same process a commit wakes it at once. Not for network file systems.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, cast

from stigmergy.codec import Codec
from stigmergy.errors import DamagedValue, RevisionConflict, StoreClosed
from stigmergy.flow import Flow, Scan
from stigmergy.hub import new_epoch
from stigmergy.keys import check_key
from stigmergy.model import Change, Op
from stigmergy.providers._engine import Done, Encoded, Engine, Found, Limits, Page, Place, Stored, Value, limits
from stigmergy.providers._log import LogStore
from stigmergy.providers._sqlite_file import Ask, Connection, File, Transport, result_code

__all__ = ["SQLiteStore", "open_sqlite"]

T = TypeVar("T")

_SET, _DELETE = Op.SET, Op.DELETE  # looked up once: on CPython 3.11 a member of an enum takes longer than a call
_ENTRY = "codec, data, revision, last, writer, time, expires, meta"
_PAGE = 500
_PAGE_BYTES = 4 << 20
_TRIM_EVERY = 64
_VALUE = "SELECT codec, data, expires FROM entries WHERE key = ?"
_INSERT = f"INSERT INTO entries ({_ENTRY}, key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REPLACE = f"UPDATE entries SET {_ENTRY.replace(',', ' = ?,')} = ? WHERE key = ?"
# The last record of the log is the head, so that a commit has one row less to write (benchmark: set, sqlite).
_HEAD = """
    SELECT epoch, coalesce(log.revision, meta.revision), coalesce(CAST(log.time AS REAL), meta.time),
        (SELECT min(expires) FROM entries WHERE expires < 9e999)
    FROM meta LEFT JOIN log ON log.revision = (SELECT max(revision) FROM log)
"""
_NO_VALUE = (None, None)
_UNKNOWN = -1
"""The revision of an entry whose own is damaged: no condition holds, and as an old value it is damaged, too."""
_ABSENT = (None, None, 0, None)
_DAMAGED = Value("", b"")


class SQLiteStore(LogStore):
    """Shared state in a file, for any number of processes of one machine.

    Args:
        path: of the file; it is made if it is not there, its folder is not. SQLite keeps two more beside it.
        durability: "normal" survives whatever kills the process; "full" also what kills the machine, for an fsync per
            commit.
        history: how many of the last changes are remembered for `since=`, at least 100.
        history_seconds: older ones are forgotten as well, now and then as commits come; `None`: only by `history`.
        timeout: how many seconds to wait for others who write, before `Unavailable`.
        codec: what makes values bytes; by default strict JSON (`stigmergy.codec`).

    Deadlines go by the clock of the host, but never back. A commit that another process makes reaches the watches here
    within a few milliseconds, or 25 after a rest.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Literal["normal", "full"] = "normal",
        history: int = 10_000,
        history_seconds: float | None = None,
        timeout: float = 5.0,
        codec: Codec | None = None,
    ) -> None:
        if os.fspath(path) in ("", ":memory:"):
            raise ValueError("a SQLite store has a file: for one in memory there is MemoryStore")
        if durability not in ("normal", "full"):
            raise ValueError(f"durability must be 'normal' or 'full', not {durability!r}")
        kept = limits(history, history_seconds, timeout)
        self._file = File(Path(path).absolute(), durability, kept.timeout)
        super().__init__(_Engine(self._file, kept), codec)
        self._file_transport = cast("Transport", self._transport)

    def get(self, key: str, default: Any = None) -> Any:
        key = check_key(key)
        if self.is_closed:
            raise StoreClosed
        row = self._file_transport.call(_row, _VALUE, key)
        if row is None:
            return default
        codec, data, expires = row
        return self._log.decoded(key, _value(codec, data)) if expires is None else super().get(key, default)

    def __repr__(self) -> str:
        return f"<SQLiteStore {str(self._file.path)!r}, SQLite {sqlite3.sqlite_version}>"


class _Head(NamedTuple):
    """Where a transaction begins, by which clock, and when the first deadline is."""

    epoch: str
    revision: int
    time: float
    due: float
    now: float

    @property
    def place(self) -> Place:
        return Place(self.epoch, self.revision, self.time)


class _Engine(Engine):
    capabilities: ClassVar[frozenset[str]] = frozenset({"distributed", "durable", "isolated", "resumable"})

    def __init__(self, file: File, kept: Limits) -> None:
        self._file = file
        self._kept = kept
        self._trimmed = 0
        """The revision at which the log was trimmed here."""

    def transport(self) -> Transport:
        return Transport(self._file)

    # -- flows: each a single request, but for a read that meets an expired entry --------------------------------------

    def read(self, key: str, seen: Place) -> Flow[Stored | None]:
        stored: Stored | None = yield Ask(_read, key)
        if stored is not None and stored.expires is not None and stored.expires <= time.time():
            stored = yield Ask(self._picture, seen, _read_in, key)
        return stored

    def scan(self, request: Scan, seen: Place) -> Flow[Found]:
        found: Found = yield Ask(self._picture, seen, _scan, request)
        return found

    def commit(self, writes: Sequence[Encoded], seen: Place) -> Flow[Done]:
        done: Done = yield Ask(self._commit, writes, seen)
        self._file.wake()
        return done

    def log(self, after: int, seen: Place) -> Flow[Page]:
        return (yield from Ask(self._log, after, seen))

    def wait(self, place: Place, seconds: float) -> Flow[None]:
        return (yield from Ask(self._file.poll, seconds))

    # -- transactions --------------------------------------------------------------------------------------------------

    def _picture(self, connection: Connection, seen: Place, look: Callable[..., T], *args: Any) -> T:
        """Return `look(connection, head, *args)` in a transaction in which nothing is past its deadline.

        It writes only if it must.
        """
        try:
            connection.execute("BEGIN")
            head = _head(connection)
            if head.due > head.now and not _is_lost(connection, head, seen):
                return look(connection, head, *args)
        finally:
            connection.rollback()
        result: T = self._file.write(connection, self._enter_and_look, seen, look, *args)
        return result

    def _enter_and_look(self, connection: Connection, seen: Place, look: Callable[..., T], *args: Any) -> T:
        return look(connection, self._enter(connection, seen), *args)

    def _log(self, connection: Connection, after: int, seen: Place) -> Page:
        # Before the transaction: what is committed after this look, and so perhaps not in the page, changes it.
        (connection.data_version,) = connection.execute("PRAGMA data_version").fetchone()
        return self._picture(connection, seen, _page, after)

    def _commit(self, connection: Connection, writes: Sequence[Encoded], seen: Place) -> Done:
        return self._file.write(connection, self._commit_while_locked, writes, seen)

    def _commit_while_locked(self, connection: Connection, writes: Sequence[Encoded], seen: Place) -> Done:
        head = self._enter(connection, seen)
        alien = seen.epoch not in ("", head.epoch)
        before = [_before(connection, write, alien) for write in writes]
        last, revisions = head.revision, list[int | None]()
        for write, old in zip(writes, before, strict=True):
            changes = write.op is _SET or (write.op is _DELETE and old[2] != 0)
            last += changes
            revisions.append(last if changes else None)
        if last == head.revision:
            return Done(tuple(revisions), head.place)
        for write, old, revision in zip(writes, before, revisions, strict=True):
            if revision is not None:
                _write(connection, write, old, revision, last, head.now)
        self._trim(connection, last, head.now)
        return Done(tuple(revisions), Place(head.epoch, last, head.now))

    def _enter(self, connection: Connection, seen: Place) -> _Head:
        """Begin a new life if the file lost its past, and make due deadlines into changes."""
        head = _head(connection)
        if _is_lost(connection, head, seen):
            connection.execute("DELETE FROM log")
            life = new_epoch(), max(head.revision, seen.revision)
            connection.execute("UPDATE meta SET epoch = ?, revision = ?, time = 0.0", life)
            head = _head(connection)
        if head.due > head.now:
            return head
        revision = _expire(connection, head)
        self._trim(connection, revision, head.now)
        return _Head(head.epoch, revision, head.now, inf, head.now)

    def _trim(self, connection: Connection, revision: int, now: float) -> None:
        """Forget records that are too many, or too old, from time to time. The last one stays: it was just written."""
        if abs(revision - self._trimmed) < _TRIM_EVERY:
            return
        self._trimmed = revision
        connection.execute("DELETE FROM log WHERE revision <= ?", (revision - self._kept.history,))
        if self._kept.history_seconds is not None:
            some = "SELECT revision, time FROM log ORDER BY revision LIMIT 10000"
            old = f"SELECT max(revision) FROM ({some}) WHERE time < ?"
            connection.execute(f"DELETE FROM log WHERE revision <= ({old})", (now - self._kept.history_seconds,))


def open_sqlite(url: str, **options: Any) -> SQLiteStore:
    """What `open_store` calls: `sqlite:///relative/state.db`, `sqlite:////absolute/state.db?durability=full`."""
    from urllib.parse import parse_qsl, unquote, urlsplit

    parts = urlsplit(url)
    if not url[len("sqlite:") :].startswith("///") or len(parts.path) < 2 or parts.fragment:
        raise ValueError("a SQLite store is named by a path: sqlite:///state.db, or sqlite:////absolute/state.db")
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise ValueError(f"a SQLite store has no option {name!r} in its URL")
        try:
            options.setdefault(name, _OPTIONS[name](text))
        except ValueError:
            raise ValueError(f"option {name!r} of the URL cannot be {text!r}") from None
    return SQLiteStore(unquote(parts.path[1:]), **options)


_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "durability": str,
    "history": int,
    "history_seconds": float,
    "timeout": float,
}


# -- statements --------------------------------------------------------------------------------------------------------


def _head(connection: Connection) -> _Head:
    epoch, revision, then, due = connection.execute(_HEAD).fetchone()
    return _Head(epoch, revision, then, inf if due is None else due, max(time.time(), then))


def _is_lost(connection: Connection, head: _Head, seen: Place) -> bool:
    """Whether the file is not what it was when `seen` was seen: another one, or an older copy of it."""
    if head.revision < seen.revision:
        return True
    if head.epoch != seen.epoch or head.place == seen or not seen.time:
        return False
    row = connection.execute("SELECT time FROM log WHERE revision = ?", (seen.revision,)).fetchone()
    return row is not None and row[0] != seen.time


def _expire(connection: Connection, head: _Head) -> int:
    """Make due deadlines into changes; return the revision of the last."""
    revision = head.revision
    due = "SELECT rowid, key, codec, data, revision FROM entries WHERE expires <= ? ORDER BY expires, key"
    for row, key, *old in connection.execute(due, (head.now,)).fetchall():
        revision += 1
        _record(connection, revision, Op.DELETE, key, _NO_VALUE, old, revision, None, head.now, expired=True)
        connection.execute("DELETE FROM entries WHERE rowid = ?", (row,))  # the key may be no text that it has
    return revision


def _row(connection: Connection, query: str, key: str) -> tuple[Any, ...] | None:
    try:
        return connection.execute(query, (key,)).fetchone()  # type: ignore[no-any-return]
    except sqlite3.DatabaseError as error:
        if result_code(error) != sqlite3.SQLITE_CORRUPT:
            raise
        raise DamagedValue(key) from error


def _read(connection: Connection, key: str) -> Stored | None:
    row = _row(connection, f"SELECT {_ENTRY} FROM entries WHERE key = ?", key)
    return None if row is None else _stored(row)


def _read_in(connection: Connection, head: _Head, key: str) -> Stored | None:
    return _read(connection, key)


def _before(connection: Connection, write: Encoded, alien: bool) -> tuple[Any, ...]:
    """What is at the key of `write`: codec, data, revision and deadline. Raises `RevisionConflict`.

    The revisions that an `alien` knows are of another life: no condition on one holds.
    """
    found = connection.execute("SELECT codec, data, revision, expires FROM entries WHERE key = ?", (write.key,))
    before: tuple[Any, ...] = found.fetchone() or _ABSENT
    if type(before[2]) is not int:
        before = (*_NO_VALUE, _UNKNOWN, None)
    if write.if_revision is not None and (write.if_revision != before[2] or (alien and before[2])):
        raise RevisionConflict(write.key, write.if_revision, before[2])
    return before


def _write(
    connection: Connection, write: Encoded, before: tuple[Any, ...], revision: int, last: int, now: float
) -> None:
    op, key, value, _, ttl, writer, meta = write
    codec, data, old_revision, deadline = before
    if op is _DELETE:
        connection.execute("DELETE FROM entries WHERE key = ?", (key,))
    else:
        assert value is not None
        expires = deadline if ttl == "keep" else None if ttl is None else now + ttl
        row = (*value, revision, last, writer, now, expires, meta, key)
        connection.execute(_REPLACE if old_revision else _INSERT, row)
    old = (codec, data, old_revision)
    _record(connection, revision, cast("Op", op), key, value or _NO_VALUE, old, last, writer, now, meta=meta)


def _record(
    connection: Connection,
    revision: int,
    op: Op,
    key: str,
    value: tuple[Any, Any],
    old: Sequence[Any],
    last: int,
    writer: str | None,
    now: float,
    *,
    expired: bool = False,
    meta: str | None = None,
) -> None:
    row = (revision, op, key, *value, *old, last, writer, now, expired, meta)
    connection.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def _scan(connection: Connection, head: _Head, request: Scan) -> Found:
    rows = _rows_below(connection, request) if request.keys is None else _rows_at(connection, request, request.keys)
    return Found({_name(key): _stored(row) for key, *row in rows}, head.place)


def _rows_at(connection: Connection, request: Scan, keys: Iterable[str]) -> list[tuple[Any, ...]]:
    query = f"SELECT key, {_ENTRY} FROM entries WHERE key = ?"
    wanted = sorted(key for key in keys if request.after is None or key > request.after)
    found = [row for key in wanted for row in connection.execute(query, (key,))]
    return found[: request.limit]


def _rows_below(connection: Connection, request: Scan) -> Iterable[tuple[Any, ...]]:
    # UTF-8 never has a byte 0xff: behind every key with the prefix, and before every other one that is behind it.
    beyond = request.prefix.encode() + b"\xff"
    where = "key >= ? AND key < CAST(? AS TEXT) AND key > ?"
    query = f"SELECT key, {_ENTRY} FROM entries WHERE {where} ORDER BY key LIMIT ?"
    return connection.execute(query, (request.prefix, beyond, request.after or "", request.limit or -1))


def _page(connection: Connection, head: _Head, after: int) -> Page:
    (oldest,) = connection.execute("SELECT min(revision) FROM log").fetchone()
    changes = _changes(connection, after) if oldest is not None and oldest - 1 <= after < head.revision else []
    due = None if head.due == inf else head.due - head.now
    return Page(changes, head.place, head.revision + 1 if oldest is None else oldest, due)


def _changes(connection: Connection, after: int) -> list[Change]:
    """A page of the log: so many records, or so many bytes."""
    changes, size = list[Change](), 0
    for row in connection.execute(f"SELECT * FROM log WHERE revision > ? ORDER BY revision LIMIT {_PAGE}", (after,)):
        changes.append(_change(row))
        size += sum(len(each) for each in row if isinstance(each, bytes))
        if size > _PAGE_BYTES:
            break
    return changes


def _change(row: Sequence[Any]) -> Change:
    revision, op, key, codec, data, old_codec, old_data, old, last, writer, then, expired, meta = row
    if not (_is_sound(old, last, writer, then) and type(expired) is int):
        return Change(_SET, _name(key), _DAMAGED, None, revision, 0, revision, None, 0.0, False, 0, None)
    value = None if op == _DELETE else _value(codec, data)
    old_value = _value(old_codec, old_data) if old else None
    kind = _DELETE if op == _DELETE else _SET
    return Change(kind, _name(key), value, old_value, revision, old, last, writer, then, bool(expired), 0, meta)


def _stored(row: Sequence[Any]) -> Stored:
    codec, data, revision, last, writer, then, expires, meta = row
    if not (_is_sound(revision, last, writer, then) and (expires is None or type(expires) is float)):
        return Stored(_DAMAGED, 0, 0, None, 0.0, None, None)
    return Stored(_value(codec, data), revision, last, writer, then, expires, meta)


def _name(key: Any) -> str:
    return key if type(key) is str else repr(key)


def _value(codec: Any, data: Any) -> Value:
    return Value(codec, data) if type(codec) is str and type(data) is bytes else _DAMAGED


def _is_sound(revision: Any, last: Any, writer: Any, then: Any) -> bool:
    """Whether each is of its type: SQLite keeps whatever somebody else has put there."""
    return (
        type(revision) is int and type(last) is int and type(then) is float and (writer is None or type(writer) is str)
    )
