"""Time for tests: a clock that is told, and one that passes by itself."""

from __future__ import annotations

import time
from typing import ClassVar
from weakref import WeakSet

from stigmergy.store import Store

__all__ = ["HostClock", "VirtualClock"]


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
    """The host's time, for stores whose clock cannot be told. A short while is short here."""

    unit: ClassVar[float] = 0.1

    def advance(self, seconds: float) -> None:
        """Wait until `seconds` have passed."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(left)
