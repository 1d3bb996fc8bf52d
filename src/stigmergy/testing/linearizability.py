"""Whether one order of all calls, true to the time at which each was under way, explains every answer.

Two checks, which know different things. `check_linearizable` searches for such an order, key by key, and takes nothing
for granted; the search is that of Wing and Gong (1993), with the cache of Lowe (2017). `check_revisions` takes the
order from the revisions, over all keys together, so there is nothing to search. A store has to pass both.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import accumulate, pairwise
from math import inf
from typing import NamedTuple

from stigmergy.testing.history import History, Invocation

__all__ = ["check_linearizable", "check_revisions"]


def check_linearizable(history: History, *, configurations: int = 1_000_000) -> list[str]:
    """Return what is wrong, one sentence for each key; nothing, if an order was found for every key.

    Calls of unknown outcome may take effect at any time after they began, or never. A search that tried so many
    `configurations` of one key in vain is undecided, and that is wrong, too.
    """
    wrong: list[str] = []
    for key, calls in _by_key(history).items():
        calls = _with_revisions(calls)
        wrong += _never_written(calls) or _search(key, calls, configurations)
    return wrong


def check_revisions(history: History) -> list[str]:
    """Return what is wrong if the revisions are the order; nothing, if they are."""
    calls: list[Invocation] = []
    for of_key in _by_key(history).values():
        calls += _with_revisions(of_key)
    order = _Order(calls)
    return [*_never_written(calls), *_reused(order), *_against_time(order), *_unexplained(calls, order)]


# -- what is known -----------------------------------------------------------------------------------------------------


def _by_key(history: Iterable[Invocation]) -> dict[str, list[Invocation]]:
    by_key: dict[str, list[Invocation]] = {}
    for call in history:
        by_key.setdefault(call.key, []).append(call)
    return by_key


def _with_revisions(calls: list[Invocation]) -> list[Invocation]:
    """The calls of one key with the revision of each value: it was written once, so whoever was told knows for all.

    Where nobody was told, because the outcome of the write is unknown, a negative number of its own stands for it.
    """
    told: dict[str | None, int] = {}
    for call in calls:
        if call.value is not None and call.revision is not None and call.outcome == "ok":
            told.setdefault(call.value, call.revision)
    for number, call in enumerate(calls, start=1):
        if call.action == "set" and call.outcome == "unknown":
            told.setdefault(call.value, -number)
    return [
        call._replace(revision=told.get(call.value)) if call.revision is None and call.action != "delete" else call
        for call in calls
    ]


def _never_written(calls: list[Invocation]) -> list[str]:
    """The reads of what nobody wrote at that revision."""
    written = {(call.key, call.value, call.revision) for call in calls if call.action == "set"}
    return [
        f"{call.key!r}: a read returned {call.value!r} at revision {call.revision}, which nobody wrote"
        for call in calls
        if call.action == "read" and call.value is not None and (call.key, call.value, call.revision) not in written
    ]


# -- the search --------------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    current: int
    """The revision of the entry; 0: absent; negative: of a write whose revision nobody was told."""
    highest: int
    """The highest revision that the key ever had. It outlives a delete; else a revision could come back unseen."""


class _Moment:
    """The beginning of a call, or its end, in a list linked in the order of time."""

    __slots__ = ("call", "end", "following", "is_end", "number", "preceding")

    preceding: _Moment
    following: _Moment
    end: _Moment | None

    def __init__(self, number: int, call: Invocation, *, is_end: bool) -> None:
        self.number = number
        self.call = call
        self.is_end = is_end
        self.end = None

    @property
    def time(self) -> tuple[float, bool]:
        return (self.call.returned, True) if self.is_end else (self.call.called, False)

    def take_out(self) -> None:
        self.preceding.following = self.following
        self.following.preceding = self.preceding
        if self.end is not None:
            self.end.take_out()

    def put_back(self) -> None:
        if self.end is not None:
            self.end.put_back()
        self.preceding.following = self.following.preceding = self


def _search(key: str, calls: list[Invocation], configurations: int) -> list[str]:
    """Look for an order in which each call takes effect between its beginning and its end.

    A call that is given the next place in the order is taken out of the list, and the search begins anew at the front.
    If it comes upon an end instead, there was no place for the call that ends here, so the last one placed goes back.
    """
    front = _linked(calls)
    ends = sum(call.returned < inf for call in calls)
    state, placed = _State(0, 0), 0
    path: list[tuple[_Moment, _State]] = []
    tried: set[tuple[int, _State]] = set()
    here = front.following
    while ends:
        if here.is_end:
            if not path:
                return [f"{key!r}: no order explains its {len(calls)} calls"]
            if len(tried) > configurations:
                return [f"{key!r}: undecided after {len(tried)} configurations"]
            here, state = path.pop()
            here.put_back()
            placed ^= 1 << here.number
            ends += here.end is not None
        elif (after := _effect(here.call, state)) and (place := (placed | 1 << here.number, after)) not in tried:
            tried.add(place)
            path.append((here, state))
            placed, state = place
            here.take_out()
            ends -= here.end is not None
            here = front
        here = here.following
    return []


def _linked(calls: list[Invocation]) -> _Moment:
    """The moment before all others. A call of unknown outcome has no end; what happens at the same time overlaps."""
    moments = []
    for number, call in enumerate(calls):
        begin = _Moment(number, call, is_end=False)
        moments.append(begin)
        if call.returned < inf:
            begin.end = _Moment(number, call, is_end=True)
            moments.append(begin.end)
    moments.sort(key=lambda moment: moment.time)
    front = last = _Moment(-1, calls[0], is_end=False)
    for moment in [*moments, front]:
        last.following, moment.preceding = moment, last
        last = moment
    return front


def _effect(call: Invocation, state: _State) -> _State | None:
    """The state after a call that answered as it did, or `None` if it would not have answered so."""
    current, highest = state
    expected, revision = call.if_revision, call.revision
    if call.action == "read":
        return state if revision == current else None
    if call.outcome == "conflict":
        return state if _is_at(state, revision) and not _is_at(state, expected) else None
    if expected is not None and not _is_at(state, expected):
        return None
    if revision is None:  # a delete of unknown outcome
        return _State(0, highest)
    if call.action == "delete" and (revision == 0) != (current == 0):
        return None
    if revision == 0:
        return state
    if revision < 0:
        return _State(revision, highest)
    return _State(revision if call.action == "set" else 0, revision) if revision > highest else None


def _is_at(state: _State, revision: int | None) -> bool:
    """Whether the key may be at `revision`: that of a write of unknown outcome may be any that is new."""
    current, highest = state
    return revision == current or (current < 0 and revision is not None and revision > highest)


# -- by revision -------------------------------------------------------------------------------------------------------


class _Order:
    """What the revisions say: which writes there were, in their order, and what each key was at from when to when."""

    def __init__(self, calls: list[Invocation]) -> None:
        self.writes = sorted(
            (
                call
                for call in calls
                if call.action != "read" and call.outcome != "conflict" and (call.revision or 0) > 0
            ),
            key=lambda call: call.revision or 0,
        )
        self.holes = {call.key for call in calls if call.outcome == "unknown" and (call.revision or -1) < 0}
        """The keys with writes that may have happened and whose revision nobody was told."""
        self.at: dict[str, list[tuple[int, int]]] = {}
        """By key: since which revision of the store it was at which revision of its own (0: absent)."""
        for call in self.writes:
            revision = call.revision or 0
            self.at.setdefault(call.key, [(0, 0)]).append((revision, revision if call.action == "set" else 0))
        ended = sorted((call.returned, call.revision or 0) for call in calls if call.returned < inf)
        self._ended = [time for time, _ in ended]
        self._seen = [0, *accumulate((revision for _, revision in ended), max)]
        begun = sorted((call.called, call.revision or 0) for call in self.writes)
        self._begun = [time for time, _ in begun]
        self._reached = [0, *accumulate((revision for _, revision in begun), max)]

    def span(self, call: Invocation) -> tuple[int, int]:
        """The first and the last revision at which the store may have been while `call` was under way."""
        seen = self._seen[bisect_left(self._ended, call.called)]
        reached = self._reached[bisect_right(self._begun, call.returned)]
        return seen, reached

    def was_at(self, key: str, revision: int, span: tuple[int, int]) -> bool:
        """Whether the entry at `key` was that of `revision` (0: absent) at some moment of the span."""
        moments = self.at.get(key, [(0, 0)])
        begin = bisect_right(moments, (span[0], span[0])) - 1
        return any(own == revision for since, own in moments[begin:] if since <= span[1])

    def before(self, call: Invocation) -> int:
        """The revision at which the key of a write was right before it."""
        moments = self.at[call.key]
        return moments[bisect_left(moments, (call.revision or 0, 0)) - 1][1]


def _reused(order: _Order) -> list[str]:
    return [
        f"revision {former.revision} was taken by writes of {former.key!r} and {latter.key!r}"
        for former, latter in pairwise(order.writes)
        if former.revision == latter.revision
    ]


def _against_time(order: _Order) -> list[str]:
    """The writes that ended before one with a lower revision began."""
    wrong, latest = [], -inf
    for call in order.writes:
        if call.returned < latest:
            wrong.append(f"{call.key!r}: revision {call.revision} was over before a lower one began")
        latest = max(latest, call.called)
    return wrong


def _unexplained(calls: list[Invocation], order: _Order) -> list[str]:
    """The answers that no moment within the call explains."""
    return [
        f"{call.key!r}: the {call.action} by client {call.client} that {_told(call)} cannot have happened when it did"
        for call in calls
        if call.outcome != "unknown" and call.key not in order.holes and not _is_explained(call, order)
    ]


def _is_explained(call: Invocation, order: _Order) -> bool:
    revision, expected = call.revision or 0, call.if_revision
    if call.action == "read":
        return order.was_at(call.key, revision, order.span(call))
    if call.outcome == "conflict":
        return revision != expected and order.was_at(call.key, revision, order.span(call))
    if revision == 0:
        return order.was_at(call.key, 0, order.span(call))
    before = order.before(call)
    return expected in (None, before) and (call.action == "set" or before > 0)


def _told(call: Invocation) -> str:
    return f"{'met' if call.outcome == 'conflict' else 'told'} revision {call.revision}"
