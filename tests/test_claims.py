"""Claims: who has one, what a holder may write, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest

import stigmergy.claims
import stigmergy.lease
from processes import PATIENCE, Link, Start, eventually
from stigmergy import (
    AccessDenied,
    AsyncStore,
    Call,
    Change,
    Check,
    ClaimLost,
    Commit,
    Delete,
    Flow,
    InvalidKey,
    MemoryStore,
    Middleware,
    Next,
    Op,
    OpenWatch,
    Operation,
    OutcomeUnknown,
    RevisionConflict,
    Set,
    Store,
    StoreClosed,
    Unavailable,
    acting_as,
    apply_middleware,
    claim,
    guarded,
    open_async_store,
    open_store,
    owner_of,
    scoped,
)
from stigmergy.codec import JSON
from stigmergy.lease import Lease, acquire, keep
from stigmergy.providers.sqlite import SQLiteStore
from stigmergy.testing import VirtualClock

LONG = 3600.0
SHORT = 0.03
"""Renewed a hundred times a second: where `leases` goes by, for in real time no machine keeps up with that."""


@pytest.fixture
def root(clock: VirtualClock) -> Iterator[MemoryStore]:
    with MemoryStore(clock=clock) as store:
        yield store


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """The clock of those who hold claims: they renew them in real time, and lose one for good when this says so."""
    clock = VirtualClock()
    for module in (stigmergy.claims, stigmergy.lease):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock


def with_a_ttl_that_is_kept(attempt: Callable[[float], object]) -> None:
    """Call `attempt(ttl)`, in real time, with the shortest ttl by which this machine does not lose the claim."""
    for ttl in (0.3, 3.0):
        with suppress(ClaimLost):
            attempt(ttl)
            return
    attempt(30.0)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def mapping(function: Callable[[Change], Change]) -> Middleware:
    """A middleware by which every watch is mapped through `function`."""

    def around(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        return result.map(function) if isinstance(operation, OpenWatch) else result

    return around


def keepers() -> list[int]:
    """The threads that renew claims."""
    return [thread for thread, frame in sys._current_frames().items() if "_keep_in_thread" in names(frame)]


def names(frame: FrameType | None) -> list[str]:
    """The functions that a thread is in."""
    return [] if frame is None else [frame.f_code.co_name, *names(frame.f_back)]


# -- taking and leaving ------------------------------------------------------------------------------------------------


def test_a_claim_is_an_ordinary_entry_with_a_ttl_written_by_its_owner(root: MemoryStore) -> None:
    with claim(root, "task", "w1", LONG) as held:
        entry = root.get_entry("task")
        assert entry is not None
        assert (entry.writer, entry.revision) == ("w1", held.token)
        assert entry.expires is not None
        assert root.scan().keys() == {"task"}
        assert owner_of(root, "task") == held.owner == "w1"
        assert (held.key, held.lost) == ("task", False)
        assert repr(held) == "<Claim of 'w1' on 'task', token 1>"
    assert owner_of(root, "task") is None


async def test_the_same_awaited() -> None:
    async with MemoryStore().aio as store:
        async with claim(store, "task", "w1", LONG) as held:
            assert await owner_of(store, "task") == "w1"
            assert await held.set("a", 1) == 2
            assert await held.commit(Check("a", 2), Set("b", 1)) == (None, 3)
            assert await held.delete("a") is True
            assert repr(held) == "<AsyncClaim of 'w1' on 'task', token 1>"
        assert await owner_of(store, "task") is None
        assert (await store.get_entry("b")).writer == "w1"  # type: ignore[union-attr]


def test_nothing_is_left_behind(root: MemoryStore) -> None:
    with claim(root, "task", "w1", LONG):
        eventually(lambda: len(keepers()) == 1)
        assert len(root._hub._members()) == 1

    assert root._hub._members() == []
    eventually(lambda: keepers() == [])


def test_a_claim_is_taken_by_exactly_one(root: MemoryStore) -> None:
    granted: list[str] = []
    barrier = threading.Barrier(8)

    def contend(name: str) -> None:
        barrier.wait()
        with suppress(TimeoutError):
            claim(root, "task", name, LONG, timeout=0).__enter__()
            granted.append(name)

    threads = [threading.Thread(target=contend, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [owner_of(root, "task")] == granted


def test_who_waits_is_woken_by_the_watch_and_does_nothing_until_then(root: MemoryStore) -> None:
    asked: list[str] = []
    parked = threading.Event()

    def listening(operation: Operation[Any]) -> Flow[Any]:
        asked.append(operation.name)
        try:
            return (yield operation)
        except RevisionConflict:
            parked.set()
            raise

    tokens: list[int] = []

    def wait() -> None:
        with claim(apply_middleware(root, listening), "task", "w2", LONG) as held:
            tokens.append(held.token)

    with claim(root, "task", "w1", LONG) as first:
        waiting = in_thread(wait)
        assert parked.wait(PATIENCE)
        root.set("other", 1)
    waiting.join(PATIENCE)

    assert tokens > [first.token]
    assert asked == ["open_watch", "commit", "commit", "commit"], "watch, refused, granted, released"


def test_many_waiters_get_it_one_after_the_other_and_tokens_increase(root: MemoryStore) -> None:
    tokens: list[int] = []
    inside = threading.Lock()

    def work(name: str) -> None:
        for _ in range(25):
            with claim(root, "task", name, LONG) as held:
                assert inside.acquire(blocking=False), "two at once"
                tokens.append(held.token)
                inside.release()

    threads = [in_thread(lambda name=f"w{n}": work(name)) for n in range(8)]  # type: ignore[misc]
    for thread in threads:
        thread.join(PATIENCE)

    assert len(tokens) == 200
    assert tokens == sorted(set(tokens))


def test_a_waiter_takes_over_from_a_claim_that_expires(root: MemoryStore, clock: VirtualClock) -> None:
    with pytest.raises(ClaimLost), claim(root, "task", "dead", 10):
        clock.advance(20)
        with claim(root, "task", "w2", LONG, timeout=PATIENCE) as held:
            assert owner_of(root, "task") == "w2"
            assert held.token == 3, "set, expired, set"


# -- time runs out -----------------------------------------------------------------------------------------------------


def test_a_waiter_gives_up_in_time_and_is_never_granted(root: MemoryStore) -> None:
    with claim(root, "task", "w1", LONG):
        with pytest.raises(TimeoutError), claim(root, "task", "w2", LONG, timeout=0.01):
            raise AssertionError("granted")
        assert [each.ended for each in root._hub._members()].count(False) == 1, "its watch goes on"
    assert owner_of(root, "task") is None
    assert root.scan().revision == 2


async def test_a_cancelled_waiter_is_never_granted() -> None:
    async with MemoryStore().aio as store:
        async with claim(store, "task", "w1", LONG):
            waiter = claim(store, "task", "w2", LONG)
            waiting = asyncio.create_task(waiter.__aenter__())
            with pytest.raises(TimeoutError):
                async with claim(store, "task", "w3", LONG, timeout=0.01):
                    raise AssertionError("granted")
            waiting.cancel()
            await asyncio.wait([waiting])
            assert waiting.cancelled()
        await asyncio.sleep(0)
        assert await owner_of(store, "task") is None


def test_a_waiter_of_a_store_that_is_closed_hears_of_it() -> None:
    store = MemoryStore()
    with pytest.raises(ClaimLost), claim(store, "task", "w1", LONG):
        heard: list[Exception] = []

        def wait() -> None:
            try:
                claim(store, "task", "w2", LONG).__enter__()
            except Exception as error:
                heard.append(error)

        waiting = in_thread(wait)
        eventually(lambda: len(store._hub._members()) == 2)
        store.close()
        waiting.join(PATIENCE)
        assert [type(each) for each in heard] == [StoreClosed]


# -- renewal -----------------------------------------------------------------------------------------------------------


def test_a_claim_is_renewed_for_as_long_as_the_block_runs() -> None:
    def hold(ttl: float) -> None:
        changes: list[Change] = []
        with MemoryStore() as store, store.watch("task") as watch, claim(store, "task", "w1", ttl) as held:
            eventually(lambda: changes.extend(iter(watch.get_nowait, None)) or held.lost or len(changes) > 2)
            held.set("a", 1)
        assert all(change.op is Op.SET and change.writer == "w1" for change in changes)
        assert len({change.value["claim"] for change in changes}) == 1
        assert held.token == changes[0].revision

    with_a_ttl_that_is_kept(hold)


def test_a_claim_is_renewed_by_a_task_as_well() -> None:
    async def hold(ttl: float) -> None:
        async with MemoryStore().aio as store, store.watch("task") as watch, claim(store, "task", "w1", ttl) as held:
            changes = [await watch.aget() for _ in range(3)]
            await held.set("a", 1)
        assert all(change.op is Op.SET for change in changes)

    with_a_ttl_that_is_kept(lambda ttl: asyncio.run(hold(ttl)))


def test_a_claim_is_renewed_after_each_third_of_its_ttl_and_after_a_tenth_if_that_failed(
    root: MemoryStore, leases: VirtualClock
) -> None:
    lease = Lease("task", "w1", 12.0)
    root.run(acquire(lease, None))
    keeping = keep(lease, lambda: True)
    step, waited = next(keeping), list[float]()
    for failure in (None, None, Unavailable("for once"), None, None):
        assert isinstance(step, Next)
        assert step.timeout is not None
        waited.append(step.timeout)
        leases.advance(step.timeout)  # and no change has come
        assert isinstance(keeping.throw(TimeoutError()), Commit)
        step = keeping.throw(failure) if failure else keeping.send((lease.revision + 1,))
    keeping.close()

    assert waited == pytest.approx([4.0, 4.0, 4.0, 1.2, 4.0])


def test_a_renewal_between_a_look_and_a_write_is_no_error(root: MemoryStore) -> None:
    renewals = 3

    def renewing(operation: Operation[Any]) -> Flow[Any]:
        nonlocal renewals
        if isinstance(operation, Commit) and isinstance(operation.writes[0], Check) and renewals:
            renewals -= 1
            entry = root.get_entry("task")
            assert entry is not None
            root.commit(Set("task", entry.value, entry.revision, LONG, "w1"))
        return (yield operation)

    with claim(apply_middleware(root, renewing), "task", "w1", LONG) as held:
        assert held.set("a", 1) == 5
        assert not held.lost
    assert renewals == 0
    assert owner_of(root, "task") is None


def test_a_claim_that_is_dropped_without_leaving_is_not_renewed_for_ever() -> None:
    with MemoryStore() as store, store.watch("task", capacity=None) as watch:
        held = claim(store, "task", "w1", 0.15)
        held.__enter__()
        assert watch.get(PATIENCE).op is Op.SET
        del held
        gc.collect()
        while (change := watch.get(PATIENCE)).op is Op.SET:
            pass
        assert change.expired
        eventually(lambda: keepers() == [])


def test_a_renewal_that_cannot_reach_the_engine_is_tried_again_until_the_deadline(
    root: MemoryStore, leases: VirtualClock
) -> None:
    failing = threading.Event()
    tried = threading.Semaphore(0)

    def unreachable(operation: Operation[Any]) -> Flow[Any]:
        if failing.is_set() and isinstance(operation, Commit):
            tried.release()
            raise Unavailable("no route")
        return (yield operation)

    store = apply_middleware(root, unreachable)
    with pytest.raises(ClaimLost), claim(store, "task", "w1", SHORT) as held:
        failing.set()
        leases.advance(0.99 * SHORT)
        for _ in range(2):
            assert tried.acquire(timeout=PATIENCE)
        assert not held.lost
        with root.watch("task") as watch:
            failing.clear()
            for _ in range(2):  # at the second time it knows of the first
                assert watch.get(PATIENCE).op is Op.SET, "renewed after all"
        leases.advance(0.99 * SHORT)
        assert not held.lost
        failing.set()
        leases.advance(2 * SHORT)
        eventually(lambda: held.lost)
        with pytest.raises(ClaimLost):
            held.set("a", 1)
        failing.clear()


def test_an_unknown_outcome_is_looked_up(root: MemoryStore) -> None:
    unknown = True

    def blind(operation: Operation[Any]) -> Flow[Any]:
        nonlocal unknown
        result = yield operation
        if isinstance(operation, Commit) and unknown:
            unknown = False
            raise OutcomeUnknown("cut off")
        return result

    with claim(apply_middleware(root, blind), "task", "w1", LONG) as held:
        assert held.token == 1
        held.set("a", 1)


# -- losing it ---------------------------------------------------------------------------------------------------------

THEFTS: dict[str, Callable[[MemoryStore, VirtualClock], object]] = {
    "expired": lambda store, clock: clock.advance(2 * LONG),
    "deleted": lambda store, clock: store.delete("task"),
    "set by somebody": lambda store, clock: store.set("task", 1),
    "claimed anew by the same owner": lambda store, clock: (
        store.delete("task"),
        store.commit(Set("task", 1, writer="w1")),
    ),
}


@pytest.mark.parametrize("theft", THEFTS.values(), ids=THEFTS)
def test_a_lost_claim_writes_nothing_shows_at_once_and_raises_at_the_end(
    root: MemoryStore, clock: VirtualClock, theft: Any
) -> None:
    with pytest.raises(ClaimLost) as lost, claim(root, "task", "w1", LONG) as held:
        theft(root, clock)
        before = root.scan().revision
        for write in (
            lambda: held.set("a", 1),
            lambda: held.delete("a"),
            lambda: held.commit(Set("a", 1), Set("b", 1)),
        ):
            with pytest.raises(ClaimLost):
                write()
        assert held.lost
        assert root.scan().revision == before
        eventually(lambda: held.lost)
    assert (lost.value.key, lost.value.owner, lost.value.token) == ("task", "w1", 1)
    assert root.get("a") is None


@pytest.mark.parametrize("theft", THEFTS.values(), ids=THEFTS)
def test_the_keeper_notices_without_a_write(root: MemoryStore, clock: VirtualClock, theft: Any) -> None:
    with pytest.raises(ClaimLost), claim(root, "task", "w1", LONG) as held:
        theft(root, clock)
        root.scan()
        eventually(lambda: held.lost)


@pytest.mark.parametrize("theft", THEFTS.values(), ids=THEFTS)
async def test_losing_it_cancels_the_block(clock: VirtualClock, theft: Any) -> None:
    with MemoryStore(clock=clock) as root:
        reached = False
        with pytest.raises(ClaimLost):
            async with claim(root.aio, "task", "w1", LONG) as held:
                theft(root, clock)
                root.scan()
                try:
                    await asyncio.get_running_loop().create_future()  # for ever
                finally:
                    reached = held.lost
        assert reached
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)


async def test_a_cancellation_from_outside_stays_one() -> None:
    async with MemoryStore().aio as store:
        entered = asyncio.Event()

        async def work() -> None:
            async with claim(store, "task", "w1", LONG):
                entered.set()
                await asyncio.get_running_loop().create_future()

        task = asyncio.create_task(work())
        await entered.wait()
        task.cancel()
        await asyncio.wait([task])

        assert task.cancelled()
        assert await owner_of(store, "task") is None


async def test_a_loop_that_was_blocked_past_the_deadline_finds_the_claim_lost() -> None:
    with MemoryStore() as root:
        with pytest.raises(ClaimLost):
            async with claim(root.aio, "task", "w1", 0.05) as held:
                while root.get("task") is not None:
                    pass  # the loop is held up
                await asyncio.get_running_loop().create_future()
        assert held.lost


@pytest.mark.parametrize("lose", [False, True])
def test_what_the_block_raises_comes_out(root: MemoryStore, lose: bool) -> None:
    with pytest.raises(ZeroDivisionError), claim(root, "task", "w1", LONG):
        if lose:
            root.delete("task")
        raise ZeroDivisionError
    assert owner_of(root, "task") is None


async def test_what_an_async_block_raises_comes_out() -> None:
    async with MemoryStore().aio as store:
        with pytest.raises(ZeroDivisionError):
            async with claim(store, "task", "w1", LONG):
                raise ZeroDivisionError
        assert await owner_of(store, "task") is None


def test_a_claim_that_was_not_renewed_in_time_stays_lost_whatever_the_store_says(
    root: MemoryStore, leases: VirtualClock
) -> None:
    hold_up, tried = threading.Event(), threading.Event()
    hold_up.set()

    def slow(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit) and isinstance(operation.writes[0], Set):
            if not hold_up.is_set():
                tried.set()
            hold_up.wait(PATIENCE)
        return (yield operation)

    with pytest.raises(ClaimLost), claim(apply_middleware(root, slow), "task", "w1", SHORT) as held:
        hold_up.clear()
        assert tried.wait(PATIENCE)
        leases.advance(2 * SHORT)  # and the clock of the store stands still: the entry never expires
        assert held.lost
        with root.watch("task") as watch:
            hold_up.set()
            assert watch.get(PATIENCE).op is Op.SET, "renewed, too late"
        assert held.lost
        with pytest.raises(ClaimLost):
            held.set("a", 1)
    assert root.scan().keys() == set(), "it was given up, and so it was deleted"


@pytest.mark.parametrize("error", [TypeError("a bug"), TimeoutError("slow"), AccessDenied("write", "task")])
def test_an_error_in_a_renewal_is_no_loss_before_the_deadline(
    root: MemoryStore, leases: VirtualClock, error: Exception
) -> None:
    failures = [error]

    def failing(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit) and operation.writes[0].if_revision and failures:
            raise failures.pop()
        return (yield operation)

    with root.watch("task") as watch:
        with claim(apply_middleware(root, failing), "task", "w1", SHORT) as held:
            leases.advance(0.99 * SHORT)
            assert watch.get(PATIENCE).revision == held.token
            assert watch.get(PATIENCE).op is Op.SET, "renewed at the second attempt"
            assert failures == []
        assert owner_of(root, "task") is None


def test_the_loss_tells_what_kept_it_from_being_renewed(root: MemoryStore, leases: VirtualClock) -> None:
    failed = threading.Semaphore(0)

    def failing(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit) and isinstance(operation.writes[0], Set) and operation.writes[0].if_revision:
            failed.release()
            raise Unavailable("no route")
        return (yield operation)

    with pytest.raises(ClaimLost) as lost, claim(apply_middleware(root, failing), "task", "w1", SHORT) as held:
        for _ in range(2):  # at the second time it knows of the first
            assert failed.acquire(timeout=PATIENCE)
        leases.advance(2 * SHORT)
        assert held.lost
    assert isinstance(lost.value.__cause__, Unavailable)
    assert owner_of(root, "task") is None


def test_an_error_after_the_write_that_takes_the_claim_leaves_none(root: MemoryStore) -> None:
    def observing(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        if isinstance(operation, Commit) and isinstance(operation.writes[0], Set):
            raise TypeError("a bug in an observer")
        return result

    with pytest.raises(TypeError, match="observer"), claim(apply_middleware(root, observing), "task", "w1", LONG):
        raise AssertionError("granted")
    assert owner_of(root, "task") is None


async def test_an_error_while_leaving_does_not_hide_a_cancellation(root: MemoryStore) -> None:
    def down(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit) and isinstance(operation.writes[0], Delete):
            raise OSError("down")
        return (yield operation)

    async def work() -> None:
        async with claim(apply_middleware(root, down).aio, "task", "w1", LONG):
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(work())
    await root.aio.wait_for("task", bool, timeout=PATIENCE)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_keeper_that_somebody_else_cancels_tells_the_block(root: MemoryStore) -> None:
    async def work() -> None:
        async with claim(root.aio, "task", "w1", LONG):
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(work())
    await root.aio.wait_for("task", bool, timeout=PATIENCE)
    await asyncio.sleep(0)
    for other in asyncio.all_tasks() - {task, asyncio.current_task()}:
        other.cancel()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ClaimLost):
            await task
    assert owner_of(root, "task") is None


# -- what may not end a claim ------------------------------------------------------------------------------------------


def test_the_block_is_left_while_this_thread_holds_the_lock_of_the_store(root: MemoryStore) -> None:
    held = claim(root, "task", "w1", LONG)
    held.__enter__()
    with root._lock:  # as a signal handler, or a finaliser, that struck in the midst of a write
        held.__exit__(None, None, None)

    assert owner_of(root, "task") is None
    assert not held.lost


def test_a_claim_that_was_left_is_not_lost_later(root: MemoryStore, leases: VirtualClock) -> None:
    with claim(root, "task", "w1", LONG) as held:
        held.set("a", 1)
    leases.advance(2 * LONG)

    assert not held.lost


@pytest.mark.parametrize("url", ["memory", "sqlite:///{}/state.db"])
def test_a_burst_of_other_writes_ends_neither_a_claim_nor_the_wait_for_it(url: str, tmp_path: Path) -> None:
    granted: list[int] = []

    def wait() -> None:
        with claim(store, "task", "w2", LONG, timeout=PATIENCE) as held:
            granted.append(held.token)

    with open_store(url.format(tmp_path), history=100) as store:
        with claim(store, "task", "w1", LONG) as held:
            waiting = in_thread(wait)
            eventually(lambda: len(store._hub._members()) == 2)  # type: ignore[attr-defined]
            store.commit(*[Set(f"bulk:{number:06}", number) for number in range(2_000)])
            with store.watch("bulk:000000") as watch:
                store.set("bulk:000000", "the last")
                watch.get(PATIENCE)  # so the reader has been there
            assert held.set("a", 1) > 2_000
            assert not held.lost
        waiting.join(PATIENCE)
        assert granted > [2_000]


def test_an_error_of_the_watch_is_no_loss_and_a_theft_behind_it_is_one(root: MemoryStore, leases: VirtualClock) -> None:
    failures = iter([LookupError("once"), LookupError("again")])

    def fail(change: Change) -> Change:
        for error in failures:
            raise error
        return change

    renewed = root.watch("task")
    with pytest.raises(ClaimLost), claim(apply_middleware(root, mapping(fail)), "task", "w1", SHORT) as held:
        for _ in range(4):
            renewed.get(PATIENCE)
        assert not held.lost
        root.delete("task")
        eventually(lambda: held.lost)
    assert next(failures, None) is None


def test_a_watch_that_cannot_be_opened_again_is_no_loss_while_renewals_go_through(
    root: MemoryStore, leases: VirtualClock
) -> None:
    refused = threading.Semaphore(0)

    def refusing(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, OpenWatch) and is_held:
            refused.release()
            raise Unavailable("no route")
        result = yield operation
        return result.map(fail) if isinstance(operation, OpenWatch) else result

    def fail(change: Change) -> Change:
        raise LookupError("always")

    is_held = False
    with pytest.raises(ClaimLost) as lost, claim(apply_middleware(root, refusing), "task", "w1", SHORT) as held:
        is_held = True
        leases.advance(0.99 * SHORT)
        for _ in range(20):
            assert refused.acquire(timeout=PATIENCE)
        leases.advance(0.99 * SHORT)
        assert not held.lost
        assert held.set("a", 1)
        root.set("task", "somebody else's")
        eventually(lambda: held.lost)
    assert isinstance(lost.value.__cause__, (LookupError, Unavailable))


def test_who_waits_is_not_sent_away_by_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with SQLiteStore(path) as store, SQLiteStore(path, codec=Other()) as other:
        first = other.set("task", "in words of its own")
        granted = []

        def wait() -> None:
            with claim(store, "task", "w1", LONG, timeout=PATIENCE) as held:
                granted.append(held.token)

        waiting = in_thread(wait)
        eventually(lambda: store._hub._members())
        other.set("task", "again")
        other.delete("task")
        waiting.join(PATIENCE)
        assert granted > [first]

        with pytest.raises(ClaimLost) as lost, claim(store, "task", "w1", LONG) as held:
            other.set("task", "stolen")
            with pytest.raises(ClaimLost):
                held.set("a", 1)
        assert lost.value.key == "task"
        assert other.get("task") == "stolen"


class Other(JSON):
    id = "other"


def test_blocking_jobs_of_the_program_hold_up_no_renewal(tmp_path: Path) -> None:
    async def hold(ttl: float) -> None:
        stop = threading.Event()
        async with open_async_store(f"sqlite:///{tmp_path}/state.db") as store:
            jobs = [asyncio.create_task(asyncio.to_thread(stop.wait)) for _ in range(64)]
            try:
                async with claim(store, "task", "w1", ttl) as held, store.watch("task") as renewals:
                    changes = [await anext(renewals) for _ in range(2)]
                    await held.set("a", 1)
            finally:
                stop.set()
                await asyncio.gather(*jobs)
        assert all(change.op is Op.SET for change in changes)

    with_a_ttl_that_is_kept(lambda ttl: asyncio.run(hold(ttl)))


@pytest.mark.parametrize("url", ["memory", "sqlite"])
async def test_a_block_that_is_cancelled_again_at_each_step_leaves_its_claim(url: str, tmp_path: Path) -> None:
    """As the cancel scopes of anyio do."""

    async def work(number: int) -> None:
        async with claim(store, f"task {number}", "w1", LONG):
            inside.set()
            await asyncio.Event().wait()

    async with open_async_store("memory" if url == "memory" else f"sqlite:///{tmp_path}/state.db") as store:
        for number in range(40):
            inside = asyncio.Event()
            task = asyncio.create_task(work(number))
            await inside.wait()
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.to_thread(eventually, lambda key=f"task {number}": owner_of(store.sync, key) is None)


def test_claims_are_held_and_left_when_the_main_thread_has_ended(tmp_path: Path) -> None:
    program = """
