"""Threads for what an async face does by blocking.

Those of asyncio itself belong to the program: while its own jobs keep them busy, a model that is asked, say, nothing
else there would come to its turn, not even the renewal of a claim.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from os import getpid
from typing import TypeVar

__all__ = ["Threads"]

T = TypeVar("T")

_MOST = 32
"""Of one store. Calls beyond wait their turn."""


class Threads:
    """The threads of one store, for all event loops. They start when they are needed."""

    def __init__(self) -> None:
        self._pools: dict[int, ThreadPoolExecutor] = {}
        """By process: a child that was forked has none of its parent's threads."""
        self._closed = False

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Return `function(*args)`, called in a thread, in this context. Cancelled, it lets that go on."""
        from asyncio import get_running_loop

        call = partial(copy_context().run, function, *args)
        return await get_running_loop().run_in_executor(self._pool(), call)

    def close(self) -> None:
        """Let the threads end when they have nothing more to do. Waits for none."""
        self._closed = True
        self._pools.clear()  # a pool that nobody holds ends; one that is shut down refuses who is about to call

    def _pool(self) -> ThreadPoolExecutor:
        if self._closed:
            return ThreadPoolExecutor(1, "stigmergy")  # for a call that comes too late, and ends with it
        process = getpid()
        pool = self._pools.get(process)
        return self._pools.setdefault(process, ThreadPoolExecutor(_MOST, "stigmergy")) if pool is None else pool
