"""Threads for what an async face does by blocking.

Those of asyncio itself belong to the program: while its own jobs keep them busy, a model that is asked, say, nothing
else there would come to its turn, not even the renewal of a claim. And like those of every `ThreadPoolExecutor` they
take no more work once the main thread has ended, though other threads, and their loops, go on.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

__all__ = ["Threads"]

T = TypeVar("T")

_MOST = 32
"""Of one store. Calls beyond wait their turn."""


class Threads:
    """The threads of one store, for all event loops. They start when they are needed."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}
        """By process: a child that was forked has none of its parent's threads."""
        self._closed = False

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Return `function(*args)`, called in a thread, in this context. Cancelled, it lets that go on."""
        from asyncio import wrap_future

        done: Future[T] = Future()
        _going.add(done)
        try:
            self._pool().submit(partial(_perform, done, partial(copy_context().run, function, *args)))
        except BaseException:  # there are no more threads, or a signal handler raised
            _going.discard(done)
            raise
        return await wrap_future(done)

    def close(self) -> None:
        """Let the threads end when they have nothing more to do. Waits for none."""
        self._closed = True
        self._pools.clear()

    def _pool(self) -> _Pool:
        if self._closed:
            return _Pool()  # for a call that comes too late, and ends with it
        process = os.getpid()
        pool = self._pools.get(process)
        return self._pools.setdefault(process, _Pool()) if pool is None else pool


class _Pool:
    """Threads that take calls from one queue. They end, all calls done, when nobody holds the pool any more."""

    def __init__(self) -> None:
        self._crew = _Crew()

    def __del__(self) -> None:
        self._crew.calls.put(None)

    def submit(self, call: Callable[[], Callable[[], None]]) -> None:
        self._crew.submit(call)


class _Crew:
    """What the threads of a pool know of it."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], Callable[[], None]] | None] = SimpleQueue()
        """Each does what is asked, and returns how to tell of it."""
        self._lock = Lock()
        self._started = 0
        self._free = 0
        """Threads that wait for a call, less the calls that wait for a thread."""

    def submit(self, call: Callable[[], Callable[[], None]]) -> None:
        with self._lock:
            short = self._free <= 0 and self._started < _MOST
            self._started += short
            self._free -= not short
        if short:
            try:
                Thread(target=self._work, name="stigmergy", daemon=True).start()
            except RuntimeError:  # no more threads; or CPython 3.12.1, where the main thread has ended
                with self._lock:
                    self._started -= 1
                    if not self._started:
                        raise
                    self._free -= 1
        self.calls.put(call)

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            tell = call()
            with self._lock:
                self._free += 1  # before anybody is told, who may call again at once
            tell()
            del call, tell
        self.calls.put(None)


_going: set[Future[Any]] = set()
"""What was asked for and is not done. A program ends when it is, writes included, though nobody waits for them."""
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_going.clear)
atexit.register(lambda: wait(list(_going)))


def _perform(done: Future[T], call: Callable[[], T]) -> Callable[[], None]:
    answer: Callable[[], None]
    try:
        answer = partial(done.set_result, call())
    except BaseException as error:
        answer = partial(done.set_exception, error)
    try:
        return partial(_tell, done, answer)
    finally:
        del done, call, answer  # the error holds this frame


def _tell(done: Future[Any], answer: Callable[[], None]) -> None:
    """Answer, if somebody still wants to know."""
    try:
        if done.set_running_or_notify_cancel():
            answer()
    finally:
        _going.discard(done)
