"""StoreConformance: the laws put together, and the fixtures that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stigmergy.aio import AsyncStore
from stigmergy.store import Store
from stigmergy.testing.clock import HostClock, VirtualClock
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.bad_input import BadInput
from stigmergy.testing.conformance.closing import Closing
from stigmergy.testing.conformance.concurrency import Concurrency
from stigmergy.testing.conformance.deadlines import Deadlines
from stigmergy.testing.conformance.interleaving import Interleaving
from stigmergy.testing.conformance.observing import Observing
from stigmergy.testing.conformance.places import Places
from stigmergy.testing.conformance.reads import Reads
from stigmergy.testing.conformance.values import Values
from stigmergy.testing.conformance.watches import Watches
from stigmergy.testing.conformance.writes import Writes
from stigmergy.testing.report import Figures, Judged

__all__ = ["StoreConformance"]


class StoreConformance(
    Writes,
    Reads,
    Watches,
    Observing,
    Deadlines,
    Values,
    BadInput,
    Closing,
    Concurrency,
    Places,
    Interleaving,
):
    """Subclass it as `Test...`, and give it one fixture: `make_store`, which returns a function that makes a store.

        class TestJsonStore(StoreConformance):
            @pytest.fixture
            def make_store(self):
                return JsonStore

    Each call must make an empty store of its own. But a store that declares "durable" or "distributed" keeps its state
    in a place: there each call opens the same place, which is empty when the test begins (`tmp_path` makes a good one).

    Either colour will do; both are judged, by what the store declares in `capabilities`. A store whose deadlines can be
    told the time overrides `clock` as well, with a `VirtualClock` that its stores go by: time then passes at once.
    """

    @pytest.fixture
    def make_store(self) -> Callable[..., Store | AsyncStore]:
        raise NotImplementedError(f"{type(self).__name__} needs a fixture `make_store`")

    @pytest.fixture
    def clock(self) -> HostClock | VirtualClock:
        return HostClock()

    @pytest.fixture(params=["sync", "async"])
    def colour(self, request: pytest.FixtureRequest) -> Colour:
        return Colour(request.param)

    @pytest.fixture
    def new_store(
        self, colour: Colour, make_store: Callable[..., Store | AsyncStore], judged: Judged
    ) -> Iterator[Callable[..., Any]]:
        """`new_store()`: another store, in the colour of the test, closed afterwards."""
        with colour.stores(judged.seeing(make_store)) as new:
            yield new

    @pytest.fixture
    def store(self, new_store: Callable[..., Any]) -> Any:
        return new_store()

    @pytest.fixture
    def new_sync_store(
        self, make_store: Callable[..., Store | AsyncStore], judged: Judged
    ) -> Iterator[Callable[[], Store]]:
        """`new_sync_store()`: another store as it is, for tests of threads, closed afterwards."""
        colour = Colour("sync")
        with colour.stores(judged.seeing(make_store)) as new:
            yield lambda: colour.raw(new())

    @pytest.fixture
    def sync_store(self, new_sync_store: Callable[[], Store]) -> Store:
        return new_sync_store()

    @pytest.fixture(autouse=True)
    def judged(self, request: pytest.FixtureRequest) -> Judged:
        """What the report will say of this test."""
        return Judged(request)

    @pytest.fixture
    def figures(self, judged: Judged) -> Figures:
        """`figures.note(text, number)`: a figure for the report, summed over the tests of a class."""
        return judged.figures
