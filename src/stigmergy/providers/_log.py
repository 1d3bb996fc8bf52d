"""Stores over an engine that keeps a log: both colours, made of the same flows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar, cast
from weakref import finalize

from stigmergy._core.fork import after_fork_in_child
from stigmergy.aio import AsyncStore
from stigmergy.checks import check_writes
from stigmergy.codec import JSON, Codec, check_codec
from stigmergy.errors import Compacted, DamagedValue, InvalidValue, RevisionConflict, StoreClosed
from stigmergy.flow import Flow, OpenWatch, Scan, arun, run
from stigmergy.hub import matching, parse_bookmark
from stigmergy.keys import check_key
from stigmergy.model import Change, Check, Delete, Entry, Meta, Op, Set, Snapshot, Write
from stigmergy.providers._engine import AsyncTransport, Encoded, Engine, Page, Place, Stored, Transport, Value
from stigmergy.providers._reader import Reader
from stigmergy.store import Store
from stigmergy.subscription import Subscription
from stigmergy.threads import Threads
from stigmergy.watch import Watch

__all__ = ["AsyncLogStore", "LogStore"]

T = TypeVar("T")

_BEYOND = 2**53 - 1
"""After this revision there are no records."""


class Past(NamedTuple):
    """What a watch begins with: the changes that match after the revision `since`, up to a place."""

    changes: list[Change]
    since: int
    place: Place
    meanwhile: tuple[Change, ...] = ()
    """Those among them that came while the watch was opened. As live ones they count against its capacity."""


class Log:
    """An engine and a codec, and what is done with them, as flows."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self.engine = engine
        self.seen = Place("", 0, 0.0)
        """The furthest place that anybody here has seen: what the engine loses behind it does not go unnoticed."""
        self._codec = check_codec(codec)
        self._codecs = {each.id: each for each in (JSON(), codec)}

    # -- the operations ------------------------------------------------------------------------------------------------

    def get(self, key: str, default: Any) -> Flow[Any]:
        stored = yield from self.engine.read(key, self.seen)
        return default if stored is None else self.decoded(key, stored.value)

    def get_entry(self, key: str) -> Flow[Entry | None]:
        stored = yield from self.engine.read(key, self.seen)
        if stored is not None and not self.seen.epoch:
            # Nothing has told yet in which life its revision is a condition; and what was read may be of another one.
            yield from self.head()
            stored = yield from self.engine.read(key, self.seen)
        return None if stored is None else self.entry(key, stored)

    def scan(self, request: Scan) -> Flow[Snapshot]:
        entries, place = yield from self.engine.scan(request, self.seen)
        self._see(place)
        return Snapshot(entries, self.entry, place.revision, f"{place.epoch}.{place.revision}")

    def commit(self, writes: Sequence[Encoded]) -> Flow[tuple[int | None, ...]]:
        try:
            revisions, place = yield from self.engine.commit(writes, self.seen)
        except RevisionConflict as conflict:
            if conflict.actual == conflict.expected:  # as it was in another life
                yield from self.head()
            raise
        self._see(place)
        return revisions

    # -- what watches begin with ---------------------------------------------------------------------------------------

    def head(self) -> Flow[Place]:
        """Where the log ends."""
        return (yield from self.page(_BEYOND)).head

    def page(self, after: int) -> Flow[Page]:
        """What follows `after`, judged by all that anybody here has seen."""
        page = yield from self.engine.log(after, self.seen)
        self._see(page.head)
        return page

    def past(self, request: OpenWatch, so_far: Past | None = None) -> Flow[Past]:
        """What a watch begins with, going on from what is known of it `so_far`. Raises `Compacted`."""
        if so_far is not None:
            with suppress(Compacted):  # else it is of no use any more, behind a gap or in a life before
                more = yield from self._since(request, f"{so_far.place.epoch}.{so_far.place.revision}")
                return so_far._replace(place=more.place, meanwhile=(*so_far.meanwhile, *more.changes))
        if request.latest:
            place, changes = yield from self.current(request)
            return Past(changes, place.revision, place)
        if request.since is None:
            place = yield from self.head()
            return Past([], place.revision, place)
        return (yield from self._since(request, request.since))

    def current(self, request: OpenWatch) -> Flow[tuple[Place, list[Change]]]:
        """What there is now, as changes in the order of revisions."""
        scan = Scan(keys=request.keys) if request.prefix is None else Scan(request.prefix)
        entries, place = yield from self.engine.scan(scan, self.seen)
        self._see(place)
        changes = [_present(key, stored) for key, stored in entries.items()]
        return place, sorted(changes, key=lambda change: change.revision)

    def _since(self, request: OpenWatch, since: int | str) -> Flow[Past]:
        epoch, after = parse_bookmark(since) if isinstance(since, str) else (None, since)
        revision, matches, changes = after, matching(request), list[Change]()
        while True:
            page = yield from self.page(revision)
            if epoch is None:
                epoch = page.head.epoch
            if not page.follows(epoch, revision):
                raise Compacted(since, page.oldest)
            changes += [change for change in page.changes if matches(change.key)]
            if not page.changes:
                return Past(changes, after, page.head)
            revision = page.changes[-1].revision

    def _see(self, place: Place) -> None:
        seen = self.seen
        if place.epoch != seen.epoch or place.revision > seen.revision:
            self.seen = place

    # -- values --------------------------------------------------------------------------------------------------------

    def encoded(self, writes: Iterable[Write]) -> list[Encoded]:
        """`writes` as the engine takes them. Raises as `checks.check_writes` does, and `InvalidValue`."""
        return [self._encoded(write) for write in check_writes(writes)]

    def _encoded(self, write: Write) -> Encoded:
        if isinstance(write, Set):
            key, value, expected, ttl, writer, meta = write
            return Encoded(Op.SET, key, self._value(key, value), expected, ttl, writer, _as_json(meta))
        if isinstance(write, Delete):
            return Encoded(Op.DELETE, write.key, None, write.if_revision, None, write.writer, _as_json(write.meta))
        return Encoded(None, write.key, None, write.if_revision, None, None, None)

    def _value(self, key: str, value: Any) -> Value:
        try:
            return Value(self._codec.id, self._codec.encode(value))
        except Exception as error:
            raise InvalidValue(key, type(value).__name__) from error

    def decoded(self, key: str, value: Value) -> Any:
        """`value` as a reader's own. Raises `DamagedValue`."""
        try:
            if value.codec not in self._codecs:
                raise LookupError(f"it was written with the codec {value.codec!r:.50}: pass that one as codec=")
            return self._codecs[value.codec].decode(value.data)
        except Exception as error:
            raise DamagedValue(key) from error

    def entry(self, key: str, stored: Stored) -> Entry:
        """`stored` as a reader's own."""
        value, revision, _, writer, time, expires, meta = stored
        return Entry(self.decoded(key, value), revision, writer, time, expires, _as_meta(key, meta))

    def deliver(self, change: Change) -> Change:
        """`change` as a reader's own."""
        value = None if change.op is Op.DELETE else self.decoded(change.key, change.value)
        old_value = self.decoded(change.key, change.old_value) if change.old_revision else None
        return change._replace(value=value, old_value=old_value, meta=_as_meta(change.key, change.meta))


