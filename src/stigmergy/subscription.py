"""Subscription: the buffer of one watch, which a hub fills and a `Watch` empties, with the hub's lock held.

Atomic sections. A signal handler or a finaliser can run between two bytecodes of a thread that holds the lock, and use
the same store. The lock is re-entrant, or that would deadlock; so it does not keep the two apart. What does is one rule
for this module, the hub and the memory store: stores to memory that belong together stand in a section without a call,
marked `atomic: no bytecode boundary`. CPython runs handlers and finalisers at calls, at allocations and at the end of a
loop's round, so a `while` condition belongs to what is before it; and the finaliser of a value when its last reference
goes, so what a section drops is held by a local. A section begins by looking whether all that was found out before is
still true; one call into C may stand last.

The race that it prevents, in `EveryChange.put` for example: were there a call between `self.seen = revision` and
`buffer.append(change)`, a handler could write there. Its newer change would be buffered first, this one after it, and
the reader would receive them in the wrong order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from sys import maxsize
from time import time
from typing import TYPE_CHECKING, Any, Protocol

from stigmergy.errors import Lagged, StateError
from stigmergy.model import Change, Op

if TYPE_CHECKING:
    from stigmergy.flow import OpenWatch
    from stigmergy.hub import Hub

__all__ = ["EveryChange", "LatestState", "Subscription", "Waiter", "last_fill"]

_SET = Op.SET
_NOTHING: deque[Change] = deque()
_UNKNOWN: tuple[Any, int] = (None, 0)


class Waiter(Protocol):
    """Somebody parked."""

    def wake(self) -> bool:
        """Let it run on. `False`: it may never run, or somebody else has woken it; wake another one as well."""
        ...


last_fill: list[object] = [None]
"""Has another object whenever a buffer has become full, anywhere: an async write that sees that lets readers run.

