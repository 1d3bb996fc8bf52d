"""StoreConformance: the laws put together, and the fixtures that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stigmergy.aio import AsyncStore
from stigmergy.store import Store
from stigmergy.testing.clock import HostClock, VirtualClock
from stigmergy.testing.colour import Colour

__all__ = ["StoreConformance"]


class StoreConformance:
    """Subclass it as `Test...`, and give it one fixture: `make_store`, which returns a function that makes a store.

        class TestJsonStore(StoreConformance):
            @pytest.fixture
            def make_store(self):
                return JsonStore

    Each call must make an empty store of its own. Either colour will do; both are judged, by what the store declares
    in `capabilities`. A store whose deadlines can be told the time overrides `clock` as well, with a `VirtualClock`
    that its stores go by: time then passes at once.
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
    def new_store(self, colour: Colour, make_store: Callable[..., Store | AsyncStore]) -> Iterator[Callable[..., Any]]:
        """`new_store()`: another store, in the colour of the test, closed afterwards."""
        with colour.stores(make_store) as new:
            yield new

    @pytest.fixture
    def store(self, new_store: Callable[..., Any]) -> Any:
        return new_store()
