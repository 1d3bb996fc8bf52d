"""The Redis provider: shared by any number of machines. Redis 6.2 and later, Valkey; needs the extra `redis`.

Each commit is one call of one script on the server (`_redis_script.py`), which keeps the entries of a namespace, their
order, their deadlines and a log of changes in five keys with the same hash tag. Whoever watches blocks on the log.

How durable it is, the server decides: see its persistence (`appendonly`), and give it `maxmemory-policy noeviction`.
After a failover or a restart that lost what was acknowledged, watches and bookmarks are told (`Compacted`), and
revisions go on above all that this process has seen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, cast

from redis.connection import Connection, SSLConnection, parse_url
from redis.exceptions import RedisError

from stigmergy.codec import Codec
from stigmergy.errors import DamagedValue, RevisionConflict, Unavailable
from stigmergy.flow import Flow, Scan, Sleep
from stigmergy.hub import new_epoch
from stigmergy.model import Change, Op, Ttl
from stigmergy.providers._engine import AsyncTransport, Done, Encoded, Engine, Found, Page, Place, Stored, Value, limits
from stigmergy.providers._log import LogStore
from stigmergy.providers._redis_script import COMMIT, LOG, READ, SCAN, Script
from stigmergy.providers._redis_wire import NO_SCRIPT, Ask, RedisTransport, Server, Wait, Write, packed

__all__ = ["RedisEngine", "RedisStore", "open_redis"]

_LONGEST_TTL = 2.0**32
"""In seconds, 136 years: the server counts in microseconds, and not beyond 2 ** 53."""
_TICK = 0.1
"""In seconds: how often, at the least, a server looks which clients have blocked for long enough."""
_SHORT_WAIT = 0.01


class RedisStore(LogStore):
    """Shared state on a Redis or Valkey server, for any number of processes and machines.

    Args:
        url: of the server: `redis://`, `rediss://` (TLS), `unix://`; `valkey://` and `valkeys://` mean the same.
        namespace: stores of one namespace share everything, others nothing.
        history: how many of the last changes are remembered for `since=`, at least 100.
        history_seconds: older ones are forgotten as well, now and then as commits come; `None`: only by `history`.
        timeout: how many seconds to wait for a connection, and for an answer.
        codec: what makes values bytes; by default strict JSON (`stigmergy.codec`).

    Deadlines go by the clock of the server. Give every store of a namespace the same `history` and `history_seconds`:
    each commit forgets by those of the store that makes it.

    """

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        namespace: str = "stigmergy",
        history: int = 10_000,
        history_seconds: float | None = None,
        timeout: float = 5.0,
        codec: Codec | None = None,
    ) -> None:
        engine = RedisEngine(
            url, namespace=namespace, history=history, history_seconds=history_seconds, timeout=timeout
        )
        self._name = f"{engine.server.name}/{engine.server.database}, namespace {namespace!r}"
        super().__init__(engine, codec)

    def __repr__(self) -> str:
        return f"<RedisStore {self._name}>"


class RedisEngine(Engine):
    """One namespace on one server. Arguments as of `RedisStore`."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"distributed", "durable", "isolated", "resumable"})

    def __init__(
        self, url: str, *, namespace: str, history: int, history_seconds: float | None, timeout: float
    ) -> None:
        kept = limits(history, history_seconds, timeout)
        self.server = _server(url, kept.timeout)
        entries, *others = (f"{{{_checked(namespace)}}}:{name}".encode() for name in "vkdsm")
        self._log_key = others[2]
        self._history = b"%d" % kept.history, b"%d" % math.ceil((kept.history_seconds or 0) * 1e6)
        self._read = b"*3\r\n" + packed(b"HGET", entries)
        self._keys = packed(b"5", entries, *others)

    def transport(self) -> RedisTransport:
        return RedisTransport(self.server)

    def async_transport(self) -> AsyncTransport:
        from stigmergy.providers._redis_aio import AsyncRedisTransport

        return AsyncRedisTransport(self.server)

    # -- flows ---------------------------------------------------------------------------------------------------------

    def read(self, key: str, seen: Place) -> Flow[Stored | None]:
        encoded = key.encode()
        record = yield Ask(self._read + packed(encoded))
        stored = None if record is None else _stored(record)
        if stored is not None and stored.expires is not None:  # by the clock of the server, whether it is still there
            _, record = yield from self._call(READ, seen, [encoded])
            stored = None if record is None else _stored(record)
        if record is not None and stored is None:
            raise DamagedValue(key)
        return stored

    def scan(self, request: Scan, seen: Place) -> Flow[Found]:
        limit = b"-1" if request.limit is None else b"%d" % min(request.limit, 1 << 31)
        place, *found = yield from self._call(SCAN, seen, [limit, *_wanted(request)])
        pairs = zip(found[::2], found[1::2], strict=True)
        return Found({_text(key): _stored(record) or _DAMAGED for key, record in pairs}, place)

    def commit(self, writes: Sequence[Encoded], seen: Place) -> Flow[Done]:
        arguments: list[bytes] = []
        for op, key, value, expected, ttl, writer, meta in writes:
            condition = b"" if expected is None else b"%d" % expected
            arguments += _OPS[op], key.encode(), condition, _ttl(ttl), _body(value, writer, meta)
        answer = yield from self._call(COMMIT, seen, arguments, Write)
        if isinstance(answer[0], Place):
            place, *revisions = answer
            return Done(tuple([None if each == b"-" else int(each) for each in revisions]), place)
        what, number, *actual = answer
        write = writes[number]
        if what == b"damaged":
            raise DamagedValue(write.key)
        raise RevisionConflict(write.key, cast(int, write.if_revision), int(actual[0]))

    def log(self, after: int, seen: Place) -> Flow[Page]:
        first = b"%d-0" % min(after + 1, 1 << 53)
        place, oldest, due, *logged = yield from self._call(LOG, seen, [first])
        oldest = place.revision + 1 if oldest is None else int(oldest)
        changes = [] if after < oldest - 1 else [_change(*each) for each in logged if _is_ours(each[0], place.revision)]
        return Page(changes, place, oldest, None if due is None else max(0.0, float(due) / 1e6))

    def wait(self, place: Place, seconds: float) -> Flow[None]:
        # A server that does nothing else is late by a tick. What is due before that is waited for here.
        blocking = min(seconds - _TICK, self.server.timeout / 2)
        if blocking < 0.001:
            yield from Sleep(min(max(seconds, 0.0), _SHORT_WAIT))
            return
        milliseconds, last = b"%d" % (blocking * 1e3), b"%d-0" % place.revision
        command = packed(b"XREAD", b"BLOCK", milliseconds, b"COUNT", b"1", b"STREAMS", self._log_key, last)
        yield Wait(b"*8\r\n" + command)

    def _call(self, script: Script, seen: Place, arguments: list[bytes], kind: type[Ask] = Ask) -> Flow[list[Any]]:
        """Call `script`. Its answer, in which a `Place` stands for what `done` begins with."""
        epoch, revision, seen_at = seen.epoch.encode(), seen.revision, b"%d" % _microseconds(seen.time)
        number, rest = 14 + len(arguments), packed(*self._history, *arguments)
        command = packed(b"EVALSHA", script.digest)
        while True:
            common = packed(new_epoch().encode(), epoch, b"%d" % revision, seen_at)
            answers = yield kind(b"*%d\r\n%b%b%b%b" % (number, command, self._keys, common, rest))
            words, *answer = [answers] if type(answers) is bytes else answers
            word, *more = words.split(b" ")
            if word == b"done":
                place = Place(_text(more[0]), int(more[1]), int(more[2]) / 1e6)
                return [place, *more[3:], *answer]
            if word == b"refused":
                raise Unavailable(f"{self.server.name} refused ({_reason(answer[0])})")
            if word == NO_SCRIPT[0]:
                command = packed(b"EVAL", script.source)  # from which the server learns it
            elif word == b"ahead":
                revision = int(answer[0])  # as if that had been seen, which means that a new life begins
            elif word != b"again":
                return [word, *answer]


