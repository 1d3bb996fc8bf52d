"""The lease behind a claim, in flows: taking it, renewing it, writing while it holds, releasing it.

A lease is an entry with a ttl and a value of its own. What is known of it here may be out of date; what is written on
its strength is decided by the store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf
from time import monotonic

from stigmergy._core.fork import after_fork_in_child
from stigmergy.checks import check_timeout, check_writes
from stigmergy.errors import (
    ClaimLost,
    Compacted,
    DamagedValue,
    InvalidValue,
    OutcomeUnknown,
    RevisionConflict,
    StoreClosed,
    Unavailable,
    WatchClosed,
)
from stigmergy.flow import Commit, Flow, GetEntry, Next, OpenWatch, Sleep
from stigmergy.model import Change, Check, Delete, Entry, Op, Set, Write
from stigmergy.watch import Watch

__all__ = ["Lease", "acquire", "fenced", "keep", "release", "write_delete", "write_set", "writer_of"]

_LONGEST_PAUSE = 0.1


class Lease:
    """What is known of one claim, by its holder and by its keeper."""

    def __init__(self, key: str, owner: str, ttl: float) -> None:
        if isinstance(ttl, str):
            raise TypeError("ttl is a number of seconds")
        self._value = {"claim": os.urandom(8).hex()}
        """Tells the entry of this claim from that of another claim by the same owner."""
        (write,) = check_writes([Set(key, self._value, None, ttl, owner)])
        assert isinstance(write, Set)
        if write.ttl is None or write.writer is None:
            raise TypeError("a claim has an owner and a ttl")
        self._write = write
        self.key = write.key
        self.owner = write.writer
        self.ttl = float(write.ttl)
        self.token = 0
        self.revision = 0
        """That of the entry, as far as is known."""
        self.deadline = inf
        """By `monotonic`, never later than the deadline that the store has."""
        self.renewal = inf
        """When it is to be renewed."""
        self.attempted = False
        """Whether a write is under way, or done, that may have taken the claim."""
        self.lost = False
        self.gone = False
        """Whether the entry was seen not to be the claim's own any more."""
        self.cause: Exception | None = None
        """What kept it from being renewed."""
        self.ended = False
        self.watch: Watch | None = None
        after_fork_in_child(self, Lease._leave_to_parent)

    def claiming(self) -> Set:
        """The write that takes the claim, or renews it."""
        return self._write._replace(if_revision=self.revision)

    def hold(self, revision: int, since: float) -> None:
        """Take note that the claim was taken, or renewed, by a write at `revision` that began at `since`."""
        self.token = self.token or revision
        if not self.is_lost():
            self.deadline = since + self.ttl
            self.renewal = since + self.ttl / 3
            self.cause = None
        self.revision = revision

    def is_lost(self) -> bool:
        """Whether the claim is lost: once it is, or was not renewed in time, for good."""
        if not self.ended and monotonic() >= self.deadline:
            self.lost = True
        return self.lost

    def is_at(self, entry: Entry | Change | None) -> bool:
        """Whether `entry` is the claim's own."""
        return entry is not None and entry.writer == self.owner and entry.value == self._value

    def look_at(self, entry: Entry | None) -> None:
        """Take note of the present state of the key."""
        if entry is not None and self.is_at(entry):
            self.revision = entry.revision
        elif not self.ended:
            self.lost = self.gone = True

    def heed(self, change: Change) -> None:
        """Take note of a change that the watch delivered."""
        is_own = change.op is Op.SET and self.is_at(change)
        if change.revision > self.revision and not (is_own or self.ended):
            self.lost = self.gone = True

    def end(self) -> None:
        """Stop renewing; what is known by now stays so."""
        self.is_lost()
        self.ended = True
        if self.watch is not None:
            self.watch.close()

    def _leave_to_parent(self) -> None:
        if self.token or self.attempted:
            self.lost = self.gone = True

    def error(self) -> ClaimLost:
        """What those are told who count on it after it was lost."""
        return ClaimLost(self.key, self.owner, self.token)


def acquire(lease: Lease, timeout: float | None) -> Flow[None]:
    """Wait for the claim, and take it. The watch that it was waited for with tells the keeper if it is lost."""
    if lease.watch is not None:
        raise RuntimeError("a claim is entered once")
    until = monotonic() + check_timeout(timeout)
    lease.watch = yield from OpenWatch((lease.key,))
    try:
        while not (yield from _take(lease)):
            while (yield from _stays_taken(lease, until)):
                pass
    except BaseException as error:
        lease.watch.close()
        yield from _withdraw(lease, error)
        raise


def _stays_taken(lease: Lease, until: float) -> Flow[bool]:
    """Wait for the next change of the key, and tell whether it is one that leaves the key with somebody."""
    assert lease.watch is not None
    left = until - monotonic()
    try:
        change = yield from Next(lease.watch, None if left == inf else max(left, 0.0))
    except TimeoutError:
        if until == inf:  # the watch is mapped through what raised it
            raise
        raise TimeoutError(f"{lease.key!r} was not free in time") from None
    except WatchClosed:
        yield from GetEntry(lease.key)  # a closed store says so
        raise
    except Compacted:
        lease.watch = yield from OpenWatch((lease.key,))
        return False
    except (DamagedValue, InvalidValue):  # who has it writes what cannot be read here
        return False
    return change.op is not Op.DELETE


