"""Rows: how long a write is on its way to somebody who waits for it: task to task, thread to thread, loop to thread."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib import import_module
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

from benchmarks.measure import Effort, Run
from benchmarks.model import Contender, Kind, Row, times
from stigmergy import MemoryStore

__all__ = ["ROWS"]


class Line(NamedTuple):
    """A way from one end to another; which end awaits depends on the row."""

    send: Callable[[Any], Any]
    receive: Callable[[], Any]


OpenLine: TypeAlias = Callable[[ExitStack], Line]
Lines: TypeAlias = dict[str, tuple[Kind, OpenLine, OpenLine]]
"""By contender: what it is, a line there, and a line back."""
Start: TypeAlias = Callable[[Effort], AbstractContextManager[Run]]


# -- lines -------------------------------------------------------------------------------------------------------------


def _ours(*, sender_awaits: bool, receiver_awaits: bool) -> OpenLine:
    def open_line(after: ExitStack) -> Line:
        store = after.enter_context(MemoryStore())
        watch = store.watch("key")
        send = store.aio.set if sender_awaits else store.set
        return Line(partial(send, "key"), watch.__anext__ if receiver_awaits else watch.__next__)

    return open_line


def _simple_queue(after: ExitStack) -> Line:
    line: queue.SimpleQueue[Any] = queue.SimpleQueue()
    return Line(line.put, line.get)


def _asyncio_queue(after: ExitStack) -> Line:
    line: asyncio.Queue[Any] = asyncio.Queue()
    return Line(line.put, line.get)


def _plain_way_there(after: ExitStack) -> Line:
    put, get = _simple_queue(after)

    async def send(item: Any) -> None:
        put(item)

    return Line(send, get)


def _plain_way_back(after: ExitStack) -> Line:
    line: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    return Line(lambda item: loop.call_soon_threadsafe(line.put_nowait, item), line.get)


def _mixed(module: str, sending: str, receiving: str) -> OpenLine:
    """A line of `module`, whose queue has two faces, `sync_q` and `async_q`."""

    def open_line(after: ExitStack) -> Line:
        line = import_module(module).Queue()
        return Line(getattr(line, sending).put, getattr(line, receiving).get)

    return open_line


# -- there and back ----------------------------------------------------------------------------------------------------


async def _opened(after: ExitStack, there: OpenLine, back: OpenLine) -> tuple[Line, Line]:
    """Both lines, opened in the loop that uses them."""
    return there(after), back(after)


@contextmanager
def _answering(receive: Callable[[], Any], send: Callable[[Any], Any], stop: Callable[[], Any]) -> Iterator[None]:
    """A thread that answers whatever it receives, until it is stopped and receives something more."""
    stopped = False

    def answer() -> None:
        while receive() is not None and not stopped:
            send(0)

    thread = Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped = True
        stop()
        thread.join(10)


def _between_threads(there: OpenLine, back: OpenLine) -> Start:
    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        with ExitStack() as after:
            (send, heard), (answer, receive) = there(after), back(after)

            def run(times: int) -> list[float]:
                samples = []
                for i in range(times):
                    started = perf_counter()
                    send(i)
                    receive()
                    samples.append((perf_counter() - started) / 2)
                return samples

            with _answering(heard, answer, partial(send, -1)):
                yield run

    return start


async def _round_trips(send: Callable[[Any], Any], receive: Callable[[], Any], times: int) -> list[float]:
    samples = []
    for i in range(times):
        started = perf_counter()
        await send(i)
        await receive()
        samples.append((perf_counter() - started) / 2)
    return samples


def _between_tasks(there: OpenLine, back: OpenLine) -> Start:
    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        with ExitStack() as after, asyncio.Runner() as runner:
            (send, heard), (answer, receive) = runner.run(_opened(after, there, back))

            async def answer_all() -> None:
                while True:
                    await heard()
                    await answer(0)

            async def session(times: int) -> list[float]:
                answering = asyncio.create_task(answer_all())
                try:
                    return await _round_trips(send, receive, times)
                finally:
                    answering.cancel()
                    await asyncio.wait([answering])

            yield lambda times: runner.run(session(times))

    return start


def _between_loop_and_thread(there: OpenLine, back: OpenLine) -> Start:
    @contextmanager
    def start(effort: Effort) -> Iterator[Run]:
        with ExitStack() as after, asyncio.Runner() as runner:
            (send, heard), (answer, receive) = runner.run(_opened(after, there, back))
            with _answering(heard, answer, lambda: runner.run(send(-1))):
                yield lambda times: runner.run(_round_trips(send, receive, times))

    return start


# -- rows --------------------------------------------------------------------------------------------------------------


def _row(
    name: str,
    about: str,
    start: Callable[[OpenLine, OpenLine], Any],
    lines: Lines,
    base: str,
    limit: float | None,
) -> Row:
    found = {title: Contender(kind, start(there, back)) for title, (kind, there, back) in lines.items()}
    return Row(name, about, found, base, None if limit is None else times(limit, base))


def _queue_peers(sending: str, receiving: str) -> Lines:
    return {
        module: ("queue", _mixed(module, sending, receiving), _mixed(module, receiving, sending))
        for module in ("culsans", "janus")
    }


_OUR_TASKS = _ours(sender_awaits=True, receiver_awaits=True)
_OUR_THREADS = _ours(sender_awaits=False, receiver_awaits=False)
_OUR_WAY_THERE = _ours(sender_awaits=True, receiver_awaits=False)
_OUR_WAY_BACK = _ours(sender_awaits=False, receiver_awaits=True)

ROWS = (
    _row(
        "task to task",
        "from `await set` in one task to `async for` in another: half of there and back",
        _between_tasks,
        {
            "ours": ("ours", _OUR_TASKS, _OUR_TASKS),
            "asyncio.Queue": ("floor", _asyncio_queue, _asyncio_queue),
            **_queue_peers("async_q", "async_q"),
        },
        "asyncio.Queue",
        3.0,
    ),
    _row(
        "thread to thread",
        "from set in one thread to `for` in another: half of there and back",
        _between_threads,
        {
            "ours": ("ours", _OUR_THREADS, _OUR_THREADS),
            "SimpleQueue": ("floor", _simple_queue, _simple_queue),
            **_queue_peers("sync_q", "sync_q"),
        },
        "SimpleQueue",
        1.4,
    ),
    _row(
        "loop to thread and back",
        "from a task to a thread, and from the thread to the task: half of both",
        _between_loop_and_thread,
        {
            "ours": ("ours", _OUR_WAY_THERE, _OUR_WAY_BACK),
            "by hand": ("floor", _plain_way_there, _plain_way_back),
            **_queue_peers("async_q", "sync_q"),
        },
        "by hand",
        None,
    ),
)
