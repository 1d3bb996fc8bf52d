"""Claims: one owner at a time for a key, and writes that happen only while the claim holds.

A claim is an ordinary entry with a ttl, whose `writer` is the owner. It is taken by a set on condition that the key is
absent, renewed by conditional sets, and noticed by whoever watches the key. Nothing here relies on two clocks that
agree: a holder may believe in a claim that has expired (it was paused, say), but what it writes through the claim is
refused by the store, in the same commit (Kleppmann, "How to do distributed locking", 2016: fencing).
"""

from __future__ import annotations

import os
from _thread import start_new_thread
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Self, cast, overload
from weakref import ref

from stigmergy.aio import AsyncStore
from stigmergy.checks import check_timeout, check_writes
from stigmergy.errors import (
    ClaimLost,
    Compacted,
    DamagedValue,
    InvalidValue,
    OutcomeUnknown,
    RevisionConflict,
    StoreClosed,
    WatchClosed,
)
from stigmergy.flow import Commit, Flow, GetEntry, Next, OpenWatch, Sleep
from stigmergy.model import Change, Check, Delete, Entry, Op, Set, Ttl, Write
from stigmergy.store import Store
from stigmergy.watch import Watch

if TYPE_CHECKING:
    from asyncio import Task

__all__ = ["AsyncClaim", "Claim", "claim", "owner_of"]

_LONGEST_PAUSE = 0.1


@overload
def claim(store: Store, key: str, owner: str, ttl: float, *, timeout: float | None = None) -> Claim: ...
@overload
def claim(store: AsyncStore, key: str, owner: str, ttl: float, *, timeout: float | None = None) -> AsyncClaim: ...
def claim(
    store: Store | AsyncStore, key: str, owner: str, ttl: float, *, timeout: float | None = None
) -> Claim | AsyncClaim:
    """Return a claim of `owner` on `key`, to be held by `with`, or `async with` on an `AsyncStore`.

    Entering waits until the key is absent, at most `timeout` seconds (`None`: for ever; `TimeoutError` after that), and
    sets it: of many claimants exactly one does. Those who wait are woken when it is deleted or expires, all at once,
    and whoever is quickest has it next: there is no queue, and nobody is promised a turn.

    While the block runs the claim is renewed every third of `ttl` seconds, in the background. It is lost if that cannot
    be done in time, or if somebody else deletes or sets the key. Leaving the block deletes the entry, and raises
    `ClaimLost` if the claim was lost, unless the block raised something itself. A claim that is dropped without leaving
    the block is not renewed again.

    `claim` alone keeps nobody from writing to anything: use `claim.set`, `claim.delete` and `claim.commit` for writes
    that must not happen after it was lost. Raises `InvalidKey` for the key or the owner, `ValueError` for the ttl.
    """
    lease = _Lease(key, owner, ttl)
    check_timeout(timeout)
    if isinstance(store, AsyncStore):
        return AsyncClaim(store, lease, timeout)
    if isinstance(store, Store):
        return Claim(store, lease, timeout)
    raise TypeError(f"a claim is made on a store, not on a {type(store).__name__}")


@overload
def owner_of(store: Store, key: str) -> str | None: ...
@overload
def owner_of(store: AsyncStore, key: str) -> Coroutine[Any, Any, str | None]: ...
def owner_of(store: Store | AsyncStore, key: str) -> str | Coroutine[Any, Any, str | None] | None:
    """Return who has the claim on `key`, or `None`: the writer of its entry. To be awaited on an `AsyncStore`."""
    return store.run(_writer(key))


class _Held:
    """What both kinds of claim show."""

    _lease: _Lease

    @property
    def key(self) -> str:
        """What is claimed."""
        return self._lease.key

    @property
    def owner(self) -> str:
        """Who claims it."""
        return self._lease.owner

    @property
    def token(self) -> int:
        """The fencing token: the revision of the write that took the claim, larger for each later claim on the store.

        Give it to systems outside the store, to refuse whoever comes with a smaller one. 0 before the claim is held.
        """
        return self._lease.token

    @property
    def lost(self) -> bool:
        """Whether the claim is known to be lost, or was not renewed in time: for good, and writes through it fail."""
        return self._lease.is_lost()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.owner!r} on {self.key!r}, token {self.token}>"


