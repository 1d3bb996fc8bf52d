"""Rows: what middleware and hooks add."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.model import Kind, Names, Row, Statement, Subject, more
from benchmarks.ours import OURS
from stigmergy import Hooks, MemoryStore, Operation, apply_middleware, with_hooks
from stigmergy.flow import Flow
from stigmergy.middleware import Middleware

__all__ = ["ROWS"]

_HOOKS = Hooks(before_get=lambda key: None, before_set=lambda key, value: None)
_DOES: dict[str, Statement] = {"get": "store.get('key')", "set": "store.set('key', i)"}


def _through(operation: Operation[Any]) -> Flow[Any]:
    return (yield operation)


def _behind(title: str, *middleware: Middleware, kind: Kind = "ours") -> Subject:
    @contextmanager
    def open_store() -> Iterator[Names]:
        with apply_middleware(MemoryStore(), *middleware) as store:
            store.set("key", 1)
            yield {"store": store}

    return Subject(title, kind, open_store, _DOES)


def _row(name: str, about: str, does: str, base: Subject, budget: float | None, *middleware: Middleware) -> Row:
    found = {"ours": _behind("ours", *middleware).contender(does), base.title: base.contender(does)}
    limit = None if budget is None else more(budget * 1e-6, base.title, f"{budget:g} us")
    return Row(name, about, found, base.title, limit)


_BARE = Subject("without", "floor", OURS.open, _DOES)
_ONE = _behind("one layer", _through, kind="floor")

ROWS = (
    _row("get through middleware", "one layer that passes everything on", "get", _BARE, 0.8, _through),
    _row("get through a second layer", "two layers", "get", _ONE, 0.6, _through, _through),
    _row("set through middleware", "one layer that passes everything on", "set", _BARE, 1.5, _through),
    _row("set through a second layer", "two layers", "set", _ONE, 0.6, _through, _through),
    _row("get with hooks", "before_get, which does nothing", "get", _BARE, None, with_hooks(_HOOKS)),
    _row("set with hooks", "before_set, which does nothing", "set", _BARE, 2.0, with_hooks(_HOOKS)),
)
