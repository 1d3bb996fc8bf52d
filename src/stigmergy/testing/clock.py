"""Time for tests: a clock that is told, and one that passes by itself."""

from __future__ import annotations

import time
from typing import ClassVar
from weakref import WeakSet

from stigmergy.store import Store

__all__ = ["HANG_TIMEOUT", "HostClock", "VirtualClock"]

HANG_TIMEOUT = 60.0
"""Seconds after which what has not come never will. Every wait of the suite has this limit: only a hang reaches it, and
no store that is slow, and no machine that is busy."""


class VirtualClock:
    """A clock that stands still until it is told: `MemoryStore(clock=VirtualClock())`.

    `unit` is how many seconds are a short while for a test; `store.set(key, value, ttl=clock.unit)`.
    """

    unit: ClassVar[float] = 1.0

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self._stores: WeakSet[Store] = WeakSet()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, at once; what comes due in the stores that `follow` expires before this returns."""
        self.now += seconds
        for store in list(self._stores):
            store.scan(limit=1)

    def follow(self, store: Store) -> Store:
        """Let each `advance` expire what came due in `store`, as its own timer would by a clock that goes by itself."""
        self._stores.add(store)
        return store


class HostClock:
    """The host's time, for stores whose clock cannot be told. A short while is short here.

    A test that must come to something before a deadline may come too late, where the store is slow, the machine busy,
    or the process suspended. What it finds then says nothing of the store: see `is_late` and `lengthen`.
    """

    unit: float = 0.02

    def __init__(self) -> None:
        self.restart()

    def advance(self, seconds: float) -> None:
        """Wait until `seconds` have passed."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(left)
        self._advanced += seconds

    def restart(self) -> None:
        """Begin to measure how late a test is."""
        self._advanced = 0.0
        self._begun = time.monotonic(), time.time()

    @property
    def is_late(self) -> bool:
        """Whether the operations since `restart` took more than `unit`: that is, all that passed and was not `advance`.

        By either clock that a store may go by: a clock that was set makes a test late as well.
        """
        begun, begun_by_wall = self._begun
        took = time.monotonic() - begun - self._advanced
        return max(took, abs(time.time() - begun_by_wall - self._advanced)) > self.unit

    def lengthen(self) -> None:
        """Let a short while be four times as long from now on."""
        self.unit *= 4
