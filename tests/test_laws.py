"""The laws of watches: what they refuse, and that watches under traffic keep them.

`python -m pytest -m large tests/test_laws.py` takes the larger figures.
"""

from __future__ import annotations

import pytest

from stigmergy import Change, MemoryStore, Op, OpenWatch
from stigmergy.testing import laws
from stigmergy.testing.traffic import Between, check_watched, record_watches

EVERYTHING = OpenWatch(prefix="")


def change(key: str, revision: int, old: int = 0, *, op: Op = Op.SET, missed: int = 0, commit: int = 0) -> Change:
    value = f"v{revision}" if op is Op.SET else None
    old_value = f"v{old}" if old else None
    return Change(op, key, value, old_value, revision, old, commit or revision, None, 0.0, False, missed, None)


LOG = [
    change("a", 1),
    change("b", 2, commit=3),
    change("a", 3, 1, commit=3),
    change("a", 4, 3, op=Op.DELETE),
    change("a", 5),
]


def test_what_really_happened_is_lawful() -> None:
    assert laws.check_log(LOG) == []
    assert laws.check_watch(LOG, LOG, EVERYTHING, since=0, until=5) == []
    assert laws.check_watch(LOG[2:4], LOG, OpenWatch(["a"]), since=1, until=4) == []
    assert laws.check_watch([LOG[4]._replace(missed=4)], LOG, EVERYTHING, since=0, until=5) == []
    assert laws.check_observe([LOG[1], change("a", 5)], LOG, EVERYTHING) == []
    assert laws.check_observe([LOG[0], LOG[1], change("a", 5, 1)], LOG, EVERYTHING) == []


@pytest.mark.parametrize(
    ("broken", "delivered", "request_"),
    [
        ("asked for", LOG, OpenWatch(["a"])),
        ("came after", [LOG[0], LOG[2], LOG[1], LOG[3], LOG[4]], EVERYTHING),
        ("came after", [LOG[0], LOG[0], *LOG[1:]], EVERYTHING),
        ("missing before", [LOG[0], *LOG[2:]], EVERYTHING),
        ("missing before", [LOG[0], LOG[2]._replace(missed=2), *LOG[3:]], EVERYTHING),
        ("never delivered", LOG[:4], EVERYTHING),
        ("not what happened", [*LOG[:4], LOG[4]._replace(value="x")], EVERYTHING),
        ("not what happened", [*LOG[:2], LOG[2]._replace(old_value="x"), *LOG[3:]], EVERYTHING),
        ("not what happened", [*LOG[:2], LOG[2]._replace(commit=9), *LOG[3:]], EVERYTHING),
        ("not what happened", [*LOG, change("a", 6, 5)], EVERYTHING),
    ],
)
def test_a_watch_that_breaks_a_law_is_refused(broken: str, delivered: list[Change], request_: OpenWatch) -> None:
    assert any(broken in wrong for wrong in laws.check_watch(delivered, LOG, request_, since=0, until=5))


@pytest.mark.parametrize(
    ("broken", "delivered"),
    [
        ("is the present", [LOG[0], LOG[1]]),
        ("is the present", [LOG[1], LOG[2]._replace(old_value=None, old_revision=0)]),
        ("does not say", [LOG[0], LOG[1], change("a", 5)]),
        ("not what happened", [LOG[1], change("a", 5)._replace(value="x")]),
    ],
)
def test_an_observe_that_breaks_a_law_is_refused(broken: str, delivered: list[Change]) -> None:
    assert any(broken in wrong for wrong in laws.check_observe(delivered, LOG, EVERYTHING))


@pytest.mark.parametrize(
    ("broken", "log"),
    [
        ("has place", [LOG[0], *LOG[2:]]),
        ("where their commits end", [LOG[0], LOG[1]._replace(commit=4), *LOG[2:]]),
        ("where their commits end", [LOG[0], LOG[1], LOG[2]._replace(commit=4), *LOG[3:]]),
        ("does not say", [*LOG[:2], LOG[2]._replace(old_value=None), *LOG[3:]]),
        ("does not say", [*LOG[:4], change("a", 5, 3)]),
    ],
)
def test_a_log_with_a_gap_or_half_a_commit_is_refused(broken: str, log: list[Change]) -> None:
    assert any(broken in wrong for wrong in laws.check_log(log))


@pytest.mark.slow
@pytest.mark.parametrize(("between", "writes", "rounds"), [(None, 20_000, 5), ("line", 2_000, 1), ("opcode", 500, 1)])
def test_watches_opened_at_any_moment_of_the_traffic_keep_their_laws(
    between: Between, writes: int, rounds: int, seed: str
) -> None:
    missed = 0
    for number in range(rounds):
        store = MemoryStore(history=1000)
        log, watched = record_watches(store, seed=f"{seed}/{number}", writes=writes, between=between)
        assert check_watched(log, watched) == []
        assert len(watched) >= 8, "too few watches were open to prove anything"
        missed += sum(each.missed for one in watched for each in one.delivered)
    assert missed > 0, "no watch was ever too slow, so nothing was proved of those that are"


@pytest.mark.large
@pytest.mark.parametrize("between", ["line", "opcode"])
def test_watches_opened_in_long_preempted_traffic_keep_their_laws(between: Between, seed: str) -> None:
    for number in range(10):
        log, watched = record_watches(
            MemoryStore(history=1000), seed=f"{seed}/{number}", writes=20_000, between=between
        )
        assert check_watched(log, watched) == []
