"""Fork: the locks of all stores are held while it happens, so that the child's copy is nobody's half-done work."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakMethod

__all__ = ["survive_forks"]

_InChild = Callable[[], None]

_parties: dict[int, tuple[Any, WeakMethod[_InChild]]] = {}
"""By the id of a lock: that `RLock`, and what to do in a child."""
_held: list[tuple[Any, WeakMethod[_InChild]]] = []
_forking = RLock()
"""One thread at a time: `_held` is what that one holds."""


def survive_forks(lock: Any, in_child: _InChild) -> None:
    """While the object of the method `in_child` lives, hold `lock`, an `RLock`, during forks; call it in the child."""
    _parties[id(lock)] = lock, WeakMethod(in_child, partial(_forget, id(lock)))


def _forget(party: int, _: object) -> None:
    _parties.pop(party, None)


def _hold_all() -> None:
    _forking.acquire()
    while not all(map(_hold, _parties.copy().values())):
        _release_held()


def _hold(party: tuple[Any, WeakMethod[_InChild]]) -> bool:
    # Not for long: whoever has this lock may itself be waiting for one that is already held here.
    held: bool = party[0].acquire(timeout=0.01)
    if held:
        _held.append(party)
    return held


def _release_held() -> None:
    while _held:
        _held.pop()[0].release()


def _release_all() -> None:
    _release_held()
    _forking.release()


def _release_all_in_child() -> None:
    for _, reference in _held:
        in_child = reference()
        if in_child is not None:
            in_child()
    _release_all()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_release_all_in_child)
