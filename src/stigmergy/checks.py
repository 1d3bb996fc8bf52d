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
    "check_number",
    "check_page",
    "check_seconds",
    "check_since",
    "check_timeout",
    "check_ttl",
    "check_writes",
]

Overflow: TypeAlias = Literal["drop", "raise"]

_MAX_META_BYTES = 1024
_OVERFLOWS: Mapping[str, Overflow] = {"drop": "drop", "raise": "raise"}


def check_writes(writes: Iterable[Write]) -> tuple[Write, ...]:
    """Return `writes` with plain keys. Raises as each write does, and `ValueError` for none, or a key written twice."""
    if type(writes) is tuple and len(writes) == 1:
        return (_check_write(writes[0]),)  # as most have (benchmark: set through middleware)
    checked = tuple(map(_check_write, writes))
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
    plain = None if limit is None else min(check_number("limit", limit, 1), maxsize)
    return None if after is None else check_prefix(after), plain


def check_since(since: int | str | None) -> int | str | None:
    """Return where a watch is to begin in plain form: a revision or a bookmark."""
    if since is None:
        return None
    return _as_str(since) if isinstance(since, str) else check_number("since", since, 0)


def check_buffer(capacity: int | None, overflow: Overflow) -> tuple[int | None, Overflow]:
    """Return the buffer that a watch is to have in plain form."""
    plain = _OVERFLOWS.get(_as_str(overflow))
    if plain is None:
        raise ValueError(f"overflow must be 'drop' or 'raise', not {overflow!r}")
    return None if capacity is None else check_number("capacity", capacity, 1), plain


def check_capabilities(there: frozenset[str], required: Iterable[str]) -> None:
    """Raise `Unsupported` for the first of `required` that is not `there`."""
    for capability in required:
        if capability not in there:
            raise Unsupported(capability)


def check_number(name: str, number: object, least: int) -> int:
    """Return `number` as a plain `int`. Raises `TypeError` if it is none, `ValueError` if it is below `least`."""
    plain = _check_int(name, number)
    if plain < least:
        raise ValueError(f"{name} must be at least {least}, not {plain}")
    return plain


def check_seconds(name: str, seconds: object) -> float:
    """Return `seconds` as a plain `float`, positive and finite. Raises `TypeError`, `ValueError`."""
    if not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} is a number of seconds, not a {type(seconds).__name__}")
    try:
        plain = float(seconds)
    except OverflowError:
        plain = inf
    if not (isfinite(plain) and plain > 0):
        raise ValueError(f"{name} must be a positive, finite number of seconds, not {plain}")
    return plain


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
        return Set(plain, value, _check_condition(expected), check_ttl(ttl), *stamps)
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


def check_ttl(ttl: Ttl) -> Ttl:
    """Return `ttl` in plain form. Raises `TypeError`, `ValueError`."""
    if ttl is None:
        return None
    if _as_str(ttl) == "keep":
        return "keep"
    if not isinstance(ttl, (int, float)):
        raise TypeError(f"ttl is a number of seconds or 'keep', not a {type(ttl).__name__}")
    return check_seconds("ttl", ttl)


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
    return _as_str(text)


def _as_str(text: object) -> str:
    """`text` as a plain `str`, if it is one at all: whatever a subclass says of itself."""
    return str.__str__(text) if isinstance(text, str) else ""
