"""Reads: entries, scans, pages, waiting for a value."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from stigmergy.errors import Unsupported
from stigmergy.model import Delete, Entry, Set
from stigmergy.testing.clock import HANG_TIMEOUT
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.transcript import take, unchanged

__all__ = ["Reads"]


class Reads:
    """G7, G8 and G10 of the guarantees, and what is derived from them."""

    async def test_get_returns_what_set_took(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)

        assert await store.get("a") == 1

    async def test_get_returns_the_default_for_an_absent_key_and_creates_nothing(
        self, store: Any, colour: Colour
    ) -> None:
        assert await store.get("a") is None
        assert await store.get("a", 7) == 7
        assert await store.get_entry("a") is None
        assert await store.get_many(["a"]) == {}
        assert (await store.scan()).revision == 0

    async def test_a_stored_none_is_a_value(self, store: Any, colour: Colour) -> None:
        await store.set("a", None)

        assert await store.get("a", "absent") is None
        entry = await store.get_entry("a")
        assert entry is not None
        assert entry.value is None
        assert await store.get_many(["a"]) == {"a": None}

    async def test_an_entry_tells_value_revision_and_times(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)
        began = time.monotonic()
        revision = await store.set("b", 2, ttl=60)
        took = time.monotonic() - began  # the store may read its clock twice

        entry = await store.get_entry("b")

        assert isinstance(entry, Entry)
        assert (entry.value, entry.revision, entry.writer, entry.meta) == (2, revision, None, None)
        assert entry.expires == pytest.approx(entry.time + 60, abs=1 + took)
        assert (await store.get_entry("a")).expires is None

    async def test_every_face_sees_a_write_that_has_returned(self, store: Any, colour: Colour) -> None:
        raw = colour.raw(store)

        for number in range(20):
            await store.set("a", number)
            assert raw.get("a") == number
            raw.set("a", -number)
            assert await store.get("a") == -number

    async def test_reading_changes_nothing(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)

        async with unchanged(store, colour):
            await store.get("a")
            await store.get_entry("absent")
            await store.get_many(["a", "absent"])
            await store.scan()
            (await store.observe("absent")).close()
            await store.wait_for("a", lambda value: True)

    # -- scans ---------------------------------------------------------------------------------------------------------

    async def test_scan_returns_the_keys_that_begin_with_a_prefix_sorted_by_code_points(
        self, store: Any, colour: Colour
    ) -> None:
        for key in ["b", "a:2", "a:10", "a", "a:é", "a:Z", "aé", "a:\U0001f600", "a:\uffff"]:
            await store.set(key, key)

        snapshot = await store.scan("a:")

        assert list(snapshot) == ["a:10", "a:2", "a:Z", "a:é", "a:\uffff", "a:\U0001f600"]
        assert {key: entry.value for key, entry in snapshot.items()} == {key: key for key in snapshot}
        assert snapshot.revision == 9

    async def test_a_limit_beyond_every_store_is_no_limit(self, store: Any, colour: Colour) -> None:
        await store.commit(Set("a", 1), Set("b", 2))

        assert list(await store.scan(limit=2**64)) == ["a", "b"]
        assert list(await store.scan(keys=["b"], limit=2**64)) == ["b"]

    async def test_scan_pages_by_after_and_limit(self, store: Any, colour: Colour) -> None:
        keys = [f"k{number:03}" for number in range(100)]
        await store.commit(*[Set(key, 0) for key in reversed(keys)], Set("j", 0), Set("l", 0))
        pages: list[str] = []
        after = None
        while page := list(await store.scan("k", after=after, limit=7)):
            assert len(page) <= 7
            pages += page
            after = page[-1]

        assert pages == keys

    async def test_after_need_not_be_a_key_that_is_there(self, store: Any, colour: Colour) -> None:
        await store.commit(*[Set(key, 0) for key in ["a", "b", "c"]])

        assert list(await store.scan(after="aa")) == ["b", "c"]
        assert list(await store.scan(after="c")) == []
        assert list(await store.scan("b", after="a")) == ["b"]
        assert list(await store.scan("b", after="bb")) == []

    async def test_scan_of_keys_returns_exactly_those_that_are_there(self, store: Any, colour: Colour) -> None:
        for key in "abc":
            await store.set(key, key)

        assert list(await store.scan(keys=["c", "x", "a", "a"])) == ["a", "c"]
        assert list(await store.scan(keys=["c", "b", "a"], after="a", limit=1)) == ["b"]
        assert list(await store.scan(keys=[])) == []
        assert await store.get_many(iter(["b", "x"])) == {"b": "b"}

    async def test_scans_follow_creations_and_deletions(self, store: Any, colour: Colour) -> None:
        model: set[str] = set()
        for number in range(300):
            key = f"k{number * 7919 % 100}"
            if key in model:
                await store.delete(key)
                model.discard(key)
            else:
                await store.set(key, 0)
                model.add(key)
            if number % 37 == 0:
                assert list(await store.scan("k1")) == sorted(key for key in model if key.startswith("k1"))
        assert list(await store.scan()) == sorted(model)

    async def test_a_watch_from_a_snapshots_bookmark_goes_on_without_gap_or_repeat(
        self, store: Any, colour: Colour
    ) -> None:
        await store.set("a", 1)
        snapshot = await store.scan()

        watch = await store.watch(prefix="", since=snapshot.bookmark)
        await store.set("a", 2)

        (change,) = await take(colour, watch, 1)
        assert (change.value, change.old_value) == (2, 1)

    async def test_a_snapshot_stays_as_it_was(self, store: Any, colour: Colour) -> None:
        await store.commit(Set("a", [1]), Set("b", 2))
        snapshot = await store.scan()

        await store.commit(Set("a", [3]), Delete("b"), Set("c", 4))

        assert {key: entry.value for key, entry in snapshot.items()} == {"a": [1], "b": 2}
        assert "c" not in snapshot
        assert (len(snapshot), snapshot.revision) == (2, 2)

    # -- waiting -------------------------------------------------------------------------------------------------------

    async def test_wait_for_returns_at_once_what_already_holds(self, store: Any, colour: Colour) -> None:
        await store.set("a", 3)

        entry = await store.wait_for("a", lambda value: value == 3, timeout=0)

        assert isinstance(entry, Entry)
        assert (entry.value, entry.revision) == (3, 1)

    async def test_wait_for_hears_of_a_write_that_comes_while_it_looks(self, store: Any, colour: Colour) -> None:
        await store.set("a", 0)

        def look(value: int) -> bool:
            if value < 3:
                colour.raw(store).set("a", value + 1)
            return value == 3

        assert (await store.wait_for("a", look, timeout=HANG_TIMEOUT)).revision == 4

    async def test_wait_for_times_out(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)

        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError):
                await store.wait_for("a", lambda value: value == 2, timeout=timeout)
            with pytest.raises(TimeoutError):
                await store.wait_for("absent", lambda value: True, timeout=timeout)
        with pytest.raises(ValueError, match="NaN"):
            await store.wait_for("a", lambda value: True, timeout=math.nan)

    # -- capabilities --------------------------------------------------------------------------------------------------

    async def test_require_returns_the_store_or_names_what_is_missing(self, store: Any, colour: Colour) -> None:
        assert store.require() is not None
        assert store.require(*store.capabilities) is not None

        with pytest.raises(Unsupported) as missing:
            store.require(*store.capabilities, "flying")
        assert missing.value.capability == "flying"

    async def test_both_faces_declare_the_same_capabilities(self, store: Any, colour: Colour) -> None:
        raw = colour.raw(store)

        assert store.capabilities == raw.capabilities == raw.aio.capabilities
