"""Rules and a log around a store: hooks for the simple cases, a middleware where logic is needed, both colours."""

import asyncio
from typing import Any

from stigmergy import (
    AccessDenied,
    Commit,
    Flow,
    Hooks,
    MemoryStore,
    Middleware,
    Operation,
    Store,
    apply_middleware,
    with_hooks,
)


def only_numbers(key: str, value: object) -> None:
    """A hook: refuse a write before anything has happened, by raising."""
    if key.startswith("budget/") and not isinstance(value, int):
        raise ValueError(f"{key} takes numbers")


def read_only(operation: Operation[Any]) -> Flow[Any]:
    """A middleware: look at an operation, and let it through by yielding it. A guard refuses what it does not want."""
    for write in operation.writes if isinstance(operation, Commit) else ():
        if write.key.startswith("config/"):
            raise AccessDenied("write", write.key)
    return (yield operation)


def log_to(lines: list[str]) -> Middleware:
    """A middleware with something of its own is made by a function."""

    def log(operation: Operation[Any]) -> Flow[Any]:
        try:
            result = yield operation
        except Exception as error:
            lines.append(f"{operation.name}: {type(error).__name__}")
            raise
        lines.append(operation.name)
        return result

    return log


def main() -> None:
    bare = MemoryStore()
    bare.set("config/model", "large")
    lines: list[str] = []
    store = apply_middleware(bare, log_to(lines), read_only, with_hooks(Hooks(before_set=only_numbers)))

    store.set("budget/tokens", 1000)
    store.update("budget/tokens", lambda left: left - 512)
    for key, value in ("budget/tokens", "a lot"), ("config/model", "small"):
        try:
            store.set(key, value)
        except (AccessDenied, ValueError) as error:
            print("refused:", error)
    asyncio.run(in_the_other_colour(store))
    print("log:", ", ".join(lines))


async def in_the_other_colour(store: Store) -> None:
    """The async face of the store passes through the same chain."""
    print("left:", await store.aio.get("budget/tokens"))


if __name__ == "__main__":
    main()
