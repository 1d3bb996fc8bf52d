"""The grammar of keys, and scopes."""

from __future__ import annotations

import sys
from enum import StrEnum
from itertools import product
from typing import Any

import pytest

from stigmergy import InvalidKey, Scope, scoped_key
from stigmergy.keys import check_key, check_prefix

GOOD = [
    "a",
    " ",
    "two words",
    "a:b/c.d",
    "*?[]{}\\'\"",
    "é",
    "e\u0301",
    "\u00a0",
    "\u200b",
    "\u2028",
    "\ue000",
    "\uffff",
    "\U0001f600",
    "\U0010ffff",
    "k" * 512,
    "é" * 256,
    "\U0001f600" * 128,
]
# Each with what the error says of it.
BAD = [
    ("k" * 513, "at most 512 bytes"),
    ("é" * 256 + "k", "at most 512 bytes"),
    ("\U0001f600" * 128 + "k", "at most 512 bytes"),
    *((f"a{chr(code)}b", "control characters") for code in [*range(0x20), *range(0x7F, 0xA0)]),
    ("\n", "control characters"),
    ("a\n", "control characters"),
    ("\ud800", "lone surrogates"),
    ("a\udfffb", "lone surrogates"),
    (42, "a str"),
    (None, "a str"),
    (b"a", "a str"),
    (["a"], "a str"),
    (("a",), "a str"),
]


class Liar(str):
    """A `str` that says something else to everybody who asks."""

    __slots__ = ()

    def __str__(self) -> str:
        return "other"

    def __repr__(self) -> str:
        return "other"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __len__(self) -> int:
        return 1

    def __format__(self, spec: str) -> str:
        return "other"

    def isascii(self) -> bool:
        return True

    def isprintable(self) -> bool:
        return True

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"a"


class Topic(StrEnum):
    PLAN = "plan"
    SPOILT = "plan\n"


@pytest.mark.parametrize("key", GOOD)
def test_a_key_within_the_grammar_is_taken_as_it_is(key: str) -> None:
    assert check_key(key) == key
    assert check_prefix(key) == key


@pytest.mark.parametrize(("key", "reason"), BAD)
def test_a_key_outside_the_grammar_is_refused(key: Any, reason: str) -> None:
    for check in (check_key, check_prefix):
        with pytest.raises(InvalidKey, match=reason):
            check(key)


def test_any_character_is_a_key_unless_it_is_a_control_character_or_a_surrogate() -> None:
    refused = []
    for code in [*range(0x3000), *range(0xD700, 0xE100), 0xFFFE, 0xFFFF, 0x10000, sys.maxunicode]:
        try:
            check_key(chr(code))
        except InvalidKey:
            refused.append(code)

    assert refused == [*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)]


def test_a_key_is_not_empty_but_a_prefix_may_be() -> None:
    with pytest.raises(InvalidKey, match="not empty"):
        check_key("")
    assert check_prefix("") == ""


def test_keys_are_never_normalised() -> None:
    assert check_key("é") != check_key("e\u0301")


@pytest.mark.parametrize("check", [check_key, check_prefix])
def test_a_key_of_a_subclass_of_str_is_taken_as_its_plain_str(check: Any) -> None:
    for key in (Topic.PLAN, Liar("plan")):
        plain = check(key)
        assert type(plain) is str
        assert plain == "plan"


@pytest.mark.parametrize("check", [check_key, check_prefix])
def test_a_subclass_of_str_cannot_hide_a_bad_key(check: Any) -> None:
    for key in (Topic.SPOILT, Liar("plan\n"), Liar("\ud800"), Liar("k" * 513)):
        with pytest.raises(InvalidKey):
            check(key)
    with pytest.raises(InvalidKey):
        check_key(Liar(""))


def test_the_error_shows_the_key_by_its_repr() -> None:
    with pytest.raises(InvalidKey, match=r"^invalid key 'a\\x00b': ") as refused:
        check_key("a\x00b")

    assert refused.value.key == r"'a\x00b'"