# -- what is stored ----------------------------------------------------------------------------------------------------

_RECORD = re.compile(rb"(\d{1,16}) (\d{1,16}) (\d{1,16}) (-|\d{1,16}) ([^\n]*)\n?")
_DAMAGED = Stored(Value("", b""), 0, 0, None, 0.0, None, None)
"""What cannot be read at all. No codec has this name, so that whoever asks for its value is told."""
_OPS: Mapping[Op | None, bytes] = {Op.SET: b"s", Op.DELETE: b"d", None: b"c"}
_LOGGED = {b"s": Op.SET, b"d": Op.DELETE, b"x": Op.DELETE}


def _body(value: Value | None, writer: str | None, meta: str | None) -> bytes:
    codec, data = ("", b"") if value is None else value
    return _line(codec, writer, meta) + data


def _line(codec: str, writer: str | None, meta: str | None) -> bytes:
    """What precedes a value, all ASCII."""
    return _plain_line(codec) if writer is None and meta is None else json.dumps([codec, writer, meta]).encode() + b"\n"


@lru_cache(16)
def _plain_line(codec: str) -> bytes:
    return json.dumps([codec, None, None]).encode() + b"\n"


def _stored(record: bytes) -> Stored | None:
    """What `record` says; `None` if it is damaged from the start."""
    parts = _RECORD.match(record)
    if parts is None:
        return None
    revision, commit, time, expires, line = parts.groups()
    codec, writer, meta = _read_line(line) if len(line) <= 256 else _read_line.__wrapped__(line)
    deadline = None if expires == b"-" else int(expires) / 1e6
    value = Value(codec, record[parts.end() :])
    return Stored(value, int(revision), int(commit), writer, int(time) / 1e6, deadline, meta)


@lru_cache(1024)
def _read_line(line: bytes) -> tuple[str, str | None, str | None]:
    try:
        codec, writer, meta = json.loads(line)
        for text in (codec, writer, meta):
            if text is not None:
                text.encode()
    except (AttributeError, RecursionError, TypeError, ValueError):
        return "", None, None
    return codec or "", writer, meta