import asyncio, sys, threading
from stigmergy import claim, open_store

store = open_store(f"sqlite:///{sys.argv[1]}/state.db")
entered = threading.Event()

async def work():
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def tell():
        threading.main_thread().join()
        loop.call_soon_threadsafe(ended.set)

    async with claim(store.aio, "task", "w1", 3600) as held:
        threading.Thread(target=tell).start()
        entered.set()
        await ended.wait()
        await asyncio.gather(held.set("a", 1), *(store.aio.get("b") for _ in range(8)))

threading.Thread(target=asyncio.run, args=[work()]).start()
assert entered.wait(30)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with SQLiteStore(tmp_path / "state.db") as store:
        assert (store.get("a"), owner_of(store, "task")) == (1, None)


def test_a_watch_mapped_through_what_times_out_makes_no_storm_of_renewals(
    root: MemoryStore, leases: VirtualClock
) -> None:
    renewals = 0

    def counting(operation: Operation[Any]) -> Flow[Any]:
        nonlocal renewals
        renewals += isinstance(operation, Commit)
        result = yield operation
        return result.map(fail) if isinstance(operation, OpenWatch) else result

    def fail(change: Change) -> Change:
        raise TimeoutError("no key came in time")

    store = apply_middleware(root, counting)
    began = time.monotonic()
    with claim(store, "task", "w1", 2.0) as held:
        eventually(lambda: renewals >= 6)
        made = renewals  # and now the time, which may be any later
        assert made <= 1 + (time.monotonic() - began) / 0.015, "a hundredth of the ttl between two"
        assert not held.lost
        waiting = claim(store, "task", "w2", LONG)
        with pytest.raises(TimeoutError, match="no key came in time"):
            waiting.__enter__()


