"""Flows: logic that never waits. What needs more than one step is written once, here, and runs in both colours.

A flow is a generator. It yields *operations*, which ask something of the store and pass through its middleware, and
*steps*, which the driver does itself. `run` and `arun` are the drivers; they differ in nothing but the `await`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from itertools import count
from math import inf
from types import GeneratorType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar, overload

from stigmergy.checks import Overflow, check_buffer, check_keys, check_page, check_since, check_timeout, check_writes
from stigmergy.errors import RevisionConflict, WatchClosed
from stigmergy.keys import check_key, check_prefix
from stigmergy.model import Change, Entry, Set, Snapshot, Write

if TYPE_CHECKING:
    from stigmergy.aio import AsyncStore
    from stigmergy.store import Store
    from stigmergy.watch import Watch

__all__ = [
    "Call",
    "Commit",
    "Flow",
    "GetEntry",
    "Next",
    "OpenWatch",
    "Operation",
    "Perform",
    "Scan",
    "Sleep",
    "Step",
    "arun",
    "backoff",
    "get_many",
    "run",
    "update",
    "wait_for",
]

T = TypeVar("T")


class Step(Generic[T]):
    """Something a flow may yield. `result = yield from step` has the type of the step's result; `yield step` works too.

    Immutable. A kind of step says how it is done in each colour.
    """

    __slots__ = ()

    def __iter__(self) -> Generator[Step[T], Any, T]:
        return (yield self)  # type: ignore[no-any-return]

    def do(self) -> T:
        """Do it, blocking this thread if need be."""
        raise NotImplementedError

    async def ado(self) -> T:
        """Do it, awaiting if need be."""
        return self.do()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __repr__(self) -> str:
        names: tuple[str, ...] = self.__slots__
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({fields})"


Flow: TypeAlias = Generator[Step[Any], Any, T]
_assign = object.__setattr__


class Operation(Step[T]):
    """A step that asks something of a store, and so passes through middleware on the way.

    An operation that exists is a valid one: bad arguments are refused when it is made, and keys are plain `str`.
    """

    __slots__ = ()
    name: ClassVar[str]

    def apply(self, store: Store | AsyncStore) -> Any:
        """Do it on `store`: its result on a `Store`, an awaitable of it on an `AsyncStore`."""
        raise NotImplementedError


class GetEntry(Operation["Entry | None"]):
    """Ask for the entry at `key`. Raises `InvalidKey`."""

    __slots__ = ("key",)
    name = "get_entry"
    key: str

    def __init__(self, key: str) -> None:
        _set_key(self, check_key(key))

    def apply(self, store: Store | AsyncStore) -> Any:
        return store.get_entry(self.key)


_set_key = GetEntry.key.__set__  # type: ignore[attr-defined, misc]  # half the time of `_assign` (benchmark: get with hooks)


class Scan(Operation[Snapshot]):
    """Ask for one consistent picture of the entries below `prefix`, or at `keys`. Raises `InvalidKey`, `ValueError`."""

    __slots__ = ("after", "keys", "limit", "prefix")
    name = "scan"
    prefix: str
    keys: tuple[str, ...] | None
    after: str | None
    limit: int | None

    def __init__(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> None:
        if keys is not None and prefix:
            raise ValueError("scan takes keys or a prefix, not both")
        after, limit = check_page(after, limit)
        _assign(self, "prefix", check_prefix(prefix))
        _assign(self, "keys", None if keys is None else check_keys(keys))
        _assign(self, "after", after)
        _assign(self, "limit", limit)

    def apply(self, store: Store | AsyncStore) -> Any:
        return store.scan(self.prefix, keys=self.keys, after=self.after, limit=self.limit)


class Commit(Operation["tuple[int | None, ...]"]):
    """Ask for `writes`, all of them or none. Raises `InvalidKey`, `TypeError`, `ValueError`."""

    __slots__ = ("writes",)
    name = "commit"
    writes: tuple[Write, ...]

    def __init__(self, writes: Iterable[Write]) -> None:
        _set_writes(self, check_writes(writes))

    def apply(self, store: Store | AsyncStore) -> Any:
        return store.commit(*self.writes)


_set_writes = Commit.writes.__set__  # type: ignore[attr-defined, misc]


class OpenWatch(Operation["Watch"]):
    """Ask for a watch of `keys`, or of everything below `prefix`.

    `latest` is the intent of `observe`: the latest state instead of every change; `since`, `capacity` and `overflow`
    are then of no account. Raises `InvalidKey`, `ValueError`.
    """

    __slots__ = ("capacity", "keys", "latest", "overflow", "prefix", "since")
    name = "open_watch"
    keys: tuple[str, ...]
    prefix: str | None
    since: int | str | None
    capacity: int | None
    overflow: Overflow
    latest: bool

    def __init__(
        self,
        keys: Iterable[str] = (),
        prefix: str | None = None,
        since: int | str | None = None,
        capacity: int | None = 1024,
        overflow: Overflow = "drop",
        latest: bool = False,
    ) -> None:
        keys = check_keys(keys)
        if bool(keys) == (prefix is not None):
            raise ValueError("a watch takes either keys or a prefix")
        capacity, overflow = check_buffer(capacity, overflow)
        _assign(self, "keys", keys)
        _assign(self, "prefix", None if prefix is None else check_prefix(prefix))
        _assign(self, "since", check_since(since))
        _assign(self, "capacity", capacity)
        _assign(self, "overflow", overflow)
        _assign(self, "latest", bool(latest))

    def apply(self, store: Store | AsyncStore) -> Any:
        return store._open(self)


class Call(Step[T]):
    """Call `function(*args)` outside every lock. On an async store it may be async."""

    __slots__ = ("args", "function")
    function: Callable[..., Any]
    args: tuple[Any, ...]

    @overload
    def __init__(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> None: ...
    @overload
    def __init__(self, function: Callable[..., T], *args: Any) -> None: ...
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        _assign(self, "function", function)
        _assign(self, "args", args)

    def do(self) -> T:
        result: Any = self.function(*self.args)
        if hasattr(type(result), "__await__"):
            discard(result)
            raise async_on_sync(self.function)
        value: T = result
        return value

    async def ado(self) -> T:
        result: Any = self.function(*self.args)
        value: T = await result if hasattr(type(result), "__await__") else result
        return value

    def __repr__(self) -> str:
        return f"Call({_named(self.function)})"


class Next(Step[Change]):
    """Wait for the next change of `watch`, at most `timeout` seconds (`None`: for ever); `TimeoutError` after that."""

    __slots__ = ("timeout", "watch")
    watch: Watch
    timeout: float | None

    def __init__(self, watch: Watch, timeout: float | None = None) -> None:
        check_timeout(timeout)
        _assign(self, "watch", watch)
        _assign(self, "timeout", timeout)

    def do(self) -> Change:
        return self.watch.get(self.timeout)

    async def ado(self) -> Change:
        import asyncio

        limit = asyncio.timeout(self.timeout)
        try:
            async with limit:
                return await self.watch.aget()
        except TimeoutError:
            if not limit.expired():
                raise
            late = self.watch.get_nowait()  # it may have come in time, the task not
            if late is None:
                raise TimeoutError("no change came in time") from None
            return late
        finally:
            del limit  # it holds the task, and the task this frame


class Sleep(Step[None]):
    """Let `seconds` pass. Raises `ValueError` for a negative number, or NaN."""

    __slots__ = ("seconds",)
    seconds: float

    def __init__(self, seconds: float) -> None:
        if not seconds >= 0:
            raise ValueError(f"seconds must not be negative, not {seconds}")
        _assign(self, "seconds", seconds)

    def do(self) -> None:
        time.sleep(self.seconds)

    async def ado(self) -> None:
        import asyncio

        await asyncio.sleep(self.seconds)


Perform: TypeAlias = Callable[[Operation[Any]], Any]
"""What does an operation that a flow yielded."""


def run(flow: Flow[T], perform: Perform) -> T:
    """Drive `flow` to its result, blocking. Each operation goes to `perform`; errors are thrown into the flow."""
    send = resume = _sender(flow)
    argument: Any = None
    try:
        while True:
            step = resume(argument)
            try:
                argument = perform(step) if isinstance(step, Operation) else _checked(step).do()
                resume = send
            except BaseException as error:
                argument, resume = error, flow.throw
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    except BaseException:
        flow.close()  # it has ended already, unless something struck here
        raise
    finally:
        del argument, resume  # an error held here would hold this frame, and the frame the error


async def arun(flow: Flow[T], perform: Callable[[Operation[Any]], Awaitable[Any]]) -> T:
    """Same as `run`, awaiting. Cancellation is thrown into the flow like any other error."""
    send = resume = _sender(flow)
    argument: Any = None
    try:
        while True:
            step = resume(argument)
            try:
                argument = await (perform(step) if isinstance(step, Operation) else _checked(step).ado())
                resume = send
            except BaseException as error:
                argument, resume = error, flow.throw
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    except BaseException:
        flow.close()
        raise
    finally:
        del argument, resume


def backoff(conflicts: int) -> Sleep:
    """How long to stay away after so many conflicts in a row: those who write one key must not hold each other up.

    Exponential with full jitter (Brooker, "Exponential Backoff and Jitter", 2015), from 0.2 to 25 milliseconds at most.
    """
    from random import uniform  # takes long to import, and most writes never conflict

    return Sleep(uniform(0, 1e-4 * 2 ** min(conflicts, 8)))


def get_many(keys: Iterable[str]) -> Flow[dict[str, Any]]:
    """`Store.get_many`: one scan."""
    snapshot = yield from Scan(keys=keys)
    return {key: entry.value for key, entry in snapshot.items()}


def update(key: str, function: Callable[[Any], Any], default: Any = None) -> Flow[Any]:
    """`Store.update`: read, compute, write on condition that nobody wrote in between; else again, a little later."""
    for conflicts in count(1):
        entry = yield from GetEntry(key)
        value = yield from Call(function, default if entry is None else entry.value)
        try:
            yield from Commit((Set(key, value, if_revision=0 if entry is None else entry.revision, ttl="keep"),))
        except RevisionConflict:
            yield from backoff(conflicts)
        else:
            return value


def wait_for(key: str, predicate: Callable[[Any], Any], timeout: float | None = None) -> Flow[Entry]:
    """`Store.wait_for`: look, and look again whenever the key has changed."""
    deadline = time.monotonic() + check_timeout(timeout)
    watch, seen = None, 0
    try:
        while True:
            entry = yield from GetEntry(key)
            if entry is not None and entry.revision != seen:
                seen = entry.revision
                if (yield from Call(predicate, entry.value)):
                    return entry
            if watch is None:  # it begins with the present state, so what came since the first look is not missed
                watch = yield from OpenWatch((key,), latest=True)
            left = deadline - time.monotonic()
            try:
                yield from Next(watch, None if left == inf else max(left, 0.0))
            except TimeoutError:
                if left == inf:  # the watch is mapped through what raised it
                    raise
                raise TimeoutError(f"{key!r} did not become what was waited for in time") from None
            except WatchClosed:
                yield from GetEntry(key)  # a closed store says so
                raise
    finally:
        if watch is not None:
            watch.close()


def _sender(flow: Flow[T]) -> Callable[[Any], Step[Any]]:
    if type(flow) is not GeneratorType and not isinstance(flow, Generator):
        discard(flow)
        raise TypeError(f"a flow is a generator, not a {type(flow).__name__}: its function must contain a yield")
    return flow.send


def _checked(step: object) -> Step[Any]:
    if not isinstance(step, Step):
        raise TypeError(f"a flow may yield operations and steps, not a {type(step).__name__}")
    return step


def async_on_sync(function: Callable[..., Any]) -> TypeError:
    """What to raise where `function` would have to be awaited, and cannot be."""
    return TypeError(f"{_named(function)} is async: use it with the async store (`.aio`), or make it plain")


def discard(awaitable: object) -> None:
    """Close a coroutine that nobody will await, so that it does not warn about it."""
    close = getattr(awaitable, "close", None)
    if close is not None:
        close()


def _named(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
