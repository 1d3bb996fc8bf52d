"""The thread that makes deadlines into changes when nobody else comes by."""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import inf
from queue import Empty, SimpleQueue
from weakref import WeakMethod

from stigmergy._core.helpers import start_helper

__all__ = ["Sweeper"]

_SHORTEST_SLEEP = 0.001
_LONGEST_SLEEP = 3600.0


class Sweeper:
    """Calls `sweep` whenever a deadline is due; `sweep` returns the seconds until the next one.

    The thread is started by the first `wake`, holds `sweep` weakly, and ends with its object. It parks on a
    `SimpleQueue` and is started by `start_new_thread`, because both may be used inside a signal handler or a
    finaliser; `threading.Thread.start` deadlocks there if it was the one interrupted.
    """

    __slots__ = ("_calls", "_started", "_sweep", "until")

    def __init__(self, sweep: Callable[[], float]) -> None:
        self.until = inf
        """The deadline that it sleeps for: whoever brings an earlier one wakes it. Kept by `sweep`."""
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self._sweep = WeakMethod(sweep, partial(_stop, self._calls))
        self._started = False

    def wake(self) -> None:
        """Call `sweep` now."""
        self.until = -inf
        if self._started:
            self._calls.put(True)
        else:
            self._started = True
            try:
                start_helper(start_new_thread, self._run, (self._sweep, self._calls))
            except BaseException as error:
                self._rest()  # the next one tries again
                if not isinstance(error, RuntimeError):  # no more threads, or the interpreter is ending
                    raise

    def _run(self, reference: WeakMethod[Callable[[], float]], calls: SimpleQueue[bool]) -> None:
        try:
            _sweep_for_ever(reference, calls)
        finally:
            self._rest()

    def _rest(self) -> None:
        self._started = False
        self.until = inf

    def stop(self) -> None:
        """End the thread."""
        _stop(self._calls)


def _stop(calls: SimpleQueue[bool], _: object = None) -> None:
    calls.put(False)


def _sweep_for_ever(reference: WeakMethod[Callable[[], float]], calls: SimpleQueue[bool]) -> None:
    go_on = True
    while go_on and (sweep := reference()) is not None:
        wait = sweep()
        del sweep
        with suppress(Empty):
            go_on = calls.get(timeout=min(max(wait, _SHORTEST_SLEEP), _LONGEST_SLEEP))