def test_when_a_loop_is_shut_down_a_block_that_is_cancelled_cleans_up_in_peace() -> None:
    cleaned: list[object] = []

    async def work(store: AsyncStore, name: str) -> None:
        async with claim(store, name, "w1", LONG) as held:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
                cleaned.append(await held.set(f"{name} left", True))

    async def main() -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(work(store.aio, f"task-{number}")) for number in range(20)]
        for number in range(20):
            await store.aio.wait_for(f"task-{number}", bool, timeout=PATIENCE)
        return tasks

    with MemoryStore() as store:
        tasks = asyncio.run(main())
        assert len(cleaned) == 20
        assert all(task.cancelled() for task in tasks)
        assert not store.scan("task-").keys() & {f"task-{number}" for number in range(20)}


async def test_a_renewal_that_hangs_is_the_cause(root: MemoryStore) -> None:
    async def hang() -> None:
        await asyncio.get_running_loop().create_future()

    def hanging(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit) and isinstance(operation.writes[0], Set) and operation.writes[0].if_revision:
            yield Call(hang)
        return (yield operation)

    with pytest.raises(ClaimLost) as lost:
        async with claim(apply_middleware(root.aio, hanging), "task", "w1", 0.2):
            await asyncio.get_running_loop().create_future()

    assert isinstance(lost.value.__cause__, TimeoutError)


