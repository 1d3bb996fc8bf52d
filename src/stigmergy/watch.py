"""Watch: an ordered stream of changes, and the two ways to wait for the next one.

A `Watch` is what a program holds: it takes changes out of a `Subscription`, hands over copies, and parks its thread or
its task while there is none.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from math import inf
from threading import TIMEOUT_MAX
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias

from stigmergy.checks import check_timeout
from stigmergy.errors import WatchClosed
from stigmergy.model import Change
from stigmergy.subscription import Subscription

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

__all__ = ["Deliver", "Opening", "Watch"]

Deliver: TypeAlias = Callable[[Change], Change]
"""Makes a change that was taken out the reader's own."""


class Watch:
    """The changes of some keys or of a prefix, in order: `for`, `async for`, `with`, `async with`, on one object.

    A watch is open from the start: whatever is written after `store.watch()` has returned it, or after
    `await store.aio.watch()` has, reaches it.

    Revisions strictly increase. Every change that matches is delivered once or, where the reader was too slow, counted
    in `missed` of the next one delivered. Several threads or tasks that read one watch share its changes.

    A watch ends when it is closed, or its store; what was buffered is still delivered. Iteration then just ends, while
    `get`, `get_nowait` and `aget` raise `WatchClosed`. A reader that is cancelled or interrupted while it waits loses
    nothing. A watch that nobody holds any more unsubscribes by itself.
    """

    __slots__ = ("__weakref__", "_deliver", "_owner", "_subscription")

    def __init__(self, subscription: Subscription, owner: object = None) -> None:
        """For providers: a watch of `subscription`. `owner` is kept alive as long as the watch."""
        self._subscription = subscription
        self._owner = owner
        self._deliver: Deliver = subscription.hub.deliver

    def get(self, timeout: float | None = None) -> Change:
        """Return the next change, waiting for it in this thread, at most `timeout` seconds.

        Raises `TimeoutError`, `WatchClosed`, `Lagged` (with `overflow="raise"`), and `RuntimeError` where waiting would
        block a running event loop.
        """
        deadline = inf if timeout is None else monotonic() + check_timeout(timeout)
        source = self._subscription
        try:
            while source.is_idle() or (change := self.get_nowait()) is None:
                _park_thread(source, deadline)
        except BaseException:
            source.wake()  # passes on a hint that this reader may have had
            raise
        return change

    async def aget(self) -> Change:
        """Same as `get`, waiting in this task; `asyncio.timeout` limits the wait."""
        source = self._subscription
        try:
            while source.is_idle() or (change := self.get_nowait()) is None:
                await _park_task(source)
        except BaseException:
            source.wake()  # passes on a hint that this reader may have had
            raise
        return change

    def get_nowait(self) -> Change | None:
        """Return the next change, or `None` if there is none now. Raises `WatchClosed` and `Lagged`.

        A change whose value cannot be copied (`InvalidValue`), or for which a function given to `map` raises, is taken
        out nevertheless: the next call goes on behind it.
        """
        source = self._subscription
        ended = source.ended  # asked before the look: what is put in between the two must not be passed over
        change: Change | None = source.hub.locked(source.take)
        if change is None:
            if ended:
                raise source.error or WatchClosed
            return None
        try:
            return self._deliver(change)
        except (StopIteration, StopAsyncIteration, WatchClosed) as error:
            raise RuntimeError(f"a function given to map raised {type(error).__name__}") from error

    def map(self, function: Callable[[Change], Change]) -> Self:
        """Pass each change through `function` as it is taken out, in the reader's thread or task; return this watch."""
        return self.around(lambda deliver, change: function(deliver(change)))

    def around(self, function: Callable[[Deliver, Change], Change]) -> Self:
        """For views: `map`, but `function(deliver, change)` calls `deliver` itself, and sees what that raises."""
        self._deliver = partial(function, self._deliver)
        return self

    def close(self) -> None:
        """End the watch, from any thread. What is buffered can still be read. Closing twice is fine."""
        self._subscription.hub.leave(self._subscription)

    @property
    def revision(self) -> int:
        """All that matches up to this revision was delivered, or counted as missed. Advances without deliveries."""
        source = self._subscription
        return source.hub.locked(source.revision)

    @property
    def bookmark(self) -> str:
        """The moment of `revision`: a watch opened with `since=` this bookmark goes on from there."""
        source = self._subscription
        return source.hub.locked(source.bookmark)

    @property
    def dropped(self) -> int:
        """How many changes gave way to newer ones so far because the buffer was full."""
        return self._subscription.dropped

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        try:
            return self.get()
        except WatchClosed:
            raise StopIteration from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        try:
            return await self.aget()
        except WatchClosed:
            raise StopAsyncIteration from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a watch cannot be copied or pickled")

    def __del__(self) -> None:
        # No lock is taken here: the collector may have struck this thread anywhere. The hub's next user clears up.
        # Nor is it sure that `__init__` came to its end.
        source: Subscription | None = getattr(self, "_subscription", None)
        if source is not None:
            source.hub.left.append(source)

    def __repr__(self) -> str:
        return f"<Watch {self._subscription!r}>"