def _is_ours(name: bytes, head: int) -> bool:
    """Whether the entry `name` of the stream is a record of the log up to the revision `head`."""
    revision, _, sequence = name.partition(b"-")
    return sequence == b"0" and int(revision) <= head


def _change(name: bytes, fields: list[bytes]) -> Change:
    named = dict(zip(fields[::2], fields[1::2], strict=False))
    revision = int(name.partition(b"-")[0])
    key, op = _text(named.get(b"k", b"")), _LOGGED.get(named.get(b"o", b""), Op.SET)
    new, old = _stored(named.get(b"n", b"")) or _DAMAGED, named.get(b"p")
    before = (_stored(old) or _DAMAGED) if old else None
    old_value, old_revision = (None, 0) if before is None else (before.value, before.revision)
    value = None if op is Op.DELETE else new.value
    commit, expired = new.commit or revision, named.get(b"o") == b"x"
    return Change(
        op, key, value, old_value, revision, old_revision, commit, new.writer, new.time, expired, 0, cast(Any, new.meta)
    )


def _wanted(request: Scan) -> Iterable[bytes]:
    """The keys of `request`, sorted, or the range of keys."""
    prefix, keys, after = request.prefix, request.keys, request.after
    if keys is not None:
        return b"keys", *(key.encode() for key in sorted(keys) if after is None or key > after)
    first = b"(" + after.encode() if after is not None and after >= prefix else b"[" + prefix.encode()
    # In UTF-8 keys are ordered as by code points, and no byte is 0xff.
    return b"range", first, b"(" + prefix.encode() + b"\xff"


def _ttl(ttl: Ttl) -> bytes:
    if ttl is None:
        return b""
    return b"keep" if ttl == "keep" else b"%d" % max(1, _microseconds(min(float(ttl), _LONGEST_TTL)))


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _reason(refusal: bytes) -> str:
    """The word that says why the server does not write; before it, there may be where in the script that was."""
    words = re.findall(r"\b[A-Z]{3,}\b", _text(refusal))
    return words[0] if words else "ERR"


# -- where it is -------------------------------------------------------------------------------------------------------

_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "history": int,
    "history_seconds": float,
    "namespace": str,
    "timeout": float,
}
_OF_THE_DRIVER = frozenset({"client_name", "db", "password", "socket_keepalive", "username"})
"""Parameters of a URL that are the driver's, besides those of TLS."""


def open_redis(url: str, **options: Any) -> RedisStore:
    """What `open_store` calls: `redis://localhost:6379/0?namespace=team`, `valkeys://user:password@host/0`."""
    from urllib.parse import parse_qsl, urlencode

    address, _, query = url.partition("?")
    others = []
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            others.append((name, text))
            continue
        try:
            options.setdefault(name, _OPTIONS[name](text))
        except ValueError:
            raise ValueError(f"option {name!r} of the URL cannot be {text!r}") from None
    return RedisStore(f"{address}?{urlencode(others)}" if others else address, **options)


def _server(url: str, timeout: float) -> Server:
    """What `url` names. Raises `ValueError`, which shows nothing of it but the names of parameters."""
    name, _, rest = url.partition("://")
    scheme = _SCHEMES.get(name.lower())
    if scheme is None:
        raise ValueError(f"the URL of a Redis server begins with one of {', '.join(_SCHEMES)}")
    _check_address(scheme, rest)
    arguments = dict[str, Any](cast(Any, parse_url)(f"{scheme}://{rest}"))
    connection_class = arguments.pop("connection_class", Connection)
    arguments |= {"protocol": 2, "socket_timeout": timeout, "socket_connect_timeout": timeout}
    try:
        connection_class(**arguments)
    except (RedisError, TypeError, ValueError) as error:
        raise ValueError("the driver refuses the parameters of this URL") from error
    return Server(connection_class, arguments, timeout)


def _check_address(scheme: str, rest: str) -> None:
    """Raise `ValueError` for what the driver would take as something else, or pass on to whoever connects."""
    from urllib.parse import parse_qsl, urlsplit

    # A password that is not quoted may be anywhere.
    nonsense = ValueError("this is not the URL of a Redis server, or its password is not percent-encoded")
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        meant = bool(re.fullmatch(r"/.+" if scheme == "unix" else r"/?\d*", parts.path)) and parts.port != 0
    except ValueError:
        raise nonsense from None
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if not meant or parts.fragment or not all(map(str.isidentifier, names)):
        raise nonsense
    for name in names:
        if name not in _OF_THE_DRIVER and not (scheme == "rediss" and name in _parameters(SSLConnection)):
            raise ValueError(f"a Redis store has no option {name!r} in its URL")


def _parameters(connection_class: type[Any]) -> set[str]:
    from inspect import signature

    return {name for name in signature(connection_class.__init__).parameters if name.startswith("ssl_")}


def _checked(namespace: str) -> str:
    if not namespace or re.search(r"[\x00-\x1f\x7f-\x9f{}]", namespace):
        raise ValueError(f"a namespace is not empty and has no braces and no control characters: not {namespace!r}")
    return namespace