class LogStore(Store):
    """A store over an engine; several of them, in any number of processes, may share one place.

    One that is dropped and was not closed lets go of its connections, and warns, as files do: `ResourceWarning`.
    """

    is_closed = True
    """Until it was made, too."""

    def __init__(self, engine: Engine, codec: Codec | None = None) -> None:
        self.capabilities = engine.capabilities
        self._log = Log(engine, JSON() if codec is None else codec)
        self._transport = engine.transport()
        after_fork_in_child(self._transport, _abandon)
        self._reader = Reader(self._log)
        self._hub = self._reader.hub
        self._finalizer = finalize(self, _let_go, self._reader, self._transport)
        self.is_closed = False

    def get(self, key: str, default: Any = None) -> Any:
        return self._run(self._log.get(check_key(key), default))

    def get_entry(self, key: str) -> Entry | None:
        return self._run(self._log.get_entry(check_key(key)))

    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return self._run(self._log.scan(Scan(prefix, keys=keys, after=after, limit=limit)))

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return self._run(self._log.commit(self._log.encoded(writes)))

    def open_watch(self, request: OpenWatch) -> Watch:
        # Join, start, fetch, begin, in this order. The reader runs as long as anything has joined. What is fetched then
        # reaches at least as far as the reader had come; if that has gone on meanwhile, what lies between is fetched as
        # well. So nothing is missing between what was fetched and what the reader brings from then on.
        subscription = self._hub.subscription(request)
        watch = Watch(subscription, self)
        try:
            self._hub.locked(self._join_while_locked, subscription)
            self._reader.start(self._run)
            past, begun = None, False
            while not begun:  # once, as a rule: the reader would have to publish between the fetch and the look
                restarts = self._hub.restarts
                past = self._run(self._log.past(request, past))
                begun = self._hub.locked(self._begin_while_locked, subscription, past, restarts)
        except BaseException:
            watch.close()
            raise
        return watch

    def close(self) -> None:
        self.is_closed = True
        self._hub.locked(self._hub.close)
        self._reader.close()
        self._finalizer()
        face: Any = self._faces.get("aio")
        if face is not None:
            face.close_soon()

    def __del__(self) -> None:
        if not self.is_closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)  # noqa: B028, there is none of use

    def _run(self, flow: Flow[T]) -> T:
        if self.is_closed:
            flow.close()
            raise StoreClosed
        return run(flow, self._transport.request)

    def _join_while_locked(self, subscription: Subscription) -> None:
        if self.is_closed:
            raise StoreClosed
        self._hub.join(subscription)

    def _begin_while_locked(self, subscription: Subscription, past: Past, restarts: int) -> bool:
        """Whether the watch goes on from `past`. Not if the reader has come further."""
        if subscription.ended:
            raise StoreClosed
        epoch, revision, _ = past.place
        if self._hub.is_beyond(epoch, revision, restarts):
            return False
        subscription.begin(epoch, past.since, past.changes, past.meanwhile, revision)
        return True

    def _to_async(self) -> AsyncStore:
        transport = self._log.engine.async_transport()
        return super()._to_async() if transport is None else AsyncLogStore(self, self._log, transport)


