"""Deadlines: nothing is readable past its own, and no newer value falls to an older one."""

from __future__ import annotations

import itertools
import math
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from stigmergy import Change, Check, Delete, MemoryStore, Op, RevisionConflict, Set, Store, Watch
from stigmergy.providers import _sweeper
from stigmergy.testing import VirtualClock

FOREVER = 1e9


@pytest.fixture
def store(clock: VirtualClock) -> Any:
    with MemoryStore(clock=clock) as store:
        yield store


def drained(watch: Watch) -> list[Change]:
    return list(iter(watch.get_nowait, None))


def summary(changes: list[Change]) -> list[tuple[Any, ...]]:
    return [(change.op, change.key, change.old_value, change.expired) for change in changes]


# -- a deadline belongs to one entry -----------------------------------------------------------------------------------


@pytest.mark.parametrize("renew", ["set", "conditional set", "commit", "delete and set"])
def test_renewed_at_the_last_moment_an_entry_outlives_its_first_deadline(
    store: MemoryStore, clock: VirtualClock, renew: str
) -> None:
    watch = store.watch("a")
    revision = store.set("a", 1, ttl=10)
    clock.now = math.nextafter(1010.0, 0)

    match renew:
        case "set":
            store.set("a", 2, ttl=10)
        case "conditional set":
            store.set("a", 2, ttl=10, if_revision=revision)
        case "commit":
            store.commit(Check("a", revision), Set("a", 2, ttl=10))
        case _:
            assert store.delete("a")
            store.set("a", 2, ttl=10, if_revision=0)

    clock.now = 1010.0
    store.scan()
    assert store.get("a") == 2
    clock.now = math.nextafter(1020.0, 0) - 1e-6
    assert store.get("a") == 2
    clock.now = 1020.0
    assert store.get("a") is None
    assert [change.old_value for change in drained(watch) if change.expired] == [2]


OVERWRITES: dict[str, Callable[[Store], object]] = {
    "without ttl": lambda store: store.set("a", 2),
    "by a commit": lambda store: store.commit(Set("a", 2)),
    "by an update after a plain set": lambda store: (store.set("a", 1), store.update("a", lambda value: value + 1)),
    "after a delete": lambda store: (store.delete("a"), store.set("a", 2)),
    "after a delete, keeping nothing": lambda store: (store.delete("a"), store.set("a", 2, ttl="keep")),
    "with a longer ttl": lambda store: store.set("a", 2, ttl=FOREVER),
}


@pytest.mark.parametrize("overwrite", OVERWRITES.values(), ids=OVERWRITES.keys())
def test_an_old_deadline_never_ends_a_newer_value(
    store: MemoryStore, clock: VirtualClock, overwrite: Callable[[Store], object]
) -> None:
    store.set("a", 1, ttl=10)
    clock.advance(9)
    overwrite(store)
    watch = store.watch("a")

    for _ in range(100):
        clock.advance(1)
        store.scan(limit=1)

    assert store.get("a") == 2
    assert drained(watch) == []


def test_a_shorter_deadline_replaces_a_longer_one(store: MemoryStore, clock: VirtualClock) -> None:
    store.set("a", 1, ttl=100)
    store.set("a", 2, ttl=10)
    clock.advance(10)

    assert store.get("a") is None
    store.set("a", 3)
    clock.advance(90)
    assert store.get("a") == 3


def test_each_write_of_a_commit_has_a_deadline_of_its_own(store: MemoryStore, clock: VirtualClock) -> None:
    watch = store.watch(prefix="")
    store.commit(Set("a", 1, ttl=30), Set("b", 2, ttl=10), Set("c", 3), Set("d", 4, ttl=20), Set("e", 5, ttl=10))
    drained(watch)

    expired = []
    for now in (1009.0, 1010.0, 1020.0, 1030.0, 2000.0):
        clock.now = now
        store.scan()
        expired.append([change.key for change in drained(watch)])

    assert expired == [[], ["b", "e"], ["d"], ["a"], []]
    assert store.get("c") == 3


def test_a_commit_that_fails_leaves_every_deadline_as_it_was(store: MemoryStore, clock: VirtualClock) -> None:
    store.set("a", 1, ttl=10)
    with pytest.raises(RevisionConflict):
        store.commit(Set("a", 2), Set("b", 1, ttl=5), Check("c", 7))

    clock.advance(5)
    assert store.get_many(["a", "b"]) == {"a": 1}
    clock.advance(5)
    assert store.get_many(["a", "b"]) == {}


# -- the host's clock may jump -----------------------------------------------------------------------------------------


def test_jumps_of_the_hosts_clock_by_an_hour_change_no_expiry_and_no_order(
    store: MemoryStore, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, seed: str
) -> None:
    chance = random.Random(seed)
    host = time.time()
    monkeypatch.setattr(time, "time", lambda: host + chance.choice([-3600, 0, 3600]))
    watch = store.watch(prefix="", capacity=None)
    model: dict[str, float] = {}
    for number in range(3000):
        key = f"key {chance.randrange(20)}"
        ttl = chance.randrange(1, 50)
        if chance.random() < 0.5:
            store.set(key, number, ttl=ttl)
            model[key] = clock.now + ttl
        else:
            clock.now += 1
            assert set(store.scan()) == {name for name, deadline in model.items() if deadline > clock.now}

    changes = drained(watch)
    state = [change.revision for change in drained(store.observe(prefix=""))]
    assert state == sorted(state)
    times = [change.time for change in changes]
    assert min(times) < host - 3000 < host + 3000 < max(times)
    assert [change.revision for change in changes] == list(range(1, len(changes) + 1))


