"""Handles: scopes, identities, guards. That a handle keeps everything a store does is in `test_conformance.py`."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stigmergy import (
    AccessDenied,
    Change,
    Check,
    Commit,
    DamagedValue,
    Delete,
    Flow,
    GetEntry,
    InvalidKey,
    InvalidValue,
    MemoryStore,
    OpenWatch,
    Operation,
    RevisionConflict,
    Scan,
    Scope,
    Set,
    Store,
    StoreClosed,
    WatchClosed,
    acting_as,
    agent_store,
    apply_middleware,
    guarded,
    scoped,
    scoped_key,
)
from stigmergy.testing import Colour


@pytest.fixture
def root() -> Iterator[MemoryStore]:
    with MemoryStore() as store:
        yield store


# -- scopes ------------------------------------------------------------------------------------------------------------


def test_a_scope_is_a_view_of_the_keys_below_it(root: MemoryStore) -> None:
    planner = scoped(root, "agent/planner")
    root.set("agent/planner2:x", 0)
    root.set("agent/plan:x", 0)

    planner.set("x", 1)
    planner.commit(Check("x", 3), Set("y:z", 2))

    assert root.get("agent/planner:x") == 1
    assert dict(planner.get_many(["x", "y:z", "none"])) == {"x": 1, "y:z": 2}
    snapshot = planner.scan()
    assert list(snapshot) == ["x", "y:z"]
    assert snapshot["y:z"].value == 2
    assert snapshot.revision == 4
    assert list(planner.scan("y:")) == ["y:z"]
    assert list(planner.scan(after="x", limit=1)) == ["y:z"]
    assert list(planner.scan(keys=["x"])) == ["x"]
    assert list(scoped(root, "agent/plan").scan()) == ["x"]


async def test_watches_and_bookmarks_of_a_scope_speak_of_its_keys(store: Any, colour: Colour) -> None:
    raw = colour.raw(store)
    handle = scoped(raw, "a")
    watched = [handle.watch("k"), handle.watch(prefix=""), handle.observe("k"), handle.observe(prefix="k")]
    raw.set("k", 0)
    raw.set("b:k", 0)
    raw.set("a:k", 1)

    for watch in watched:
        change = watch.get_nowait()
        assert change is not None
        assert (change.key, change.value, change.revision) == ("k", 1, 3)
        assert watch.get_nowait() is None
    bookmark = handle.scan().bookmark
    handle.set("k", 2)
    resumed = handle.watch("k", since=bookmark).get_nowait()
    assert resumed is not None
    assert (resumed.key, resumed.value) == ("k", 2)
    assert handle.wait_for("k", lambda value: value == 2, timeout=60).revision == 4


@pytest.mark.parametrize("between", [lambda store: store, lambda store: acting_as(store, "w")])
def test_a_scope_of_a_scope_joins_their_segments(root: MemoryStore, between: Callable[[Store], Store]) -> None:
    outer = scoped(root, "agent")
    inner = scoped(between(outer), "planner/notes")

    inner.set("k", 1)

    assert root.get("agent/planner/notes:k") == 1
    assert root.scan().keys() == {"agent/planner/notes:k"}
    assert inner.get_entry("k").writer == (None if between(outer) is outer else "w")  # type: ignore[union-attr]


def test_a_scope_of_a_guard_stays_within_the_guard(root: MemoryStore) -> None:
    inner = scoped(guarded(scoped(root, "a"), writer="w", write=["b:"]), "b")

    inner.set("k", 1)

    assert list(root.scan()) == ["a:b:k"]


def test_errors_that_cross_a_scope_speak_of_its_keys(root: MemoryStore) -> None:
    handle = scoped(scoped(guarded(root, writer="w", read=["a/b:"], write=["a/b:x", "a/b:deep:"]), "a"), "b")

    with pytest.raises(RevisionConflict) as conflict:
        handle.set("x", 1, if_revision=7)
    assert (conflict.value.key, conflict.value.expected, conflict.value.actual) == ("x", 7, 0)
    with pytest.raises(AccessDenied) as denied:
        handle.set("y", 1)
    assert (denied.value.action, denied.value.key) == ("write", "y")
    with pytest.raises(InvalidKey) as invalid:
        handle.get("k" * 510)
    assert "'k" in invalid.value.key
    assert "a/b" not in str(invalid.value)
    with pytest.raises(InvalidKey):
        handle.set("", 1)
    assert list(root.scan()) == []


def test_an_error_of_a_value_keeps_its_cause_and_gets_the_key_of_the_scope(root: MemoryStore) -> None:
    import threading

    with pytest.raises(TypeError, match=r"'k' cannot hold") as error:
        scoped(root, "a").set("k", threading.Lock())
    assert isinstance(error.value.__cause__, TypeError)


def test_an_error_of_a_change_speaks_of_the_keys_of_the_scope(root: MemoryStore) -> None:
    class Once:
        """Can be copied on its way in, and then no more."""

        copies = 0

        def __deepcopy__(self, memo: object) -> Once:
            Once.copies += 1
            if Once.copies > 1:
                raise LookupError("no more")
            return self

    handle = scoped(acting_as(scoped(root, "a"), "w"), "b")
    near, far = handle.watch("k"), root.watch("a/b:k")
    handle.set("k", Once())

    with pytest.raises(InvalidValue) as error:
        near.get_nowait()
    assert error.value.key == "k"
    assert isinstance(error.value.__cause__, LookupError)
    assert error.value.__context__ is error.value.__cause__ or "a/b" not in str(error.value.__context__)
    with pytest.raises(InvalidValue) as error:
        far.get_nowait()
    assert error.value.key == "a/b:k"


def test_an_error_that_a_layer_raises_is_related_by_those_around_it_only(root: MemoryStore) -> None:
    def fail(change: Change) -> Change:
        raise DamagedValue(change.key)

    def failing(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        return result.map(fail) if isinstance(operation, OpenWatch) else result

    inside = scoped(apply_middleware(scoped(root, "a"), failing), "b")
    watch = inside.watch("k").map(fail)
    inside.set("k", 1)

    with pytest.raises(DamagedValue) as error:
        watch.get_nowait()
    assert error.value.key == "k"


@pytest.mark.parametrize("scope", ["", "/", "a/", "/a", "a//b", "a:b", ":", "a\n", "\ud800", "a" * 513, None, 1])
def test_a_bad_scope_is_refused(root: MemoryStore, scope: Any) -> None:
    with pytest.raises(InvalidKey):
        scoped(root, scope)
    with pytest.raises(InvalidKey):
        scoped(scoped(root, "a"), scope)


SYLLABLES = ["a", "b", "A", "é", "e\u0301", "\u212b", ":", "/", "::", "//", "a:b", "a/b", ".", "..", "%2F", " "]
HOSTILE = list(dict.fromkeys("".join(parts) for n in (1, 2) for parts in itertools.product(SYLLABLES, repeat=n)))[:194]
HOSTILE += ["", "*", "?", "\x00", "\x85", "\ud83d"]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_names_meet_only_where_one_scope_lies_inside_the_other(every: int) -> None:
    assert len(HOSTILE) == len(set(HOSTILE)) == 200
    names = [*HOSTILE[:16], *HOSTILE[16::every]]
    with MemoryStore(history=0) as root:
        owner: dict[str, tuple[str, str]] = {}
        refused = 0
        for scope, key in itertools.product(names, names):
            try:
                scoped(root, scope).set(key, [scope, key], if_revision=0)
            except InvalidKey:
                refused += 1
                continue
            owner[f"{scope}:{key}"] = scope, key
        assert refused > len(names) ** 2 / 40
        assert len(owner) == len(root.scan()), "two pairs met"
        for scope in {scope for scope, _ in owner.values()}:
            seen = {key: entry.value for key, entry in scoped(root, scope).scan().items()}
            assert seen == {key: [scope, key] for other, key in owner.values() if other == scope}
        assert len({unicodedata.normalize("NFC", key) for key in owner}) < len(owner), "none were alike enough"


def test_scoped_key_is_injective() -> None:
    made: dict[str, tuple[Any, ...]] = {}
    for scope, owner, key in itertools.product(Scope, [None, *HOSTILE], HOSTILE):
        try:
            name = scoped_key(scope, key, owner=owner)
        except InvalidKey:
            continue
        assert name not in made, (made[name], (scope, owner, key))
        made[name] = scope, owner, key
    assert len(made) > 10_000


# -- identities --------------------------------------------------------------------------------------------------------


def test_every_write_bears_the_name(root: MemoryStore) -> None:
    handle = acting_as(root, "planner")
    watch = root.watch(prefix="")

    handle.set("a", 1)
    handle.update("a", lambda value: value + 1)
    handle.commit(Set("b", 1), Check("a", 2))
    handle.delete("b")

    assert [change.writer for change in iter(watch.get_nowait, None)] == ["planner"] * 4
    entry = handle.get_entry("a")
    assert entry is not None
    assert entry.writer == "planner"


def test_nobody_writes_in_the_name_of_another_by_stacking_handles(root: MemoryStore) -> None:
    forger = acting_as(acting_as(root, "honest"), "forger")

    with pytest.raises(AccessDenied):
        forger.set("a", 1)
    with pytest.raises(AccessDenied):
        acting_as(root, "honest").commit(Set("a", 1, writer="forger"))
    assert root.scan().revision == 0
    acting_as(acting_as(root, "same"), "same").commit(Set("a", 1, writer="same"))


@pytest.mark.parametrize("make", [acting_as, lambda store, name: guarded(store, writer=name)])
def test_an_empty_identity_is_refused(root: MemoryStore, make: Callable[..., Store]) -> None:
    for name in ("", None, 1, "a\n"):
        with pytest.raises(InvalidKey):
            make(root, name)


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def guard(root: MemoryStore) -> Store:
    root.commit(Set("mine:a", 1), Set("other:a", 1), Set("one", 1), Set("one:more", 1), Set("drop", 1))
    return guarded(root, writer="w", read=["mine:", "one"], write=["mine:", "drop"])


class Unknown(Operation[Any]):
    __slots__ = ()
    name = "unknown"

    def apply(self, store: Any) -> Any:
        return store


class Disguised(GetEntry):
    __slots__ = ()

    def apply(self, store: Any) -> Any:
        return store


def asking(operation: Operation[Any]) -> Flow[Any]:
    return (yield operation)


DENIED: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get("other:a"),
    "get_entry": lambda store: store.get_entry("drop"),
    "a key below an exact grant": lambda store: store.get("one:more"),
    "a prefix grant is not a key": lambda store: store.get("mine"),
    "get_many": lambda store: store.get_many(["mine:a", "other:a"]),
    "set": lambda store: store.set("other:a", 2),
    "set what may be read": lambda store: store.set("one", 2),
    "conditional set": lambda store: store.set("one", 2, if_revision=3),
    "delete": lambda store: store.delete("other:a"),
    "delete an absent key": lambda store: store.delete("none"),
    "commit": lambda store: store.commit(Set("mine:a", 2), Delete("other:a")),
    "a check": lambda store: store.commit(Set("mine:a", 2), Check("other:a", 2)),
    "a check of what may only be written": lambda store: store.commit(Check("drop", 5)),
    "scan": lambda store: store.scan(),
    "scan of a wider prefix": lambda store: store.scan("min"),
    "scan of a key as a prefix": lambda store: store.scan("one"),
    "scan of keys": lambda store: store.scan(keys=["mine:a", "drop"]),
    "watch": lambda store: store.watch("mine:a", "other:a"),
    "watch of a prefix": lambda store: store.watch(prefix=""),
    "watch of a key as a prefix": lambda store: store.watch(prefix="one"),
    "observe": lambda store: store.observe("drop"),
    "observe a prefix": lambda store: store.observe(prefix="other:"),
    "update": lambda store: store.update("one", lambda value: value),
    "update of what may only be written": lambda store: store.update("drop", lambda value: value),
    "wait_for": lambda store: store.wait_for("other:a", bool, timeout=0),
    "an unknown operation": lambda store: store.run(asking(Unknown())),
    "an operation in disguise": lambda store: store.run(asking(Disguised("mine:a"))),
    "in the name of another": lambda store: store.commit(Set("mine:a", 2, writer="other")),
    "below a scope": lambda store: scoped(store, "other").get("a"),
    "behind middleware": lambda store: apply_middleware(store, asking).set("one", 2),
    "behind another guard": lambda store: guarded(store, writer="w", read=["other:"]).get("other:a"),
}


@pytest.mark.parametrize("what", DENIED)
def test_what_is_not_granted_is_denied_before_any_effect(root: MemoryStore, guard: Store, what: str) -> None:
    before = root.scan().revision

    with pytest.raises(AccessDenied):
        DENIED[what](guard)
    with pytest.raises(AccessDenied):
        DENIED[what](guard.aio.sync)
    assert root.scan().revision == before
    assert root._hub._members() == []


@pytest.mark.parametrize(
    "operation",
    [
        GetEntry("other:a"),
        Scan(),
        Commit([Set("one", 2)]),
        Commit([Check("other:a", 2)]),
        OpenWatch(prefix=""),
        Unknown(),
        Disguised("mine:a"),
    ],
)
async def test_the_async_face_denies_the_same(operation: Operation[Any]) -> None:
    with MemoryStore() as root:
        guard = guarded(root.aio, writer="w", read=["mine:", "one"], write=["mine:", "drop"])
        with pytest.raises(AccessDenied):
            await guard.run(asking(operation))
        with pytest.raises(AccessDenied):
            await apply_middleware(guard, asking).run(asking(operation))


class Lying(str):
    def startswith(self, *_: Any) -> bool:
        return True

    def __radd__(self, other: str) -> str:
        return str(self)


def changed(operation: Operation[Any], **fields: Any) -> Operation[Any]:
    """An operation that is no longer what it was when it was made."""
    for name, value in fields.items():
        object.__setattr__(operation, name, value)
    return operation


CHANGED: dict[str, Callable[[], Operation[Any]]] = {
    "a key": lambda: changed(GetEntry("mine:a"), key=Lying("other:a")),
    "a write": lambda: changed(Commit([Set("mine:a", 1)]), writes=(Set(Lying("other:a"), 2),)),
    "keys of a watch": lambda: changed(OpenWatch(["mine:a"]), keys=(Lying("other:a"),)),
    "a prefix": lambda: changed(Scan("mine:"), prefix=Lying("")),
}


@pytest.mark.parametrize("what", CHANGED)
def test_an_operation_that_was_changed_after_it_was_made_is_denied(root: MemoryStore, guard: Store, what: str) -> None:
    with pytest.raises(AccessDenied):
        guard.run(asking(CHANGED[what]()))
    assert root.get("other:a") == 1


class Sly(int):
    """A number with ideas of its own, which must not run in the writes of others."""

    def __sub__(self, other: int) -> int:
        raise LookupError("in the midst of a write")

    __rsub__ = __lt__ = __le__ = __gt__ = __ge__ = __sub__  # type: ignore[assignment]


def test_what_a_reader_asks_for_cannot_strike_a_writer(root: MemoryStore, guard: Store) -> None:
    watch = guard.watch("mine:a", capacity=Sly(5), since=Sly(0))
    assert len(guard.scan("mine:", limit=Sly(5))) == 1
    root.set("mine:a", 2)
    root.set("unrelated", 3)

    assert watch.get_nowait() is not None


def test_a_key_cannot_leave_its_scope_by_lying(root: MemoryStore, guard: Store) -> None:
    operation = changed(GetEntry("x"), key=Lying("other:a"))
    assert scoped(root, "s").run(asking(operation)) is None


@pytest.mark.parametrize("operation", [Unknown(), Disguised("mine:a")])
def test_an_identity_lets_nothing_through_that_it_could_not_sign(root: MemoryStore, operation: Operation[Any]) -> None:
    with pytest.raises(AccessDenied):
        acting_as(root, "w").run(asking(operation))


def test_an_error_of_a_class_of_ones_own_crosses_a_scope(root: MemoryStore) -> None:
    class Own(RevisionConflict):
        def __init__(self, key: str) -> None:
            super().__init__(key, 1, 2)

    def raising(operation: Operation[Any]) -> Flow[Any]:
        yield from ()
        raise Own("s:k")

    with pytest.raises(Own) as error:
        scoped(apply_middleware(root, raising), "s").get("k")
    assert (error.value.key, error.value.actual) == ("k", 2)
    assert error.value.__context__ is None


def test_what_is_granted_goes_through(guard: Store) -> None:
    watch = guard.watch(prefix="mine:")
    assert guard.get("one") == 1
    assert list(guard.scan("mine:")) == ["mine:a"]
    assert list(guard.scan("mine:a")) == ["mine:a"]
    assert guard.update("mine:a", lambda value: value + 1) == 2
    assert guard.commit(Check("one", 3), Set("mine:b", 1), Delete("drop")) == (None, 7, 8)
    assert [(change.key, change.writer) for change in iter(watch.get_nowait, None)] == [
        ("mine:a", "w"),
        ("mine:b", "w"),
    ]
    assert guard.observe("one").get(5).value == 1


def test_a_guard_without_grants_denies_everything(root: MemoryStore) -> None:
    with pytest.raises(AccessDenied):
        guarded(root, writer="w").get("a")
    with pytest.raises(AccessDenied):
        guarded(root, writer="w", read=["a"]).set("a", 1)


@pytest.mark.parametrize("grants", ["mine:", [""], [1], ["a\n"]])
def test_bad_grants_are_refused(root: MemoryStore, grants: Any) -> None:
    with pytest.raises((InvalidKey, TypeError)):
        guarded(root, writer="w", read=grants)
    with pytest.raises((InvalidKey, TypeError)):
        guarded(root, writer="w", write=grants)


@pytest.mark.parametrize("behind", [lambda store: store, lambda store: apply_middleware(store, asking)])
def test_no_public_name_leads_to_the_store_behind_a_guard(root: MemoryStore, behind: Any) -> None:
    root.set("mine:a", 1)
    guard = behind(guarded(root, writer="w", read=["mine:"]))
    reachable: list[Any] = [guard, guard.aio, guard.watch("mine:a"), guard.scan("mine:"), guard.get_entry("mine:a")]
    seen: set[int] = set()
    while reachable:
        found = reachable.pop()
        if id(found) in seen or type(found) in (str, int, float, type(None)):
            continue
        seen.add(id(found))
        assert found is not root
        assert not (isinstance(found, MemoryStore))
        assert getattr(found, "__self__", None) is not root
        if isinstance(found, (Store, type(guard.aio))) or type(found).__module__.startswith("stigmergy"):
            reachable += [getattr(found, name) for name in dir(found) if not name.startswith("_")]


def test_an_agent_store_has_the_scopes_of_the_original(root: MemoryStore) -> None:
    handle = agent_store(root, agent="planner", session="s1", global_write=["plan", "results:"])
    mine = scoped_key(Scope.AGENT, "counter", owner="planner")
    shared = scoped_key(Scope.SESSION, "topic", owner="s1")
    root.set("global:config", 1)

    handle.commit(Set(mine, 1), Set(shared, 2), Set("global:plan", 3), Set("global:results:1", 4))

    assert handle.get_many([mine, shared, "global:plan", "global:config"]) == {
        mine: 1,
        shared: 2,
        "global:plan": 3,
        "global:config": 1,
    }
    assert {entry.writer for entry in handle.scan("global:").values()} == {None, "planner"}
    for key in ["global:config", "global:plan2", "global:results", "agent:counter", "agent/planner2:x", "session/s2:x"]:
        with pytest.raises(AccessDenied):
            handle.set(key, 1)
    for key in ["agent/other:counter", "session/s2:topic", "agent:counter", "other"]:
        with pytest.raises(AccessDenied):
            handle.get(key)
    with pytest.raises(AccessDenied):
        agent_store(root, agent="planner").get(shared)
    for bad in ("", "a:b", "a/b"):
        with pytest.raises(InvalidKey):
            agent_store(root, agent=bad)
        with pytest.raises(InvalidKey):
            agent_store(root, agent="a", session=bad)


# -- closing -----------------------------------------------------------------------------------------------------------

HANDLES: dict[str, Callable[[Any], Any]] = {
    "scoped": lambda store: scoped(store, "a"),
    "scoped twice": lambda store: scoped(scoped(store, "a"), "b"),
    "acting_as": lambda store: acting_as(store, "w"),
    "guarded": lambda store: guarded(store, writer="w", read=["k"], write=["k"]),
}


@pytest.mark.parametrize("make", HANDLES.values(), ids=HANDLES)
async def test_closing_a_handle_ends_it_and_its_watches_never_the_store(make: Any, store: Any, colour: Colour) -> None:
    raw = colour.raw(store)
    handle = colour.face(make(raw if colour.name == "sync" else raw.aio))
    outside = raw.watch(prefix="")
    watch = await handle.watch("k")
    await handle.set("k", 1)

    await handle.close()
    await handle.close()

    last = watch.get_nowait()
    assert last is not None
    assert last.value == 1
    with pytest.raises(WatchClosed):
        watch.get_nowait()
    for use in (
        handle.get("k"),
        handle.set("k", 2),
        handle.scan("k"),
        handle.update("k", str),
        handle.wait_for("k", bool),
    ):
        with pytest.raises(StoreClosed):
            await use
    with pytest.raises(StoreClosed):
        await handle.watch("k")
    raw.set("still", 1)
    assert isinstance(outside.get(5), Change)


def test_closing_a_handle_ends_those_that_were_made_of_it(root: MemoryStore) -> None:
    outer = scoped(root, "a")
    inner, guard = scoped(acting_as(outer, "w"), "b"), guarded(outer, writer="w", read=["k"])
    watches = inner.watch("k"), guard.watch("k")

    outer.close()

    for watch in watches:
        with pytest.raises(WatchClosed):
            watch.get_nowait()
    for handle in (inner, guard):
        with pytest.raises(StoreClosed):
            handle.get("k")
    assert scoped(root, "a").get("k") is None


def test_a_handle_remembers_no_watch_that_is_gone(root: MemoryStore) -> None:
    handle: Any = scoped(root, "a")
    for _ in range(100):
        handle.watch("k")
    kept = handle.watch("k")

    assert len(handle.handle._watches) == 1
    del kept
    assert handle.handle._watches == {}


@pytest.mark.parametrize("make", HANDLES.values(), ids=HANDLES)
def test_a_handle_is_made_of_a_store(make: Any) -> None:
    with pytest.raises(TypeError):
        make({})
