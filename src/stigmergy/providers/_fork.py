"""Fork: the child gets every store as it was between two bytecodes, and settles it like one that was interrupted.

No lock is held while it happens. A fork finds the parent's other threads where a signal handler finds this one: between
bytecodes (CPython forks with the GIL held, or, without a GIL, with the world stopped). That is what a commit survives
anyway. A hook that takes locks before the fork can be interrupted with some of them in hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from weakref import ref

__all__ = ["in_children"]

T = TypeVar("T")

_parties: dict[int, Callable[[], None]] = {}


def in_children(party: T, revive: Callable[[T], None]) -> None:
    """Call `revive(party)` in each child process that is forked while `party` lives."""
    _parties[id(party)] = partial(_revive, ref(party, partial(_forget, id(party))), revive)


def _revive(reference: ref[T], revive: Callable[[T], None]) -> None:
    party = reference()
    if party is not None:
        revive(party)


def _forget(party: int, _: object) -> None:
    _parties.pop(party, None)


def _revive_all() -> None:
    for revive in list(_parties.values()):
        revive()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_revive_all)
