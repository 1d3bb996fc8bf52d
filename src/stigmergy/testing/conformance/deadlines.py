"""Deadlines: what a ttl promises. Time passes by `clock.advance`; where the clock is told, an operation follows, for
such a clock moves no timer.

Where the clock is the host's, most of these tests only wait until a deadline has passed, and a slow store changes
nothing. Those marked `in_time` must come to something before a deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, TypeAlias

import pytest

from stigmergy.errors import RevisionConflict
from stigmergy.model import Delete, Op, Set
from stigmergy.testing.clock import HostClock, VirtualClock
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.transcript import heard, take

__all__ = ["Deadlines"]

Clock: TypeAlias = HostClock | VirtualClock
Test: TypeAlias = Callable[[Any, Any, Colour, Clock], Coroutine[Any, Any, None]]

LONG = 3600.0
"""A ttl that does not end within a test."""

LONGEST_UNIT = 10.0
"""Seconds: five attempts, if the first unit is 0.02."""


def in_time(test: Test) -> Test:
    """Let `test` fail only if it came in time: if its operations took less than one `unit` of its clock.

    If they took longer, the entry of which it says that it is there may rightly be gone. It is tried again with longer
    units, on a store that is empty, but for its revision.
    """

    @wraps(test)
    async def tried(self: Any, store: Any, colour: Colour, clock: Clock) -> None:
        if not isinstance(clock, HostClock):
            return await test(self, store, colour, clock)
        while clock.unit < LONGEST_UNIT:
            clock.restart()
            try:
                return await test(self, store, colour, clock)
            except TimeoutError:  # a hang, however long the units are
                raise
            except Exception:
                if not clock.is_late:
                    raise
            clock.lengthen()
            for key in await store.scan():
                await store.delete(key)
        pytest.skip("the store or the machine was too slow to do anything before a deadline")

    return tried


class Deadlines:
    """G9 of the guarantees."""

    @in_time
    async def test_an_entry_is_readable_before_its_deadline(self, store: Any, colour: Colour, clock: Clock) -> None:
        await store.set("a", 1, ttl=5 * clock.unit)
        clock.advance(3.5 * clock.unit)

        assert await store.get("a") == 1
        assert list(await store.scan()) == ["a"]
        assert await store.delete("a") is True

    async def test_an_entry_past_its_deadline_is_never_readable(self, store: Any, colour: Colour, clock: Clock) -> None:
        await store.set("a", 1, ttl=clock.unit)
        await store.set("b", 1)
        clock.advance(1.5 * clock.unit)

        assert await store.get("a") is None
        assert await store.get_entry("a") is None
        assert list(await store.scan()) == ["b"]
        assert await store.get_many(["a", "b"]) == {"b": 1}
        assert await store.delete("a") is False

    @pytest.mark.parametrize("read", ["get", "get_entry", "delete"])
    async def test_the_first_to_meet_an_expired_entry_does_not_read_it(
        self, store: Any, colour: Colour, clock: Clock, read: str
    ) -> None:
        await store.set("a", 1, ttl=clock.unit)
        clock.advance(1.5 * clock.unit)

        assert not await getattr(store, read)("a")

    async def test_expiry_is_an_ordinary_change_exactly_once(self, store: Any, colour: Colour, clock: Clock) -> None:
        watch = await store.watch("a")
        await store.set("a", [1], ttl=clock.unit)
        clock.advance(2 * clock.unit)
        for _ in range(3):
            await store.scan()
        await store.set("a", 2, ttl=LONG)

        first, expiry, again = await take(colour, watch, 3)

        assert (first.op, first.revision, first.expired) == (Op.SET, 1, False)
        assert (expiry.op, expiry.expired, expiry.old_value, expiry.value) == (Op.DELETE, True, [1], None)
        assert (expiry.revision, expiry.old_revision, expiry.commit) == (2, 1, 2)
        assert (again.op, again.revision, again.old_revision, again.expired) == (Op.SET, 3, 0, False)

    async def test_an_expiry_takes_a_revision(self, store: Any, colour: Colour, clock: Clock) -> None:
        await store.set("a", 1, ttl=clock.unit)
        await store.set("b", 1, ttl=clock.unit)
        clock.advance(1.5 * clock.unit)

        assert (await store.scan()).revision == 4
        assert await store.set("c", 1) == 5

    @in_time
    async def test_entries_expire_in_the_order_of_their_deadlines(
        self, store: Any, colour: Colour, clock: Clock
    ) -> None:
        watch = await store.watch(prefix="")
        await store.set("renewed", 1, ttl=5 * clock.unit)
        await store.set("later", 1, ttl=7 * clock.unit)
        await store.set("renewed", 2, ttl=8 * clock.unit)
        await store.set("kept", 1, ttl=6 * clock.unit)
        await store.set("kept", 2, ttl="keep")
        clock.advance(9 * clock.unit)
        await store.scan()
        await heard(store, colour)

        expired = [change.key for change in await colour.drain(watch) if change.expired]

        assert expired == ["kept", "later", "renewed"]

    async def test_a_timer_expires_what_nobody_asks_for(self, store: Any, colour: Colour, clock: Clock) -> None:
        _needs_a_timer(clock)
        watch = await store.watch("a")
        await store.set("a", 1, ttl=clock.unit)

        changes = [await colour.get(watch) for _ in range(2)]

        assert [(change.op, change.expired) for change in changes] == [(Op.SET, False), (Op.DELETE, True)]

    async def test_an_earlier_deadline_overtakes_a_later_one(self, store: Any, colour: Colour, clock: Clock) -> None:
        _needs_a_timer(clock)
        watch = await store.watch("soon")
        await store.set("late", 1, ttl=LONG)
        clock.advance(clock.unit)  # by then a timer rests until the later one
        await store.set("soon", 1, ttl=clock.unit)

        assert [(await colour.get(watch)).expired for _ in range(2)] == [False, True]

    @in_time
    async def test_observe_delivers_an_expiry(self, store: Any, colour: Colour, clock: Clock) -> None:
        revision = await store.set("a", 1, ttl=5 * clock.unit)
        watch = await store.observe("a")
        await heard(store, colour)
        (first,) = await colour.drain(watch)
        clock.advance(6 * clock.unit)
        await store.scan()
        await heard(store, colour)

        (expiry,) = await colour.drain(watch)

        assert (first.op, first.value, first.revision) == (Op.SET, 1, revision)
        assert (expiry.op, expiry.expired, expiry.old_value, expiry.old_revision) == (Op.DELETE, True, 1, revision)

    @in_time
    async def test_a_set_without_ttl_clears_an_earlier_one(self, store: Any, colour: Colour, clock: Clock) -> None:
        watch = await store.watch("a")
        await store.set("a", 1, ttl=5 * clock.unit)
        await store.set("a", 2)
        clock.advance(6 * clock.unit)

        assert await store.get("a") == 2
        assert (await store.get_entry("a")).expires is None
        await store.delete("a")
        assert [change.expired for change in await take(colour, watch, 3)] == [False] * 3

    @in_time
    async def test_a_deadline_never_takes_a_newer_value(self, store: Any, colour: Colour, clock: Clock) -> None:
        before = (await store.scan()).revision
        await store.set("renewed", 1, ttl=5 * clock.unit)
        await store.set("renewed", 2, ttl=LONG)
        await store.set("again", 1, ttl=5 * clock.unit)
        await store.delete("again")
        await store.set("again", 2)
        clock.advance(6 * clock.unit)

        assert await store.get_many(["renewed", "again"]) == {"renewed": 2, "again": 2}
        assert (await store.scan()).revision == before + 5

    @in_time
    async def test_keep_keeps_the_deadline(self, store: Any, colour: Colour, clock: Clock) -> None:
        await store.set("a", 1, ttl=5 * clock.unit)
        expires = (await store.get_entry("a")).expires
        await store.set("a", 2, ttl="keep")
        await store.set("b", 2, ttl="keep")

        assert (await store.get_entry("a")).expires == expires
        assert (await store.get_entry("b")).expires is None
        clock.advance(6 * clock.unit)
        assert await store.get_many(["a", "b"]) == {"b": 2}

    @in_time
    async def test_update_keeps_a_ttl(self, store: Any, colour: Colour, clock: Clock) -> None:
        await store.set("n", 0, ttl=5 * clock.unit)
        expires = (await store.get_entry("n")).expires

        await store.update("n", lambda value: value + 1)

        assert (await store.get_entry("n")).expires == expires
        clock.advance(6 * clock.unit)
        assert await store.get("n") is None

    async def test_a_conditional_write_meets_the_expiry_first(self, store: Any, colour: Colour, clock: Clock) -> None:
        revision = await store.set("a", 1, ttl=clock.unit)
        clock.advance(1.5 * clock.unit)

        with pytest.raises(RevisionConflict) as conflict:
            await store.set("a", 2, if_revision=revision)

        assert conflict.value.actual == 0
        assert await store.set("a", 2, if_revision=0) == 3

    async def test_a_commit_meets_the_expiry_first(self, store: Any, colour: Colour, clock: Clock) -> None:
        await store.set("a", 1, ttl=clock.unit)
        clock.advance(1.5 * clock.unit)

        assert await store.commit(Delete("a"), Set("b", 1)) == (None, 3)

    async def test_after_expiry_and_recreate_an_old_revision_never_matches_again(
        self, store: Any, colour: Colour, clock: Clock
    ) -> None:
        old = await store.set("a", 1, ttl=clock.unit)
        clock.advance(1.5 * clock.unit)
        await store.set("a", 1)

        with pytest.raises(RevisionConflict):
            await store.set("a", 2, if_revision=old)


def _needs_a_timer(clock: Clock) -> None:
    if isinstance(clock, VirtualClock):
        pytest.skip("a clock that is told moves no timer")
