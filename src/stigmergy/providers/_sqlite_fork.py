"""Forks: no connection to a SQLite file is open across one.

SQLite keeps in memory which locks its process holds. A child inherits the memory, and not the locks: it would be in a
file without that others know, who then do away with its write-ahead log, and with what the child has committed to it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from threading import get_ident
from typing import Protocol
from weakref import WeakSet

from stigmergy._core.fork import after_fork_in_child

__all__ = ["enter", "join", "leave"]

_ROUNDS = 2000
"""Of half a millisecond or more. Counted, for all may have been suspended while a clock went on."""


class Party(Protocol):
    """Somebody who has connections."""

    def interrupt(self) -> None:
        """Let calls that wait for something to happen return soon."""
        ...

    def close_idle(self) -> None:
        """Close the connections that nobody is in."""
        ...

    def spoil(self) -> None:
        """In a child process: refuse to be used, because somebody was in a connection when it was forked."""
        ...


_parties: WeakSet[Party] = WeakSet()
_inside: dict[object, int] = {}
"""The calls that are under way, each with its thread."""
_forks: list[int] = []
"""The threads that are about to fork: the first one does, the others wait their turn."""


def join(party: Party) -> None:
    """Let `party` know of each fork while it lives."""
    _parties.add(party)


def enter(call: object) -> None:
    """Begin `call`, in which a connection is used. Waits while a fork is under way."""
    # Register, check: a fork that begins after the check finds this call, and waits for its end.
    here = get_ident()
    _inside[call] = here
    while next(iter(_forks), here) != here:
        del _inside[call]
        time.sleep(0.001)
        _inside[call] = here


def leave(call: object) -> None:
    """End `call`, which may not have begun."""
    _inside.pop(call, None)


def _before() -> None:
    """Close all connections, when nobody is in them any more."""
    here = get_ident()
    _forks.append(here)
    while _forks[0] != here:
        time.sleep(0.0005)
    rounds = _ROUNDS
    while rounds and any(thread != here for thread in list(_inside.values())):
        rounds -= 1
        for party in list(_parties):
            party.interrupt()
        time.sleep(0.0005)
    for party in list(_parties):
        party.close_idle()


def _after_in_parent() -> None:
    with suppress(ValueError):  # a signal handler that raised can have kept `_before` from it
        _forks.remove(get_ident())


def _after_in_child(parties: WeakSet[Party]) -> None:
    if _inside:
        for party in list(parties):
            party.spoil()
    _inside.clear()
    _forks.clear()


after_fork_in_child(_parties, _after_in_child)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent)