def test_a_jump_of_the_hosts_clock_neither_hurries_nor_delays_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    host = time.time()
    with MemoryStore() as store:
        watch = store.watch(prefix="")
        store.commit(Set("short", 1, ttl=0.02), Set("long", 1, ttl=3000))
        monkeypatch.setattr(time, "time", lambda: host + 3600)
        assert store.get("long") == 1
        monkeypatch.setattr(time, "time", lambda: host - 3600)
        changes = [watch.get(timeout=60) for _ in range(3)]

        assert [(change.key, change.op) for change in changes] == [
            ("short", Op.SET),
            ("long", Op.SET),
            ("short", Op.DELETE),
        ]
        assert store.get("long") == 1


def test_the_timer_sleeps_until_the_next_deadline_and_no_longer(store: MemoryStore, clock: VirtualClock) -> None:
    watch = store.watch(prefix="")
    store.commit(Set("a", 1, ttl=0.25), Set("b", 1, ttl=3), Set("c", 1, ttl=3), Set("d", 1, ttl=8000))
    drained(watch)
    slept: list[float] = []
    expired: list[list[str]] = []

    class Calls:
        """Nobody calls: what is slept passes at once, by the clock."""

        def get(self, timeout: float) -> bool:
            expired.append([change.key for change in drained(watch)])
            slept.append(timeout)
            clock.advance(timeout)
            if len(slept) < 6:
                raise queue.Empty
            return False

    _sweeper._sweep_for_ever(lambda: store._sweep, Calls())  # type: ignore[arg-type, return-value]

    assert slept == [0.25, 2.75, 3600.0, 3600.0, 797.0, 3600.0]
    assert expired == [[], ["a"], ["b", "c"], [], [], ["d"]]
    assert _sweeper._SHORTEST_SLEEP < 0.01


# -- many deadlines ----------------------------------------------------------------------------------------------------

many_of_them = pytest.mark.parametrize("many", [5000, pytest.param(100_000, marks=pytest.mark.slow)])


@many_of_them
def test_each_of_many_deadlines_is_one_change_in_time(clock: VirtualClock, seed: str, many: int) -> None:
    chance = random.Random(seed)
    with MemoryStore(clock=clock, history=0) as store:
        watch = store.watch(prefix="", capacity=None)
        deadlines = {}
        for number in range(many):
            ttl = chance.randrange(1, 100)
            store.set(f"key {number}", number, ttl=ttl)
            deadlines[f"key {number}"] = clock.now + ttl
            assert len(store._deadlines.heap) <= 2 * len(store._entries) + 64
        drained(watch)
        last = many
        while deadlines:
            clock.now += 9
            store.scan(limit=1)
            due = {key for key, deadline in deadlines.items() if deadline <= clock.now}
            changes = drained(watch)
            assert sorted(change.key for change in changes) == sorted(due)
            assert all(change.expired and change.key == f"key {change.old_value}" for change in changes)
            assert [change.revision for change in changes] == list(range(last + 1, last + len(due) + 1))
            last += len(due)
            for key in due:
                del deadlines[key]

        assert not store._deadlines.heap
        assert not store._entries


@many_of_them
def test_the_timers_of_entries_renewed_many_times_are_no_more_than_two_a_key(
    clock: VirtualClock, seed: str, many: int
) -> None:
    chance = random.Random(seed)
    with MemoryStore(clock=clock) as store:
        for number in range(many):
            store.set(f"key {chance.randrange(many // 100)}", number, ttl=100 + chance.randrange(100))
            assert len(store._deadlines.heap) <= 2 * len(store._entries) + len(store._entries) // 8 + 65
        watch = store.watch(prefix="", capacity=None)
        present = len(store._entries)
        clock.advance(200)
        store.scan(limit=1)

        assert [change.expired for change in drained(watch)] == [True] * present
        assert not store._deadlines.heap


@many_of_them
def test_many_short_lives_of_ever_new_keys_keep_few_timers(clock: VirtualClock, many: int) -> None:
    with MemoryStore(clock=clock) as store:
        for number in range(many):
            store.set(f"session {number}", number, ttl=FOREVER)
            if number >= 100:
                store.delete(f"session {number - 100}")
            assert len(store._deadlines.heap) <= 2 * 101 + 101 // 8 + 65


def test_the_timers_of_entries_that_were_deleted_go_before_they_come_due(clock: VirtualClock) -> None:
    with MemoryStore(clock=clock) as store:
        for number in range(2000):
            store.set(f"key {number}", number, ttl=FOREVER)
        for number in range(2000):
            store.delete(f"key {number}")
        for number in range(1000):
            store.set("key", number, ttl=10)

        assert len(store._deadlines.heap) <= 2 * len(store._entries) + 65


