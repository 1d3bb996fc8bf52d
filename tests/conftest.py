"""What most tests take: the in-memory store in both colours (`stigmergy.testing.Colour`), and a clock to be told."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stigmergy import MemoryStore
from stigmergy.testing import Colour, VirtualClock


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    return Colour(request.param)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def new_store(colour: Colour) -> Iterator[Callable[..., Any]]:
    """`new_store(**options)`: another store, closed afterwards."""
    with colour.stores(MemoryStore) as new:
        yield new


@pytest.fixture
def store(new_store: Callable[..., Any]) -> Any:
    return new_store()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test without a colour on an event loop."""
    if "colour" in pyfuncitem.funcargs or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True
