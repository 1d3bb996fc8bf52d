"""Rows: one operation at a time, by one thread or one task."""

from __future__ import annotations

from benchmarks.floors import DICT
from benchmarks.model import Budget, Row, contenders, times
from benchmarks.ours import LIVE, OURS
from benchmarks.peers import PEERS

__all__ = ["ROWS"]


def _row(name: str, about: str, budget: Budget | None = None) -> Row:
    found = contenders(name, OURS, LIVE, DICT, *PEERS)
    return Row(name, about, found, base=DICT.title if DICT.title in found else None, budget=budget)


ROWS = (
    _row("get", "get of a scalar", times(2.2, DICT.title)),
    _row("set", "set of a scalar, nobody watching", times(3.5, DICT.title)),
    Row(
        "set with a ttl",
        "set of a scalar that is to expire in a minute; the next one puts that off",
        {**contenders("set with a ttl", OURS, *PEERS), "without": OURS.contender("set", "floor")},
        base="without",
        budget=times(3, "without"),
    ),
    _row("delete", "set of a new key, and its delete"),
    _row("conditional set", "set on condition of the revision that the last one returned"),
    _row("update", "add one to a number"),
    _row("commit of 10", "ten keys in one commit"),
    _row("scan", "the values of 100 keys below a prefix, among 1,000"),
    _row("get of a small dict", "four items, one of them a list; the reader's own, unless a note says live"),
    _row("set of a small dict", "the same dict, copied unless a note says live"),
    _row("async get", "await a get of a scalar"),
    _row("async set", "await a set of a scalar"),
    _row("set and deliver", "one thread sets, and takes the change out of a watch"),
)
