"""All rows, and how they are chosen and measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from random import Random

from benchmarks import concurrency, engines, growth, latency, layers, reads_writes, watching
from benchmarks.measure import Effort, Figures, interleaved
from benchmarks.model import Row
from benchmarks.peers import MODULES, is_installed

__all__ = ["ROWS", "Result", "chosen", "measured"]

ROWS: tuple[Row, ...] = (
    *reads_writes.ROWS,
    *layers.ROWS,
    *watching.ROWS,
    *latency.ROWS,
    *concurrency.ROWS,
    *growth.ROWS,
    *engines.ROWS,
)


@dataclass(frozen=True)
class Result:
    """What was found for a row."""

    row: Row
    figures: dict[str, Figures]
    """By contender."""
    missing: tuple[str, ...]
    """The contenders that are not installed."""
    lacking: str = ""
    """Why none of them could be measured, if so."""


def chosen(patterns: Iterable[str]) -> tuple[Row, ...]:
    """The row of that name, for each of `patterns`, or else those with it in their names. Raises `ValueError`."""
    names: set[str] = set()
    for pattern in patterns:
        found = {row.name for row in ROWS if row.name == pattern} or {row.name for row in ROWS if pattern in row.name}
        if not found:
            raise ValueError(f"no row has {pattern!r} in its name")
        names |= found
    return tuple(row for row in ROWS if row.name in names)


def measured(rows: Iterable[Row], effort: Effort) -> Iterator[Result]:
    random = Random()
    for row in rows:
        if lacking := row.lacking():
            yield Result(row, {}, (), lacking)
            continue
        missing = tuple(name for name in row.contenders if name in MODULES and not is_installed(name))
        own = replace(
            effort, rounds=min(effort.rounds, row.rounds or effort.rounds), seconds=effort.seconds * row.longer
        )
        times = None if row.times is None else own.size(row.times)
        with ExitStack() as stack:
            runs = {}
            for name, contender in row.contenders.items():
                if name not in missing:
                    runs[name] = stack.enter_context(contender.start(own))
            yield Result(row, interleaved(runs, own, random, times=times), missing)