class AsyncLogStore(AsyncStore):
    """The async face of a `LogStore` whose engine has an async transport. That store opens its watches, in a thread."""

    def __init__(self, store: LogStore, log: Log, transport: AsyncTransport) -> None:
        self._store = self._faces["sync"] = store
        self.capabilities = store.capabilities
        self._log = log
        self._transport = transport
        after_fork_in_child(transport, _abandon)
        self._threads = Threads()

    async def get(self, key: str, default: Any = None) -> Any:
        return await self._run(self._log.get(check_key(key), default))

    async def get_entry(self, key: str) -> Entry | None:
        return await self._run(self._log.get_entry(check_key(key)))

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return await self._run(self._log.scan(Scan(prefix, keys=keys, after=after, limit=limit)))

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return await self._run(self._log.commit(self._log.encoded(writes)))

    async def open_watch(self, request: OpenWatch) -> Watch:
        return await self._threads.open_watch(self._store, request)

    async def close(self) -> None:
        await self._transport.close()
        self._threads.close()  # and so the next call has a thread of its own: others may be opening watches still
        await self._threads.call(self._store.close)

    def close_soon(self) -> None:
        """For the other face: same as `close`, waiting for nothing."""
        self._transport.close_soon()
        self._threads.close()

    async def _run(self, flow: Flow[T]) -> T:
        if self._store.is_closed:
            flow.close()
            raise StoreClosed
        return await arun(flow, self._transport.request)


def _present(key: str, stored: Stored) -> Change:
    value, revision, commit, writer, time, _, meta = stored
    return Change(Op.SET, key, value, None, revision, 0, commit, writer, time, False, 0, cast("Meta | None", meta))


def _as_json(meta: Meta | None) -> str | None:
    return None if meta is None else json.dumps(dict(meta))


def _as_meta(key: str, text: object) -> Meta | None:
    if text is None:
        return None
    try:
        meta = json.loads(cast("str", text))
    except (TypeError, ValueError) as error:
        raise DamagedValue(key) from error
    if not isinstance(meta, dict):
        raise DamagedValue(key)
    return meta


def _abandon(transport: Transport | AsyncTransport) -> None:
    transport.abandon()


def _let_go(reader: Reader, transport: Transport) -> None:
    reader.stop()
    transport.close()
