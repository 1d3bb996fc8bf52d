"""Any sequence of operations, drawn by Hypothesis, in either colour: the store must answer as the model does.

What is compared: every result and every conflict, the entries, pages of scans, what each watch delivers and counts,
from now on or from a moment in the past, through time that passes, and at the end what each `observe` came to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from stigmergy.aio import AsyncStore
from stigmergy.errors import Lagged, RevisionConflict
from stigmergy.flow import OpenWatch
from stigmergy.model import Change, Check, Delete, Set, Ttl, Write
from stigmergy.store import Store
from stigmergy.testing.clock import VirtualClock
from stigmergy.testing.colour import Colour
from stigmergy.testing.laws import check_observe
from stigmergy.testing.model import ModelStore, ModelWatch
from stigmergy.testing.traffic import wait_until_told
from stigmergy.watch import Watch

__all__ = ["StoreMachine"]

keys = st.sampled_from(["a", "a:b", "a:c", "ab", "b"])
prefixes = st.sampled_from(["", "a", "a:", "b", "z"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
conditions = st.sampled_from(["none", "absent", "current", "older", "newer"])
ttls = st.sampled_from([None, None, 1.0, 2.0, 5.0, "keep"])


class StoreMachine(RuleBasedStateMachine):
    """Make a subclass with what is below, and give it to `hypothesis.stateful.run_state_machine_as_test`.

    Without a `VirtualClock` that the store goes by there are no ttls.
    """

    colour: ClassVar[Colour]
    clock: ClassVar[VirtualClock | None] = None

    @staticmethod
    def make_store() -> Store | AsyncStore:
        """The store to judge."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner() if self.colour.name == "async" else None
        self.made = self.make_store()
        self.store = self.colour.face(self.made)
        self.model = ModelStore(self._emptied())
        self.told = self._watch(prefix="", capacity=None)
        """A watch of everything: its revision says what all of them were told."""
        self.watches: list[tuple[Watch, ModelWatch]] = []
        self.observed: list[tuple[Watch, OpenWatch, list[Change]]] = []
        if self.clock is not None:
            self.model.now = self.clock.now

    # -- writes --------------------------------------------------------------------------------------------------------

    @rule(key=keys, value=values, condition=conditions, ttl=ttls)
    def set(self, key: str, value: Any, condition: str, ttl: Ttl) -> None:
        """Set, on any condition, with any ttl."""
        write = Set(key, value, self._revision(key, condition), self._ttl(ttl))
        self._agree(
            [write],
            lambda: self.store.set(key, value, if_revision=write.if_revision, ttl=write.ttl),
            lambda made: made[0],
        )

    @rule(key=keys, condition=conditions)
    def delete(self, key: str, condition: str) -> None:
        """Delete, on any condition."""
        write = Delete(key, self._revision(key, condition))
        self._agree(
            [write], lambda: self.store.delete(key, if_revision=write.if_revision), lambda made: made[0] is not None
        )

    @rule(
        sets=st.dictionaries(keys, st.tuples(values, conditions, ttls), max_size=3),
        deletes=st.dictionaries(keys, conditions, max_size=2),
        checks=st.dictionaries(keys, conditions.filter(lambda each: each != "none"), max_size=1),
        order=st.randoms(use_true_random=False),
    )
    def commit(self, sets: dict[str, Any], deletes: dict[str, str], checks: dict[str, str], order: Any) -> None:
        """Several writes at once, each on any condition."""
        writes: list[Write] = [
            Set(key, value, self._revision(key, condition), self._ttl(ttl))
            for key, (value, condition, ttl) in sets.items()
        ]
        writes += [Delete(key, self._revision(key, condition)) for key, condition in deletes.items() if key not in sets]
        writes += [Check(key, self._revision(key, condition) or 0) for key, condition in checks.items()]
        order.shuffle(writes)
        if writes:
            self._agree(writes, lambda: self.store.commit(*writes), lambda made: made)

    @rule(key=keys, addition=st.integers(1, 9))
    def update(self, key: str, addition: int) -> None:
        """Replace a value by one made of it."""

        def function(value: Any) -> Any:
            return [value, addition]

        new = function("nothing" if self.model.at(key).revision == 0 else self.model.at(key).value)
        assert self._do(self.store.update(key, function, default="nothing")) == new
        self.model.commit([Set(key, new, ttl="keep")])

    # -- time ----------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.clock is not None)
    @rule(seconds=st.sampled_from([0.5, 1.0, 1.0, 2.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        """Let deadlines come due."""
        assert self.clock is not None
        self.clock.advance(seconds)
        self.model.now += seconds
        self.model.expire()
        self._do(self.store.scan(limit=1))

    # -- reads ---------------------------------------------------------------------------------------------------------

    @rule(key=keys)
    def read(self, key: str) -> None:
        """Look at one key in every way there is."""
        value, revision, deadline = self.model.at(key)
        entry = self._do(self.store.get_entry(key))
        assert self._do(self.store.get(key, "nothing")) == (value if revision else "nothing")
        assert (0 if entry is None else entry.revision) == revision
        if entry is not None:
            assert entry.value == value
            assert (entry.expires is None) == (deadline == float("inf"))

    @rule(among=st.lists(keys, unique=True))
    def read_many(self, among: list[str]) -> None:
        """Look at several keys."""
        there = {key: self.model.at(key).value for key in among if self.model.at(key).revision}
        assert self._do(self.store.get_many(among)) == there

    @rule(prefix=prefixes, after=st.none() | keys, limit=st.none() | st.integers(1, 4))
    def scan(self, prefix: str, after: str | None, limit: int | None) -> None:
        """Look at a page of a prefix."""
        snapshot = self._do(self.store.scan(prefix, after=after, limit=limit))
        found = {key: (entry.value, entry.revision) for key, entry in snapshot.items()}
        assert list(found.items()) == list(self.model.scan(prefix, after, limit).items())
        assert snapshot.revision == self.model.revision

    # -- watches -------------------------------------------------------------------------------------------------------

    @rule(
        where=st.lists(keys, min_size=1, unique=True) | prefixes,
        since=st.none() | st.integers(0, 20),
        capacity=st.sampled_from([1, 2, 3, 1024, None]),
        overflow=st.sampled_from(["drop", "raise"]),
    )
    def open_watch(self, where: list[str] | str, since: int | None, capacity: int | None, overflow: Any) -> None:
        """Watch keys or a prefix, from now on or from the past, with any buffer."""
        if "resumable" not in self.made.capabilities or (since is not None and since > len(self.model.log)):
            since = None
        among, prefix = ((), where) if isinstance(where, str) else (where, None)
        request = OpenWatch(among, prefix, None if since is None else self.model.base + since, capacity, overflow)
        self.watches.append((self._do(self.store.open_watch(request)), self.model.open(request)))

    @precondition(lambda self: self.watches)
    @rule(number=st.integers(0, 9), most=st.integers(1, 5))
    def take(self, number: int, most: int) -> None:
        """Take changes out of a watch."""
        self._wait_until_told()
        watch, expected = self.watches[number % len(self.watches)]
        for _ in range(most):
            self._take(watch, expected)

    @precondition(lambda self: self.watches and "resumable" in self.made.capabilities)
    @rule(number=st.integers(0, 9))
    def resume(self, number: int) -> None:
        """Close a watch, and open one from its bookmark: it delivers what the first one had not."""
        watch, expected = self._close(number)
        keys, prefix = expected.request.keys, expected.request.prefix
        resumed = self._watch(*keys, prefix=prefix, since=watch.bookmark, capacity=None)
        self.watches.append((resumed, self.model.open(OpenWatch(keys, prefix, expected.taken, None))))

    @precondition(lambda self: self.watches)
    @rule(number=st.integers(0, 9))
    def close_watch(self, number: int) -> None:
        """Close a watch."""
        self._close(number)

    @rule(where=st.lists(keys, min_size=1, unique=True) | prefixes)
    def observe(self, where: list[str] | str) -> None:
        """Observe keys or a prefix."""
        request = OpenWatch(prefix=where, latest=True) if isinstance(where, str) else OpenWatch(where, latest=True)
        self.observed.append((self._do(self.store.open_watch(request)), request, []))

    @precondition(lambda self: self.observed)
    @rule(number=st.integers(0, 9), most=st.integers(1, 3))
    def take_observed(self, number: int, most: int) -> None:
        """Take changes out of an `observe`."""
        self._wait_until_told()
        watch, _, delivered = self.observed[number % len(self.observed)]
        delivered += filter(None, (watch.get_nowait() for _ in range(most)))

    def teardown(self) -> None:
        """Judge what was observed, and close."""
        try:
            self._wait_until_told()
            for watch, request, delivered in self.observed:
                delivered += iter(watch.get_nowait, None)
                assert check_observe(list(map(_comparable, delivered)), self.model.log, request) == []
        finally:
            self._do(self.store.close())
            if self.runner is not None:
                self.runner.close()

    # -- the comparison ------------------------------------------------------------------------------------------------

    def _do(self, awaitable: Coroutine[Any, Any, Any]) -> Any:
        return self.colour.run(awaitable) if self.runner is None else self.runner.run(awaitable)

    def _watch(self, *keys: str, **request: Any) -> Watch:
        watch: Watch = self._do(self.store.open_watch(OpenWatch(keys, **request)))
        return watch

    def _emptied(self) -> int:
        """Delete what is there, since a durable store may open the same place again; return the revision after it."""
        there = self._do(self.store.scan())
        if there:
            self._do(self.store.commit(*map(Delete, there)))
        revision: int = self._do(self.store.scan()).revision
        return revision

    def _agree(self, writes: Iterable[Write], call: Callable[[], Any], answer: Callable[[Any], Any]) -> None:
        """Do the same in the model and in the store, and compare what came of it."""
        expected = _outcome(lambda: answer(self.model.commit(writes)))
        assert _outcome(lambda: self._do(call())) == expected

    def _wait_until_told(self) -> None:
        wait_until_told(self.told, self.model.revision)

    def _take(self, watch: Watch, expected: ModelWatch) -> None:
        change = expected.take()
        if change is not None and change.missed and expected.request.overflow == "raise":
            with pytest.raises(Lagged) as lagged:
                watch.get_nowait()
            assert lagged.value.missed == change.missed
            change = change._replace(missed=0)
        taken = watch.get_nowait()
        assert (None if taken is None else _comparable(taken)) == change

    def _close(self, number: int) -> tuple[Watch, ModelWatch]:
        self._wait_until_told()
        watch, expected = self.watches.pop(number % len(self.watches))
        self.model.watches.remove(expected)
        watch.close()
        return watch, expected

    def _revision(self, key: str, condition: str) -> int | None:
        current = self.model.at(key).revision
        return {"none": None, "absent": 0, "current": current, "older": max(current - 1, 0), "newer": current + 1}[
            condition
        ]

    def _ttl(self, ttl: Ttl) -> Ttl:
        return ttl if self.clock is not None else None


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RevisionConflict as conflict:
        return "conflict", conflict.key, conflict.expected, conflict.actual


def _comparable(change: Change) -> Change:
    return change._replace(time=0.0)
