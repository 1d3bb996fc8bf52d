"""An event loop with a seed and virtual time: races of tasks are found in milliseconds, and found again.

    async def main() -> None:
        store = MemoryStore(clock=asyncio.get_running_loop().time)
        ...

    for seed in range(2000):
        run_seeded(main, seed)

A plain loop runs what is ready in the order in which it became so, and most races need another one. This loop draws
the order from its seed. Each step takes a little of its virtual time, as in life: time that only jumps hides races.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from heapq import heappop
from pathlib import PurePath
from random import Random
from typing import Any, NoReturn, TypeVar

__all__ = ["LeftBehind", "SeededLoop", "Stuck", "run_seeded"]

T = TypeVar("T")

_LONGEST_STEP = 0.002


class Stuck(AssertionError):
    """Nothing can ever run again. Says which tasks wait, and where; of values it says nothing."""


class LeftBehind(AssertionError):
    """A program came to its end with tasks that still wait, or with failures that nobody was told of."""


class SeededLoop(asyncio.BaseEventLoop):
    """Runs what is ready in an order drawn from `seed`. It never really waits: if nothing is ready, it is later.

    `time` may be the clock of a store, whose ttls then pass as the timers of this loop do. There are no threads,
    sockets and processes here; a store's own timer is a thread, so let something call the store once ttls are over.
    """

    _ready: deque[asyncio.Handle]
    _scheduled: list[Any]
    _stopping: bool

    def __init__(self, seed: int | str) -> None:
        super().__init__()
        self._draw = Random(seed).random
        self._now = 0.0
        self._tasks: list[asyncio.Task[Any]] = []  # asyncio itself forgets tasks that nobody holds

    def time(self) -> float:
        """Virtual seconds since this loop was made."""
        return self._now

    def waiting(self) -> list[str]:
        """The tasks that have not ended, and where they are, each as one line."""
        return [f"{task.get_name()}: {' > '.join(_frames(task.get_coro()))}" for task in self._tasks if not task.done()]

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = super().create_task(coro, **options)
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: object, func: object, *args: object) -> NoReturn:
        """Refuse: there are no threads."""
        raise NotImplementedError("a seeded loop has no threads")

    def close(self) -> None:
        super().close()
        self._tasks.clear()

    def _run_once(self) -> None:
        """One step."""
        while not self._become_ready():
            if self._scheduled:
                self._now = self._scheduled[0]._when
            elif self._stopping:
                return
            else:
                raise Stuck("\n".join(["nothing can run:", *self.waiting()]))
        chosen = int(self._draw() * len(self._ready))
        handle = self._ready[chosen]
        del self._ready[chosen]
        self._now += self._draw() * _LONGEST_STEP
        if not handle.cancelled():
            handle._run()

    def _become_ready(self) -> bool:
        """Let the timers that are due be ready; return whether anything is."""
        scheduled = self._scheduled
        while scheduled and (scheduled[0]._when <= self._now or scheduled[0].cancelled()):
            handle = heappop(scheduled)
            handle._scheduled = False
            if not handle.cancelled():
                self._ready.append(handle)
        return bool(self._ready)

    def _write_to_self(self) -> None:
        """What `call_soon_threadsafe` does to wake a loop that sleeps; this one never does."""


def run_seeded(main: Callable[[], Coroutine[Any, Any, T]], seed: int | str) -> T:
    """Return the result of `main()`, run on a `SeededLoop`; whatever is raised says the seed.

    Raises `Stuck`; `LeftBehind` where `main` returned while tasks that it started still waited, or where a task or
    a callback failed and nobody was told. All tasks have ended, and the loop is closed, when this returns.
    """
    loop = SeededLoop(seed)
    untold: list[str] = []
    loop.set_exception_handler(lambda _, context: untold.append(f"{context['message']}: {context.get('exception')!r}"))
    try:
        result = loop.run_until_complete(main())
        left = [*loop.waiting(), *_failures(loop._tasks), *untold]
        if left:
            raise LeftBehind("\n".join(["left behind:", *left]))
        return result
    except BaseException as error:
        error.add_note(f"seed: {seed!r}")
        raise
    finally:
        _end(loop)


def _end(loop: SeededLoop) -> None:
    pending = [task for task in loop._tasks if not task.done()]
    for task in pending:
        task.cancel()
    with suppress(Stuck):
        loop.run_until_complete(_ended(pending))
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _failures(tasks: Sequence[Any]) -> Iterator[str]:
    """The tasks that failed, and nobody asked for their result."""
    for task in tasks:
        if task.done() and task._log_traceback:
            yield f"{task.get_name()} failed: {task.exception()!r}"


def _frames(waiting: Any) -> Iterator[str]:
    """Where a coroutine is, and what it awaits, and so on."""
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is not None:
            yield f"{frame.f_code.co_name} ({PurePath(frame.f_code.co_filename).name}:{frame.f_lineno})"
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
