"""What may be asked of a store: bad input gets its typed error here, before anything has changed.

Operations (`flow.py`) let their arguments through these functions, so that one that exists is a valid one, and whoever
is handed it, a guard for example, sees plain `str` keys and exact types: nobody hides behind a subclass.
"""

from collections.abc import Iterable, Mapping
from math import inf, isfinite
from sys import maxsize
from typing import Literal, TypeAlias

from stigmergy.errors import Unsupported
from stigmergy.keys import check_key, check_prefix
from stigmergy.model import Check, Delete, Meta, Set, Ttl, Write

__all__ = [
    "Overflow",
    "check_buffer",
    "check_capabilities",
    "check_keys",
    "check_page",
    "check_timeout",
    "check_writes",
]

Overflow: TypeAlias = Literal["drop", "raise"]

_MAX_META_BYTES = 1024


def check_writes(writes: Iterable[Write]) -> tuple[Write, ...]:
    """Return `writes` with plain keys. Raises as each write does, and `ValueError` for none, or a key written twice."""
    checked = tuple(map(_check_write, writes))
    if len(checked) == 1:
        return checked
    if not checked:
        raise ValueError("a commit has at least one write")
    written: set[str] = set()
    for write in checked:
        if type(write) is not Check:
            if write.key in written:
                raise ValueError(f"{write.key!r} is written twice in one commit")
            written.add(write.key)
    return checked


def check_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Return `keys` as plain `str`, each once, in the order given."""
    if isinstance(keys, str):
        raise TypeError("keys is an iterable of keys: write [key] for a single one")
    return tuple(dict.fromkeys(map(check_key, keys)))


def check_page(after: str | None, limit: int | None) -> tuple[str | None, int | None]:
    """Return `after` and `limit` of a scan in plain form."""
    if limit is not None and _check_int("limit", limit) < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return None if after is None else check_prefix(after), None if limit is None else min(limit, maxsize)


def check_buffer(since: int | str | None, capacity: int | None, overflow: Overflow) -> None:
    """Raise `ValueError` for what no watch can be opened with."""
    if not (since is None or isinstance(since, str)) and _check_int("since", since) < 0:
        raise ValueError(f"since must not be negative, not {since}")
    if capacity is not None and _check_int("capacity", capacity) < 1:
        raise ValueError(f"capacity must be at least 1, not {capacity}")
    if overflow not in ("drop", "raise"):
        raise ValueError(f"overflow must be 'drop' or 'raise', not {overflow!r}")


def check_capabilities(there: frozenset[str], required: Iterable[str]) -> None:
    """Raise `Unsupported` for the first of `required` that is not `there`."""
    for capability in required:
        if capability not in there:
            raise Unsupported(capability)


def check_timeout(timeout: float | None) -> float:
    """Return `timeout` in seconds, infinite for `None`; `ValueError` for a NaN."""
    if timeout is None:
        return inf
    if timeout != timeout:
        raise ValueError("timeout must not be NaN")
    return timeout


def _check_write(write: Write) -> Write:
    if isinstance(write, Set):
        key, value, expected, ttl, writer, meta = write
        plain = check_key(key)
        if plain is key and writer is None and meta is None and type(write) is Set:
            kept = ttl is None or (type(ttl) is str and ttl == "keep")
            if kept and (expected is None or (type(expected) is int and expected >= 0)):
                return write  # as most are: nothing is made anew (benchmark: commit of 10)
        stamps = _check_writer(writer), _check_meta(meta)
        return Set(plain, value, _check_condition(expected), _check_ttl(ttl), *stamps)
    if isinstance(write, Delete):
        key, expected, writer, meta = write
        return Delete(check_key(key), _check_condition(expected), _check_writer(writer), _check_meta(meta))
    if isinstance(write, Check):
        return Check(check_key(write.key), _check_revision(write.if_revision))
    raise TypeError(f"a write is a Set, a Delete or a Check, not a {type(write).__name__}")


def _check_int(name: str, number: object) -> int:
    if not isinstance(number, int):
        raise TypeError(f"{name} is an int, not a {type(number).__name__}")
    return int(number)


def _check_condition(if_revision: int | None) -> int | None:
    return None if if_revision is None else _check_revision(if_revision)


def _check_revision(revision: int) -> int:
    plain = _check_int("if_revision", revision)
    if plain < 0:
        raise ValueError(f"if_revision must not be negative, not {plain}")
    return plain


def _check_ttl(ttl: Ttl) -> Ttl:
    if ttl is None:
        return None
    if isinstance(ttl, str) and str.__eq__(ttl, "keep") is True:
        return "keep"
    if not isinstance(ttl, (int, float)):
        raise TypeError(f"ttl is a number of seconds or 'keep', not a {type(ttl).__name__}")
    try:
        seconds = float(ttl)
    except OverflowError:
        seconds = inf
    if not (isfinite(seconds) and seconds > 0):
        raise ValueError(f"ttl must be a positive, finite number of seconds, not {seconds}")
    return seconds


def _check_writer(writer: str | None) -> str | None:
    return None if writer is None else check_key(writer)


def _check_meta(meta: Meta | None) -> Meta | None:
    if meta is None:
        return None
    if not isinstance(meta, Mapping):
        raise TypeError(f"meta is a mapping of str to str, not a {type(meta).__name__}")
    plain = {_text(name): _text(text) for name, text in meta.items()}
    if sum(len(text.encode("utf-8", "replace")) for pair in plain.items() for text in pair) > _MAX_META_BYTES:
        raise ValueError(f"meta has at most {_MAX_META_BYTES} bytes of UTF-8")
    return plain


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"meta is a mapping of str to str, not of {type(text).__name__}")
    return str.__str__(text)