One for all, so that it holds for every store that has a hub. No attribute of a class: to set one costs CPython what it
has learned of the class, and 3.13 soon stops learning (benchmark: fan-out after 10,000 fills)."""


class Subscription(ABC):
    """A watch as its hub sees it. All is used with the hub's lock held, but waking, the waiters, and hints as such."""

    __slots__ = ("ended", "epoch", "error", "hub", "keys", "loaded", "prefix", "seen", "taken", "until", "waiters")

    dropped: int

    def __init__(self, hub: Hub, request: OpenWatch) -> None:
        self.hub = hub
        self.epoch = hub.epoch
        """The life of the store that the revisions belong to."""
        self.keys = request.keys
        self.prefix = request.prefix
        self.loaded: Any
        """What is to be delivered of the time before the watch was opened."""
        self.seen = maxsize
        """The revision up to which changes were put in; until the hub says where to begin, none is put in."""
        self.taken = 0
        """The revision up to which changes were taken out."""
        self.until = 0
        """The revision up to which everything was put in when the watch ended."""
        self.ended = False
        self.error: StateError | None = None
        self.waiters: list[Waiter] = []  # a deque takes 600 bytes when it is empty, and nearly always it is

    @property
    def has_begun(self) -> bool:
        """Whether it was said where to begin."""
        return self.seen != maxsize or self.ended

    def begin(self, epoch: str, since: int, past: Iterable[Change], meanwhile: Iterable[Change], revision: int) -> None:
        """Deliver `past`, all that matches after `since`; what came `meanwhile`; and then what is beyond `revision`.

        With the lock held, and only the thread that reads the log puts changes in: nothing comes in between.
        """
        self.epoch = epoch
        self.loaded = self.load(past)
        self.taken = self.seen = since
        for change in meanwhile:
            self.put(change)
        self.seen = revision

    @abstractmethod
    def load(self, changes: Iterable[Change]) -> Any:
        """Return `changes` in the form of `loaded`."""

    @abstractmethod
    def put(self, change: Change) -> None:
        """Buffer `change`, unless it was put in before."""

    @abstractmethod
    def take(self) -> Change | None:
        """Remove and return the oldest change, as stored; `None` if there is none."""

    @abstractmethod
    def first(self) -> Change | None:
        """The change that `take` would remove."""

    @abstractmethod
    def is_idle(self) -> bool:
        """Whether there is nothing to take, and may be later. A hint, if it is asked without the lock."""

    def revision(self) -> int:
        """The revision up to which everything was delivered or counted."""
        first = self.first()
        return self.reached() if first is None else first.revision - 1

    def reached(self) -> int:
        """The revision up to which everything that matches was put in."""
        if self.ended:
            return self.until
        return self.hub.revision if self.seen == maxsize else max(self.hub.revision, self.seen)

    def bookmark(self) -> str:
        """The name of the moment of `revision`."""
        return f"{self.epoch}.{self.revision()}"

    def end(self, error: StateError | None = None) -> None:
        """Take no more changes. Whoever reads past the last one gets `error`, or `WatchClosed`."""
        if not self.ended:
            self.until = self.reached()
            self.seen = maxsize
            self.error = error
            self.ended = True

    def wake(self) -> None:
        """Wake one of those who wait: a hint to look again. Waiters whose loop is dead are dropped."""
        while self.waiters:
            try:
                waiter = self.waiters[0]
            except IndexError:
                return  # another thread was as quick
            woken = waiter.wake()
            # Removed only now: an interrupt between the two must not lose a waiter that was not woken yet.
            self.remove(waiter)
            if woken:
                return

    def wake_all(self) -> None:
        """Wake everybody who waits."""
        for waiter in self.waiters.copy():
            waiter.wake()
            self.remove(waiter)

    def remove(self, waiter: Waiter) -> None:
        """Forget `waiter`, if it is there."""
        with suppress(ValueError):
            self.waiters.remove(waiter)

    @property
    def of(self) -> str:
        """What is watched, for people."""
        return ", ".join(map(repr, self.keys)) if self.prefix is None else f"prefix={self.prefix!r}"

    def __repr__(self) -> str:
        return self.of + (", ended" if self.ended else "")


class EveryChange(Subscription):
    """Every change, in a buffer of `capacity` in which the oldest gives way to the newest."""

    __slots__ = ("buffer", "capacity", "dropped", "missed", "raises", "warned")

    def __init__(self, hub: Hub, request: OpenWatch) -> None:
        super().__init__(hub, request)
        self.capacity = maxsize if request.capacity is None else request.capacity
        self.raises = request.overflow == "raise"
        self.loaded: deque[Change] = _NOTHING
        self.buffer: deque[Change] = deque()
        self.missed = 0
        """How many changes gave way since the last one was taken out of the buffer."""
        self.dropped = 0
        self.warned = False

    def load(self, changes: Iterable[Change]) -> deque[Change]:
        return deque(changes) or _NOTHING

    def put(self, change: Change) -> None:
        buffer, revision = self.buffer, change.revision
        room = self.capacity - len(buffer)
        oldest = buffer[0] if room <= 0 and buffer else None
        if revision > self.seen:  # atomic: no bytecode boundary
            self.seen = revision
            if oldest is not None and buffer and buffer[0] is oldest:
                del buffer[0]
                self.missed += 1
                self.dropped += 1
            buffer.append(change)
        if oldest is not None:
            self.hub.to_release.append(oldest)
            if not self.warned:
                self.hub.to_wake.append(self)
        if self.waiters:  # looked at behind the append: see parking in `watch.py`
            self.hub.to_wake.append(self)
        if room <= 1:
            last_fill[0] = object()

    def take(self) -> Change | None:
        loaded, buffer = self.loaded, self.buffer
        if loaded:  # atomic: no bytecode boundary
            change = loaded[0]
            del loaded[0]
            self.taken = change.revision
            return change
        while (oldest := buffer[0] if buffer else None) is not None:
            missed = self.missed
            lagged = Lagged(missed) if missed and self.raises else None
            taken = oldest._replace(missed=missed) if missed else oldest
            if buffer and buffer[0] is oldest and self.missed == missed:  # atomic: no bytecode boundary
                self.missed = 0
                if lagged is not None:
                    self.taken = oldest.revision - 1
                    raise lagged
                del buffer[0]
                self.taken = oldest.revision
                return taken
        return None

    def is_idle(self) -> bool:
        return not (self.buffer or self.loaded or self.ended)

    def first(self) -> Change | None:
        return self.loaded[0] if self.loaded else self.buffer[0] if self.buffer else None

    def revision(self) -> int:
        return self.taken if self.missed and not self.loaded else super().revision()

    def wake(self) -> None:
        if self.dropped and not self.warned and self._is_first_to_warn():
            import logging  # takes as long as a third of the package, and most watches are never full

            logging.getLogger("stigmergy").warning(
                "a watch of %s is full (%d changes): the oldest gives way to the newest", self.of, self.capacity
            )
        super().wake()

    def _is_first_to_warn(self) -> bool:
        with self.hub.lock:
            first, self.warned = not self.warned, True
            return first


