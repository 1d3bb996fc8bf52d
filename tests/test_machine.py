"""The in-memory store does what a dict and a list do, with ttls by a clock that is told.

`python -m pytest -m large tests/test_machine.py` takes the larger figures.
"""

from __future__ import annotations

from functools import partial

import pytest

from stigmergy import MemoryStore
from stigmergy.testing import Colour, VirtualClock
from stigmergy.testing.conformance.interleaving import judge_sequences


@pytest.mark.parametrize(
    ("examples", "steps"),
    [
        pytest.param(200, 50, marks=pytest.mark.slow),
        pytest.param(5000, 100, marks=pytest.mark.large),
    ],
)
def test_any_sequence_of_operations_does_what_the_model_does(
    colour: Colour, clock: VirtualClock, seed: str, examples: int, steps: int
) -> None:
    judge_sequences(partial(MemoryStore, clock=clock), colour, clock, seed, examples=examples, steps=steps)