# -- nothing is readable past its deadline -----------------------------------------------------------------------------


def holds(write: Callable[[], object]) -> bool:
    try:
        write()
    except RevisionConflict:
        return False
    return True


def waited_for(store: Store) -> bool:
    try:
        store.wait_for("a", lambda value: True, timeout=0)
    except TimeoutError:
        return False
    return True


def updated(store: Store) -> bool:
    seen = store.update("a", lambda value: [value], default="absent")
    store.delete("a")
    return bool(seen != ["absent"])


def observed(store: Store) -> bool:
    with store.observe("a") as watch:
        return watch.get_nowait() is not None


Reader = Callable[[Store], bool]
"""Whether the entry at "a", which was written at revision 1, is there."""
READERS: dict[str, Reader] = {
    "get": lambda store: store.get("a") is not None,
    "get_entry": lambda store: store.get_entry("a") is not None,
    "scan": lambda store: "a" in store.scan(),
    "scan of a prefix": lambda store: "a" in store.scan("a"),
    "scan of keys": lambda store: len(store.scan(keys=["a"])) == 1,
    "get_many": lambda store: store.get_many(["a"]) != {},
    "wait_for": waited_for,
    "conditional set": lambda store: holds(lambda: store.set("a", 2, if_revision=1)),
    "conditional delete": lambda store: holds(lambda: store.delete("a", if_revision=1)),
    "delete": lambda store: store.delete("a"),
    "check": lambda store: holds(lambda: store.commit(Check("a", 1), Set("b", 1))),
    "delete in a commit": lambda store: store.commit(Delete("a"))[0] is not None,
    "update": updated,
    "observe": observed,
}
every_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())


@every_reader
def test_a_reader_before_the_deadline_finds_the_entry(store: MemoryStore, clock: VirtualClock, reader: Reader) -> None:
    store.set("a", 1, ttl=3600)
    clock.now = math.nextafter(4600.0, 0)

    assert reader(store)


@every_reader
def test_a_reader_at_the_deadline_finds_nothing_and_every_other_one_neither(
    store: MemoryStore, clock: VirtualClock, reader: Reader
) -> None:
    watch = store.watch("a", capacity=None)
    store.set("a", 1, ttl=3600)
    clock.advance(3600)
    assert not reader(store)
    for other in READERS.values():
        assert not other(store)

    assert summary(drained(watch))[:2] == [(Op.SET, "a", None, False), (Op.DELETE, "a", 1, True)]


@pytest.mark.parametrize("write", [lambda store: store.set("a", 2), lambda store: store.commit(Set("a", 2))])
def test_a_deadline_that_passed_unseen_is_a_change_before_whatever_is_written_next(
    store: MemoryStore, clock: VirtualClock, write: Callable[[Store], object]
) -> None:
    watch = store.watch("a")
    store.set("a", 1, ttl=3600)
    clock.advance(3600)
    write(store)

    assert summary(drained(watch)) == [
        (Op.SET, "a", None, False),
        (Op.DELETE, "a", 1, True),
        (Op.SET, "a", None, False),
    ]
    assert store.get("a") == 2


def test_keep_cannot_carry_an_entry_past_its_deadline(store: MemoryStore, clock: VirtualClock) -> None:
    store.set("a", 1, ttl=10)
    clock.advance(10)
    store.set("a", 2, ttl="keep")

    clock.advance(FOREVER)
    assert store.get("a") == 2


def test_what_a_snapshot_has_stays_readable_there(store: MemoryStore, clock: VirtualClock) -> None:
    store.set("a", 1, ttl=10)
    snapshot = store.scan()
    clock.advance(10)

    assert snapshot["a"].value == 1
    assert [change.expired for change in drained(store.watch("a", since=snapshot.bookmark))] == [True]


LOOKS: list[Callable[[Store], Any]] = [
    lambda store: store.get("a"),
    lambda store: (store.get_entry("a") or [None])[0],
    lambda store: store.get_many(["a"]).get("a"),
    lambda store: {key: entry.value for key, entry in store.scan("a").items()}.get("a"),
]


def test_what_one_thread_saw_expire_no_other_thread_reads_afterwards() -> None:
    store = MemoryStore()
    written = gone = 0
    deaths: list[int] = [0] * len(LOOKS)
    witnessed = [0] * len(LOOKS)
    faults: list[tuple[int, int]] = []
    done = threading.Event()

    def look(mine: int, see: Callable[[Store], Any]) -> None:
        while not done.is_set():
            before, dead = written, max(deaths)
            value = see(store)
            if value is None:
                deaths[mine] = max(deaths[mine], before)
                witnessed[mine] += before > dead
            elif value <= dead:
                faults.append((value, dead))

    threads = [threading.Thread(target=look, args=each) for each in enumerate(LOOKS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for number in itertools.count(1):
            store.set("a", number, ttl=0.0005 * (1 + number % 4))
            written = number
            while store.get("a") is not None:
                pass
            gone = number
            if number >= 100 and all(witnessed):
                break
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)

    assert not faults
    assert max(deaths) <= gone
    store.close()
