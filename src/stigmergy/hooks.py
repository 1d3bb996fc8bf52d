"""Hooks: plain functions around reads and writes, as one middleware."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from stigmergy.errors import RevisionConflict
from stigmergy.flow import Call, Commit, Flow, GetEntry, OpenWatch, Operation, Scan, Step, async_on_sync, discard
from stigmergy.middleware import Middleware
from stigmergy.model import Delete, Set

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
      retries depend.

    They fire for `set`, `delete`, `commit`, conditional writes and every attempt of `update` alike: once for each write
    of a commit, all those before it first. Expiry fires none. On an async store all may be async; an async hook on a
    sync store is a `TypeError` before anything has happened.
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


def compose_hooks(*hooks: Hooks) -> Hooks:
    """Return one `Hooks` that calls those of all, in order; the first that raises stops the chain."""
    return Hooks(**{moment: sum((getattr(each, moment) for each in hooks), ()) for moment in _MOMENTS})


def with_hooks(hooks: Hooks) -> Middleware:
    """Return a middleware that calls `hooks`, for `apply_middleware`."""
    functions = [hook for moment in _MOMENTS for hook in getattr(hooks, moment)]
    first_async = next((_Await(hook, None) for hook in functions if _is_async(hook)), None)
    observes = bool(hooks.after_get or hooks.after_set)

    # Plain functions are called right here: a step or a generator for each took longer than the write that it is about
    # (benchmark: set with hooks).
    def call_hooks(operation: Operation[Any]) -> Flow[Any]:
        if first_async is not None:
            yield first_async
        attempted = False
        try:
            for before, args in _before(hooks, operation):
                for hook in before:
                    if (given := hook(*args)) is not None:
                        yield from _given(hook, given)
            attempted = True
            result = yield operation
        except Exception as error:
            if attempted:
                yield from _observe(hooks, operation, None, error)
            raised = yield from _on_error(hooks.on_error, error)
            if raised is error:
                raise
            try:
                raise raised from error
            finally:
                del raised  # it holds this frame
        if observes:
            yield from _observe(hooks, operation, result, None)
        return result

    return call_hooks


def _before(hooks: Hooks, operation: Operation[Any]) -> list[tuple[tuple[Hook, ...], tuple[Any, ...]]]:
    """Whom to call before `operation`, each with what."""
    if isinstance(operation, GetEntry):
        return [(hooks.before_get, (operation.key,))]
    if isinstance(operation, Commit):
        asked: list[tuple[tuple[Hook, ...], tuple[Any, ...]]] = []
        for write in operation.writes:
            if isinstance(write, Set):
                asked.append((hooks.before_set, (write.key, write.value)))
            elif isinstance(write, Delete):
                asked.append((hooks.on_delete, (write.key,)))
        return asked
    if isinstance(operation, Scan):
        return [(hooks.on_scan, (operation,))]
    if isinstance(operation, OpenWatch):
        return [(hooks.on_watch, (operation,))]
    return []


def _observe(hooks: Hooks, operation: Operation[Any], result: Any, error: Exception | None) -> Flow[None]:
    """Call what only observes: an operation that happened is not made a failure by it."""
    observers: tuple[Hook, ...] = ()
    seen: list[tuple[str, Any]] = []
    if isinstance(operation, GetEntry):
        observers, seen = hooks.after_get, [(operation.key, None if result is None else result.value)]
    elif isinstance(operation, Commit):
        observers = hooks.after_set
        seen = [(write.key, write.value) for write in operation.writes if isinstance(write, Set)]
    for key, value in seen:
        try:
            for hook in observers:
                if (given := hook(key, value, error)) is not None:
                    yield from _given(hook, given)
        except Exception:
            _log("a hook that observes %r failed", key)


def _given(hook: Hook, given: Any) -> Flow[None]:
    """Await what `hook` has returned, if that is to be awaited."""
    if hasattr(type(given), "__await__"):
        yield _Await(hook, given)


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


class _Await(Step[None]):
    """Await what `hook` has returned, if anything. On a sync store that is a `TypeError`: `hook` is async."""

    __slots__ = ("given", "hook")
    hook: Hook
    given: Any

    def __init__(self, hook: Hook, given: Any) -> None:
        object.__setattr__(self, "hook", hook)
        object.__setattr__(self, "given", given)

    def do(self) -> None:
        discard(self.given)
        raise async_on_sync(self.hook)

    async def ado(self) -> None:
        if self.given is not None:
            await self.given


def _is_async(hook: Hook) -> bool:
    from inspect import iscoroutinefunction  # takes long to import, and not everybody has hooks

    return iscoroutinefunction(hook) or iscoroutinefunction(getattr(hook, "__call__", None))  # noqa: B004


def _functions(hook: Hook | tuple[Hook, ...] | None) -> tuple[Hook, ...]:
    functions = hook if isinstance(hook, tuple) else () if hook is None else (hook,)
    for function in functions:
        if not callable(function):
            raise TypeError(f"a hook is a function, not a {type(function).__name__}")
    return functions
