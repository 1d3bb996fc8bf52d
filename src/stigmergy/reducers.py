"""Reducers: keys whose values are merged instead of replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, TypeAlias

from stigmergy.errors import RevisionConflict
from stigmergy.flow import Call, Commit, Flow, Operation, Scan, backoff
from stigmergy.keys import check_whole_key
from stigmergy.middleware import Middleware
from stigmergy.model import Set, Snapshot, Write

__all__ = ["Reducer", "with_reducers"]

Reducer: TypeAlias = Callable[[Any, Any], Any]
"""Makes one value of the old and the new one. Pure: it may be called again for the same write."""


def with_reducers(reducers: Mapping[str, Reducer], default: Reducer | None = None) -> Middleware:
    """Return a middleware that merges what is set at the keys of `reducers` with what is there.

    An unconditional set, in a commit or alone, writes `reducer(old, new)`, atomically: of many at once none is lost.
    Where the key is absent `new` is written as it is. The ttl is that of the set (`ttl="keep"`: what it was). A
    conditional set replaces, since whoever makes one has seen the old value; so `update` does not merge twice.
    `default` is the reducer of all other keys (`None`: they are replaced). Keys are whole: one that ends in `:`, as the
    prefix of a grant does, is `InvalidKey`.

    A reducer runs outside every lock, again after a conflict, and on an async store it may be async. What it raises,
    the write raises, and nothing was changed. The layer sees keys as the handle has them that it is applied to.
    """
    merges = {check_whole_key(key): _callable(reducer) for key, reducer in reducers.items()}
    if default is not None:
        _callable(default)

    def reduce(operation: Operation[Any]) -> Flow[Any]:
        if not isinstance(operation, Commit):
            return (yield operation)
        by_key = {
            write.key: reducer
            for write in operation.writes
            if isinstance(write, Set) and write.if_revision is None
            for reducer in [merges.get(write.key, default)]
            if reducer is not None
        }
        if not by_key:
            return (yield operation)
        for conflicts in count(1):
            there: Snapshot = yield Scan(keys=by_key)
            writes: list[Write] = []
            for write in operation.writes:
                if isinstance(write, Set) and write.key in by_key:
                    writes.append((yield from _merged(write, by_key[write.key], there)))
                else:
                    writes.append(write)
            try:
                return (yield Commit(writes))
            except RevisionConflict as conflict:
                if conflict.key not in by_key or conflict.expected != _revision(there, conflict.key):
                    raise  # a condition of the caller's
            yield from backoff(conflicts)

    return reduce


def _merged(write: Set, reducer: Reducer, there: Snapshot) -> Flow[Set]:
    entry = there.get(write.key)
    if entry is None:
        return write._replace(if_revision=0)
    value = yield from Call(reducer, entry.value, write.value)
    return write._replace(value=value, if_revision=entry.revision)


def _revision(there: Snapshot, key: str) -> int:
    return there[key].revision if key in there else 0


def _callable(reducer: Reducer) -> Reducer:
    if not callable(reducer):
        raise TypeError(f"a reducer is a function, not a {type(reducer).__name__}")
    return reducer
