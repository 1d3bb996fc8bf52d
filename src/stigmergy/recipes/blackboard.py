"""Blackboard: what several agents write on together, each under its own name.

Made of public pieces only: a scope, an identity for each agent, reducers, and a middleware for keys that have an owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any, Generic, TypeVar, overload

from stigmergy.aio import AsyncStore
from stigmergy.errors import AccessDenied, RevisionConflict
from stigmergy.flow import Commit, Flow, Operation, Scan, backoff
from stigmergy.keys import check_whole_key
from stigmergy.middleware import Middleware, apply_middleware
from stigmergy.model import Check, Snapshot, Write
from stigmergy.reducers import Reducer, with_reducers
from stigmergy.scope import acting_as, listed, plain, scoped
from stigmergy.store import Store
from stigmergy.watch import Opening, Watch

__all__ = ["Blackboard", "with_ownership"]

S = TypeVar("S", Store, AsyncStore)


class Blackboard(Generic[S]):
    """A blackboard in `scope` of a store of either colour.

    >>> from operator import add
    >>> from stigmergy import MemoryStore
    >>> board = Blackboard(MemoryStore(), reducers={"notes": add}, owned=["plan"])
    >>> planner, critic = board.agent("planner"), board.agent("critic")
    >>> watch = board.watch("plan", "notes")
    >>> _ = planner.set("plan", "walk"), planner.set("notes", ["on foot"]), critic.set("notes", ["in the rain"])
    >>> board.all.get("notes")
    ['on foot', 'in the rain']
    >>> [(change.key, change.writer) for change in iter(watch.get_nowait, None)]
    [('plan', 'planner'), ('notes', 'planner'), ('notes', 'critic')]
    >>> critic.set("plan", "stay")
    Traceback (most recent call last):
    stigmergy.errors.AccessDenied: this handle may not write what another owns: 'plan'

    `reducers` and `default` are as for `with_reducers`. A key that is `owned` belongs to the agent that has written it
    first, until that agent deletes it. Both name whole keys: one that ends in `:` is `InvalidKey`.
    """

    def __init__(
        self,
        store: S,
        *,
        scope: str = "blackboard",
        reducers: Mapping[str, Reducer] | None = None,
        default: Reducer | None = None,
        owned: Iterable[str] = (),
    ) -> None:
        self.all: S = scoped(store, scope)
        """The blackboard itself, to read and to watch."""
        self._merging = with_reducers(reducers or {}, default)
        self._owned = frozenset(map(check_whole_key, listed(owned)))

    def agent(self, name: str) -> S:
        """Return the blackboard as agent `name` has it: what it writes bears that name."""
        handle: S = acting_as(self.all, name)
        return apply_middleware(handle, self._merging, with_ownership(name, self._owned))

    @overload
    def watch(self: Blackboard[Store], *keys: str) -> Watch: ...
    @overload
    def watch(self: Blackboard[AsyncStore], *keys: str) -> Opening: ...
    def watch(self, *keys: str) -> Watch | Opening:
        """Return one watch of several `keys`, in the order of revisions; of everything, if none is given."""
        return self.all.watch(*keys) if keys else self.all.watch(prefix="")


def with_ownership(agent: str, owned: Iterable[str]) -> Middleware:
    """Return a middleware under which `agent` may write those keys of `owned` that nobody else wrote first.

    Whose a key is, is told by the `writer` of its entry, and decided in the same commit as the write: `AccessDenied`.
    So are operations of an unknown kind.
    """
    mine = frozenset(map(check_whole_key, listed(owned)))

    def owning(operation: Operation[Any]) -> Flow[Any]:
        operation = plain(operation)
        if not isinstance(operation, Commit):
            return (yield operation)
        among = [write.key for write in operation.writes if write.key in mine and not isinstance(write, Check)]
        if not among:
            return (yield operation)
        for conflicts in count(1):
            there: Snapshot = yield Scan(keys=among)
            for key, entry in there.items():
                if entry.writer != agent:
                    raise AccessDenied("write what another owns:", key)
            try:
                return (yield Commit([_on_condition(write, among, there) for write in operation.writes]))
            except RevisionConflict as conflict:
                expected = [write.if_revision for write in operation.writes if write.key == conflict.key]
                if conflict.key not in among or conflict.expected in expected:
                    raise  # a condition of the caller's
            yield from backoff(conflicts)

    return owning


def _on_condition(write: Write, among: Iterable[str], there: Snapshot) -> Write:
    if isinstance(write, Check) or write.key not in among:
        return write
    seen = there[write.key].revision if write.key in there else 0
    if write.if_revision not in (None, seen):
        raise RevisionConflict(write.key, write.if_revision or 0, seen)
    return write._replace(if_revision=seen)
