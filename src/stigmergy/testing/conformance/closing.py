"""Closing: nothing is answered any more, and what was buffered is still delivered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stigmergy.errors import StoreClosed
from stigmergy.model import Check
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.transcript import heard, refused, rest

__all__ = ["Closing"]


class Closing:
    """G22 of the guarantees."""

    async def test_a_closed_store_refuses_every_operation(self, store: Any, colour: Colour) -> None:
        await store.set("a", 1)
        await store.close()
        await store.close()

        await refused(
            StoreClosed,
            lambda: store.get("a"),
            lambda: store.get_entry("a"),
            lambda: store.get_many(["a"]),
            lambda: store.set("a", 1),
            lambda: store.set("a", 1, ttl=1),
            lambda: store.set("a", 1, if_revision=9),
            lambda: store.delete("a"),
            lambda: store.delete("absent"),
            lambda: store.commit(Check("a", 1)),
            lambda: store.update("a", lambda value: value),
            lambda: store.scan(),
            lambda: store.scan(keys=[]),
            lambda: store.wait_for("a", lambda value: True),
            lambda: store.watch("a"),
            lambda: store.watch(prefix="", since=0),
            lambda: store.observe("a"),
        )

    async def test_open_watches_deliver_what_they_had_and_end_with_the_store(self, store: Any, colour: Colour) -> None:
        every, latest = await store.watch("a"), await store.observe("a")
        await store.set("a", 1)
        await store.set("a", 2)
        await heard(store, colour)
        await store.close()

        assert [change.value for change in await rest(colour, every)] == [1, 2]
        assert [change.value for change in await rest(colour, latest)] == [2]

    async def test_closing_one_face_closes_the_store(self, store: Any, colour: Colour) -> None:
        raw = colour.raw(store)
        await store.set("a", 1)
        raw.close()

        with pytest.raises(StoreClosed):
            await store.get("a")
        with pytest.raises(StoreClosed):
            raw.get("a")

    async def test_leaving_the_with_block_closes_the_store(self, new_store: Callable[[], Any], colour: Colour) -> None:
        async with new_store() as store:
            await store.set("a", 1)

        with pytest.raises(StoreClosed):
            await store.get("a")

    async def test_a_watch_may_be_closed_after_its_store(self, store: Any, colour: Colour) -> None:
        watch, never_used = await store.watch("a"), await store.watch("a")
        await store.close()

        watch.close()
        never_used.close()
        assert await rest(colour, watch) == []

    async def test_a_watch_that_nobody_has_used_yet_ends_with_its_store(self, store: Any, colour: Colour) -> None:
        watch = await store.watch("a")
        await store.close()

        assert await rest(colour, watch) == []
