"""Fork: what a child process has to part with, since it has none of its parent's threads, and no right to their things.

No lock is held while a process forks. The child gets every store as it was between two bytecodes of the parent's other
threads (CPython forks with the GIL held, or, without a GIL, with the world stopped), and rolls it forward like one that
was interrupted there. Locks taken before a fork would not help: a hook can be interrupted with some of them in hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TypeVar
from weakref import ref

__all__ = ["after_fork_in_child", "never_release"]

T = TypeVar("T")

_registered: dict[int, Callable[[], None]] = {}
_never_released: list[object] = []


def after_fork_in_child(owner: T, detach: Callable[[T], None]) -> None:
    """Call `detach(owner)` in each child process that is forked while `owner` lives, in the order of registration.

    Once for each owner. One that fails keeps no other from being called.
    """
    _registered[id(owner)] = partial(_call, ref(owner, partial(_forget, id(owner))), detach)


def never_release(resource: object) -> None:
    """Keep `resource` of the parent alive in this child: released here, it would be closed for the parent as well."""
    _never_released.append(resource)


def _call(reference: ref[T], detach: Callable[[T], None]) -> None:
    owner = reference()
    if owner is not None:
        detach(owner)


def _forget(owner: int, _: object) -> None:
    _registered.pop(owner, None)


def _detach_all() -> None:
    with ExitStack() as stack:  # calls all of them, whatever one of them raises, the last one first
        for detach in reversed(_registered.copy().values()):
            stack.callback(detach)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_detach_all)
