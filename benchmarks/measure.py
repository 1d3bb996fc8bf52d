"""The method: every contender of a row is sampled in turn, in random order, round after round.

What else runs on the machine then hits all of them alike, and the best of many samples is hit the least: they are
shorter than the slices in which a busy machine is shared. So ratios are taken between bests; the median tells how calm
it was. As in `timeit`, the garbage collector rests within a sample. All contenders are in one process, unless what
happened before in their process is what they differ by.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles
from typing import TypeAlias

__all__ = ["FULL", "QUICK", "Effort", "Figures", "Run", "interleaved", "sample"]

Run: TypeAlias = Callable[[int], "float | list[float]"]
"""Does something so many times. Returns the seconds (or bytes) that all of it took, by its own clock, or a list of what
each time took."""


@dataclass(frozen=True)
class Effort:
    """How long to measure, and on what size."""

    rounds: int
    """How many samples are taken of each contender."""
    seconds: float
    """How long a sample is to last."""
    largest: int
    """Sizes (of keys, of watches) beyond this are cut down to it."""

    def size(self, wanted: int) -> int:
        return min(wanted, self.largest)


FULL = Effort(rounds=150, seconds=0.002, largest=1_000_000)
QUICK = Effort(rounds=2, seconds=0.001, largest=500)


@dataclass(frozen=True)
class Figures:
    """What the samples of one contender say: seconds, or bytes, for one time."""

    best: float
    median: float
    p99: float | None = None
    """Of single times, where they were taken one by one; `best` is then the best median of a sample."""


def interleaved(
    runs: Mapping[str, Run], effort: Effort, random: Random, *, times: int | None = None
) -> dict[str, Figures]:
    """Sample `runs` in turn, each so often that a sample takes `effort.seconds`, or just `times` times."""
    often = {name: _calibrated(run, effort.seconds) if times is None else times for name, run in runs.items()}
    samples: dict[str, list[float | list[float]]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(effort.rounds):
        random.shuffle(order)
        for name in order:
            samples[name].append(sample(runs[name], often[name]))
    return {name: _figures(samples[name], often[name]) for name in runs}


def sample(run: Run, times: int) -> float | list[float]:
    """One sample, without the garbage collector."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return run(times)
    finally:
        if was_enabled:
            gc.enable()


def _calibrated(run: Run, seconds: float) -> int:
    """How often to run for a sample of about `seconds`. What this runs is also the warm-up."""
    times = 2
    while True:
        # One sample alone may have been held up, and say too few times.
        took = min(_seconds(sample(run, times)) for _ in range(3))
        if took >= seconds / 2:
            return max(1, round(times * seconds / took))
        times *= 2 if took > seconds / 20 else 10


def _seconds(taken: float | list[float]) -> float:
    return sum(taken) if isinstance(taken, list) else taken


def _figures(samples: list[float | list[float]], times: int) -> Figures:
    means: list[float] = []
    singles: list[float] = []
    for taken in samples:
        if isinstance(taken, list):
            means.append(median(taken))
            singles += taken
        else:
            means.append(taken / times)
    if not singles:
        return Figures(min(means), median(means))
    return Figures(min(means), median(singles), quantiles(singles, n=100)[98] if len(singles) > 1 else singles[0])
