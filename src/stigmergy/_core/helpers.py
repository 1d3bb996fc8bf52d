"""Helper threads: timers, readers of logs, keepers of claims, workers of async interfaces. None is sent a signal."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

__all__ = ["start_helper"]


def start_helper(start: Callable[..., object], *args: object) -> None:
    """Call `start(*args)`, which starts a thread. What it raises passes through.

    The thread has all signals blocked but its own faults. A program may block one in its threads and wait for it by
    `sigwait`: a helper that was started before, and does not block it, would receive it, and the program would be
    killed. Python's handlers run in the main thread, whichever thread receives the signal. A process that is started by
    a helper begins with these signals blocked.
    """
    import signal

    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        start(*args)
        return
    # A thread begins with the mask of the one that starts it. Would it block them itself, a signal could be sooner.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _all_but_faults())
        start(*args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def _all_but_faults() -> frozenset[int]:
    import signal

    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
    return frozenset(signal.valid_signals() - faults)
