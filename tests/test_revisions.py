"""Revisions never come back: not after a delete, not after an expiry, whatever an old reader still believes."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from stigmergy import Check, Delete, MemoryStore, RevisionConflict, Set
from stigmergy.testing import Colour, VirtualClock

Stale = Callable[[Any, str, int], Any]
"""A conditional write of (store, key, revision), to be awaited."""

STALE: list[Stale] = [
    lambda store, key, revision: store.set(key, "stale", if_revision=revision),
    lambda store, key, revision: store.set(key, "stale", if_revision=revision, ttl="keep"),
    lambda store, key, revision: store.delete(key, if_revision=revision),
    lambda store, key, revision: store.commit(Set("other", "stale"), Check(key, revision)),
    lambda store, key, revision: store.commit(Set("other", "stale"), Delete(key, if_revision=revision)),
    lambda store, key, revision: store.commit(Check(key, revision), Set(key, "stale")),
]


async def successes(store: Any, key: str, revisions: list[int]) -> int:
    """How many conditional writes at `revisions` go through; each is tried in one of the ways, in turn."""
    actual = await revision_of(store, key)
    went_through = 0
    for number, revision in enumerate(revisions):
        with suppress(RevisionConflict):
            await STALE[number % len(STALE)](store, key, revision)
            went_through += 1
    assert await revision_of(store, key) == actual or went_through
    return went_through


async def revision_of(store: Any, key: str) -> int:
    entry = await store.get_entry(key)
    return 0 if entry is None else entry.revision


async def by_delete(store: Any, clock: VirtualClock) -> None:
    assert await store.delete("key")


async def by_expiry(store: Any, clock: VirtualClock) -> None:
    clock.advance(60)


@pytest.mark.parametrize("lives", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("go", [by_delete, by_expiry])
async def test_however_often_a_key_is_made_anew_no_write_at_an_older_revision_goes_through(
    new_store: Callable[..., Any],
    colour: Colour,
    clock: VirtualClock,
    seed: str,
    go: Callable[..., Any],
    lives: int,
) -> None:
    chance = random.Random(seed)
    store = new_store(clock=clock)
    born: list[int] = []
    for cycle in range(lives):
        born.append(await store.set("key", cycle, ttl=60, if_revision=0))
        assert born[-1] == 2 * cycle + 1, "one revision for each birth, one for each end"
        older = born[:-1] if cycle < 60 else [*born[-4:-1], chance.choice(born[:-1])]
        assert await successes(store, "key", older) == 0
        await go(store, clock)
        assert await successes(store, "key", [*older[-3:], born[-1]]) == 0

    last = await store.set("key", "end")
    assert last == 2 * lives + 1
    assert await successes(store, "key", list(range(last))) == 0
    assert await store.get_many(["key", "other"]) == {"key": "end"}


async def test_a_revision_of_one_key_is_no_condition_that_holds_for_another(store: Any) -> None:
    revisions = [await store.set(f"key{number}", number) for number in range(100)]

    for number, revision in enumerate(revisions):
        others = [each for each in revisions if each != revision]
        assert await successes(store, f"key{number}", others) == 0


async def test_every_write_that_changes_something_takes_the_next_revision_and_no_other_does(
    new_store: Callable[..., Any], colour: Colour, clock: VirtualClock, seed: str
) -> None:
    chance = random.Random(seed)
    store = new_store(clock=clock)
    watch = await store.watch(prefix="", capacity=None)
    last = 0
    for number in range(2000):
        key = chance.choice("abcd")
        before = await store.scan()  # first makes what is due into changes
        last = before.revision
        match chance.randrange(6):
            case 0:
                last += 1
                assert await store.set(key, number, ttl=chance.choice([None, 1, 3, "keep"])) == last
            case 1:
                assert await store.delete(key) is (key in before)
                last += key in before
            case 2:
                with pytest.raises(RevisionConflict):
                    await store.set(key, number, if_revision=last + 1)
            case 3:
                absent = Delete(f"absent {number}")
                revisions = await store.commit(Set("x", number), Check("y", 0), absent, Delete(key), Set("z", 1))
                gone = key in before
                assert revisions == (last + 1, None, None, last + 2 if gone else None, last + 2 + gone)
                last += 2 + gone
            case 4:
                last += 1
                await store.update(key, lambda value: value, default=0)
            case _:
                clock.advance(1)
                await store.get_many(["a", "b", "c", "d"])
                last = (await store.scan()).revision

    assert [change.revision for change in await colour.drain(watch)] == list(range(1, last + 1))


def test_revisions_of_racing_threads_are_dense_and_each_is_taken_once(seed: str) -> None:
    clock = VirtualClock()
    store = MemoryStore(clock=clock)
    watch = store.watch(prefix="", capacity=None)
    taken: list[list[int]] = [[] for _ in range(4)]
    stale: list[int] = []

    def race(mine: list[int], chance: random.Random) -> None:
        for number in range(2000):
            key = chance.choice("ab")
            match chance.randrange(4):
                case 0:
                    mine.append(store.set(key, number, ttl=1))
                case 1:
                    mine += filter(None, store.commit(Set("x", number), Delete(key)))
                case 2:
                    clock.now += 1
                case _ if mine:
                    with suppress(RevisionConflict):
                        stale.append(store.set("x", number, if_revision=mine[0] - 1))

    threads = [
        threading.Thread(target=race, args=(mine, random.Random(f"{seed}/{number}")))
        for number, mine in enumerate(taken)
    ]
    store.set("x", 0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)

    last = store.scan().revision  # what is due is a change now
    changes = list(iter(watch.get_nowait, None))
    expired = [change.revision for change in changes if change.expired]
    everything = sorted([1, *stale, *expired, *(revision for mine in taken for revision in mine)])
    assert everything == list(range(1, last + 1)) == [change.revision for change in changes]
    assert all(mine == sorted(mine) for mine in taken)
    assert expired
    store.close()
