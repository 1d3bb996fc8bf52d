"""Watch: an ordered stream of changes, and the two ways to wait for the next one.

A `Subscription` is what a hub fills: a buffer of changes, and the list of those who wait for one. A `Watch` is what a
program holds: it takes changes out, hands over copies, and parks its thread or its task while there is none.

A signal handler or a finaliser may strike between any two bytecodes, while this thread holds the hub's lock, and use
the same store. Hence one rule, marked *uninterrupted* below: where several stores to memory belong together, no call
stands among them, for CPython lets handlers and finalisers in only at calls, allocations and the end of a loop's round
(so the condition of a `while` belongs to what is before it). One call into C may stand last. (`commit` of the memory provider lives by the same rule.)
"""

from __future__ import annotations

import logging
import sys
from _thread import allocate_lock
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from functools import partial
from sys import maxsize
from threading import TIMEOUT_MAX, Lock
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from stigmergy.checks import check_timeout
from stigmergy.errors import Lagged, StateError, WatchClosed
from stigmergy.model import Change, Op

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

    from stigmergy.flow import OpenWatch
    from stigmergy.hub import Hub

__all__ = ["EveryChange", "LatestState", "Subscription", "Watch"]

_SET = Op.SET
_NOTHING: deque[Change] = deque()
_log = logging.getLogger("stigmergy")


class Watch:
    """The changes of some keys or of a prefix, in order: `for`, `async for`, `with`, `async with`, on one object.

    Revisions strictly increase. Every change that matches is delivered once or, where the reader was too slow, counted
    in `missed` of the next one delivered. Several threads or tasks that read one watch share its changes.

    A watch ends when it is closed, or its store; what was buffered is still delivered. Iteration then just ends, while
    `get`, `get_nowait` and `aget` raise `WatchClosed`. A reader that is cancelled or interrupted while it waits loses
    nothing. A watch that nobody holds any more unsubscribes by itself.
    """

    __slots__ = ("__weakref__", "_functions", "_opener", "_opening", "_subscription")

    def __init__(self, source: Subscription | Callable[[], Watch]) -> None:
        """For providers: a watch of `source`; a function stands for a watch that is yet to be opened, by blocking."""
        self._subscription = source if isinstance(source, Subscription) else None
        self._opener = None if isinstance(source, Subscription) else source
        self._opening = Lock()
        self._functions: tuple[Callable[[Change], Change], ...] = ()

    def get(self, timeout: float | None = None) -> Change:
        """Return the next change, waiting for it in this thread, at most `timeout` seconds.

        Raises `TimeoutError`, `WatchClosed`, `Lagged` (with `overflow="raise"`), and `RuntimeError` where waiting would
        block a running event loop.
        """
        deadline = monotonic() + check_timeout(timeout)
        while (change := self.get_nowait()) is None:
            _park_thread(self._source(), deadline)
        return change

    async def aget(self) -> Change:
        """Same as `get`, waiting in this task; `asyncio.timeout` limits the wait."""
        if self._subscription is None:
            await self._opened()
        while (change := self.get_nowait()) is None:
            await _park_task(self._source())
        return change

    def get_nowait(self) -> Change | None:
        """Return the next change, or `None` if there is none now. Raises `WatchClosed` and `Lagged`."""
        source = self._source()
        hub = source.hub
        try:
            with hub.lock:
                hub.settle()
                change = source.take()
                if change is None and source.ended:
                    raise source.error or WatchClosed
        finally:
            if hub.afterwards:
                hub.act()
        if change is None:
            return None
        change = hub.deliver(change)
        for function in self._functions:
            change = function(change)
        return change

    def map(self, function: Callable[[Change], Change]) -> Self:
        """Pass each change through `function` as it is taken out, in the reader's thread or task; return this watch."""
        self._functions = (*self._functions, function)
        return self

    def close(self) -> None:
        """End the watch, from any thread. What is buffered can still be read. Closing twice is fine."""
        self._opener = None
        if self._subscription is not None:
            self._subscription.hub.leave(self._subscription)

    @property
    def revision(self) -> int:
        """All that matches up to this revision was delivered, or counted as missed. Advances without deliveries."""
        source = self._source()
        with source.hub.lock:
            source.hub.settle()
            return source.revision()

    @property
    def bookmark(self) -> str:
        """The moment of `revision`: a watch opened with `since=` this bookmark goes on from there."""
        return self._source().hub.bookmark(self.revision)

    @property
    def dropped(self) -> int:
        """How many changes gave way to newer ones so far because the buffer was full."""
        return self._source().dropped

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

    def __await__(self) -> Generator[Any, Any, Self]:
        """Return this watch once it is subscribed: at once, unless its store blocks."""
        yield from self._opened().__await__()
        return self

    def open(self) -> None:
        """Same as `await watch`, blocking."""
        with self._opening:
            if self._subscription is None:
                if self._opener is None:
                    raise WatchClosed
                if _running_loop() is not None:
                    raise RuntimeError("use `async with` here: opening this watch would block the running event loop")
                opened = self._opener()
                self._functions = opened._functions + self._functions
                self._subscription, opened._subscription = opened._source(), None

    def try_open(self) -> None:
        """Same as `open`; what goes wrong is raised at the first use."""
        try:
            self.open()
        except Exception as error:
            self._opener = partial(_fail, error)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await self._opened()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # No lock is taken here: the collector may have struck this thread anywhere. The hub's next user clears up.
        # Nor is it sure that `__init__` came to its end.
        source: Subscription | None = getattr(self, "_subscription", None)
        if source is not None:
            source.hub.left.append(source)

    def __repr__(self) -> str:
        source = self._subscription
        return "<Watch not yet open>" if source is None else f"<Watch {source!r}>"

    async def _opened(self) -> None:
        if self._subscription is None:
            import asyncio

            await asyncio.to_thread(self.open)

    def _source(self) -> Subscription:
        if self._subscription is None:
            self.open()
        assert self._subscription is not None
        return self._subscription


