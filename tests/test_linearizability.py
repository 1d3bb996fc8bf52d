"""The checkers are right, and what the store answers to many threads has one order.

`python -m pytest -m large tests/test_linearizability.py` takes the larger figures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import permutations
from math import inf
from typing import Any, Literal

import pytest

from stigmergy import MemoryStore
from stigmergy.testing.history import History, Invocation, overlap
from stigmergy.testing.linearizability import check_linearizable, check_revisions
from stigmergy.testing.traffic import Between, record_calls

Action = Literal["read", "set", "delete"]
CHECKS: list[Callable[[History], list[str]]] = [check_linearizable, check_revisions]


def call(
    action: Action, value: str | None, revision: int | None, called: float, returned: float, **others: Any
) -> Invocation:
    outcome = "unknown" if returned == inf else "ok"
    known = {"client": 0, "if_revision": None, "outcome": outcome, "key": "k", **others}
    return Invocation(action=action, value=value, revision=revision, called=called, returned=returned, **known)


# -- the checkers ------------------------------------------------------------------------------------------------------

LAWFUL = {
    "a read after a write": [call("set", "a", 1, 0, 1), call("read", "a", 1, 2, 3)],
    "a read while it is written, before": [call("set", "a", 1, 0, 3), call("read", None, 0, 1, 2)],
    "a read while it is written, after": [call("set", "a", 1, 0, 3), call("read", "a", 1, 1, 2)],
    "a read that does not tell the revision": [call("set", "a", 1, 0, 1), call("read", "a", None, 2, 3)],
    "a delete of what is there": [
        call("set", "a", 1, 0, 1),
        call("delete", None, 2, 2, 3),
        call("read", None, 0, 4, 5),
    ],
    "a delete of what is not there": [call("delete", None, 0, 0, 1), call("set", "a", 1, 2, 3)],
    "a condition that holds": [call("set", "a", 1, 0, 1), call("set", "b", 2, 2, 3, if_revision=1)],
    "a condition that does not": [
        call("set", "a", 1, 0, 1),
        call("set", "b", 1, 2, 3, if_revision=0, outcome="conflict"),
    ],
    "an unknown write that happened": [call("set", "a", None, 0, inf), call("read", "a", 1, 2, 3)],
    "an unknown write that happened late": [
        call("set", "a", None, 0, inf),
        call("read", None, 0, 1, 2),
        call("read", "a", 1, 3, 4),
    ],
    "an unknown write that never happened": [call("set", "a", None, 0, inf), call("read", None, 0, 1, 2)],
    "a condition on an unknown write": [
        call("set", "a", None, 0, inf),
        call("set", "b", 1, 1, 2, if_revision=0, outcome="conflict"),
        call("set", "c", 2, 3, 4, if_revision=1),
    ],
    "an unknown delete": [call("set", "a", 1, 0, 1), call("delete", None, None, 2, inf), call("read", None, 0, 3, 4)],
}

UNLAWFUL = {
    "a stale read": [call("set", "a", 1, 0, 1), call("set", "b", 2, 2, 3), call("read", "a", 1, 4, 5)],
    "a read of the future": [call("read", "a", 1, 0, 1), call("set", "a", 1, 2, 3)],
    "a read of what nobody wrote": [call("read", "x", 1, 0, 1)],
    "a torn read": [call("set", "a", 1, 0, 1), call("set", "b", 2, 2, 3), call("read", "a", 2, 4, 5)],
    "reads that go back": [
        call("set", "a", 1, 0, 1),
        call("set", "b", 2, 2, 9),
        call("read", "b", 2, 3, 4),
        call("read", "a", 1, 5, 6),
    ],
    "a lost update": [
        call("set", "a", 1, 0, 1),
        call("set", "b", 2, 2, 5, if_revision=1),
        call("set", "c", 3, 2, 5, if_revision=1),
    ],
    "a revision that comes back": [
        call("set", "a", 1, 0, 1),
        call("delete", None, 2, 2, 3),
        call("set", "b", 1, 4, 5),
    ],
    "a delete that two were told of": [
        call("set", "a", 1, 0, 1),
        call("delete", None, 2, 2, 5),
        call("delete", None, 3, 2, 5),
    ],
    "a delete that did nothing": [call("set", "a", 1, 0, 1), call("delete", None, 0, 2, 3)],
    "a conflict with what it asked for": [
        call("set", "a", 1, 0, 1),
        call("set", "b", 1, 2, 3, if_revision=1, outcome="conflict"),
    ],
    "revisions against time": [call("set", "b", 2, 0, 1), call("set", "a", 1, 2, 3)],
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("history", LAWFUL.values(), ids=LAWFUL)
def test_a_history_that_has_an_order_is_accepted(history: History, check: Callable[[History], list[str]]) -> None:
    assert check(history) == []


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("history", UNLAWFUL.values(), ids=UNLAWFUL)
def test_a_history_that_has_none_is_refused(history: History, check: Callable[[History], list[str]]) -> None:
    assert len(check(history)) > 0


def test_a_search_that_finds_no_end_is_undecided_and_that_is_wrong() -> None:
    reads = [call("read", None, 0, number, 100 + number, client=number) for number in range(40)]
    history = [*reads, call("set", "a", 1, 0, 200), call("read", "x", 2, 300, 301), call("set", "x", 2, 300, 302)]
    history += [call("read", "a", 1, 400, 401)]

    (wrong,) = check_linearizable(history, configurations=1000)

    assert "undecided" in wrong


def answers(orderly: list[Invocation]) -> bool:
    """Whether a store that is asked in this order answers so; written in another way than the checkers."""
    value, current, highest = None, 0, 0
    for each in orderly:
        if each.action == "read":
            if (each.value, each.revision) != (value, current):
                return False
        elif each.if_revision not in (None, current):
            if (each.outcome, each.revision) != ("conflict", current):
                return False
        elif each.outcome == "conflict":
            return False
        elif each.action == "delete" and current == 0:
            if each.revision != 0:
                return False
        elif each.revision is None or each.revision <= highest:
            return False
        else:
            highest = each.revision
            value, current = (None, 0) if each.action == "delete" else (each.value, each.revision)
    return True


def has_an_order(history: History) -> bool:
    return any(
        answers(list(order))
        for order in permutations(history)
        if all(later.returned >= earlier.called for place, earlier in enumerate(order) for later in order[place + 1 :])
    )


def test_the_search_agrees_with_trying_all_orders_on_4000_histories(seed: str) -> None:
    draw = random.Random(seed)
    lawful = 0
    for _ in range(4000):
        history, values = [], 0
        for client in range(draw.randint(1, 5)):
            called = draw.randint(0, 8)
            times = called, called + draw.randint(1, 6)
            action: Action = draw.choice(["read", "set", "set", "delete"])
            revision = draw.randint(0 if action != "set" else 1, 3)
            if action == "read":
                history.append(call("read", f"v{revision}" if revision else None, revision, *times, client=client))
            else:
                values += 1
                condition = draw.choice([None, None, 0, 1, 2])
                outcome = "conflict" if condition is not None and draw.random() < 0.4 else "ok"
                value = f"v{revision}" if action == "set" and outcome == "ok" else None
                history.append(
                    call(action, value, revision, *times, client=client, if_revision=condition, outcome=outcome)
                )
        if len({each.value for each in history if each.action == "set" and each.value}) < sum(
            each.action == "set" and each.value is not None for each in history
        ):
            continue  # values are unique
        expected = has_an_order(history)
        lawful += expected
        assert (check_linearizable(history) == []) is expected, history
        if expected:
            assert check_revisions(history) == []
    assert 100 < lawful < 3900


# -- the store ---------------------------------------------------------------------------------------------------------


def assert_one_order(history: History) -> float:
    """Returns how much of the calls overlapped."""
    assert check_linearizable(history) == []
    assert check_revisions(history) == []
    return overlap(history)


# Under the GIL, calls overlap by themselves only if all ask for the same keys, so the untraced histories have fewer.
SHAPES = [(None, 500, 1), (None, 2000, 2), ("line", 500, 4), ("line", 500, 2), ("line", 200, 2), ("opcode", 200, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("between", "calls", "keys"), SHAPES)
def test_what_eight_threads_were_told_has_one_order(between: Between, calls: int, keys: int, seed: str) -> None:
    proving = 0
    for number in range(100):
        names = [f"key:{each}" for each in range(keys)]
        with MemoryStore() as store:
            record = partial(record_calls, store, seed=f"{seed}/{number}", keys=names, calls=calls)
            history = record(between=between, share=0.01 if between == "opcode" else 0.05)
        proving += assert_one_order(history) >= 0.7
        if proving == 10:
            return
    pytest.fail("the calls did not overlap enough to prove anything")


@pytest.mark.large
@pytest.mark.parametrize("between", [None, "line", "opcode"])
def test_what_sixteen_threads_were_told_has_one_order(between: Between, seed: str) -> None:
    names = ["a", "b", "c", "d"]
    for number in range(50):
        with MemoryStore() as store:
            history = record_calls(
                store, seed=f"{seed}/{number}", keys=names, clients=16, calls=2000, between=between, share=0.01
            )
            assert assert_one_order(history) >= 0.7


@pytest.mark.slow
def test_200_000_calls_of_eight_threads_have_one_order_and_with_two_of_them_swapped_they_have_none(seed: str) -> None:
    with MemoryStore() as store:
        history = record_calls(store, seed=seed, keys=[f"key:{each}" for each in range(8)], calls=25_000)
    assert len(history) == 200_000
    assert check_linearizable(history) == []
    assert check_revisions(history) == []

    writes = [number for number, each in enumerate(history) if each.action == "set" and each.outcome == "ok"]
    one, two = random.Random(seed).sample(writes, 2)
    times = [(history[number].called, history[number].returned) for number in (two, one)]
    for number, (called, returned) in zip((one, two), times, strict=True):
        history[number] = history[number]._replace(called=called, returned=returned)

    assert check_linearizable(history) != []
    assert check_revisions(history) != []