class LatestState(Subscription):
    """The latest change of each key, at most one a key: a newer one takes the place of an older one."""

    __slots__ = ("delivered",)

    dropped = 0

    def __init__(self, hub: Hub, request: OpenWatch) -> None:
        super().__init__(hub, request)
        self.loaded: OrderedDict[str, Change] = OrderedDict()
        self.delivered: dict[str, tuple[Any, int]] = {}
        """The value and the revision that the reader knows of each key that it knows to be there."""

    def load(self, changes: Iterable[Change]) -> OrderedDict[str, Change]:
        return OrderedDict((change.key, change) for change in changes)

    def put(self, change: Change) -> None:
        pending, key = self.loaded, change.key
        replaced = pending.get(key)
        if replaced is not None:
            self.hub.to_release.append(replaced)
        if change.revision > self.seen:  # atomic: no bytecode boundary
            self.seen = change.revision
            if key in pending:
                del pending[key]
            if change.op is _SET or key in self.delivered:
                pending[key] = change
        if self.waiters:
            self.hub.to_wake.append(self)

    def take(self) -> Change | None:
        pending, delivered = self.loaded, self.delivered
        while (change := self.first()) is not None:
            key = change.key
            known = delivered.get(key, _UNKNOWN)
            knows = (change.value, change.revision)
            taken = change._replace(old_value=known[0], old_revision=known[1])
            if key in pending and pending[key] is change:  # atomic: no bytecode boundary
                del pending[key]
                self.taken = change.revision
                if change.op is _SET:
                    delivered[key] = knows
                elif key in delivered:
                    del delivered[key]
                return taken
        return None

    def is_idle(self) -> bool:
        return not (self.loaded or self.ended)

    def first(self) -> Change | None:
        while self.loaded:
            try:
                return next(iter(self.loaded.values()))
            except (RuntimeError, StopIteration):
                continue  # a handler or finaliser changed it between the two calls
        return None

    def restart(self, revision: int, current: Sequence[Change]) -> None:
        """Go on from the state that is `current` at `revision`, in another life, or after a gap in this one.

        What was delivered and is no longer there gets a `DELETE` at `revision`.
        """
        delivered = self.delivered
        there = self.load(each for each in current if delivered.get(each.key) != (each.value, each.revision))
        gone = delivered.keys() - {each.key for each in current}
        for key in sorted(gone):
            there[key] = _gone(key, revision)
        self.epoch, self.loaded, self.seen = self.hub.epoch, there, revision
        self.hub.to_wake.append(self)


def _gone(key: str, revision: int) -> Change:
    return Change(Op.DELETE, key, None, None, revision, 0, revision, None, time(), False, 0, None)