class Subscription(ABC):
    """A watch as its hub sees it. All but `wake` and `waiters` is used with the hub's lock held."""

    __slots__ = ("ended", "error", "hub", "keys", "loaded", "prefix", "seen", "taken", "until", "waiters")

    last_fill: ClassVar[object] = None
    """Another object whenever a buffer has become full, anywhere: an async write that sees that lets readers run."""

    dropped: int

    def __init__(self, hub: Hub, request: OpenWatch) -> None:
        self.hub = hub
        self.keys = request.keys
        self.prefix = request.prefix
        self.loaded: Any
        """What is to be delivered of the time before the watch was opened."""
        self.seen = maxsize
        """The revision up to which changes were put in; until the hub says where to begin, none is."""
        self.taken = 0
        """The revision up to which changes were taken out."""
        self.until = 0
        """The hub's revision when the watch ended."""
        self.ended = False
        self.error: StateError | None = None
        self.waiters: list[_Waiter] = []  # a deque takes 600 bytes when it is empty, and nearly always it is

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
    def revision(self) -> int:
        """The revision up to which everything was delivered or counted."""

    def end(self, error: StateError | None = None) -> None:
        """Take no more changes. Whoever reads past the last one gets `error`, or `WatchClosed`."""
        if not self.ended:
            self.seen = maxsize
            self.error = error
            self.until = self.hub.revision
            self.ended = True

    def wake(self) -> None:
        """Wake one of those who wait: a hint to look again. Waiters whose loop is dead are dropped."""
        while self.waiters:
            with suppress(IndexError):  # another thread may be as quick
                waiter = self.waiters[0]
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

    def remove(self, waiter: _Waiter) -> None:
        """Forget `waiter`."""
        with suppress(ValueError):
            self.waiters.remove(waiter)

    def __repr__(self) -> str:
        of = ", ".join(map(repr, self.keys)) if self.prefix is None else f"prefix={self.prefix!r}"
        return of + (", ended" if self.ended else "")


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
        buffer = self.buffer
        size = len(buffer)
        full = size >= self.capacity
        if full:
            self._make_way()
        if change.revision > self.seen:  # uninterrupted
            self.seen = change.revision
            if full and buffer:
                del buffer[0]
                self.missed += 1
                self.dropped += 1
            buffer.append(change)
        if self.waiters:
            self.hub.afterwards.append(self)
        if size + 1 == self.capacity:
            Subscription.last_fill = object()

    def take(self) -> Change | None:
        loaded = self.loaded
        if loaded:  # uninterrupted
            change = loaded[0]
            del loaded[0]
            self.taken = change.revision
            return change
        buffer = self.buffer
        if not buffer:
            return None
        if self.missed and self.raises:  # uninterrupted
            missed = self.missed
            self.missed = 0
            self.taken = buffer[0].revision - 1
            raise Lagged(missed)
        # uninterrupted
        change = buffer[0]
        del buffer[0]
        missed = self.missed
        self.missed = 0
        self.taken = change.revision
        return change._replace(missed=missed) if missed else change

    def first(self) -> Change | None:
        return self.loaded[0] if self.loaded else self.buffer[0] if self.buffer else None

    def revision(self) -> int:
        if self.missed and not self.loaded:
            return self.taken
        first = self.first()
        if first is not None:
            return first.revision - 1
        return self.until if self.ended else self.hub.revision

    def wake(self) -> None:
        if self.dropped and not self.warned:
            self.warned = True
            _log.warning("a watch of %r is full (%d changes): the oldest gives way to the newest", self, self.capacity)
        super().wake()

    def _make_way(self) -> None:
        """Keep alive, until the lock is released, what is about to leave the buffer: its value may have a finaliser."""
        if not self.warned:
            self.hub.afterwards.append(self)
        if self.buffer:
            self.hub.afterwards.append(self.buffer[0])


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
            self.hub.afterwards.append(replaced)  # kept alive until the lock is released
        if change.revision > self.seen:  # uninterrupted
            self.seen = change.revision
            if key in pending:
                del pending[key]
            if change.op is _SET or key in self.delivered:
                pending[key] = change
        if self.waiters:
            self.hub.afterwards.append(self)

    def take(self) -> Change | None:
        pending, delivered = self.loaded, self.delivered
        while (change := self.first()) is not None:
            key = change.key
            known = (change.value, change.revision)
            if key in pending and pending[key] is change:  # uninterrupted
                before = delivered[key] if key in delivered else (None, 0)  # noqa: SIM401, a call
                del pending[key]
                self.taken = change.revision
                if change.op is _SET:
                    delivered[key] = known
                else:
                    del delivered[key]
                return change._replace(old_value=before[0], old_revision=before[1])
        return None

    def first(self) -> Change | None:
        while self.loaded:
            try:
                return next(iter(self.loaded.values()))
            except (RuntimeError, StopIteration):
                continue  # a handler or finaliser changed it between the two calls
        return None

    def revision(self) -> int:
        first = self.first()
        if first is not None:
            return first.revision - 1
        return self.until if self.ended else self.hub.revision


