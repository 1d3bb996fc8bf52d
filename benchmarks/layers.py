"""Rows: what middleware, hooks, handles, reducers and claims add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.floors import BASELINE
from benchmarks.model import Kind, Names, Row, Statement, Subject, more_sets
from benchmarks.ours import OURS
from stigmergy import (
    Hooks,
    MemoryStore,
    Operation,
    Store,
    acting_as,
    apply_middleware,
    claim,
    guarded,
    scoped,
    with_hooks,
    with_reducers,
)
from stigmergy.flow import Flow
from stigmergy.middleware import Middleware

__all__ = ["ROWS"]

_HOOKS = Hooks(before_get=lambda key: None, before_set=lambda key, value: None)
_DOES: dict[str, Statement] = {
    "get": "store.get('key')",
    "set": "store.set('key', i)",
    "merge": "store.set('key', 1)",
    "claim": "with claim(store, 'task', 'w', 60): pass",
    "by hand": "store.set('task', 'w', if_revision=0, ttl=60)\nstore.delete('task')",
}


def _through(operation: Operation[Any]) -> Flow[Any]:
    return (yield operation)


def _seen(title: str, made: Callable[[Store], Store], kind: Kind = "ours") -> Subject:
    @contextmanager
    def open_store() -> Iterator[Names]:
        with MemoryStore() as bare, made(bare) as store:
            store.set("key", 1)
            yield {"store": store, "claim": claim}

    return Subject(title, kind, open_store, _DOES)


def _behind(title: str, *middleware: Middleware, kind: Kind = "ours") -> Subject:
    return _seen(title, lambda store: apply_middleware(store, *middleware), kind)


def _compared(name: str, about: str, does: str, ours: Subject, base: Subject, budget: float | None = None) -> Row:
    """`budget` is what ours may add to `base`, in baseline sets."""
    found = {"ours": ours.contender(does), base.title: base.contender(does)}
    if budget is None:
        return Row(name, about, found, base.title)
    return Row(name, about, found | BASELINE, base.title, more_sets(budget, base.title))


def _row(name: str, about: str, does: str, base: Subject, budget: float | None, *middleware: Middleware) -> Row:
    return _compared(name, about, does, _behind("ours", *middleware), base, budget)


def _handle(name: str, does: str, made: Callable[[Store], Store]) -> Row:
    return _compared(f"{does} {name}", "next to one layer that passes everything on", does, _seen("ours", made), _ONE)


_BARE = Subject("without", "floor", OURS.open, _DOES)
_ONE = _behind("one layer", _through, kind="floor")
_PLAIN = Subject("update", "floor", OURS.open, {"merge": "store.update('key', add_one)"})
_HAND = _seen("by hand", lambda store: store, "floor")

ROWS = (
    _row("get through middleware", "one layer that passes everything on", "get", _BARE, None, _through),
    _row("get through a second layer", "two layers", "get", _ONE, None, _through, _through),
    _row("set through middleware", "one layer that passes everything on", "set", _BARE, 9, _through),
    _row("set through a second layer", "two layers", "set", _ONE, 9, _through, _through),
    _row("get with hooks", "before_get, which does nothing", "get", _BARE, 8, with_hooks(_HOOKS)),
    _row("set with hooks", "before_set, which does nothing", "set", _BARE, 12, with_hooks(_HOOKS)),
    _handle("in a scope", "get", lambda store: scoped(store, "agent/planner")),
    _handle("in a scope", "set", lambda store: scoped(store, "agent/planner")),
    _handle("with an identity", "set", lambda store: acting_as(store, "w")),
    _handle("under a guard", "get", lambda store: guarded(store, writer="w", read=["key"], write=["key"])),
    _handle("under a guard", "set", lambda store: guarded(store, writer="w", read=["key"], write=["key"])),
    _compared(
        "merge", "a set that adds", "merge", _behind("ours", with_reducers({"key": lambda old, new: old + new})), _PLAIN
    ),
    Row(
        "claim",
        "taken and released; by hand: without a watch, a thread that renews, a token",
        {"ours": _HAND.contender("claim", "ours"), "by hand": _HAND.contender("by hand")},
        base="by hand",
    ),
)