class Claim(_Held):
    """A claim on a `Store`; see `claim`."""

    def __init__(self, store: Store, lease: _Lease, timeout: float | None) -> None:
        self._store = store
        self._lease = lease
        self._timeout = timeout

    def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        """`Store.set`, if the claim holds; else `ClaimLost`."""
        return self._store.run(_set(self._lease, Set(key, value, if_revision, ttl)))

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        """`Store.delete`, if the claim holds; else `ClaimLost`."""
        return self._store.run(_delete(self._lease, Delete(key, if_revision)))

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        """`Store.commit`, if the claim holds; else `ClaimLost`. Decided by the store, in the same commit.

        The writes bear the owner as their writer. `ValueError` if one of them is to the claim's own key.
        """
        return self._store.run(_fenced(self._lease, writes))

    def __enter__(self) -> Self:
        self._store.run(_acquire(self._lease, self._timeout))
        try:
            # The thread knows this object only weakly, so that one that is dropped is not renewed for ever.
            start_new_thread(_keep_in_thread, (self._store, self._lease, cast("ref[Claim]", ref(self))))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # The keeper ends by itself. Nobody waits for it here: a signal handler or a finaliser may leave the block in
        # the midst of an operation of this thread, with the lock that the keeper is about to take.
        self._lease.end()
        with suppress(*() if kind is None else (Exception,)):
            self._store.run(_release(self._lease))


class AsyncClaim(_Held):
    """A claim on an `AsyncStore`; see `claim`. Losing it cancels the block, which then raises `ClaimLost`."""

    def __init__(self, store: AsyncStore, lease: _Lease, timeout: float | None) -> None:
        self._store = store
        self._lease = lease
        self._timeout = timeout
        self._block: Task[Any] | None = None
        self._keeper: Task[None] | None = None
        self._cancelling = 0
        self._cancelled = False

    async def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        """Same as `Claim.set`."""
        return await self._store.run(_set(self._lease, Set(key, value, if_revision, ttl)))

    async def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        """Same as `Claim.delete`."""
        return await self._store.run(_delete(self._lease, Delete(key, if_revision)))

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        """Same as `Claim.commit`."""
        return await self._store.run(_fenced(self._lease, writes))

    async def __aenter__(self) -> Self:
        import asyncio

        await self._store.run(_acquire(self._lease, self._timeout))
        self._block = asyncio.current_task()
        assert self._block is not None
        self._cancelling = self._block.cancelling()
        self._keeper = asyncio.create_task(_keep_in_task(self._store, self._lease, ref(self)))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        import asyncio

        self._lease.end()
        assert self._block is not None
        assert self._keeper is not None
        self._keeper.cancel()
        by_us = self._cancelled and self._block.uncancel() <= self._cancelling and kind is asyncio.CancelledError
        try:
            await asyncio.wait([self._keeper])
        except BaseException:
            await self._leave(asyncio.CancelledError)
            raise
        await self._leave(kind)
        if by_us:
            raise self._lease.error() from self._lease.cause or error

    async def _leave(self, kind: type[BaseException] | None) -> None:
        with suppress(*() if kind is None else (Exception,)):
            await self._store.run(_release(self._lease))

    def _is_cancelled(self) -> bool:
        """Whether somebody else has cancelled the block."""
        assert self._block is not None
        return self._block.cancelling() > self._cancelling

    def _cancel_block(self) -> None:
        assert self._block is not None
        self._cancelled = True
        self._block.cancel()


# -- the claim, in flows -----------------------------------------------------------------------------------------------


class _Lease:
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
        self._process = 0
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

    def claiming(self) -> Set:
        """The write that takes the claim, or renews it."""
        return self._write._replace(if_revision=self.revision)

    def hold(self, revision: int, since: float) -> None:
        """Take note that the claim was taken, or renewed, by a write at `revision` that began at `since`."""
        if not self.is_lost():
            self._process = os.getpid()
            self.token = self.token or revision
            self.deadline = since + self.ttl
            self.renewal = since + self.ttl / 3
            self.cause = None
        self.revision = revision

    def is_lost(self) -> bool:
        """Whether the claim is lost: once it is, or was not renewed in time, for good. A child process has none."""
        if self._process not in (0, os.getpid()):
            self.lost = self.gone = True
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

    def error(self) -> ClaimLost:
        return ClaimLost(self.key, self.owner, self.token)