class _Waiter(Protocol):
    """Somebody parked."""

    hinted: bool
    """Whether it was woken."""

    def wake(self) -> bool:
        """Let it run on. `False`: it may never run, or does already; wake another one as well."""
        ...


class _ThreadWaiter:
    __slots__ = ("_parked", "hinted")

    def __init__(self) -> None:
        self.hinted = False
        # A bare lock, because the one who releases it may be a signal handler that struck inside an acquire or a
        # release of the same lock: `threading.Event` and `Condition` deadlock there.
        self._parked = allocate_lock()
        self._parked.acquire()

    def park(self, seconds: float) -> None:
        self._parked.acquire(timeout=min(seconds, TIMEOUT_MAX))

    def wake(self) -> bool:
        self.hinted = True
        try:
            self._parked.release()
        except RuntimeError:  # somebody else has
            return False
        return True


class _TaskWaiter:
    __slots__ = ("_current_task", "_loop", "hinted", "woken")

    def __init__(self) -> None:
        import asyncio

        self.hinted = False
        self._loop: AbstractEventLoop = asyncio.get_running_loop()
        self._current_task = asyncio.current_task
        self.woken: Future[None] = self._loop.create_future()

    def wake(self) -> bool:
        # Inside a step of a task of the same loop the future can be set here, which saves a round through the loop's
        # self-pipe (benchmark: task to task). Elsewhere on that thread it cannot: a signal handler may have struck
        # while the loop sleeps in its selector.
        self.hinted = True
        if _running_loop() is self._loop and self._current_task(self._loop) is not None:
            return _set(self.woken)
        try:
            self._loop.call_soon_threadsafe(_set, self.woken)
        except RuntimeError:  # the loop is closed
            return False
        return self._loop.is_running() and not self.woken.done()


def _park_thread(source: Subscription, deadline: float) -> None:
    if _running_loop() is not None:
        raise RuntimeError("use `async for` here: waiting for this watch would block the running event loop")
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError("no change came in time")
    waiter = _ThreadWaiter()
    # Register, check, park, in this order: a change put in after the check finds the waiter.
    try:
        source.waiters.append(waiter)
        if _is_idle(source):
            waiter.park(left)
    except BaseException:
        _pass_on(source, waiter)
        raise
    source.remove(waiter)


async def _park_task(source: Subscription) -> None:
    waiter = _TaskWaiter()
    try:  # register, check, park: as above
        source.waiters.append(waiter)
        if _is_idle(source):
            await waiter.woken
    except BaseException:
        _pass_on(source, waiter)
        raise
    source.remove(waiter)


def _is_idle(source: Subscription) -> bool:
    with source.hub.lock:
        source.hub.settle()
        return source.first() is None and not source.ended


def _pass_on(source: Subscription, waiter: _Waiter) -> None:
    """Stop waiting; the wake-up that this reader got and will not use goes to the next one."""
    source.remove(waiter)
    if waiter.hinted:
        source.wake()


def _fail(error: Exception) -> Watch:
    raise error


def _set(woken: Future[None]) -> bool:
    if woken.done():
        return False
    woken.set_result(None)
    return True


def _running_loop() -> AbstractEventLoop | None:
    """The event loop that runs in this thread, without importing asyncio for those who do not use it."""
    asyncio = sys.modules.get("asyncio")
    return None if asyncio is None else asyncio._get_running_loop()
