"""Histories: what concurrent clients asked of a store, what it answered, and when.

A `Client` asks, in either colour: its methods are flows, so `store.run(client.read("key"))` on a `Store`, awaited on an
`AsyncStore`. Every value it writes is unique, so that a value read tells which write it came from.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import count
from math import inf
from time import perf_counter_ns
from typing import Any, Literal, NamedTuple, TypeAlias

from stigmergy.aio import AsyncStore
from stigmergy.errors import OutcomeUnknown, RevisionConflict, Unavailable
from stigmergy.flow import Call, Flow
from stigmergy.model import Delete, Entry
from stigmergy.store import Store

__all__ = ["Client", "History", "Invocation", "overlap"]


class Invocation(NamedTuple):
    """One call, on one key."""

    client: int
    action: Literal["read", "set", "delete"]
    key: str
    value: str | None
    """What was written, or read: `None` for an absent key."""
    if_revision: int | None
    outcome: Literal["ok", "conflict", "unknown"]
    revision: int | None
    """Of the entry read, of the write, or of the entry in conflict; 0 where there was nothing, `None` if not told."""
    called: float
    """When it began, and ended (infinite: nobody knows), in nanoseconds by a clock that all clients share."""
    returned: float


History: TypeAlias = Sequence[Invocation]


class Client:
    """Asks a store, one call at a time, and keeps the history of that in a list, which several clients may share."""

    def __init__(self, store: Store | AsyncStore, number: int, history: list[Invocation]) -> None:
        self.number = number
        self.history = history
        self._store = store
        self._values = count()
        self._known: dict[str, int] = {}
        """The revision at which this client last knew each key to be."""

    def read(self, key: str) -> Flow[None]:
        """`get_entry`."""
        called = perf_counter_ns()
        try:
            entry: Entry | None = yield Call(self._store.get_entry, key)
        except (Unavailable, OutcomeUnknown):
            return  # a read that failed says nothing
        value, revision = (None, 0) if entry is None else (entry.value, entry.revision)
        self._keep("read", key, value, None, "ok", revision, called)

    def read_value(self, key: str) -> Flow[None]:
        """`get`, which does not tell the revision."""
        called = perf_counter_ns()
        try:
            value = yield from Call(self._store.get, key)
        except (Unavailable, OutcomeUnknown):
            return
        self._keep("read", key, value, None, "ok", 0 if value is None else None, called)

    def set(self, key: str, *, if_revision: int | None = None) -> Flow[None]:
        """`set` of a new value."""
        value = f"{self.number}/{next(self._values)}"

        def write() -> Any:
            return self._store.set(key, value, if_revision=if_revision)

        yield from self._write("set", write, key, value, if_revision)

    def set_if_known(self, key: str) -> Flow[None]:
        """`set` on the condition that the key is as this client saw it last."""
        yield from self.set(key, if_revision=self._known.get(key, 0))

    def delete(self, key: str, *, if_revision: int | None = None) -> Flow[None]:
        """A commit of one `Delete`, which tells the revision of it."""

        def write() -> Any:
            return self._store.commit(Delete(key, if_revision))

        yield from self._write("delete", write, key, None, if_revision)

    def traffic(self, keys: Sequence[str], calls: int, seed: object) -> Flow[None]:
        """So many calls drawn from `seed`: half of them reads, the others set, set on a condition, and delete."""
        draw = random.Random(f"{seed}/{self.number}")
        choices = [self.read, self.read_value, self.set, self.set_if_known, self.delete]
        for _ in range(calls):
            (call,) = draw.choices(choices, [25, 15, 25, 27, 8])
            yield from call(draw.choice(keys))

    def _write(
        self, action: Literal["set", "delete"], write: Any, key: str, value: str | None, if_revision: int | None
    ) -> Flow[None]:
        called = perf_counter_ns()
        try:
            answer = yield from Call(write)
        except RevisionConflict as conflict:
            self._keep(action, key, value, if_revision, "conflict", conflict.actual, called)
        except OutcomeUnknown:
            self.history.append(Invocation(self.number, action, key, value, if_revision, "unknown", None, called, inf))
        except Unavailable:
            return  # it surely did nothing
        else:
            revision = answer if isinstance(answer, int) else answer[0] or 0
            self._keep(action, key, value, if_revision, "ok", revision, called)

    def _keep(
        self,
        action: Literal["read", "set", "delete"],
        key: str,
        value: str | None,
        if_revision: int | None,
        outcome: Literal["ok", "conflict"],
        revision: int | None,
        called: float,
    ) -> None:
        returned = perf_counter_ns()
        if revision is not None:
            self._known[key] = 0 if action == "delete" and outcome == "ok" else revision
        self.history.append(
            Invocation(self.number, action, key, value, if_revision, outcome, revision, called, returned)
        )


def overlap(history: Iterable[Invocation]) -> float:
    """The share of calls during which another one of their key was under way. A history without any proves nothing."""
    by_key: dict[str, list[Invocation]] = {}
    for call in history:
        by_key.setdefault(call.key, []).append(call)
    calls = sum(map(len, by_key.values()))
    return sum(map(_overlapping, by_key.values())) / calls if calls else 0.0


def _overlapping(calls: list[Invocation]) -> int:
    calls.sort(key=lambda call: call.called)
    overlapping, latest = set(), 0
    for number, call in enumerate(calls[1:], start=1):
        if call.called < calls[latest].returned:
            overlapping |= {latest, number}
        if call.returned > calls[latest].returned:
            latest = number
    return len(overlapping)
