"""Many clients at once on one store, in threads; what they saw is for the checks to judge."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from heapq import heappop, heappush
from math import inf
from threading import Barrier, Event, Lock
from typing import Any, Literal, NamedTuple

from stigmergy.aio import AsyncStore
from stigmergy.errors import Compacted, Lagged, RevisionConflict, StoreClosed, WatchClosed
from stigmergy.flow import OpenWatch
from stigmergy.model import Change, Check, Delete, Set, Write
from stigmergy.store import Store
from stigmergy.testing.clock import HANG_TIMEOUT
from stigmergy.testing.history import Client, Invocation
from stigmergy.testing.laws import check_log, check_observe, check_watch
from stigmergy.testing.preemption import preemption
from stigmergy.watch import Watch

__all__ = ["Watched", "all_at_once", "check_watched", "record_calls", "record_watches", "wait_until_told"]

Between = Literal["line", "opcode"] | None


def all_at_once(functions: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call each of `functions` in a thread of its own, let all begin together, and return the results."""
    functions = list(functions)
    start = Barrier(len(functions), timeout=HANG_TIMEOUT)

    def begin(function: Callable[[], Any]) -> Any:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(begin, functions))


def record_calls(
    store: Store | AsyncStore,
    *,
    seed: object,
    keys: Sequence[str],
    clients: int = 8,
    calls: int = 500,
    between: Between = None,
    share: float = 0.05,
) -> list[Invocation]:
    """The history of so many clients with so many calls each, preempted as `preemption` says.

    On an `AsyncStore` each client is a task of an event loop of its own.
    """
    history: list[Invocation] = []

    def run(client: Client) -> None:
        flow = client.traffic(keys, calls, seed)
        if isinstance(store, AsyncStore):
            asyncio.run(store.run(flow))
        else:
            store.run(flow)

    with preemption(seed, between=between, share=share):
        all_at_once([partial(run, Client(store, number, history)) for number in range(clients)])
    return history


def wait_until_told(watch: Watch, revision: int) -> None:
    """Return when the watches of a store were told of every write up to `revision`: maybe a little after it was made.

    `watch` is one of them, of everything; what it has up to there is taken out of it.
    """
    while watch.revision < revision:
        watch.get(HANG_TIMEOUT)


# -- watches -----------------------------------------------------------------------------------------------------------


class Watched(NamedTuple):
    """What one watch delivered until its store was closed; it covers the revisions after `since`."""

    request: OpenWatch
    since: int
    delivered: list[Change]


