"""What holds whatever comes between: any sequence of operations, and many clients at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test

from stigmergy.aio import AsyncStore
from stigmergy.store import Store
from stigmergy.testing.clock import HostClock, VirtualClock
from stigmergy.testing.colour import Colour
from stigmergy.testing.history import overlap
from stigmergy.testing.linearizability import check_linearizable, check_revisions
from stigmergy.testing.machine import StoreMachine
from stigmergy.testing.traffic import Between, check_watched, record_calls, record_watches

RECORDINGS = 5
ENOUGH_OVERLAP = 0.7
"""The share of calls that overlap with another one of their key, without which a history proves little. Whether they do
is a matter of the machine, not of the store: then the history is recorded again, with other keys."""


def judge_sequences(
    make_store: Callable[[], Store | AsyncStore],
    colour: Colour,
    clock: HostClock | VirtualClock,
    seed: str,
    *,
    examples: int,
    steps: int = 50,
) -> None:
    """Run the state machine over so many sequences of so many operations."""
    attributes = {
        "make_store": staticmethod(make_store),
        "colour": colour,
        "clock": clock if isinstance(clock, VirtualClock) else None,
    }
    machine = type("Machine", (StoreMachine,), attributes)
    run_state_machine_as_test(
        seeded(seed)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],  # to explain takes minutes of tracing
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )


class Interleaving:
    """The state machine, linearizability, and the laws of watches under traffic."""

    examples: ClassVar[int] = 200
    """Of the state machine; each is a sequence of up to 50 operations."""

    calls: ClassVar[int] = 1600
    """Of each history that is checked for linearizability."""

    writes: ClassVar[int] = 2000
    """Under which watches are judged."""

    def test_any_sequence_of_operations_does_what_the_model_does(
        self,
        make_store: Callable[[], Store | AsyncStore],
        colour: Colour,
        clock: HostClock | VirtualClock,
        seed: str,
        figures: Any,
    ) -> None:
        judge_sequences(make_store, colour, clock, seed, examples=self.examples)
        figures.note("sequences of up to 50 operations, against the model", self.examples)

    @pytest.mark.parametrize("between", ["line", "opcode"])
    def test_what_many_clients_were_told_has_one_order(
        self, new_store: Callable[[], Any], colour: Colour, between: Between, seed: str, figures: Any
    ) -> None:
        store: Any = new_store() if colour.name == "async" else colour.raw(new_store())
        share = 0.05 if between == "line" else 0.01
        for number in range(RECORDINGS):
            history = record_calls(
                store,
                seed=f"{seed}/{number}",
                keys=[f"a{number}", f"b{number}"],
                calls=self.calls // 8,
                between=between,
                share=share,
            )
            assert check_linearizable(history) == []
            assert check_revisions(history) == []
            if overlap(history) >= ENOUGH_OVERLAP:
                figures.note("concurrent calls, found linearizable", len(history))
                return
        pytest.skip("the calls of several clients did not overlap enough to prove anything")

    def test_watches_opened_in_the_midst_of_writes_keep_their_laws(
        self, new_store: Callable[[], Any], colour: Colour, seed: str, figures: Any
    ) -> None:
        store = colour.raw(new_store())
        log, watched = record_watches(store, seed=seed, writes=self.writes)

        assert check_watched(log, watched) == []
        figures.note("changes delivered under traffic, found lawful", sum(len(each.delivered) for each in watched))
