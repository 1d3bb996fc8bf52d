"""The reader of a store's log: one thread, which publishes to the store's watches what was written by others.

It owns one place: the epoch and the revision up to which it has published. It asks for the records behind it, and
publishes them only if they follow on it without a gap: then nothing is missing, whatever became of notifications. Where
they do not follow, the backend has lost its past, or has forgotten the records: `Hub.restart` ends the watches of every
change with `Compacted`, and those of the latest state go on from a scan.

It runs while there are watches, and only then. The race: it finds no watch and is about to end, while another thread
opens one and finds it running. So it gives up `_transport`, which says that it runs, under the hub's lock, in the same
step as it finds no watch; and a watch that is opened joins the hub first, and looks whether it runs afterwards.
"""

from __future__ import annotations

import logging
from _thread import allocate_lock, get_ident, start_new_thread
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import attrgetter
from queue import Empty, SimpleQueue
from random import uniform
from threading import RLock
from time import monotonic
from typing import Any, Protocol

from stigmergy._core.fork import after_fork_in_child
from stigmergy._core.helpers import start_helper
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
_LONGEST_CLOSE = 0.2


class Readable(Protocol):
    """What is read: an engine, from the places that were seen of it."""

    engine: Engine

    def head(self) -> Flow[Place]:
        """Where the log ends."""
        ...

    def page(self, after: int) -> Flow[Page]:
        """The next records after a revision."""
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
        self._stopped = False
        self._thread = 0
        self._transport: Transport | None = None
        """What the thread that is to run was started with; `None` while there is none."""
        self._pauses: SimpleQueue[None] = SimpleQueue()
        after_fork_in_child(self, Reader._begin_in_child)

    def start(self, perform: Callable[[Flow[Place]], Place]) -> None:
        """Have it run, from a place no later than now. A watch must have joined before, or it may be about to end."""
        if self._transport is None:
            place = perform(self._log.head())
            self.hub.locked(self._start_while_locked, place)

    def stop(self) -> None:
        """Let it end soon. Waits for nothing, so that finalisers may call it."""
        self._stopped = True
        self._pauses.put(None)
        transport = self._transport
        if transport is not None:
            transport.interrupt()

    def close(self) -> None:
        """End it. If it is in the midst of what nothing but a timeout ends, connecting say, it ends itself later."""
        self.stop()
        moment = allocate_lock()
        moment.acquire()
        deadline = monotonic() + _LONGEST_CLOSE
        while self._transport is not None and self._thread != get_ident() and monotonic() < deadline:
            self.stop()  # again, for it may have been about to connect
            moment.acquire(timeout=0.005)

    def _begin_in_child(self) -> None:
        """Part with the thread, which a child process does not have, and with the parent's watches."""
        if self._transport is not None:
            self._transport.abandon()
        self._transport, self._pauses = None, SimpleQueue()
        self.hub.live_on_in_child(RLock())

    def _start_while_locked(self, place: Place) -> None:
        if self._transport is None and not self._stopped:  # else somebody else was faster, from a place as good
            self._place = place
            self.hub.begin(place.epoch, place.revision)
            self._transport = transport = self._log.engine.transport()
            try:
                start_helper(start_new_thread, self._follow, (transport,))
            except BaseException:
                self._transport = None  # and if the thread was started nevertheless, it ends
                raise

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _follow(self, transport: Transport) -> None:
        self._thread = get_ident()
        failures = 0
        try:
            while self._transport is transport and not self._stopped:
                try:
                    self._read(transport)
                    failures = 0
                except Exception as error:  # also what nobody expects: watches must not fall silent for it
                    failures += 1
                    with suppress(Exception):  # of those who handle the log of the program
                        self._fail(error, failures)
        finally:
            transport.close()
            if self._transport is transport:
                self._transport = None

    def _read(self, transport: Transport) -> None:
        """Read on, then wait for more, unless nobody needs that any more."""
        page = run(self._log.page(self._place.revision), transport.request)
        self._go_on(page, transport)
        if self._place.revision < page.head.revision or self.hub.locked(self._rests_while_locked, transport):
            return
        seconds = _LONGEST_WAIT if page.due is None else min(page.due, _LONGEST_WAIT)
        if seconds > 0 and not self._stopped:
            run(self._log.engine.wait(self._place, seconds), transport.request)

    def _rests_while_locked(self, transport: Transport) -> bool:
        """Whether it ends, because there is no watch: decided and said in one step."""
        if self._transport is transport and not self.hub.is_watched:
            self._transport = None
        return self._transport is not transport

    def _go_on(self, page: Page, transport: Transport) -> None:
        epoch, revision, _ = self._place
        if not page.follows(epoch, revision):
            self._restart(page, transport)
        elif page.changes:
            self.hub.locked(self._publish_while_locked, page.changes, transport)

    def _publish_while_locked(self, changes: Sequence[Change], transport: Transport) -> None:
        if self._transport is transport:
            for change in changes:
                self.hub.publish(change.revision, change.key, change)
            self._place = Place(self._place.epoch, changes[-1].revision, changes[-1].time)

    def _restart(self, page: Page, transport: Transport) -> None:
        """Go on behind a gap, or in another life of the engine: with the oldest record that there is."""
        current: dict[LatestState, tuple[int, list[Change]]] = {}
        # A hole is behind older records: whoever begins with those meets it again, and again.
        is_hole = page.head.epoch == self._place.epoch and page.oldest - 1 <= self._place.revision
        place = page.head if is_hole else Place(page.head.epoch, page.oldest - 1, 0.0)
        while not self.hub.locked(self.hub.restart, place.epoch, place.revision, page.oldest, current):
            for each in self.hub.locked(self.hub.latest):
                flow = self._log.current(OpenWatch(each.keys, each.prefix, latest=True))
                there, changes = run(flow, transport.request)
                current[each] = there.revision, changes
        if self._transport is transport:
            self._place = place

    def _fail(self, error: Exception, failures: int) -> None:
        if self._stopped:
            return
        if failures == 1:
            expected = isinstance(error, (Unavailable, OutcomeUnknown))
            logging.getLogger("stigmergy").warning(
                "watches hear nothing for now, trying again: %s", error, exc_info=None if expected else error
            )
        with suppress(Empty):
            self._pauses.get(timeout=uniform(0, min(0.02 * 2 ** min(failures, 10), _LONGEST_PAUSE)))


def _nothing() -> None:
    return None


def _same(change: Any) -> Any:
    return change