@pytest.mark.parametrize("happened", [False, True])
def test_a_release_of_which_nobody_knows_whether_it_happened_is_looked_up(root: MemoryStore, happened: bool) -> None:
    cut = iter([True])

    def unsure(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit) and isinstance(operation.writes[0], Delete) and next(cut, False):
            if happened:
                yield operation
            raise OutcomeUnknown("cut off")
        return (yield operation)

    with claim(apply_middleware(root, unsure), "task", "w1", LONG) as held:
        held.set("a", 1)

    assert owner_of(root, "task") is None


@pytest.mark.parametrize("late", [False, True])
def test_a_release_that_stays_unclear_is_tried_twice_and_a_late_one_is_no_loss(root: MemoryStore, late: bool) -> None:
    tried = []

    def unsure(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit) and isinstance(operation.writes[0], Delete):
            tried.append(operation)
            if late and len(tried) == 2:
                yield tried[0]
                return (yield operation)
            raise OutcomeUnknown("cut off")
        return (yield operation)

    if late:
        with claim(apply_middleware(root, unsure), "task", "w1", LONG):
            pass
        assert len(tried) == 2
    else:
        with (
            pytest.raises(OutcomeUnknown),
            claim(apply_middleware(root, unsure), "task", "w1", LONG),
        ):
            pass
        assert len(tried) == 3, "twice, and once to withdraw"