def record_watches(
    store: Store,
    *,
    seed: object,
    writers: int = 8,
    watches: int = 16,
    writes: int = 20_000,
    keys: Sequence[str] = ("a", "a:b", "a:c", "b", "b:c"),
    between: Between = None,
) -> tuple[list[Change], list[Watched]]:
    """The log of so many writes, and what watches saw that were opened in between; closes the store at the end.

    Each watch begins up to 100 revisions before or after the moment at which it is opened. Half of the readers are
    slower than the writers, and have buffers that are too small for that. Where the store has forgotten the revision
    before, the watch begins at the moment.
    """
    log, told = store.watch(prefix="", capacity=None), store.watch(prefix="", capacity=None)
    progress = _Progress()
    draw = random.Random(str(seed))
    seeds = [draw.random() for _ in range(writers + watches)]

    def write_all() -> None:
        try:
            all_at_once([partial(_write, store, progress, seed, keys, writes // writers) for seed in seeds[:writers]])
            wait_until_told(told, store.scan(limit=1).revision)
        finally:
            store.close()
            progress.reach(inf)

    readers = [partial(_read, store, progress, seed, keys, writes) for seed in seeds[writers:]]
    with preemption(seed, between=between):
        found = all_at_once([write_all, *readers])
    return list(log), [each for each in found if each is not None]


def check_watched(log: Sequence[Change], watched: Iterable[Watched]) -> list[str]:
    """What is wrong with the log, or with what the watches delivered of it."""
    wrong = check_log(log)
    for request, since, delivered in watched:
        if request.latest:
            wrong += check_observe(delivered, log, request)
        else:
            wrong += check_watch(delivered, log, request, since=since, until=len(log))
    return wrong


class _Progress:
    """How far the writers have come. A reader that waits for it is slow by what they do, not by the clock."""

    def __init__(self) -> None:
        self.revision: float = 0
        self._waiting: list[tuple[float, int, Event]] = []
        self._lock = Lock()

    def reach(self, revision: float) -> None:
        """Wake those who wait for `revision` or an earlier one."""
        with self._lock:
            self.revision = max(self.revision, revision)
            while self._waiting and self._waiting[0][0] <= self.revision:
                heappop(self._waiting)[-1].set()

    def wait_for(self, revision: float) -> None:
        """Return when the writers have reached `revision`, or their end."""
        reached = Event()
        with self._lock:
            if revision <= self.revision:
                return
            heappush(self._waiting, (revision, id(reached), reached))
        reached.wait()


def _write(store: Store, progress: _Progress, seed: float, keys: Sequence[str], writes: int) -> None:
    draw = random.Random(seed)
    for number in range(writes):
        key, other = draw.sample(keys, 2)
        value = f"{seed}/{number}"
        entry = store.get_entry(other) if number % 4 == 0 else None
        each: list[list[Write]] = [
            [Set(key, value)],
            [Set(key, value), Set(other, value)],
            [Set(key, value), Delete(other)],
            [Set(key, value), Check(other, entry.revision if entry else 0)],
        ]
        try:
            revisions = store.commit(*draw.choice(each))
        except RevisionConflict:
            continue
        progress.reach(max(filter(None, revisions)))


def _read(store: Store, progress: _Progress, seed: float, keys: Sequence[str], writes: int) -> Watched | None:
    """Open a watch somewhere in the traffic and read it to its end; `None` if it came too late for that."""
    draw = random.Random(seed)
    among, prefix = (draw.sample(keys, 2), None) if draw.random() < 0.3 else ((), draw.choice(["", "a", "a:", "b:"]))
    begin, offset, slow = draw.randrange(writes // 2), draw.randint(-100, 100), draw.random() < 0.5
    request = OpenWatch(among, prefix, None, 16 if slow else None, draw.choice(["drop", "raise"]))
    latest = draw.random() < 0.2
    progress.wait_for(begin + max(offset, 0))
    try:
        if latest:
            request, since = OpenWatch(among, prefix, latest=True), 0
            watch = store.open_watch(request)
        else:
            watch, since = _open_watch(store, request, offset)
    except StoreClosed:
        return None
    return Watched(request, since, _drain(watch, draw, progress if slow else None))


def _open_watch(store: Store, request: OpenWatch, offset: int) -> tuple[Watch, int]:
    """What `request` asks for, and the revision behind which it begins: before now, if `offset` says so."""
    since = max(0, store.scan(limit=1).revision + min(offset, 0))
    try:
        past = OpenWatch(request.keys, request.prefix, since, request.capacity, request.overflow)
        return store.open_watch(past), since
    except Compacted:  # a store may forget; it goes on from now
        watch = store.open_watch(request)
        return watch, watch.revision


def _drain(watch: Watch, draw: random.Random, behind: _Progress | None) -> list[Change]:
    """All that `watch` delivers. `behind` makes its reader slow: the writers go on for a while after each change."""
    delivered: list[Change] = []
    missed = 0
    while True:
        try:
            change = watch.get(HANG_TIMEOUT)
        except Lagged as lagged:
            missed += lagged.missed
        except WatchClosed:
            return delivered
        else:
            delivered.append(change._replace(missed=change.missed + missed))
            missed = 0
            if behind is not None:
                behind.wait_for(behind.revision + draw.randint(0, 20))
