"""The phrases that the laws are told in, so that each reads like a transcript.

A store may tell its watches of a write a little after the write has returned. So a law takes as many changes as it
expects, waiting for each that can still come. Where it must not read yet, it waits until everything was `heard`; and
that nothing else came is shown by what comes next.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from stigmergy.errors import WatchClosed
from stigmergy.model import Change
from stigmergy.testing.clock import HANG_TIMEOUT
from stigmergy.testing.colour import Colour
from stigmergy.watch import Watch

__all__ = ["heard", "needs", "refused", "rest", "revisions", "take", "take_one", "unchanged"]

ASK_EVERY = 1.0
"""Seconds between two looks whether a change can still come; what the looks find does not depend on it."""


def needs(store: Any, *capabilities: str) -> None:
    """Skip the test of a store that does not declare all of `capabilities`."""
    for capability in capabilities:
        if capability not in store.capabilities:
            pytest.skip(f"not declared: {capability}")


async def take(colour: Colour, watch: Watch, count: int) -> list[Change]:
    """The next `count` changes, of writes that have returned."""
    return [await take_one(colour, watch) for _ in range(count)]


async def take_one(colour: Colour, watch: Watch) -> Change:
    """The next change, of a write that has returned.

    Where none comes at once, the watch is asked up to which revision it has delivered all. If that is the present one,
    and there still is no change, it was lost, and the test ends without waiting for the limit. A change that is there
    by then may have come in that very moment, but not twice in one test: then readers are not woken.
    """
    for _ in range(round(HANG_TIMEOUT / ASK_EVERY)):
        with suppress(TimeoutError):
            return await colour.get(watch, ASK_EVERY)
        present = await colour.revision()
        if present is not None and watch.revision >= present:
            change = watch.get_nowait()
            assert change is not None, f"the watch lost a change: it says that it has delivered all up to {present}"
            colour.found_late += 1
            assert colour.found_late < 2, f"the watch has delivered {change.revision}, and has not woken its reader"
            return change
    raise TimeoutError("the watch was not told of every write")


async def rest(colour: Colour, watch: Watch) -> list[Change]:
    """All changes until the watch ends, which it must."""
    changes = []
    with suppress(WatchClosed):
        while True:
            changes.append(await colour.get(watch))
    return changes


async def heard(store: Any, colour: Colour) -> None:
    """Return when the open watches of `store` were told of every write so far.

    Writes a key of its own, `~`, because a change comes when all before it have.
    """
    async with store.watch("~") as watch:
        await store.set("~", None)
        await take_one(colour, watch)


async def refused(error: type[Exception], *asks: Callable[[], Any], match: str | None = None) -> None:
    """Each of `asks`, called and awaited, raises `error`."""
    for ask in asks:
        with pytest.raises(error, match=match):  # noqa: PT012
            await ask()
            code = getattr(ask, "func", ask).__code__  # of a partial, that of its function
            pytest.fail(f"{code.co_filename}, line {code.co_firstlineno}: not refused")


def revisions(changes: Iterable[Change]) -> list[int]:
    """Their revisions."""
    return [change.revision for change in changes]


@asynccontextmanager
async def unchanged(store: Any, colour: Colour) -> AsyncIterator[None]:
    """Nothing changes in here: no revision, no entry, and no open watch hears of anything."""
    if await store.get("a") is None:
        await store.set("a", {"old": [1]})
    every, latest = await store.watch(prefix=""), await store.observe("a")
    await take(colour, latest, 1)
    before = await store.scan()

    yield

    after = await store.scan()
    assert (after.revision, after.bookmark) == (before.revision, before.bookmark)
    assert dict(after) == dict(before)
    assert await store.set("a", 2) == before.revision + 1
    assert (await take_one(colour, every)).revision == before.revision + 1
    assert (await take_one(colour, latest)).revision == before.revision + 1
