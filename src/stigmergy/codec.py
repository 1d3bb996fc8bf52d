"""Codecs: how a value becomes the bytes that an engine keeps, and comes back as it was.

A codec gives back what it took, the same value of the same type, or it does not take it. It never falls back to
something similar: a tuple is refused, not kept as a list. What is shared inside a value comes back as copies.

Decoding makes values and does nothing else, whatever the bytes are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from json import JSONDecoder, JSONEncoder
from math import isfinite
from typing import Any, Final, NoReturn, Protocol

__all__ = ["Codec", "JSON", "MsgPack", "MsgspecJSON", "check_codec", "strict_json"]  # noqa: RUF022 - sorted as strings are

_DEEPEST: Final = 256
"""How deep lists and dicts may be nested. Each level takes one of the interpreter's stack, which has 1000 as a rule: so
what was encoded can be decoded by a reader who is deeper in the stack."""


class Codec(Protocol):
    """What turns values into bytes, and back. It is used by several threads at once.

    A store makes an `InvalidValue` of every `Exception` of `encode`, and a `DamagedValue` of every one of `decode`.
    """

    id: str
    """A short name, stored next to every value: by it a reader knows which codec to ask."""

    def encode(self, value: Any) -> bytes:
        """Return bytes of which `decode` makes `value` again: equal, and of the same types all the way down.

        Raises any `Exception` for a value of which that is not true.
        """
        ...

    def decode(self, data: bytes) -> Any:
        """Return the value that was encoded as `data`. Raises any `Exception` where that cannot be known."""
        ...


def check_codec(codec: Codec) -> Codec:
    """Return `codec`. Raises `TypeError` for what cannot be one: its name, say, or its class."""
    if isinstance(codec, type) or not all(hasattr(codec, name) for name in ("id", "encode", "decode")):
        raise TypeError("a codec is an object that encodes and decodes, such as MsgPack()")
    return codec


# -- JSON, by the standard library -------------------------------------------------------------------------------------


class JSON(Codec):
    """Strict JSON in UTF-8, which every language can read: the default.

    Takes `None`, `bool`, `int`, `float`, `str`, `list`, and `dict` with `str` keys: of exactly these types, at most 256
    lists and dicts deep. An `int` has as many digits as `sys.get_int_max_str_digits` allows; a dict keeps its order.
    Refuses everything else by a `TypeError`, `ValueError` or `RecursionError`: subclasses and enums, NaN and infinity,
    lone surrogates, a list that is inside itself.

    `decode` reads what any writer of JSON wrote, but not NaN and Infinity, which are not JSON.

    >>> JSON().encode({"b": [1, -0.0, None], "a": "é"}).decode()
    '{"b":[1,-0.0,null],"a":"é"}'
    >>> JSON().encode({"a": (1, 2)})
    Traceback (most recent call last):
    TypeError: a value of type tuple would not come back as it was
    """

    id = "json"

    def encode(self, value: Any) -> bytes:
        return _TO_JSON.get(type(value), _to_json)(value).encode()

    def decode(self, data: bytes) -> Any:
        return _from_json(str(data, "utf-8"))


def strict_json(value: Any) -> Any:
    """Return a copy of `value` by way of `JSON`; raises what that raises.

    `MemoryStore(copy=strict_json)` refuses in development what a store of bytes will refuse in production.

    >>> strict_json({"a": [1, 2]})
    {'a': [1, 2]}
    """
    data = _JSON.encode(value)
    return value if type(value) in _TO_JSON else _JSON.decode(data)


def _to_json(value: Any) -> str:
    _check((value,), _TO_JSON)
    return _encoder.encode(value)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_JSON: Final = JSON()
# Cycles are found by `_check`.
_encoder: Final = JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"))
_from_json: Final = JSONDecoder(parse_constant=_refuse).decode

_TO_JSON: Final[dict[type, Callable[[Any], str]]] = {
    type(None): lambda _: "null",
    bool: lambda value: "true" if value else "false",
    int: int.__repr__,
    float: _encoder.encode,
    str: _encoder.encode,
}


# -- msgspec -----------------------------------------------------------------------------------------------------------

_LONGEST_NUMBER: Final = 4300
"""`msgspec` reads integers of so many characters, and writes longer ones: those with a sign before so many digits, and
whatever `sys.set_int_max_str_digits` allows. So longer JSON has to prove that it can be read."""


class _Msgspec(Codec):
    """What the codecs of `msgspec` share. `_scalars`: what they take besides lists, dicts and finite floats."""

    _format: str
    _scalars: Collection[type]

    def __init__(self, type: Any = Any) -> None:
        try:
            import msgspec
        except ImportError as error:
            raise ImportError("this codec needs an extra: pip install 'stigmergy[msgspec]'") from error
        format = getattr(msgspec, self._format)
        self._is_typed = type is not Any
        self._encode: Callable[[Any], bytes] = format.Encoder().encode
        self._decode: Callable[[bytes], Any] = format.Decoder(type).decode

    def encode(self, value: Any) -> bytes:
        if not self._is_typed:
            _check((value,), self._scalars)
            return self._encode(value)
        data = self._encode(value)
        _compare(value, self._decode(data))
        return data

    def decode(self, data: bytes) -> Any:
        return self._decode(data)


class MsgspecJSON(_Msgspec):
    """JSON by `msgspec`, several times as quick as `JSON`.

    With `type=Any` it takes what `JSON` takes. With another type (a `msgspec.Struct`, a dataclass, `list[Plan]`) it
    takes and returns what `msgspec` makes of that, and `encode` tries it: it decodes as well, and raises `TypeError` if
    that gives another value, or one of another type, be it an item, or a field of a struct or dataclass (1 where the
    type says `float`). Everything else (a set, a `datetime`) is compared by `==`.
    """

    id = "msgspec-json"
    _format = "json"
    _scalars = frozenset({type(None), bool, int, str})

    def encode(self, value: Any) -> bytes:
        data = super().encode(value)
        if len(data) > _LONGEST_NUMBER and not self._is_typed:
            self._decode(data)
        return data


class MsgPack(_Msgspec):
    """MessagePack by `msgspec`: smaller, and quicker still.

    Same as `MsgspecJSON`, but takes `bytes`, NaN and infinity too, and no `int` below -2**63 or above 2**64 - 1.
    """

    id = "msgpack"
    _format = "msgpack"
    _scalars = frozenset({type(None), bool, int, float, str, bytes})


# -- what can be given back --------------------------------------------------------------------------------------------


def _check(values: Iterable[Any], scalars: Collection[type], room: int = _DEEPEST) -> None:
    """Raise unless each is a scalar, a finite float, or `room` levels of lists and dicts of such; no subclasses."""
    for value in values:
        kind = type(value)
        if kind in scalars:
            continue
        if kind is list and room:
            _check(value, scalars, room - 1)
        elif kind is dict and room:
            for key in value:
                if type(key) is not str:
                    raise TypeError(f"a key of type {type(key).__name__} would not come back as it was")
            _check(value.values(), scalars, room - 1)
        elif kind is list or kind is dict:
            raise ValueError(f"nested deeper than {_DEEPEST}")
        elif kind is not float:
            raise TypeError(f"a value of type {kind.__name__} would not come back as it was")
        elif not isfinite(value):
            raise ValueError("a float that is not finite would not come back as it was")


def _compare(value: Any, again: Any, room: int = _DEEPEST) -> None:
    """Raise unless `again` is what `value` is: equal and of the same types all the way down, `room` levels at most."""
    kind = type(value)
    if type(again) is not kind:
        raise TypeError(f"a value of type {kind.__name__} would come back as one of type {type(again).__name__}")
    parts, others = _parts(value), _parts(again)
    if parts and len(parts) == len(others):
        if not room:
            raise ValueError(f"nested deeper than {_DEEPEST}")
        for part, other in zip(parts, others, strict=True):
            _compare(part, other, room - 1)
    elif repr(value) != repr(again) if kind is float else value != again:
        raise TypeError(f"a value of type {kind.__name__} would not come back as it was")


def _parts(value: Any) -> Collection[Any]:
    """The items of a list, tuple or dict, the fields of a struct or dataclass; nothing of anything else."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, dict):
        return [*value, *value.values()]
    kind = type(value)
    fields: Iterable[str] = getattr(kind, "__struct_fields__", ()) or getattr(kind, "__dataclass_fields__", ())
    return [getattr(value, name, None) for name in fields]