def test_a_gap_that_was_overcome_is_no_cause_of_a_later_loss(root: MemoryStore) -> None:
    failures = iter([LookupError("once")])
    failed = threading.Event()

    def fail(change: Change) -> Change:
        for error in failures:
            failed.set()
            raise error
        return change

    with pytest.raises(ClaimLost) as lost, claim(apply_middleware(root, mapping(fail)), "task", "w1", LONG) as held:
        assert failed.wait(PATIENCE)
        root.delete("task")
        eventually(lambda: held.lost)
    assert lost.value.__cause__ is None


def test_a_block_that_lost_its_claim_asks_an_engine_that_is_away_once(root: MemoryStore, leases: VirtualClock) -> None:
    asked: list[str] = []

    def away(operation: Operation[Any]) -> Flow[Any]:
        if not is_held:
            return (yield operation)
        if threading.current_thread() is threading.main_thread():
            asked.append(operation.name)
        raise Unavailable("no route")

    is_held = False
    with pytest.raises(ClaimLost), claim(apply_middleware(root, away), "task", "w1", LONG) as held:
        is_held = True
        leases.advance(2 * LONG)
        assert held.lost
    assert asked == ["commit"]


def test_a_keeper_that_could_not_watch_renews_nothing_that_was_left(root: MemoryStore) -> None:
    away = threading.Event()
    seen: list[Operation[Any]] = []

    def failing(operation: Operation[Any]) -> Flow[Any]:
        seen.append(operation)
        if away.is_set():
            raise Unavailable("no route")
        result = yield operation
        return result.map(fail) if isinstance(operation, OpenWatch) else result

    def fail(change: Change) -> Change:
        away.set()
        raise LookupError("and now nothing can be reached")

    held = claim(apply_middleware(root, failing), "task", "w1", LONG)
    held.__enter__()
    eventually(lambda: any(isinstance(each, OpenWatch) for each in seen[2:]))  # it pauses, or is about to
    with pytest.raises(Unavailable):
        held.__exit__(None, None, None)
    away.clear()
    eventually(lambda: keepers() == [])

    assert root.scan().revision == 1


