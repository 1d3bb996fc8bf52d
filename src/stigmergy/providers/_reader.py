"""The reader of a store's log: one thread, which hands what others wrote to the store's watches."""

from __future__ import annotations

import logging
from _thread import allocate_lock, get_ident, start_new_thread
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from queue import Empty, SimpleQueue
from random import uniform
from threading import RLock
from typing import Any, Protocol

from stigmergy.errors import OutcomeUnknown, Unavailable
from stigmergy.flow import Flow, OpenWatch, run
from stigmergy.hub import Hub
from stigmergy.model import Change
from stigmergy.providers._engine import Engine, Page, Place, Transport
from stigmergy.subscription import LatestState

__all__ = ["Reader"]

_LONGEST_WAIT = 2.0
"""In seconds. An engine that lost its past without a word is found out after so long."""
_LONGEST_PAUSE = 2.0


class Readable(Protocol):
    """What is read: an engine, from the places that were seen of it."""

    engine: Engine

    def head(self) -> Flow[Place]:
        """Where the log ends."""
        ...

    def current(self, request: OpenWatch) -> Flow[tuple[Place, list[Change]]]:
        """What there is now, as changes, and when that is."""
        ...

    def deliver(self, change: Change) -> Change:
        """A change as a reader's own."""
        ...


class Reader:
    """Owns the place in the log up to which the watches of one store were told; runs while there are any.

    It is a thread in both colours, with a connection of its own: a task would die with its loop.
    """

    def __init__(self, log: Readable) -> None:
        self.hub = Hub(
            lock=RLock(), settle=_nothing, key=attrgetter("key"), changed=_same, deliver=log.deliver, history=0
        )
        self._log = log
        self._place = Place("", 0, 0.0)
        self._running = False
        self._stopped = False
        self._thread = 0
        self._transport: Transport | None = None
        self._pauses: SimpleQueue[None] = SimpleQueue()

    def start(self, perform: Callable[[Flow[Place]], Place]) -> None:
        """Have it run from a place no later than now. A watch must be joined already, for it rests without any."""
        if not self._running:
            place = perform(self._log.head())
            self.hub.locked(self._start_while_locked, place)

    def stop(self) -> None:
        """Let it end soon. Waits for nothing, so that finalisers may call it."""
        self._stopped = True
        self._pauses.put(None)
        if self._transport is not None:
            self._transport.interrupt()

    def close(self) -> None:
        """End it."""
        self.stop()
        moment = allocate_lock()
        moment.acquire()
        while self._running and self._thread != get_ident():
            self.stop()  # again, for it may have been about to connect
            moment.acquire(timeout=0.005)

    def abandon(self) -> None:
        """In a child process, which has no such thread: part with it, and with the parent's watches."""
        if self._transport is not None:
            self._transport.abandon()
        self._transport, self._running, self._pauses = None, False, SimpleQueue()
        self.hub.live_on_in_child(RLock())

    def _start_while_locked(self, place: Place) -> None:
        if not self._running and not self._stopped:  # else somebody else was faster, from a place as good
            self._place = place
            self.hub.begin(place.epoch, place.revision)
            self._transport = self._log.engine.transport()
            self._running = True
            try:
                start_new_thread(self._follow, (self._transport,))
            except BaseException:
                self._running = False
                raise

    def _rest_while_locked(self) -> bool:
        """Whether it may end, because nobody watches."""
        self._running = self._running and self.hub.is_watched
        return not self._running

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _follow(self, transport: Transport) -> None:
        self._thread = get_ident()
        failures = 0
        try:
            while not self._stopped:
                try:
                    if self._read(transport):
                        return
                    failures = 0
                except Exception as error:  # also what nobody expects: watches must not fall silent for it
                    failures += 1
                    self._fail(error, failures)
        finally:
            transport.close()
            if self._stopped:
                self._running = False

    def _read(self, transport: Transport) -> bool:
        """Read on, then wait for more. Returns whether nobody needs that any more."""
        engine, place = self._log.engine, self._place
        page = run(engine.log(place.revision, place), transport.request)
        self._go_on(page, transport)
        if self._place.revision < page.head.revision:
            return False
        if not page.changes and self.hub.locked(self._rest_while_locked):
            return True
        seconds = _LONGEST_WAIT if page.due is None else min(page.due, _LONGEST_WAIT)
        if seconds > 0:
            run(engine.wait(self._place, seconds), transport.request)
        return False

    def _go_on(self, page: Page, transport: Transport) -> None:
        epoch, revision, _ = self._place
        follows = [change.revision for change in page.changes] == [
            *range(revision + 1, revision + 1 + len(page.changes))
        ]
        if page.head.epoch != epoch or not follows or (not page.changes and page.head.revision != revision):
            self._restart(page, transport)
        elif page.changes:
            self.hub.locked(self._publish_while_locked, page.changes)
            last = page.changes[-1]
            self._place = Place(epoch, last.revision, last.time)

    def _publish_while_locked(self, changes: list[Change]) -> None:
        for change in changes:
            self.hub.publish(change.revision, change.key, change)

    def _restart(self, page: Page, transport: Transport) -> None:
        """Go on behind a gap, or in another life of the engine."""
        current: dict[LatestState, tuple[int, list[Change]]] = {}
        while missing := [each for each in self.hub.locked(self.hub.latest) if each not in current]:
            for each in missing:
                flow = self._log.current(OpenWatch(each.keys, each.prefix, latest=True))
                place, changes = run(flow, transport.request)
                current[each] = place.revision, changes
        epoch, revision, _ = self._place = page.head
        self.hub.locked(self.hub.restart, epoch, revision, page.oldest, current)

    def _fail(self, error: Exception, failures: int) -> None:
        if self._stopped:
            return
        if failures == 1:
            expected = isinstance(error, (Unavailable, OutcomeUnknown))
            logging.getLogger("stigmergy").warning(
                "watches hear nothing for now, trying again: %s", error, exc_info=None if expected else error
            )
        with suppress(Empty):
            self._pauses.get(timeout=uniform(0, min(0.02 * 2**failures, _LONGEST_PAUSE)))


def _nothing() -> None:
    return None


def _same(change: Any) -> Any:
    return change