def _acquire(lease: _Lease, timeout: float | None) -> Flow[None]:
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


def _stays_taken(lease: _Lease, until: float) -> Flow[bool]:
    """Wait for the next change of the key, and tell whether it is one that leaves the key with somebody."""
    assert lease.watch is not None
    left = until - monotonic()
    try:
        change = yield from Next(lease.watch, None if left == inf else max(left, 0.0))
    except TimeoutError:
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


def _take(lease: _Lease) -> Flow[bool]:
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


def _entry(lease: _Lease) -> Flow[Entry | None]:
    """What is at the key. What cannot be read is not the claim's own, and counts as nothing."""
    try:
        return (yield from GetEntry(lease.key))
    except (DamagedValue, InvalidValue):
        return None


def _keep(lease: _Lease, is_wanted: Callable[[], object]) -> Flow[None]:
    """Renew the claim until it is lost, has ended, or is no longer wanted."""
    assert lease.watch is not None
    try:
        while not (lease.is_lost() or lease.ended) and is_wanted():
            try:
                lease.heed((yield from Next(lease.watch, max(lease.renewal - monotonic(), 0.0))))
            except TimeoutError:
                if is_wanted():
                    yield from _renew(lease)
            except WatchClosed:
                if not lease.ended:  # the store was closed
                    lease.lost = True
            except Exception:  # `Compacted`, say, or what a function raises that the watch is mapped through
                yield from _watch_anew(lease)
    finally:
        lease.watch.close()


def _watch_anew(lease: _Lease) -> Flow[None]:
    """Look what there is, for the watch has missed something; if that fails, renew, which tells as well."""
    try:
        watch, lease.watch = lease.watch, (yield from OpenWatch((lease.key,)))
        assert watch is not None
        watch.close()
        lease.look_at((yield from _entry(lease)))
    except Exception as error:
        lease.cause = error
        yield from Sleep(min(lease.ttl / 100, _LONGEST_PAUSE))
        yield from _renew(lease)


def _renew(lease: _Lease) -> Flow[None]:
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


def _fenced(lease: _Lease, writes: Iterable[Write]) -> Flow[tuple[int | None, ...]]:
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


def _set(lease: _Lease, write: Set) -> Flow[int]:
    (revision,) = yield from _fenced(lease, (write,))
    assert revision is not None
    return revision


def _delete(lease: _Lease, write: Delete) -> Flow[bool]:
    (revision,) = yield from _fenced(lease, (write,))
    return revision is not None


def _release(lease: _Lease) -> Flow[None]:
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
        yield from _withdraw(lease, error)
        if not (lost and isinstance(error, Exception)):
            raise
    if lost:
        raise lease.error() from lease.cause


def _withdraw(lease: _Lease, error: BaseException) -> Flow[None]:
    """Delete the entry after all, if `error` came in the midst of a write that may have set it."""
    if not lease.attempted or isinstance(error, GeneratorExit):
        return
    with suppress(Exception):
        entry = yield from _entry(lease)
        if entry is not None and lease.is_at(entry):
            yield from Commit((Delete(lease.key, entry.revision),))


def _writer(key: str) -> Flow[str | None]:
    entry = yield from GetEntry(key)
    return None if entry is None else entry.writer


def _keep_in_thread(store: Store, lease: _Lease, is_wanted: ref[Claim]) -> None:
    try:
        store.run(_keep(lease, is_wanted))
    finally:
        if not lease.ended:  # nobody renews it any more
            lease.lost = True


async def _keep_in_task(store: AsyncStore, lease: _Lease, is_wanted: ref[AsyncClaim]) -> None:
    import asyncio

    keeping = asyncio.ensure_future(store.run(_keep(lease, is_wanted)))
    cancelled = True
    try:
        while not keeping.done() and (left := lease.deadline - monotonic()) > 0:  # a renewal may hang
            await asyncio.wait([keeping], timeout=left)
        cancelled = False
    finally:
        claim = is_wanted()
        # When a loop is shut down, all tasks are cancelled: the block is cleaning up, and not to be cancelled again.
        if claim is not None and not lease.ended and not (cancelled and claim._is_cancelled()):
            lease.lost = True
            if lease.cause is None and not (cancelled or keeping.done()):
                lease.cause = TimeoutError("the renewal did not come back in time")
            claim._cancel_block()
        keeping.cancel()
        await asyncio.wait([keeping])