def test_a_forked_child_has_no_claim_and_ends_none(tmp_path: Path, start: Start) -> None:
    start(_fork_while_holding, f"sqlite:///{tmp_path}/state.db").hear()


def _fork_while_holding(link: Link, url: str) -> None:
    with open_store(url) as store, claim(store, "task", "w1", LONG) as held:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert held.lost
                with pytest.raises(ClaimLost):
                    held.set("a", "the child's")
                with pytest.raises(ClaimLost):
                    held.__exit__(None, None, None)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert owner_of(store, "task") == "w1"
        assert not held.lost
        assert held.set("a", "the parent's")
    link.say()


def test_time_out_names_what_was_not_free(root: MemoryStore) -> None:
    with claim(root, "task", "w1", LONG), pytest.raises(TimeoutError, match="'task' was not free in time"):
        claim(root, "task", "w2", LONG, timeout=0.01).__enter__()


# -- with handles, and bad input ---------------------------------------------------------------------------------------


def test_claims_go_by_the_rules_of_the_handle(root: MemoryStore) -> None:
    handle = scoped(guarded(root, writer="w1", read=["a:"], write=["a:"]), "a")
    with claim(handle, "task", "w1", LONG) as held:
        held.set("x", 1)
        assert root.scan().keys() == {"a:task", "a:x"}
    with pytest.raises(AccessDenied), claim(handle, "task", "w2", LONG):
        raise AssertionError("granted in the name of another")
    with pytest.raises(AccessDenied), claim(acting_as(root, "w3"), "task", "w2", LONG):
        raise AssertionError("granted in the name of another")
    reader = guarded(root, writer="w1", read=["a:"])
    with pytest.raises(AccessDenied), claim(reader, "a:task", "w1", LONG):
        raise AssertionError("granted to somebody who may not write")


