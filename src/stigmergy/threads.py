"""Threads for what an async interface does by blocking.

Those of asyncio itself belong to the program: while its own jobs keep them busy, a model that is asked, say, nothing
else there would come to its turn, not even the renewal of a claim. A `ThreadPoolExecutor` takes no more work once the
main thread has ended, so claims that other threads hold would stay taken; and where no thread can be started, its
`submit` raises though the call is made later all the same.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from stigmergy._core.fork import after_fork_in_child
from stigmergy._core.helpers import start_helper
from stigmergy.errors import StoreClosed

if TYPE_CHECKING:
    from stigmergy.flow import OpenWatch
    from stigmergy.store import Store
    from stigmergy.watch import Watch

__all__ = ["Threads"]

T = TypeVar("T")

_MOST = 32
"""Of one store. Calls beyond wait their turn."""


class Threads:
    """The threads of one store, for all event loops. They start when they are needed."""

    def __init__(self) -> None:
        self._pool: _Pool | None = _Pool()
        after_fork_in_child(self, Threads._begin_in_child)

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Return `function(*args)`, called in a thread, in this context. Cancelled, it lets that go on."""
        from asyncio import wrap_future

        done: Future[T] = Future()
        pool = self._pool or _Pool()  # one for a call that comes too late, and ends with it
        pool.submit(done, partial(copy_context().run, function, *args))
        del pool
        return await wrap_future(done)

    async def open_watch(self, store: Store, request: OpenWatch) -> Watch:
        """Same as `call(store.open_watch, request)`. Cancelled, it has nothing opened, or closed as soon as it is."""
        opened: list[Watch] = []
        is_wanted = True

        def open_in_thread() -> Watch:
            if not is_wanted:
                raise StoreClosed  # which reaches no caller
            opened.append(store.open_watch(request))
            if not is_wanted:
                opened[0].close()
            return opened[0]

        try:
            return await self.call(open_in_thread)
        except BaseException:
            # In this order, which is the reverse of that of the thread: one of the two closes it.
            is_wanted = False
            for watch in opened:
                watch.close()
            raise

    def close(self) -> None:
        """Let the threads end when they have nothing more to do. Waits for none."""
        self._pool = None

    def _begin_in_child(self) -> None:
        if self._pool is not None:
            self._pool = _Pool()


class _Pool:
    """Holds its workers: they end, all calls done, when the pool is dropped."""

    def __init__(self) -> None:
        workers = _Workers()
        self.submit = workers.submit
        self._calls = workers.calls

    def __del__(self) -> None:
        self._calls.put(None)


class _Workers:
    """Threads that take calls from one queue."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._lock = Lock()
        self._started = 0
        self._free = 0
        """Threads that wait for a call, less the calls that wait for a thread."""

    def submit(self, done: Future[T], call: Callable[[], T]) -> None:
        """Let a thread make `call`, and tell `done`. Raises `RuntimeError` if no thread is there, or can be started."""
        with self._lock:
            if self._free <= 0 and self._started < _MOST:
                try:
                    start_helper(Thread(target=self._work, name="stigmergy", daemon=True).start)
                    self._started += 1
                    self._free += 1
                except RuntimeError:  # no more threads; or CPython 3.12.1, where the main thread has ended
                    if not self._started:
                        raise
            self._free -= 1
        try:
            _pending_calls.add(done)
            self.calls.put((done, call))
        except BaseException:  # an interrupt, which may have kept it from the queue
            _pending_calls.discard(done)
            raise

    def _work(self) -> None:
        while (asked := self.calls.get()) is not None:
            done, call = asked
            result = error = None
            try:
                result = call()
            except BaseException as raised:
                error = raised
            with self._lock:
                self._free += 1  # before anybody is told, who may call again at once
            if done.set_running_or_notify_cancel():
                done.set_result(result) if error is None else done.set_exception(error)
            _pending_calls.discard(done)
            del asked, done, call, result, error  # an error holds this frame
        self.calls.put(None)  # for the next one


_pending_calls: set[Future[Any]] = set()
"""What was asked for and is not done. A program ends when it is, writes included, though no task waits any more."""
after_fork_in_child(_pending_calls, set.clear)
atexit.register(lambda: wait(list(_pending_calls)))
