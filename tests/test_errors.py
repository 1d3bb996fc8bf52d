"""Errors: one flat tree, facts as attributes, and never a value in a message."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

import stigmergy
from stigmergy import (
    AccessDenied,
    ClaimLost,
    Compacted,
    DamagedValue,
    InvalidKey,
    InvalidValue,
    Lagged,
    MemoryStore,
    OutcomeUnknown,
    ProviderNotFound,
    RevisionConflict,
    Set,
    StateError,
    StoreClosed,
    StoreFull,
    Unavailable,
    Unsupported,
    WatchClosed,
    errors,
)

# Each error, its facts in order, and what it says.
EXAMPLES: list[tuple[type[StateError], dict[str, Any], str]] = [
    (AccessDenied, {"action": "write", "key": "plan"}, "this handle may not write 'plan'"),
    (
        ClaimLost,
        {"key": "plan", "owner": "worker", "token": 7},
        "'worker' lost its claim on 'plan' (token 7)",
    ),
    (
        Compacted,
        {"since": 3, "oldest": 9},
        "cannot continue from 3: changes are remembered from revision 9 on, of this store and its present life",
    ),
    (DamagedValue, {"key": "plan"}, "what is stored at 'plan' cannot be read"),
    (InvalidKey, {"key": "'a\\n'", "reason": "no"}, "invalid key 'a\\n': no"),
    (InvalidValue, {"key": "plan", "type": "socket"}, "'plan' cannot hold this value of type socket"),
    (Lagged, {"missed": 4}, "4 changes were missed"),
    (OutcomeUnknown, {}, ""),
    (
        ProviderNotFound,
        {"name": "reddis", "known": ("memory", "redis")},
        "no provider is called 'reddis'; known: memory, redis",
    ),
    (
        ProviderNotFound,
        {"name": "state.db", "known": ("memory", "sqlite")},
        "no provider is called 'state.db'; known: memory, sqlite; for a file: sqlite:///state.db",
    ),
    (RevisionConflict, {"key": "plan", "expected": 3, "actual": 9}, "'plan' is at revision 9, expected at revision 3"),
    (StoreClosed, {}, "the store is closed"),
    (StoreFull, {"max_entries": 2}, "the store may hold 2 entries"),
    (Unavailable, {}, ""),
    (Unsupported, {"capability": "durable"}, "this store is not 'durable'"),
    (WatchClosed, {}, "the watch has ended"),
]
every_error = pytest.mark.parametrize(
    ("type", "facts", "message"), EXAMPLES, ids=[each[0].__name__ for each in EXAMPLES]
)


def test_the_examples_are_all_the_errors() -> None:
    assert list(dict.fromkeys(type.__name__ for type, _, _ in EXAMPLES)) == [
        name for name in errors.__all__ if name != "StateError"
    ]
    assert set(errors.__all__) <= set(stigmergy.__all__)


@every_error
def test_an_error_keeps_its_facts_as_attributes(type: type[StateError], facts: dict[str, Any], message: str) -> None:
    error = type(*facts.values())

    assert {name: getattr(error, name) for name in facts} == facts
    assert vars(error) == facts


@every_error
def test_an_error_is_one_sentence(type: type[StateError], facts: dict[str, Any], message: str) -> None:
    assert str(type(*facts.values())) == message


@every_error
def test_an_error_survives_pickling_and_copying(type: type[StateError], facts: dict[str, Any], message: str) -> None:
    error = type(*facts.values())

    twins = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    twins += [copy.copy(error), copy.deepcopy(error)]

    for twin in twins:
        assert twin is not error
        assert twin.__class__ is type
        assert vars(twin) == facts
        assert str(twin) == message


@every_error
def test_the_tree_is_flat(type: type[StateError], facts: dict[str, Any], message: str) -> None:
    assert type.__bases__[0] is StateError
    assert StateError.__bases__ == (Exception,)


@every_error
def test_an_error_says_in_its_docstring_what_happened(
    type: type[StateError], facts: dict[str, Any], message: str
) -> None:
    assert (inspect.cleandoc(type.__doc__ or "")).split("\n")[0].endswith(".")


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (AccessDenied("read", "a"), PermissionError),
        (InvalidKey("''", "empty"), ValueError),
        (InvalidValue("a", "socket"), TypeError),
        (ProviderNotFound("a", ()), LookupError),
    ],
)
def test_an_error_is_also_the_builtin_that_a_stranger_would_catch(error: Exception, builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise error


@pytest.mark.parametrize("type", [Unavailable, OutcomeUnknown, StateError])
def test_an_error_about_an_engine_says_what_the_provider_says(type: type[StateError]) -> None:
    assert str(type("no answer from localhost:6379")) == "no answer from localhost:6379"


def test_absence_is_not_called_revision_zero() -> None:
    assert str(RevisionConflict("plan", 0, 9)) == "'plan' is at revision 9, expected absent"
    assert str(RevisionConflict("plan", 3, 0)) == "'plan' is absent, expected at revision 3"


async def test_no_error_of_a_store_shows_a_value(new_store: Any) -> None:
    class Secret:
        def __repr__(self) -> str:
            return "xyzzy"

        def __deepcopy__(self, memo: object) -> Secret:
            raise ZeroDivisionError

    store = new_store(max_entries=1)
    await store.set("a", "xyzzy")
    said = []

    for operation in (
        store.set("a", "xyzzy", if_revision=7),
        store.set("b", "xyzzy"),
        store.set("a", Secret()),
        store.set("a", [Secret()]),
        store.set("", "xyzzy"),
        store.set("a", "xyzzy", ttl=-1),
        store.commit(Set("a", "xyzzy"), Set("a", "xyzzy")),
    ):
        with pytest.raises((StateError, ValueError)) as error:
            await operation
        said += [str(error.value), repr(error.value)]

    assert not [text for text in said if "xyzzy" in text]


def test_an_error_shows_the_key_as_it_was_asked_for() -> None:
    store = MemoryStore()

    with pytest.raises(RevisionConflict, match=r"^'plan' is absent, expected at revision 1$"):
        store.set("plan", 1, if_revision=1)