def test_a_condition_of_the_callers_own_is_a_conflict_and_no_loss(root: MemoryStore) -> None:
    with claim(root, "task", "w1", LONG) as held:
        with pytest.raises(RevisionConflict) as conflict:
            held.set("a", 1, if_revision=9)
        assert conflict.value.key == "a"
        assert not held.lost
        with pytest.raises(RevisionConflict):
            held.commit(Set("a", 1), Check("b", 3))
        assert held.set("a", 1, ttl=10) == 2


def test_bad_input_is_refused_before_anything_has_changed(root: MemoryStore) -> None:
    for ttl in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ttl"):
            claim(root, "task", "w1", ttl)
    for bad in ("keep", None, "1"):
        with pytest.raises(TypeError):
            claim(root, "task", "w1", bad)  # type: ignore[arg-type]
    for name in ("", None, 3):
        with pytest.raises((InvalidKey, TypeError)):
            claim(root, "task", name, LONG)  # type: ignore[arg-type]
        with pytest.raises(InvalidKey):
            claim(root, name, "w1", LONG)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        claim(root, "task", "w1", LONG, timeout=float("nan"))
    with pytest.raises(TypeError):
        claim({}, "task", "w1", LONG)  # type: ignore[call-overload]
    with pytest.raises(RuntimeError):
        claim(root, "task", "w1", LONG).set("a", 1)
    assert root.scan().revision == 0
    with claim(root, "task", "w1", LONG) as held:
        for write in (Set("task", 1), Delete("task"), Check("task", 1)):
            with pytest.raises(ValueError, match="own key"):
                held.commit(Set("a", 1), write)
        with pytest.raises(ValueError, match="at least one"):
            held.commit()
        with pytest.raises(RuntimeError, match="once"):
            held.__enter__()
        assert root.scan().revision == 1
    with pytest.raises(ClaimLost):
        held.set("a", 1)