def _take(lease: Lease) -> Flow[bool]:
    since = monotonic()
    try:
        lease.attempted = True
        (revision,) = yield from Commit((lease.claiming(),))
    except RevisionConflict:
        lease.attempted = False
        return False
    except OutcomeUnknown:
        entry = yield from _entry(lease)
        if entry is None or not lease.is_at(entry):
            raise
        revision = entry.revision
    assert revision is not None
    lease.hold(revision, since)
    return True


def _entry(lease: Lease) -> Flow[Entry | None]:
    """What is at the key. What cannot be read is not the claim's own, and counts as nothing."""
    try:
        return (yield from GetEntry(lease.key))
    except (DamagedValue, InvalidValue):
        return None


def keep(lease: Lease, is_wanted: Callable[[], object]) -> Flow[None]:
    """Renew the claim until it is lost, has ended, or is no longer wanted."""
    assert lease.watch is not None
    try:
        while not (lease.is_lost() or lease.ended) and is_wanted():
            try:
                lease.heed((yield from Next(lease.watch, max(lease.renewal - monotonic(), 0.0))))
            except TimeoutError:
                if monotonic() < lease.renewal:  # the watch is mapped through what raised it, and will be again
                    yield from Sleep(_pause(lease))
                if is_wanted():
                    yield from _renew(lease)
            except WatchClosed:
                if not lease.ended:  # the store was closed
                    lease.lost = True
            except Exception:  # `Compacted`, say, or what a function raises that the watch is mapped through
                yield from _watch_anew(lease)
    finally:
        lease.watch.close()


def _watch_anew(lease: Lease) -> Flow[None]:
    """Look what there is, for the watch has missed something; if that fails, renew, which tells as well."""
    try:
        watch, lease.watch = lease.watch, (yield from OpenWatch((lease.key,)))
        assert watch is not None
        watch.close()
        lease.look_at((yield from _entry(lease)))
    except Exception as error:
        lease.cause = error
        yield from Sleep(_pause(lease))
        yield from _renew(lease)


def _pause(lease: Lease) -> float:
    return min(lease.ttl / 100, _LONGEST_PAUSE)


def _renew(lease: Lease) -> Flow[None]:
    if lease.ended:
        return
    since = monotonic()
    try:
        try:
            (revision,) = yield from Commit((lease.claiming(),))
        except RevisionConflict:
            lease.look_at((yield from _entry(lease)))
        else:
            assert revision is not None
            lease.hold(revision, since)
    except Exception as error:  # whatever it is, it may pass before the deadline
        lease.cause = error
        lease.renewal = since + lease.ttl / 10


def fenced(lease: Lease, writes: Iterable[Write]) -> Flow[tuple[int | None, ...]]:
    """Commit `writes`, in the name of the owner, if the lease holds. Raises `ClaimLost`."""
    checked = check_writes(writes)
    if any(write.key == lease.key for write in checked):
        raise ValueError(f"{lease.key!r} is the claim's own key")
    signed = [write if isinstance(write, Check) else write._replace(writer=lease.owner) for write in checked]
    if not lease.token:
        raise RuntimeError("the claim is not held: use `with`")
    while not (lease.is_lost() or lease.ended):
        try:
            return (yield from Commit((Check(lease.key, lease.revision), *signed)))[1:]
        except RevisionConflict as conflict:
            if conflict.key != lease.key:
                raise
            lease.look_at((yield from _entry(lease)))
    raise lease.error() from lease.cause


def write_set(lease: Lease, write: Set) -> Flow[int]:
    """`fenced`, for one `Set`; its revision."""
    (revision,) = yield from fenced(lease, (write,))
    assert revision is not None
    return revision


def write_delete(lease: Lease, write: Delete) -> Flow[bool]:
    """`fenced`, for one `Delete`; whether the key was there."""
    (revision,) = yield from fenced(lease, (write,))
    return revision is not None


def release(lease: Lease) -> Flow[None]:
    """Delete the entry, unless it is somebody else's by now. Raises `ClaimLost` if the claim was lost in any way."""
    lost, left, unclear = lease.is_lost(), lease.gone, False
    try:
        while not left:
            try:
                yield from Commit((Delete(lease.key, lease.revision),))
                left = True
            except (OutcomeUnknown, RevisionConflict) as error:
                if unclear and isinstance(error, OutcomeUnknown):
                    raise
                unclear = unclear or isinstance(error, OutcomeUnknown)
                entry = yield from _entry(lease)
                if entry is not None and lease.is_at(entry):
                    lease.revision = entry.revision
                else:  # once it was unclear, a conflict may be with the first attempt
                    left, lost = True, lost or not unclear
    except StoreClosed as error:
        lost, lease.cause = True, error
    except BaseException as error:
        if not (lost and isinstance(error, Unavailable)):
            yield from _withdraw(lease, error)
        if not (lost and isinstance(error, Exception)):
            raise
    if lost:
        raise lease.error() from lease.cause


def _withdraw(lease: Lease, error: BaseException) -> Flow[None]:
    """Delete the entry after all, if `error` came in the midst of a write that may have set it."""
    if not lease.attempted or isinstance(error, GeneratorExit):
        return
    with suppress(Exception):
        entry = yield from _entry(lease)
        if entry is not None and lease.is_at(entry):
            yield from Commit((Delete(lease.key, entry.revision),))


def writer_of(key: str) -> Flow[str | None]:
    """Who wrote what is at `key`."""
    entry = yield from GetEntry(key)
    return None if entry is None else entry.writer