@pytest.mark.parametrize("key", ["k" * 100_000, "\n" * 600, "\ud800" * 1000])
def test_the_error_cuts_a_long_key_short(key: str) -> None:
    with pytest.raises(InvalidKey) as refused:
        check_key(key)

    assert len(refused.value.key) <= 60
    assert refused.value.key.endswith("...")
    str(refused.value).encode()


# -- scopes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "owner", "key"),
    [
        (Scope.AGENT, None, "agent:counter"),
        (Scope.SESSION, None, "session:counter"),
        (Scope.GLOBAL, None, "global:counter"),
        (Scope.AGENT, "planner", "agent/planner:counter"),
        (Scope.SESSION, "42", "session/42:counter"),
    ],
)
def test_a_scoped_key_names_the_scope_the_owner_and_the_key(scope: Scope, owner: str | None, key: str) -> None:
    scoped = scoped_key(scope, "counter", owner=owner)

    assert type(scoped) is str
    assert scoped == key


def test_different_scopes_owners_and_keys_never_make_the_same_key() -> None:
    texts = ["".join(letters) for length in (1, 2, 3) for letters in product("a:/", repeat=length)]
    made: dict[str, tuple[Scope, str | None, str]] = {}

    for triple in product(Scope, [None, *texts, "agent", "agent/a", "global"], [*texts, "agent:a", "agent/a:a"]):
        scope, owner, key = triple
        try:
            scoped = scoped_key(scope, key, owner=owner)
        except InvalidKey:
            continue
        assert made.setdefault(scoped, triple) == triple

    assert len(made) == 3 * 41 + 2 * 5 * 41  # each key without an owner, and with each of the five that may be owners


@pytest.mark.parametrize("owner", ["", ":", "/", "a:b", "a/b", "planner:", "a\n", "\ud800", "k" * 513, 42])
@pytest.mark.parametrize("scope", Scope)
def test_an_owner_outside_its_grammar_is_refused(scope: Scope, owner: Any) -> None:
    with pytest.raises(InvalidKey):
        scoped_key(scope, "counter", owner=owner)


def test_the_global_scope_has_no_owner() -> None:
    with pytest.raises(InvalidKey, match="the global scope has no owner"):
        scoped_key(Scope.GLOBAL, "counter", owner="planner")


@pytest.mark.parametrize(("key", "_"), [("", ""), *BAD])
def test_a_bad_key_makes_no_scoped_key(key: Any, _: str) -> None:
    with pytest.raises(InvalidKey):
        scoped_key(Scope.AGENT, key)
    with pytest.raises(InvalidKey):
        scoped_key(Scope.AGENT, key, owner="planner")


def test_a_scoped_key_is_a_key_itself_and_must_not_be_too_long() -> None:
    assert len(scoped_key(Scope.AGENT, "k" * 506)) == 512

    for key, owner in [("k" * 507, None), ("k" * 506, "o"), ("k", "o" * 512)]:
        with pytest.raises(InvalidKey, match="at most 512 bytes"):
            scoped_key(Scope.AGENT, key, owner=owner)


def test_a_scope_may_be_given_by_its_name_and_an_unknown_one_is_refused() -> None:
    assert scoped_key("agent", "counter") == "agent:counter"  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="nobody"):
        scoped_key("nobody", "counter")  # type: ignore[arg-type]


def test_an_owner_and_a_key_of_a_subclass_of_str_are_taken_as_plain() -> None:
    scoped = scoped_key(Scope.AGENT, Liar("counter"), owner=Liar("planner"))

    assert type(scoped) is str
    assert scoped == "agent/planner:counter"


def test_a_liar_cannot_smuggle_a_separator_into_an_owner() -> None:
    with pytest.raises(InvalidKey):
        scoped_key(Scope.AGENT, "counter", owner=Liar("a:b"))