# -- the workloads of Jepsen's report on etcd 3.4.3, adapted -----------------------------------------------------------


def holders(log: list[Change]) -> list[str]:
    """Writes of data that happened while somebody else, or nobody, had the claim; and tokens that did not increase."""
    wrong: list[str] = []
    holder: tuple[str, int] | None = None
    last = 0
    for change in log:
        if change.key == "task":
            if change.op is Op.DELETE:
                holder = None
            elif holder is None:
                holder = change.value["claim"], change.revision
                if change.revision <= last:
                    wrong.append(f"token {change.revision} after {last}")
                last = change.revision
            elif holder[0] != change.value["claim"]:
                wrong.append(f"{change} took a claim that was held")
        elif holder is None or change.value[0] != holder[1]:
            wrong.append(f"{change} by {change.value[0]}, while {holder} had the claim")
    return wrong


def contend(
    root: Store, random: Random, rounds: int, ttl: float, written: list[int], pause: Callable[[], object]
) -> None:
    """Count up under a claim, `rounds` times, each time through whatever comes between."""
    done = 0
    while done < rounds:
        with suppress(ClaimLost), claim(root, "task", f"w{random.randrange(3)}", ttl) as held:
            number = root.get("n", [0, 0])[1]
            if random.random() < 0.3:
                pause()
            held.set("n", [held.token, number + 1])
            done += 1
            written.append(number + 1)


def test_unfenced_critical_sections_may_overlap(root: MemoryStore, clock: VirtualClock) -> None:
    inside: list[str] = []
    memory: set[int] = set()
    with pytest.raises(ClaimLost), claim(root, "task", "paused", 10):
        inside.append("paused")
        seen = set(memory)
        clock.advance(20)
        with claim(root, "task", "next", 10):
            inside.append("next")
            memory |= {1}
        memory = seen | {2}
    assert inside == ["paused", "next"]
    assert memory == {2}, "an element is lost, as the documentation says it may be"


@pytest.mark.parametrize("rounds", [40, pytest.param(250, marks=pytest.mark.slow)])
def test_fenced_writes_lose_nothing_though_holders_are_paused_past_their_ttl(
    seed: str, rounds: int, clock: VirtualClock, leases: VirtualClock
) -> None:
    with MemoryStore(clock=clock) as root, root.watch(prefix="", capacity=None) as watch:
        written: list[int] = []
        jumps = Random(f"{seed}/jumps")

        def pause() -> None:
            if jumps.random() < 0.5:
                clock.advance(jumps.choice([0.01, 0.04, 0.1]))
                root.scan(limit=1)
            else:
                entry = root.get_entry("task")  # a renewal, or the end of the claim
                if entry is not None:
                    with suppress(TimeoutError):
                        root.watch("task", since=entry.revision).get(5 * SHORT)

        threads = [
            in_thread(lambda n=n: contend(root, Random(f"{seed}/{n}"), rounds, SHORT, written, pause))  # type: ignore[misc]
            for n in range(8)
        ]
        for thread in threads:
            thread.join(PATIENCE)
        log = list(iter(watch.get_nowait, None))

    assert sorted(written) == list(range(1, 8 * rounds + 1)), "an increment was lost"
    assert holders(log) == []
    assert sum(change.expired for change in log) > rounds / 10, "nobody was paused past the ttl"
    renewals = sum(change.op is Op.SET and change.old_revision > 0 for change in log if change.key == "task")
    assert renewals > rounds / 10, "nobody renewed"


@pytest.mark.parametrize("rounds", [60, pytest.param(625, marks=pytest.mark.slow)])
def test_no_write_by_a_former_holder_after_somebody_else_has_the_claim(seed: str, rounds: int) -> None:
    with MemoryStore() as root, root.watch(prefix="", capacity=None) as watch:
        written: list[int] = []

        def revoke() -> None:
            root.delete("task")

        threads = [
            in_thread(lambda n=n: contend(root, Random(f"{seed}/{n}"), rounds, LONG, written, revoke))  # type: ignore[misc]
            for n in range(8)
        ]
        for thread in threads:
            thread.join(PATIENCE)
        log = list(iter(watch.get_nowait, None))

    assert sorted(written) == list(range(1, 8 * rounds + 1))
    assert holders(log) == []


def test_the_check_of_the_log_sees_a_write_by_somebody_else() -> None:
    with MemoryStore() as root, root.watch(prefix="") as watch:
        root.set("task", {"claim": "a"})
        root.set("n", [1, 1])
        root.set("n", [7, 2])
        root.delete("task")
        root.set("n", [1, 3])
        log = list(iter(watch.get_nowait, None))

    assert len(holders(log)) == 2