class Opening:
    """A watch that is yet to be opened: `watch = await opening`, or `async with opening as watch:`, once.

    Nothing is open before that. Opened twice it is a `RuntimeError`, and dropped unopened a `RuntimeWarning`, as with
    any coroutine: it holds the one of `AsyncStore.open_watch`.
    """

    __slots__ = ("_coroutine", "_watch")

    def __init__(self, coroutine: Coroutine[Any, Any, Watch]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Watch]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> Watch:
        self._watch = await self._coroutine
        return self._watch

    async def __aexit__(self, *_: object) -> None:
        self._watch.close()

    def __aiter__(self) -> object:
        # Opened by its first step, it would lose what is written before that.
        from inspect import CORO_CREATED, getcoroutinestate, iscoroutine

        if iscoroutine(self._coroutine) and getcoroutinestate(self._coroutine) == CORO_CREATED:
            self._coroutine.close()  # it need not warn as well
        raise TypeError(
            "open it first: `async with store.watch(...) as watch:`, and in there `async for change in watch:`"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("an opening cannot be copied or pickled")

    def __repr__(self) -> str:
        return "<Opening of a watch, to be awaited or entered by `async with`>"


class _ThreadWaiter:
    __slots__ = ("_hint", "_parked")

    def __init__(self) -> None:
        self._hint = allocate_lock()
        """Acquired by the thread that has woken it. If several do at once, one has; the others wake another waiter."""
        # A bare lock, because the one who releases it may be a signal handler that struck inside an acquire or a
        # release of the same lock: `threading.Event` and `Condition` deadlock there.
        self._parked = allocate_lock()
        self._parked.acquire()

    def park(self, seconds: float) -> None:
        self._parked.acquire(timeout=min(seconds, TIMEOUT_MAX))

    def wake(self) -> bool:
        try:
            self._parked.release()
        except RuntimeError:
            return False  # somebody else has
        return self._hint.acquire(blocking=False)  # last: an interrupt before it leaves a needless hint, not a lost one


class _TaskWaiter:
    __slots__ = ("_current_task", "_hint", "_loop", "woken")

    def __init__(self) -> None:
        asyncio = sys.modules["asyncio"]  # imported, since there is a task
        self._hint = allocate_lock()
        self._loop: AbstractEventLoop = asyncio.get_running_loop()
        self._current_task = asyncio.current_task
        self.woken: Future[None] = self._loop.create_future()

    def wake(self) -> bool:
        # Inside a step of a task of the same loop the future can be set here, which saves a round through the loop's
        # self-pipe (benchmark: task to task). Elsewhere on that thread it cannot: a signal handler may have struck
        # while the loop sleeps in its selector.
        if _running_loop() is self._loop and self._current_task(self._loop) is not None:
            return _set(self.woken) and self._hint.acquire(blocking=False)
        try:
            self._loop.call_soon_threadsafe(_set, self.woken)
        except RuntimeError:  # the loop is closed
            return False
        return self._loop.is_running() and not self.woken.done() and self._hint.acquire(blocking=False)


# Parking. Register, look, park, in this order. Who writes does the reverse: buffers the change, then looks for waiters.
# So a change that comes after a reader's look finds its waiter. Were the look before the registration, a change could
# come between the two: it would find no waiter, and the reader would sleep beside it.
# A wake-up is a hint to look again, given to one waiter for each change. A waiter that leaves without looking, because
# it was cancelled or timed out, passes it on (`wake` in `get` and `aget`). Else a change could lie beside another
# reader that is parked.


def _park_thread(source: Subscription, deadline: float) -> None:
    if _running_loop() is not None:
        raise RuntimeError("use `async for`, or the store's `aio`, here: waiting would block the running event loop")
    left = inf if deadline == inf else deadline - monotonic()
    if left <= 0:
        raise TimeoutError("no change came in time")
    waiter = _ThreadWaiter()
    try:  # register, look, park
        source.waiters.append(waiter)
        if source.hub.locked(source.is_idle):
            waiter.park(left)
    finally:
        source.remove(waiter)


async def _park_task(source: Subscription) -> None:
    waiter = _TaskWaiter()
    try:  # register, look, park
        source.waiters.append(waiter)
        if source.hub.locked(source.is_idle):
            await waiter.woken
    finally:
        source.remove(waiter)


def _set(woken: Future[None]) -> bool:
    if woken.done():
        return False
    woken.set_result(None)
    return True


def _running_loop() -> AbstractEventLoop | None:
    """The event loop that runs in this thread, without importing asyncio for those who do not use it."""
    asyncio = sys.modules.get("asyncio")
    return None if asyncio is None else asyncio._get_running_loop()
