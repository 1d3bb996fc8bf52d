"""Keys: their grammar, and the scopes they are built from. Pure functions.

A key is a `str` of 1 to 512 bytes in UTF-8, without control characters (C0, DEL, C1) and lone surrogates. Keys are
compared by code points and never normalised. A prefix is the beginning of a key, or empty: every key.
"""

import re
from enum import StrEnum

from stigmergy.errors import InvalidKey

__all__ = ["Scope", "check_key", "check_prefix", "check_scope", "check_whole_key", "inside", "scoped_key"]

_MAX_BYTES = 512
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Scope(StrEnum):
    """Who shares a key: one agent, one session, or everybody."""

    AGENT = "agent"
    SESSION = "session"
    GLOBAL = "global"


def scoped_key(scope: Scope, key: str, *, owner: str | None = None) -> str:
    """Put `key` into `scope`, which may belong to one `owner`. Two different triples never make the same key.

    >>> scoped_key(Scope.AGENT, "counter")
    'agent:counter'
    >>> scoped_key(Scope.AGENT, "counter", owner="planner")
    'agent/planner:counter'

    Raises `InvalidKey` for a bad key or owner: an owner has no `:` and no `/`, and `Scope.GLOBAL` has no owner.
    """
    scope = Scope(scope)
    if owner is None:
        return check_key(f"{scope}:{check_key(key)}")
    owner = check_key(owner)
    if ":" in owner or "/" in owner:
        raise InvalidKey(_shown(owner), "an owner has no ':' and no '/'")
    if scope is Scope.GLOBAL:
        raise InvalidKey(_shown(owner), "the global scope has no owner")
    return check_key(f"{scope}/{owner}:{check_key(key)}")


def check_scope(scope: object) -> str:
    """Return `scope`, one or more segments with a `/` between them, as a plain `str`, or raise `InvalidKey`.

    >>> check_scope("agent/planner")
    'agent/planner'
    """
    plain = check_key(scope)
    if ":" in plain:
        raise InvalidKey(_shown(plain), "a scope has no ':'")
    if not all(plain.split("/")):
        raise InvalidKey(_shown(plain), "a scope has no empty segment")
    return plain


def inside(prefix: str, key: str) -> str:
    """Return the key, or prefix, that `key` is below `prefix`. Raises `InvalidKey` if it is too long there."""
    try:
        return check_prefix(prefix + key)
    except InvalidKey as error:
        raise InvalidKey(_shown(key), f"{error.reason}, those of its scope included") from None


def check_key(key: object) -> str:
    """Return `key` as a plain `str`, or raise `InvalidKey`.

    >>> check_key(Scope.AGENT)
    'agent'
    """
    if type(key) is str and key.isascii() and key.isprintable() and 0 < len(key) <= _MAX_BYTES:
        return key
    checked = check_prefix(key)
    if not checked:
        raise InvalidKey(_shown(checked), "a key is not empty")
    return checked


def check_whole_key(key: object) -> str:
    """`check_key`, where one that ends in `:` would be taken for a prefix, as a grant is."""
    plain = check_key(key)
    if plain.endswith(":"):
        raise InvalidKey(_shown(plain), "this names whole keys, no prefixes")
    return plain


def check_prefix(prefix: object) -> str:
    """Return `prefix` as a plain `str`, or raise `InvalidKey`: like a key, but it may be empty."""
    if not isinstance(prefix, str):
        raise InvalidKey(_shown(prefix), "a key is a str")
    plain = str.__str__(prefix)  # a subclass may lie about everything else, about this it is not asked
    try:
        encoded = plain.encode()
    except UnicodeEncodeError:
        raise InvalidKey(_shown(plain), "a key has no lone surrogates") from None
    if len(encoded) > _MAX_BYTES:
        raise InvalidKey(_shown(plain), f"a key has at most {_MAX_BYTES} bytes of UTF-8")
    if _CONTROL.search(plain):
        raise InvalidKey(_shown(plain), "a key has no control characters")
    return plain


def _shown(key: object) -> str:
    shown = repr(key) if isinstance(key, (str, bytes, int, float, type(None))) else f"<{type(key).__name__}>"
    return shown if len(shown) <= 60 else shown[:57] + "..."
