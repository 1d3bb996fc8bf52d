"""Many clients at once on one store, in threads; what they saw is for the checks to judge."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any, Literal, NamedTuple

from stigmergy.aio import AsyncStore
from stigmergy.errors import Compacted, Lagged, RevisionConflict, StoreClosed, WatchClosed
from stigmergy.flow import OpenWatch
from stigmergy.model import Change, Check, Delete, Set, Write
from stigmergy.store import Store
from stigmergy.testing.history import Client, Invocation
from stigmergy.testing.laws import check_log, check_observe, check_watch
from stigmergy.testing.preemption import preemption
from stigmergy.watch import Watch

__all__ = ["Watched", "all_at_once", "check_watched", "record_calls", "record_watches", "wait_until_told"]

Between = Literal["line", "opcode"] | None


def all_at_once(functions: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call each of `functions` in a thread of its own, let all begin together, and return the results."""
    functions = list(functions)
    start = Barrier(len(functions), timeout=30)

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

    `watch` is one of them, of a key that nobody writes: so there is nothing to take out of it.
    """
    deadline = time.monotonic() + 30
    while watch.revision < revision:
        assert time.monotonic() < deadline, "the watches were not told of every write"
        time.sleep(0.0005)


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
    slower than the writers, and have buffers that are too small for that.
    """
    log, told = store.watch(prefix="", capacity=None), store.watch("~")
    draw = random.Random(str(seed))
    seeds = [draw.random() for _ in range(writers + watches)]

    def write_all() -> None:
        all_at_once([partial(_write, store, seed, keys, writes // writers) for seed in seeds[:writers]])
        wait_until_told(told, store.scan(limit=1).revision)
        store.close()

    readers = [partial(_read, store, seed, keys, writes) for seed in seeds[writers:]]
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


def _write(store: Store, seed: float, keys: Sequence[str], writes: int) -> None:
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
            store.commit(*draw.choice(each))
        except RevisionConflict:
            continue


def _read(store: Store, seed: float, keys: Sequence[str], writes: int) -> Watched | None:
    """Open a watch somewhere in the traffic and read it to its end; `None` if it came too late for that."""
    draw = random.Random(seed)
    where = (
        OpenWatch(draw.sample(keys, 2)) if draw.random() < 0.3 else OpenWatch(prefix=draw.choice(["", "a", "a:", "b:"]))
    )
    begin, offset, slow = draw.randrange(writes // 2), draw.randint(-100, 100), draw.random() < 0.5
    try:
        while (now := store.scan(limit=1).revision) < begin + max(offset, 0):
            time.sleep(0.005)
        if draw.random() < 0.2:
            request = OpenWatch(where.keys, where.prefix, latest=True)
        else:
            since = max(0, now + min(offset, 0))
            request = OpenWatch(where.keys, where.prefix, since, 16 if slow else None, draw.choice(["drop", "raise"]))
        watch = store.open_watch(request)
    except (StoreClosed, Compacted):
        return None
    return Watched(request, request.since if isinstance(request.since, int) else 0, _drain(watch, draw, slow=slow))


def _drain(watch: Watch, draw: random.Random, *, slow: bool) -> list[Change]:
    delivered: list[Change] = []
    missed = 0
    while True:
        try:
            change = watch.get(timeout=30)
        except Lagged as lagged:
            missed += lagged.missed
        except WatchClosed:
            return delivered
        else:
            delivered.append(change._replace(missed=change.missed + missed))
            missed = 0
            if slow:
                time.sleep(draw.uniform(0, 0.005))
