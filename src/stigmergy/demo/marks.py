"""The marks in a store that is not this process's own: which store, in which part of it, and as which bytes."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from stigmergy.codec import Codec
from stigmergy.demo.agents import Plan, Result, Status, Task, Totals, uninterrupted
from stigmergy.errors import StateError
from stigmergy.model import Delete
from stigmergy.registry import open_store
from stigmergy.scope import scoped
from stigmergy.store import Store

__all__ = ["MarkCodec", "address", "clean", "left_clean", "new_scope", "open_marks"]

_PAGE = 500
_SILENCE = logging.NullHandler()
"""For warnings: what does not pass by itself ends the run, and is told then, once."""


def open_marks(url: str) -> Store:
    """Open the store at `url`, for marks. Raises what `open_store` does; `TypeError` if its values have no codec."""
    if url.partition(":")[0].lower() in ("memory", "inmemory"):
        # No value is ever changed in place, so none has to be copied; and nobody looks back: nothing replaced is kept.
        return open_store(url, copy=None, history=0)
    logging.getLogger("stigmergy").addHandler(_SILENCE)
    return open_store(url, codec=MarkCodec())


def address(url: str) -> str:
    """What may be shown of the `url` of a store that could be opened: nothing of user, password and options.

    >>> address("redis://user:secret@localhost:6379/0?namespace=ants")
    'redis://localhost:6379/0'
    >>> address("sqlite:///ants@home.db")
    'sqlite:///ants@home.db'
    """
    name, _, rest = url.partition(":")
    path = re.split("[?#]", rest)[0]
    if path.startswith("///"):
        return f"{name}:{path}"
    return f"{name}://{path.removeprefix('//').rpartition('@')[2]}" if path else name


def new_scope() -> str:
    """The scope of a run. No other run has the same, so what is left of one that was killed confuses nobody."""
    return f"demo/{os.urandom(8).hex()}"


@contextmanager
def left_clean(store: Store, scope: str) -> Iterator[None]:
    """Remove in the end all that is in `scope`."""
    try:
        yield
    except BaseException:
        with suppress(StateError), uninterrupted():  # there is worse to tell
            clean(store, scope)
        raise
    with uninterrupted():
        clean(store, scope)


def clean(store: Store, scope: str) -> None:
    """Remove all that is in `scope`."""
    inside = scoped(store, scope)
    inside.delete("words")  # the largest value, and not worth decoding
    while keys := list(inside.scan(limit=_PAGE)):
        inside.commit(*map(Delete, keys))


# -- values ------------------------------------------------------------------------------------------------------------


class MarkCodec(Codec):
    """JSON: the kind of mark, then its fields. A word is bytes, of which each becomes the character of that number."""

    id = "stigmergy-demo"

    def encode(self, value: Any) -> bytes:
        """Return `value` as bytes. Raises for what is no mark and no claim."""
        kind = type(value).__name__
        return json.dumps([kind, *_FIELDS[kind](value)], separators=(",", ":")).encode()

    def decode(self, data: bytes) -> Any:
        """Return what was encoded as `data`."""
        kind, *fields = json.loads(data)
        return _KINDS[kind](*fields)


def _text(words: Counter[bytes]) -> dict[str, int]:
    return {word.decode("latin-1"): times for word, times in words.items()}


def _words(text: dict[str, int]) -> Counter[bytes]:
    return Counter({word.encode("latin-1"): times for word, times in text.items()})


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "Counter": lambda words: [_text(words)],
    "Plan": list,
    "Result": lambda result: [result.path, _text(result.counts), result.error],
    "Status": list,
    "Task": list,
    "Totals": list,
    "dict": lambda claim: [claim],
}
_KINDS: Mapping[str, Callable[..., Any]] = {
    "Counter": _words,
    "Plan": Plan,
    "Result": lambda path, text, error: Result(path, _words(text), error),
    "Status": Status,
    "Task": Task,
    "Totals": lambda files, skipped: Totals(files, tuple(skipped)),
    "dict": dict,
}
