"""What a row is, and the pieces to make one from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, TypeAlias

from benchmarks.measure import Effort, Figures, Run

__all__ = [
    "BASELINE_SET",
    "SMALL",
    "Budget",
    "Contender",
    "Kind",
    "Names",
    "Row",
    "Statement",
    "Subject",
    "contenders",
    "less_than",
    "looped",
    "more",
    "more_sets",
    "sets",
    "times",
]

Kind: TypeAlias = Literal["ours", "floor", "store", "queue"]
"""What a contender is: ours, the least there could be (or what we compare with), a peer that keeps state, a peer that
passes things on."""
Unit: TypeAlias = Literal["time", "bytes"]
Names: TypeAlias = dict[str, Any]
Statement: TypeAlias = "str | tuple[str, str]"
"""What one time is, in Python; in a pair, what to do once before the clock starts comes first. Both know the names of
their subject, `i`, which counts the times, `SMALL`, a small dict, and `ten` keys."""


@dataclass(frozen=True)
class Contender:
    """One of those compared in a row."""

    kind: Kind
    start: Callable[[Effort], AbstractContextManager[Run]]
    note: str = ""
    """What it gives up that the others do not."""
    live: bool = False
    """Whether it hands out live objects: a store that does is judged against ours with `copy=None`."""


@dataclass(frozen=True)
class Budget:
    """A limit on what a row finds."""

    limit: float
    text: str
    """What the limit is said to be, such as `2.5 x a dict`."""
    figure: Callable[[Mapping[str, Figures]], float]
    """What is compared with the limit."""
    counted: bool = False
    """Whether that is a number, and not in the unit of the row."""

    def verdict(self, figures: Mapping[str, Figures]) -> Literal["ok", "over"]:
        return "ok" if self.figure(figures) <= self.limit else "over"


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    about: str
    """What happens once, in the words of a user."""
    contenders: Mapping[str, Contender]
    """By name; ours is named "ours"."""
    base: str | None = None
    """Which of them the ratios refer to."""
    budget: Budget | None = None
    unit: Unit = "time"
    longer: float = 1
    """How many times longer than others its samples are, by the clock of the run."""
    times: int | None = None
    """How often a sample does it, where the clock cannot tell."""
    rounds: int | None = None
    """How many samples are enough."""
    lacking: Callable[[], str] = str
    """Why it cannot be measured here, or nothing."""


BASELINE_SET = "baseline set"
"""The contender in which budgets are counted: a set of a dict with a lock, measured in the same row."""


def times(limit: float, base: str) -> Budget:
    """Ours takes at most `limit` times what `base` takes."""
    return Budget(limit, f"{limit:g} x {base}", lambda figures: figures["ours"].best / figures[base].best, counted=True)


def sets(limit: float) -> Budget:
    """Ours takes at most as long as `limit` baseline sets."""
    return replace(times(limit, BASELINE_SET), text=f"{limit:g} baseline sets")


def more_sets(limit: float, over: str) -> Budget:
    """Ours takes at most `limit` baseline sets longer than `over`."""

    def figure(figures: Mapping[str, Figures]) -> float:
        return (figures["ours"].best - figures[over].best) / figures[BASELINE_SET].best

    return Budget(limit, f"{limit:g} baseline sets more", figure, counted=True)


def more(limit: float, base: str, said: str) -> Budget:
    """Ours takes at most `limit` more than `base`."""
    return Budget(limit, f"{said} more", lambda figures: figures["ours"].best - figures[base].best)


def less_than(limit: float, said: str) -> Budget:
    """Ours takes at most `limit`."""
    return Budget(limit, said, lambda figures: figures["ours"].best)


@dataclass(frozen=True)
class Subject:
    """Something that takes part in many rows: what it can do, one statement for each row."""

    title: str
    kind: Kind
    open: Callable[[], AbstractContextManager[Names]]
    """Make one; the names that the statements use."""
    does: Mapping[str, Statement]
    """By the name of the row."""
    live: bool = False
    gives_up: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What it gives up in some row in particular."""

    def contender(self, row: str, kind: Kind | None = None) -> Contender:
        @contextmanager
        def start(effort: Effort) -> Iterator[Run]:
            with self.open() as names, looped(self.does[row], names) as run:
                yield run

        note = "; ".join(filter(None, (self.gives_up, self.notes.get(row))))
        return Contender(kind or self.kind, start, note, self.live)


def contenders(row: str, *subjects: Subject) -> dict[str, Contender]:
    """Those of `subjects` that can do `row`, by title."""
    return {subject.title: subject.contender(row) for subject in subjects if row in subject.does}


SMALL = {"task": "search", "step": 3, "done": False, "tags": ["ants", "marks"]}
_COMMON: Names = {
    "clock": perf_counter,
    "SMALL": SMALL,
    "ten": [f"ten/{number}" for number in range(10)],
}
_LOOP = """\
{colour} run(times, {names}):
    {before}
    started = clock()
    for i in range(times):
        {each}
    return clock() - started
"""


@contextmanager
def looped(statement: Statement, names: Names) -> Iterator[Run]:
    """A run of `statement`, in a loop without calls, as `timeit` has it; in an event loop if it awaits something.

    There `aclose` of `names`, if there is one, is awaited at the end.
    """
    before, each = ("pass", statement) if isinstance(statement, str) else statement
    is_async = "await " in before + each
    scope = _COMMON | names
    source = _LOOP.format(
        colour="async def" if is_async else "def",
        names=", ".join(f"{name}={name}" for name in scope),
        before=before.replace("\n", "\n    "),
        each=each.replace("\n", "\n        "),
    )
    exec(compile(source, f"<{each}>", "exec"), scope)
    run = scope["run"]
    if not is_async:
        yield run
        return
    with asyncio.Runner() as runner:
        yield lambda times: runner.run(run(times))
        if "aclose" in names:
            runner.run(names["aclose"]())
