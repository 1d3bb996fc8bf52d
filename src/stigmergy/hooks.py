"""Hooks: plain functions around reads and writes, as one middleware."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeAlias

from stigmergy.errors import RevisionConflict
from stigmergy.flow import Call, Commit, Flow, GetEntry, OpenWatch, Operation, Scan
from stigmergy.middleware import Middleware
from stigmergy.model import Delete, Entry, Set

__all__ = ["Hook", "Hooks", "compose_hooks", "with_hooks"]

Hook: TypeAlias = Callable[..., Any]

_MOMENTS = ("before_get", "after_get", "before_set", "after_set", "on_delete", "on_scan", "on_watch", "on_error")


class Hooks:
    """What to call, when. Each is a function, or a tuple of functions that are called in order.

    - `before_get(key)`, `before_set(key, value)`, `on_delete(key)`, `on_scan(scan: Scan)` and
      `on_watch(request: OpenWatch)` are called before anything has happened, and abort the operation by raising.
    - `after_get(key, value, error)` and `after_set(key, value, error)` observe an operation that was attempted. What
      they raise is logged: a write that happened is no failure.
    - `on_error(error)` sees every `Exception` that the operation is about to raise, and may return another one to raise
      in its place. It cannot make a failure look like a success, and it cannot replace a `RevisionConflict`, on which
      retries depend. An async one is not called for a `watch()` that fails.

    They fire for `set`, `delete`, `commit`, conditional writes and every attempt of `update` alike: once for each write
    of a commit, all those before it first. Expiry fires none. On an async store all may be async but `on_watch`, since
    `watch()` returns at once; an async hook on a sync store is a `TypeError` before anything has happened.
    """

    __slots__ = _MOMENTS

    def __init__(
        self,
        *,
        before_get: Hook | tuple[Hook, ...] | None = None,
        after_get: Hook | tuple[Hook, ...] | None = None,
        before_set: Hook | tuple[Hook, ...] | None = None,
        after_set: Hook | tuple[Hook, ...] | None = None,
        on_delete: Hook | tuple[Hook, ...] | None = None,
        on_scan: Hook | tuple[Hook, ...] | None = None,
        on_watch: Hook | tuple[Hook, ...] | None = None,
        on_error: Hook | tuple[Hook, ...] | None = None,
    ) -> None:
        self.before_get = _functions(before_get)
        self.after_get = _functions(after_get)
        self.before_set = _functions(before_set)
        self.after_set = _functions(after_set)
        self.on_delete = _functions(on_delete)
        self.on_scan = _functions(on_scan)
        self.on_watch = _functions(on_watch)
        self.on_error = _functions(on_error)
        if any(map(_is_async, self.on_watch)):
            raise TypeError("on_watch must be a plain function: watch() returns at once")


def compose_hooks(*hooks: Hooks) -> Hooks:
    """Return one `Hooks` that calls those of all, in order; the first that raises stops the chain."""
    return Hooks(**{moment: sum((getattr(each, moment) for each in hooks), ()) for moment in _MOMENTS})


def with_hooks(hooks: Hooks) -> Middleware:
    """Return a middleware that calls `hooks`, for `apply_middleware`."""
    functions = [hook for moment in _MOMENTS for hook in getattr(hooks, moment)]
    in_need_of_await = [_stand_in(hook) for hook in functions if _is_async(hook)]

    def call_hooks(operation: Operation[Any]) -> Flow[Any]:
        at_once = isinstance(operation, OpenWatch)
        for stand_in in () if at_once else in_need_of_await:
            yield from Call(stand_in)
        try:
            return (yield from _around(hooks, operation))
        except Exception as error:
            handlers = [hook for hook in hooks.on_error if not (at_once and _is_async(hook))]
            raised = yield from _on_error(handlers, error)
            if raised is error:
                raise
            try:
                raise raised from error
            finally:
                del raised  # it holds this frame

    return call_hooks


def _around(hooks: Hooks, operation: Operation[Any]) -> Flow[Any]:
    if isinstance(operation, GetEntry):
        return (yield from _around_get(hooks, operation))
    if isinstance(operation, Commit):
        return (yield from _around_commit(hooks, operation))
    if isinstance(operation, Scan):
        yield from _calls(hooks.on_scan, operation)
    elif isinstance(operation, OpenWatch):
        yield from _calls(hooks.on_watch, operation)
    return (yield operation)


def _around_get(hooks: Hooks, operation: GetEntry) -> Flow[Entry | None]:
    yield from _calls(hooks.before_get, operation.key)
    try:
        entry = yield from operation
    except Exception as error:
        yield from _observe(hooks.after_get, operation.key, None, error)
        raise
    yield from _observe(hooks.after_get, operation.key, None if entry is None else entry.value, None)
    return entry


def _around_commit(hooks: Hooks, operation: Commit) -> Flow[tuple[int | None, ...]]:
    for write in operation.writes:
        if isinstance(write, Set):
            yield from _calls(hooks.before_set, write.key, write.value)
        elif isinstance(write, Delete):
            yield from _calls(hooks.on_delete, write.key)
    if not hooks.after_set:
        return (yield operation)  # type: ignore[no-any-return]
    sets = [write for write in operation.writes if isinstance(write, Set)]
    try:
        revisions = yield from operation
    except Exception as error:
        for write in sets:
            yield from _observe(hooks.after_set, write.key, write.value, error)
        raise
    for write in sets:
        yield from _observe(hooks.after_set, write.key, write.value, None)
    return revisions


def _calls(hooks: tuple[Hook, ...], *args: Any) -> Flow[None]:
    for hook in hooks:
        yield from Call(hook, *args)


def _observe(hooks: tuple[Hook, ...], *args: Any) -> Flow[None]:
    """Call what only observes: an operation that happened is not made a failure by it."""
    try:
        yield from _calls(hooks, *args)
    except Exception:
        _log("a hook that observes %r failed", args[0])


def _on_error(hooks: Iterable[Hook], error: Exception) -> Flow[Exception]:
    """Return the error to raise."""
    for hook in hooks:
        try:
            other = yield from Call(hook, error)
        except Exception:
            _log("on_error failed, and changes nothing")
            return error
        if isinstance(other, Exception) and not isinstance(error, RevisionConflict):
            error = other
    return error


def _log(message: str, *args: object) -> None:
    import logging  # takes as long as a third of the package

    logging.getLogger("stigmergy").exception(message, *args)


def _stand_in(hook: Hook) -> Hook:
    """Does nothing, but needs to be awaited: where that cannot be done, it fails in place of `hook`, in time."""

    @wraps(hook)
    async def stand_in() -> None:
        pass

    return stand_in


def _is_async(hook: Hook) -> bool:
    from inspect import iscoroutinefunction  # takes long to import, and not everybody has hooks

    return iscoroutinefunction(hook) or iscoroutinefunction(getattr(hook, "__call__", None))  # noqa: B004


def _functions(hook: Hook | tuple[Hook, ...] | None) -> tuple[Hook, ...]:
    functions = hook if isinstance(hook, tuple) else () if hook is None else (hook,)
    for function in functions:
        if not callable(function):
            raise TypeError(f"a hook is a function, not a {type(function).__name__}")
    return functions
