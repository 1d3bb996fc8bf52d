"""Isolation: the copy that a value makes on its way into an in-process store, and on its way out."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

__all__ = ["SCALARS", "isolate"]

SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})
"""The types that nobody can change, so that nobody needs a copy."""

_Memo = dict[int, Any]


def isolate(value: Any) -> Any:
    """Return a copy of `value` that shares nothing changeable with it.

    Scalars are their own copies. Plain lists, dicts, sets and tuples are copied here, everything else by
    `copy.deepcopy`; both keep one memo, so what was shared or cyclic inside the value is so inside the copy.
    Raises what the value's own `__deepcopy__` or `__reduce_ex__` raises, and `RecursionError` for a value too deep.

    >>> inner = [1]
    >>> copy = isolate({"a": inner, "b": inner})
    >>> copy, copy["a"] is inner, copy["a"] is copy["b"]
    ({'a': [1], 'b': [1]}, False, True)
    """
    return value if type(value) in SCALARS else _copied(value, {})


def _copied(value: Any, memo: _Memo) -> Any:
    """What `deepcopy(value, memo)` returns, sooner; `memo` is its memo: copies by the id of the original."""
    if id(value) in memo:
        return memo[id(value)]
    memo.setdefault(id(memo), []).append(value)  # alive as long as its id stands for it, as `deepcopy` does it
    copier = _COPIERS.get(type(value), deepcopy)
    return copier(value, memo)


def _list(value: list[Any], memo: _Memo) -> list[Any]:
    copy: list[Any] = []
    memo[id(value)] = copy
    copy.extend([item if type(item) in SCALARS else _copied(item, memo) for item in value])
    return copy


def _dict(value: dict[Any, Any], memo: _Memo) -> dict[Any, Any]:
    copy: dict[Any, Any] = {}
    memo[id(value)] = copy
    for key, item in value.items():
        kept = key if type(key) in SCALARS else _copied(key, memo)
        copy[kept] = item if type(item) in SCALARS else _copied(item, memo)
    return copy


def _set(value: set[Any], memo: _Memo) -> set[Any]:
    copy = {item if type(item) in SCALARS else _copied(item, memo) for item in value}
    memo[id(value)] = copy
    return copy


def _tuple(value: tuple[Any, ...], memo: _Memo) -> tuple[Any, ...]:
    if all(type(item) in SCALARS for item in value):
        return value
    copy = tuple([item if type(item) in SCALARS else _copied(item, memo) for item in value])
    kept: tuple[Any, ...] = memo.setdefault(id(value), copy)
    return kept  # a cycle may have led back here and made the copy already


_COPIERS: dict[type, Callable[[Any, _Memo], Any]] = {dict: _dict, list: _list, set: _set, tuple: _tuple}
