"""The laws of watches: pure functions over what a watch delivered and the log of all commits.

Each returns what is wrong, one sentence for each violation. The log is every change of the store in the order of
revisions, as an unbounded watch of everything has it that was there first; `check_log` says whether it can be one.
The laws are those that etcd's robustness tests check of its watches, adapted: what is missed here is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

from stigmergy.flow import OpenWatch
from stigmergy.model import Change, Op

__all__ = [
    "chained",
    "check_log",
    "check_observe",
    "check_watch",
    "complete",
    "converged",
    "filtered",
    "matches",
    "ordered",
    "truthful",
]


def check_watch(
    delivered: Sequence[Change], log: Sequence[Change], request: OpenWatch, *, since: int, until: int
) -> list[str]:
    """All the laws of a watch that covers the revisions after `since`, up to `until`, and has been drained."""
    laws = filtered(delivered, request), ordered(delivered), truthful(delivered, log)
    return [*chain.from_iterable(laws), *complete(delivered, log, request, since=since, until=until)]


def check_observe(delivered: Sequence[Change], log: Sequence[Change], request: OpenWatch) -> list[str]:
    """All the laws of an `observe` that has been drained."""
    known = [change._replace(old_value=None, old_revision=0) for change in delivered]
    truth = [change._replace(old_value=None, old_revision=0) for change in log]
    laws = filtered(delivered, request), chained(delivered), truthful(known, truth), converged(delivered, log, request)
    return [*chain.from_iterable(laws)]


def matches(change: Change, request: OpenWatch) -> bool:
    """Whether `change` is one that `request` asks for."""
    return change.key in request.keys if request.prefix is None else change.key.startswith(request.prefix)


def filtered(delivered: Iterable[Change], request: OpenWatch) -> list[str]:
    """A watch delivers what it was asked for and nothing else."""
    return [f"{change} was not asked for" for change in delivered if not matches(change, request)]


def ordered(delivered: Iterable[Change]) -> list[str]:
    """Revisions strictly increase over all keys together, so nothing comes twice."""
    return [
        f"{later} came after {earlier}" for earlier, later in pairwise(delivered) if later.revision <= earlier.revision
    ]


def complete(
    delivered: Iterable[Change], log: Iterable[Change], request: OpenWatch, *, since: int, until: int
) -> list[str]:
    """Every change that was asked for is delivered, or counted by the one delivered next. The newest always arrives."""
    expected = iter([change for change in log if since < change.revision <= until and matches(change, request)])
    wrong = []
    for change in delivered:
        missed = 0
        for due in expected:
            if due.revision >= change.revision:
                break
            missed += 1
        if missed != change.missed:
            wrong.append(f"{missed} changes are missing before {change}")
    return [*wrong, *(f"{change} was never delivered" for change in expected)]


def truthful(delivered: Iterable[Change], log: Iterable[Change]) -> list[str]:
    """What is delivered is what happened: op, values, revisions, commit, writer, meta."""
    truth = {change.revision: change for change in log}
    return [
        f"{change} is not what happened at its revision"
        for change in delivered
        if change._replace(missed=0) != truth.get(change.revision)
    ]


def chained(changes: Iterable[Change]) -> list[str]:
    """The `old_value` of each change is what the change of the same key before it left."""
    left: dict[str, tuple[Any, int]] = {}
    wrong = []
    for change in changes:
        if (change.old_value, change.old_revision) != left.get(change.key, (None, 0)):
            wrong.append(f"{change} does not say what it replaced")
        left[change.key] = (change.value, change.revision) if change.op is Op.SET else (None, 0)
    return wrong


def converged(delivered: Iterable[Change], log: Iterable[Change], request: OpenWatch) -> list[str]:
    """What an `observe` delivered last of each key is the present. A key that came and went may pass unseen."""
    last = {change.key: change for change in delivered}
    present = {change.key: change for change in log if matches(change, request)}
    return [
        f"{change} is the present, and was never delivered"
        for key, change in present.items()
        if (last[key].revision if key in last else 0) != change.revision
        and not (change.op is Op.DELETE and (key not in last or last[key].op is Op.DELETE))
    ]


def check_log(log: Sequence[Change]) -> list[str]:
    """Revisions grow by exactly 1 from the first on, commits are whole, and each change knows what it replaced."""
    gaps = [
        f"{change} has place {place} in the log"
        for place, change in enumerate(log, start=1)
        if change.revision != place
    ]
    torn = [
        f"{change} and {following} do not agree where their commits end"
        for change, following in pairwise(log)
        if (change.revision == change.commit) == (following.commit == change.commit)
    ]
    return [*gaps, *torn, *chained(log)]
