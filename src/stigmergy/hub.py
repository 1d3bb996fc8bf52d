"""Hub: which watches does a change reach, and the ring of recent changes.

A store owns one hub and one lock, and calls the hub with the lock held; what must not happen under the lock is put off
until its release: waking and logging in `to_wake`, releasing values in `to_release`. Everything here can be interrupted
and called again, on the same thread too: see the atomic sections in `subscription.py`.
"""

from __future__ import annotations

import os
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from stigmergy.errors import Compacted
from stigmergy.model import Change
from stigmergy.subscription import EveryChange, LatestState, Subscription
from stigmergy.watch import Watch

if TYPE_CHECKING:
    from stigmergy.flow import OpenWatch

__all__ = ["Hub", "matching", "new_epoch", "parse_bookmark"]

T = TypeVar("T")

_Topics = dict[str, dict[Subscription, None]]


class Hub:
    """The watches of one store.

    `settle` finishes, with the lock held, a commit that was interrupted, and returns what is to be kept alive until the
    lock is released. `key` is the key of a record of the store's log; `changed` makes a record a `Change`, once for all
    watches that it reaches; `deliver` makes that the reader's own, outside the lock.
    """

    __slots__ = (
        "_changed",
        "_key",
        "_sorted",
        "chains",
        "deliver",
        "epoch",
        "history",
        "keys",
        "left",
        "lock",
        "prefixes",
        "restarts",
        "revision",
        "ring",
        "settle",
        "to_release",
        "to_wake",
    )

    def __init__(
        self,
        *,
        lock: AbstractContextManager[object],
        settle: Callable[[], object],
        key: Callable[[Any], str],
        changed: Callable[[Any], Change],
        deliver: Callable[[Change], Change],
        history: int,
    ) -> None:
        self.lock = lock
        self.settle = settle
        self.deliver = deliver
        self.revision = 0
        """The revision up to which everything was published."""
        self.to_wake: deque[Subscription] = deque()
        """Whose readers to wake once the lock is released."""
        self.to_release: list[object] = []
        """What to keep alive until the lock is released: it may have a finaliser, and that is a program's own code. (A
        handler that uses the store while its thread holds the lock releases it there: it is such code itself.)"""
        self.left: deque[Subscription] = deque()
        """Subscriptions to be removed; the finaliser of a watch may append here, and does nothing else."""
        self.epoch = new_epoch()
        """The name of this life of the store: bookmarks of another one are of no use here."""
        self.restarts = 0
        """How often it went on from a moment to which the log has no way."""
        self._changed = changed
        self._key = key
        self.history = history
        self.ring: list[Any] = [None] * history
        """The record of revision r at r modulo its length: revisions are dense."""
        self.keys: _Topics = {}
        self.prefixes: _Topics = {}
        self._sorted: list[str] = []
        """The prefixes in order. One may be there twice, or have no watch any more: that does no harm."""
        self.chains: dict[str, list[str]] = {}
        """By a watched prefix: those that it begins with, itself included, the shortest first; made when it is needed.
        Another dict before and after each watch that joins or leaves: what was found out about who watches a key is
        true as long as this is the same object."""

    def publish(self, revision: int, key: str, record: object) -> object:
        """Hand `record` to the watches it reaches, and remember it. Doing so again changes nothing.

        Returns the record that had to be forgotten; keep it alive until the lock is released.
        """
        if self.left:
            self.tidy()
        if key in self.keys or self.prefixes:
            self._fan_out(key, record)
        forgotten = None
        if revision > self.revision:  # atomic: no bytecode boundary
            if self.history:
                slot = revision % self.history
                forgotten = self.ring[slot]
                self.ring[slot] = record
            self.revision = revision
        return forgotten

    def is_watched_by_prefix(self, key: str) -> bool:
        """Whether a prefix is watched that `key` begins with; true as long as `chains` is the same object."""
        chain = self._chain_up_to(key)
        return bool(chain) and key.startswith(chain[0])

    def open(self, request: OpenWatch, current: Callable[[], Iterable[Change]]) -> Watch:
        """Return a watch that is subscribed. `current` gives the present state, for `latest`. Raises `Compacted`."""
        subscription = self.subscription(request)
        watch = Watch(subscription)
        try:
            self.join(subscription)
            while True:
                start = self.revision
                since = start if request.since is None or request.latest else self._moment(request.since)
                loaded = subscription.load(current() if request.latest else self._recent(request, since))
                if self.revision == start:  # atomic: no bytecode boundary
                    subscription.loaded = loaded
                    subscription.taken = since
                    subscription.seen = start
                    return watch
        except BaseException:
            self._end([subscription])  # the error may be kept, and holds this frame
            raise

    # -- for stores whose changes come from a log, which is read a little later than it is written ---------------------

    @property
    def is_watched(self) -> bool:
        """Whether there is any watch."""
        self.tidy()
        return bool(self.keys or self.prefixes)

    def begin(self, epoch: str, revision: int) -> None:
        """Go on from a moment: of the changes up to it nobody will hear."""
        self.epoch = epoch
        self.revision = revision

    def subscription(self, request: OpenWatch) -> Subscription:
        """What `request` asks for, yet to join."""
        return LatestState(self, request) if request.latest else EveryChange(self, request)

    def join(self, subscription: Subscription) -> None:
        """Make `subscription` a member of what it watches. It receives nothing until it has begun."""
        self.tidy()
        for topics, name in self._places(subscription):
            self.chains = {}
            while True:
                members = topics.setdefault(name, {})
                members[subscription] = None
                if topics.get(name) is members:
                    break  # else a re-entrant call has tidied away what was still empty
            if topics is self.prefixes:
                self._sort_in(name)
            self.chains = {}

    def is_beyond(self, epoch: str, revision: int, restarts: int) -> bool:
        """Whether more was published than a moment that was read when there had been so many `restarts`.

        Where the moment is in another life and there was no restart since, it is in one that is still to come here.
        """
        return self.revision > revision if epoch == self.epoch else self.restarts != restarts

    def restart(
        self, epoch: str, revision: int, oldest: int, current: dict[LatestState, tuple[int, list[Change]]]
    ) -> bool:
        """Go on from a moment to which the log has no way: `Compacted` ends each watch of every change that it misses.

        Those of the latest state go on from what is `current` for each, and as of which revision. `False`: there are
        others by now.
        """
        begun = [each for each in self._members() if each.has_begun]
        if any(isinstance(each, LatestState) and each not in current for each in begun):
            return False
        for subscription in begun:
            is_there = subscription.epoch == epoch and subscription.seen >= revision
            if isinstance(subscription, EveryChange) and not is_there:
                subscription.end(Compacted(subscription.bookmark(), oldest))
        self._end([each for each in begun if each.ended])
        self.begin(epoch, revision)
        self.restarts += 1
        for subscription in begun:
            if isinstance(subscription, LatestState):
                subscription.restart(*current[subscription])
        return True

    def latest(self) -> list[LatestState]:
        """The watches of the latest state that have begun."""
        return [each for each in self._members() if isinstance(each, LatestState) and each.has_begun]

    def leave(self, subscription: Subscription) -> None:
        """End `subscription`; takes the lock itself."""
        self.locked(self._end, [subscription])

    def close(self) -> None:
        """End all watches, and forget what was remembered. Doing so again changes nothing."""
        ring, self.ring = self.ring, [None] * self.history
        self.to_release.append(ring)
        self._end(self._members())

    def locked(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, called with the lock held and no commit pending. Then do what was put off."""
        try:
            with self.lock:
                self._settle_while_locked()
                result = function(*args)
            if self.to_wake or self.to_release:
                self.run_deferred()
        except BaseException:
            self.recover()
            raise
        return result

    def recover(self) -> None:
        """Finish what an interrupted user of the lock left: a commit may be a fact, and not applied."""
        with self.lock:
            self._settle_while_locked()
        self.run_deferred()

    def run_deferred(self) -> None:
        """Do what was put off until the lock was released."""
        subscription: Subscription | None = None
        try:
            while self.to_wake:
                try:
                    for subscription in iter(self.to_wake.popleft, None):  # noqa: B007
                        break  # taken and named, with no bytecode boundary between the two
                except IndexError:
                    break  # another thread was as quick
                assert subscription is not None
                subscription.wake_all() if subscription.ended else subscription.wake()
            self.to_release.clear()
        except BaseException:
            # Interrupted with one in hand. A needless wake-up does no harm, a lost one does: wake them all.
            with self.lock:
                members = [*self._members(), *self.to_wake.copy()]
            for each in members if subscription is None else [subscription, *members]:
                each.wake_all()
            raise

    def tidy(self) -> None:
        """Remove the subscriptions that left."""
        while (subscription := self.left[0] if self.left else None) is not None:
            self.to_release.append(subscription)  # with all that it has buffered
            subscription.end()
            for topics, name in self._places(subscription):
                self.chains = {}
                members = topics.get(name, {})
                members.pop(subscription, None)
                if not members and name in topics and topics[name] is members:  # atomic: no bytecode boundary
                    del topics[name]
                if topics is self.prefixes and name not in topics:
                    self._sort_out(name)
                self.chains = {}
            if self.left and self.left[0] is subscription:  # atomic: no bytecode boundary
                del self.left[0]

    def bookmark(self, revision: int) -> str:
        """The name of the moment of `revision` in this life of the store."""
        return f"{self.epoch}.{revision}"

    def live_on_in_child(self, lock: AbstractContextManager[object]) -> None:
        """Go on with another lock in a child process: as another life, in which the parent's watches have ended."""
        self.lock = lock
        self.settle()
        self.epoch = new_epoch()
        for subscription in self._members():
            subscription.waiters.clear()
        self._end(self._members())
        self.tidy()
        self.to_wake.clear()

    def _settle_while_locked(self) -> None:
        done = self.settle()
        if done is not None:
            self.to_release.append(done)

    def _end(self, subscriptions: Iterable[Subscription]) -> None:
        self.tidy()
        for subscription in subscriptions:
            self.to_wake.append(subscription)
            self.left.append(subscription)  # tidied away by the next one: until it was woken it must be found
            subscription.end()

    def _fan_out(self, key: str, record: object) -> None:
        reached = self._reached(key)
        if reached:
            change = self._changed(record)
            for subscription in reached:
                subscription.put(change)

    def _reached(self, key: str) -> list[Subscription]:
        # The copies are private: whoever interrupts may subscribe or leave.
        reached = list(self.keys.get(key, {}).copy())
        for prefix in self._prefixes_of(key) if self.prefixes else ():
            reached += list(self.prefixes.get(prefix, {}).copy())
        return reached

    def _prefixes_of(self, key: str) -> list[str]:
        """The watched prefixes that `key` begins with."""
        while True:
            chains = self.chains
            found = [prefix for prefix in self._chain_up_to(key) if key.startswith(prefix)]
            if self.chains is chains:
                return found  # else a watch joined or left in the midst of it

    def _chain_up_to(self, key: str) -> list[str]:
        """Of the last watched prefix up to `key`, in order: those that it begins with, the shortest first.

        Those that `key` begins with are among them. For whatever stands between a prefix and a key that begins with it
        begins with it, too.
        """
        chains = self.chains
        place = bisect_right(self._sorted, key)
        try:
            last = self._sorted[place - 1] if place else ""
        except IndexError:  # a watch left in between
            return []
        chain = chains.get(last)
        if chain is None:
            beginnings = [last[:length] for length in range(len(last) + 1)]
            chains[last] = chain = [each for each in beginnings if each in self.prefixes]
        return chain

    def _sort_in(self, prefix: str) -> None:
        place = bisect_right(self._sorted, prefix)
        if self._sorted[max(0, place - 1) : place] != [prefix]:
            insort(self._sorted, prefix)

    def _sort_out(self, prefix: str) -> None:
        place = bisect_right(self._sorted, prefix) - 1
        with suppress(IndexError):  # a re-entrant call has taken some away
            # atomic: no bytecode boundary
            if place >= 0 and prefix not in self.prefixes and self._sorted[place] == prefix:
                del self._sorted[place]

    def _members(self) -> list[Subscription]:
        topics = [*self.keys.copy().values(), *self.prefixes.copy().values()]
        return list(dict.fromkeys(member for members in topics for member in members.copy()))

    def _places(self, subscription: Subscription) -> Iterator[tuple[_Topics, str]]:
        """Where `subscription` is, or would be, a member."""
        for key in subscription.keys:
            yield self.keys, key
        if subscription.prefix is not None:
            yield self.prefixes, subscription.prefix

    def _moment(self, since: int | str) -> int:
        """The revision that `since` names, if this store can go on from there."""
        oldest = max(1, self.revision - self.history + 1)
        if isinstance(since, str):
            epoch, revision = parse_bookmark(since)
            if epoch != self.epoch:
                raise Compacted(since, oldest)
        else:
            revision = since
        if not oldest - 1 <= revision <= self.revision:
            raise Compacted(since, oldest)
        return revision

    def _recent(self, request: OpenWatch, since: int) -> list[Change]:
        """The changes after `since` that match."""
        if since == self.revision:
            return []
        ring = self.ring.copy()
        records = [ring[revision % self.history] for revision in range(since + 1, self.revision + 1)]
        matches = matching(request)
        return [self._changed(record) for record in records if matches(self._key(record))]


def matching(request: OpenWatch) -> Callable[[str], bool]:
    """Whether a key is one of those that `request` is about."""
    keys, prefix = frozenset(request.keys), request.prefix
    return keys.__contains__ if prefix is None else lambda key: key.startswith(prefix)


def parse_bookmark(bookmark: str) -> tuple[str, int]:
    """The life and the revision that `bookmark` names."""
    epoch, _, digits = bookmark.rpartition(".")
    if not (epoch and digits.isdecimal()):
        raise ValueError("since is neither a revision nor a bookmark")
    return epoch, int(digits)


def new_epoch() -> str:
    """The name of a new life."""
    return os.urandom(6).hex()
