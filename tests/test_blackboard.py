"""The blackboard recipe."""

from __future__ import annotations

import threading
from operator import add
from typing import Any

import pytest

from stigmergy import (
    AccessDenied,
    Check,
    Delete,
    Flow,
    InvalidKey,
    MemoryStore,
    Operation,
    RevisionConflict,
    Scan,
    Set,
    apply_middleware,
)
from stigmergy.recipes.blackboard import Blackboard, with_ownership
from stigmergy.testing import Colour


def board_on(store: Any, colour: Colour, **options: Any) -> Blackboard[Any]:
    raw = colour.raw(store)
    return Blackboard(raw.aio if colour.name == "async" else raw, **options)


async def test_writes_bear_the_agents_name_and_one_watch_has_them_in_order(store: Any, colour: Colour) -> None:
    board = board_on(store, colour, reducers={"notes": add})
    one, two = colour.face(board.agent("one")), colour.face(board.agent("two"))
    asked = board.watch("notes", "plan"), board.watch()
    watches = [await each if colour.name == "async" else each for each in asked]

    await one.set("plan", 1)
    await two.set("notes", ["x"])
    await one.set("other", 1)
    await one.set("notes", ["y"])

    seen = [[(change.key, change.writer) for change in await colour.drain(watch)] for watch in watches]
    assert seen[0] == [("plan", "one"), ("notes", "two"), ("notes", "one")]
    assert seen[1] == [("plan", "one"), ("notes", "two"), ("other", "one"), ("notes", "one")]
    assert await colour.face(board.all).get("notes") == ["x", "y"]
    assert await store.get("blackboard:notes") == ["x", "y"]


async def test_an_owned_key_belongs_to_whoever_wrote_it_first(store: Any, colour: Colour) -> None:
    board = board_on(store, colour, owned=["plan"], reducers={"plan": add}, scope="b")
    one, two = colour.face(board.agent("one")), colour.face(board.agent("two"))
    await one.set("plan", 1)

    for attempt in (
        two.set("plan", 2),
        two.set("plan", 2, if_revision=1),
        two.delete("plan"),
        two.update("plan", lambda value: value),
        two.commit(Set("free", 1), Delete("plan")),
    ):
        with pytest.raises(AccessDenied) as denied:
            await attempt
        assert denied.value.key == "plan"
    assert await two.get("plan") == 1
    assert await two.get("free") is None
    await one.set("plan", 1)
    assert await one.commit(Check("plan", 2), Delete("plan")) == (None, 3)
    await two.set("plan", 5)
    with pytest.raises(AccessDenied):
        await one.delete("plan")


async def test_conditions_of_the_callers_own_are_conflicts(store: Any, colour: Colour) -> None:
    board = board_on(store, colour, owned=["plan"])
    one = colour.face(board.agent("one"))
    await one.set("plan", 1)
    for writes in ([Set("plan", 2, if_revision=7)], [Delete("plan", 7)], [Set("plan", 2), Check("a", 7)]):
        with pytest.raises(RevisionConflict) as conflict:
            await one.commit(*writes)
        assert conflict.value.expected == 7
    assert await one.get("plan") == 1


async def test_ownership_is_decided_in_the_commit_for_conditional_writes_too(store: Any, colour: Colour) -> None:
    raw = colour.raw(store)

    def overtaking(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        if isinstance(operation, Scan) and raw.get("blackboard:plan") is None:
            raw.commit(Set("blackboard:plan", "mine", writer="planner"))
        return result

    critic = Blackboard(apply_middleware(raw, overtaking), owned=["plan"]).agent("critic")
    with pytest.raises(RevisionConflict):
        critic.set("plan", "stolen", if_revision=1)
    assert raw.get("blackboard:plan") == "mine"


@pytest.mark.parametrize("owned", ["plan", [""], [1], ["plan:"]])
def test_bad_lists_of_owned_keys_are_refused(owned: Any) -> None:
    with MemoryStore() as store, pytest.raises((TypeError, InvalidKey)):
        Blackboard(store, owned=owned)
    with pytest.raises((TypeError, InvalidKey)):
        with_ownership("a", owned)


def test_an_operation_of_an_unknown_kind_is_denied() -> None:
    class Sneak(Operation[Any]):
        __slots__ = ()
        name = "sneak"

        def apply(self, store: Any) -> Any:
            return store.set("plan", "stolen")

    def sneak() -> Flow[Any]:
        return (yield Sneak())

    with MemoryStore() as root:
        root.set("plan", "mine")
        with pytest.raises(AccessDenied):
            apply_middleware(root, with_ownership("critic", ["plan"])).run(sneak())
        assert root.get("plan") == "mine"


def test_of_many_that_want_a_key_one_owns_it() -> None:
    with MemoryStore() as store:
        board = Blackboard(store, owned=["plan"])
        for _ in range(50):
            barrier = threading.Barrier(4)
            owners: list[str] = []

            def write(name: str, barrier: threading.Barrier = barrier, owners: list[str] = owners) -> None:
                agent = board.agent(name)
                barrier.wait()
                try:
                    agent.set("plan", name)
                    owners.append(name)
                except AccessDenied:
                    pass

            threads = [threading.Thread(target=write, args=(f"w{number}",)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [board.all.get("plan")] == owners
            board.agent(owners[0]).delete("plan")
