"""Claims: one owner at a time for a key, and writes that happen only while the claim holds.

A claim is an ordinary entry with a ttl, whose `writer` is the owner. It is taken by a set on condition that the key is
absent, renewed by conditional sets, and noticed by whoever watches the key. Nothing here relies on two clocks that
agree: a holder may believe in a claim that has expired (it was paused, say), but what it writes through the claim is
refused by the store, in the same commit (Kleppmann, "How to do distributed locking", 2016: fencing).
"""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Coroutine
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Self, cast, overload
from weakref import ref

from stigmergy._core.helpers import start_helper
from stigmergy.aio import AsyncStore
from stigmergy.checks import check_timeout
from stigmergy.lease import Lease, acquire, fenced, keep, release, write_delete, write_set, writer_of
from stigmergy.model import Check, Delete, Set, Ttl
from stigmergy.store import Store

if TYPE_CHECKING:
    from asyncio import Future, Task

__all__ = ["AsyncClaim", "Claim", "claim", "owner_of"]


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
    lease = Lease(key, owner, ttl)
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
    return store.run(writer_of(key))


class _Held:
    """What both kinds of claim show."""

    _lease: Lease

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

    def __init__(self, store: Store, lease: Lease, timeout: float | None) -> None:
        self._store = store
        self._lease = lease
        self._timeout = timeout

    def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        """`Store.set`, if the claim holds; else `ClaimLost`."""
        return self._store.run(write_set(self._lease, Set(key, value, if_revision, ttl)))

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        """`Store.delete`, if the claim holds; else `ClaimLost`."""
        return self._store.run(write_delete(self._lease, Delete(key, if_revision)))

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        """`Store.commit`, if the claim holds; else `ClaimLost`. Decided by the store, in the same commit.

        The writes bear the owner as their writer. `ValueError` if one of them is to the claim's own key.
        """
        return self._store.run(fenced(self._lease, writes))

    def __enter__(self) -> Self:
        self._store.run(acquire(self._lease, self._timeout))
        try:
            # The thread knows this object only weakly, so that one that is dropped is not renewed for ever.
            start_helper(start_new_thread, _keep_in_thread, (self._store, self._lease, cast("ref[Claim]", ref(self))))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # The keeper ends by itself. Nobody waits for it here: a signal handler or a finaliser may leave the block in
        # the midst of an operation of this thread, with the lock that the keeper is about to take.
        self._lease.end()
        with suppress(*() if kind is None else (Exception,)):
            self._store.run(release(self._lease))


class AsyncClaim(_Held):
    """A claim on an `AsyncStore`; see `claim`. Losing it cancels the block, which then raises `ClaimLost`."""

    def __init__(self, store: AsyncStore, lease: Lease, timeout: float | None) -> None:
        self._store = store
        self._lease = lease
        self._timeout = timeout
        self._block: Task[Any] | None = None
        self._keeper: Task[None] | None = None
        self._cancelling = 0
        self._cancelled = False

    async def set(self, key: str, value: Any, *, if_revision: int | None = None, ttl: Ttl = None) -> int:
        """Same as `Claim.set`."""
        return await self._store.run(write_set(self._lease, Set(key, value, if_revision, ttl)))

    async def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        """Same as `Claim.delete`."""
        return await self._store.run(write_delete(self._lease, Delete(key, if_revision)))

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        """Same as `Claim.commit`."""
        return await self._store.run(fenced(self._lease, writes))

    async def __aenter__(self) -> Self:
        import asyncio

        await self._store.run(acquire(self._lease, self._timeout))
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
        import asyncio

        # In a task of its own: some libraries cancel a task again at each step until it has ended.
        leaving = asyncio.ensure_future(self._store.run(release(self._lease)))
        _leaving.add(leaving)
        leaving.add_done_callback(_left)
        with suppress(*() if kind is None else (Exception,)):
            await asyncio.shield(leaving)

    def _is_cancelled(self) -> bool:
        """Whether somebody else has cancelled the block."""
        assert self._block is not None
        return self._block.cancelling() > self._cancelling

    def _cancel_block(self) -> None:
        assert self._block is not None
        self._cancelled = True
        self._block.cancel()


_leaving: set[Future[None]] = set()
"""A loop alone would forget them."""


def _left(leaving: Future[None]) -> None:
    _leaving.discard(leaving)
    if not leaving.cancelled():
        leaving.exception()  # whoever waits for it is told; if nobody does, that is nothing to log


# -- the keepers -------------------------------------------------------------------------------------------------------


def _keep_in_thread(store: Store, lease: Lease, is_wanted: ref[Claim]) -> None:
    try:
        store.run(keep(lease, is_wanted))
    finally:
        if not lease.ended:  # nobody renews it any more
            lease.lost = True


async def _keep_in_task(store: AsyncStore, lease: Lease, is_wanted: ref[AsyncClaim]) -> None:
    import asyncio

    keeping = asyncio.ensure_future(store.run(keep(lease, is_wanted)))
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
