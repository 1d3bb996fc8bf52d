"""Every line of the Go original's state package, here, in both colours; and its defects, gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stigmergy import (
    Change,
    Hooks,
    MemoryStore,
    Op,
    RevisionConflict,
    Scope,
    StoreClosed,
    apply_middleware,
    compose_hooks,
    list_providers,
    open_async_store,
    open_store,
    register,
    scoped_key,
    with_hooks,
)


async def test_a_store_is_opened_through_the_registry_by_its_name(colour: Any) -> None:
    store = colour.face(open_store("inmemory"))
    await store.set(scoped_key(Scope.AGENT, "counter"), 42)
    assert await store.get(scoped_key(Scope.AGENT, "counter")) == 42
    await store.close()


async def test_an_async_store_is_opened_through_the_registry_by_its_name() -> None:
    async with open_async_store("inmemory") as store:
        await store.set("counter", 42)
        assert await store.get("counter") == 42


async def test_a_store_is_constructed_directly(colour: Any) -> None:
    store = colour.face(MemoryStore())
    await store.set("counter", 42)
    assert await store.get("counter") == 42
    await store.close()


@pytest.mark.thread_unsafe  # there is one registry
async def test_providers_are_registered_and_listed(colour: Any) -> None:
    if "from-go" not in list_providers():
        register("from-go", lambda url, **options: MemoryStore(**options))

    store = colour.face(open_store("from-go", history=3))
    await store.set("a", 1)

    assert {"from-go", "inmemory", "memory"} <= set(list_providers())
    assert list_providers() == sorted(list_providers())
    await store.close()


async def test_get_returns_the_value_or_none_and_get_entry_tells_none_from_absence(store: Any) -> None:
    assert await store.get("absent") is None
    await store.set("none", None)
    assert await store.get("none") is None
    assert await store.get_entry("absent") is None
    assert await store.get_entry("none") is not None


async def test_set_overwrites_and_returns_the_revision(store: Any) -> None:
    assert await store.set("a", 1) < await store.set("a", 2)
    assert await store.get("a") == 2


async def test_delete_is_a_no_op_when_the_key_is_absent_and_says_so(store: Any) -> None:
    await store.set("a", 1)
    assert [await store.delete("a"), await store.delete("a"), await store.get("a")] == [True, False, None]


async def test_many_watches_observe_one_key_with_old_values(store: Any, colour: Any) -> None:
    watches = [await store.watch("agent:status", capacity=16) for _ in range(3)]
    await store.set("agent:status", "active")
    await store.set("agent:status", "idle")
    await store.delete("agent:status")

    for watch in watches:
        changes = [await colour.get(watch) for _ in range(3)]
        assert all(isinstance(change, Change) for change in changes)
        assert [(change.op, change.key, change.value, change.old_value) for change in changes] == [
            (Op.SET, "agent:status", "active", None),
            (Op.SET, "agent:status", "idle", "active"),
            (Op.DELETE, "agent:status", None, "idle"),
        ]


async def test_a_full_watch_drops_visibly(store: Any, colour: Any) -> None:
    watch = await store.watch("a", capacity=16)
    for number in range(20):
        await store.set("a", number)

    first = await colour.get(watch)
    assert (watch.dropped, first.missed, first.value) == (4, 4, 4)


async def test_a_watch_ends_when_it_is_closed(store: Any, colour: Any) -> None:
    watch = await store.watch("a")
    watch.close()
    assert await colour.all(watch) == []


async def test_a_watch_ends_when_the_with_block_is_left(store: Any, colour: Any) -> None:
    async with store.watch("a") as watch:
        await store.set("a", 1)
    assert [change.value for change in await colour.all(watch)] == [1]


async def test_a_watch_ends_when_the_store_is_closed(store: Any, colour: Any) -> None:
    watch = await store.watch("a")
    await store.close()
    assert await colour.all(watch) == []


async def test_cancelling_the_task_ends_its_wait() -> None:
    async with open_async_store("inmemory") as store:
        task = asyncio.create_task((await store.watch("a")).aget())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_timeout_reaches_every_waiting_operation(store: Any, colour: Any) -> None:
    with pytest.raises(TimeoutError):
        await colour.get(await store.watch("a"), 0.01)
    with pytest.raises(TimeoutError):
        await store.wait_for("a", lambda value: True, timeout=0.01)


async def test_close_twice_is_fine_and_operations_after_it_fail(store: Any) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreClosed):
        await store.set("a", 1)


@pytest.mark.parametrize(
    ("scope", "key"), [(Scope.AGENT, "agent:k"), (Scope.SESSION, "session:k"), (Scope.GLOBAL, "global:k")]
)
async def test_scoped_keys_are_what_they_were(store: Any, scope: Scope, key: str) -> None:
    await store.set(scoped_key(scope, "k"), 5)
    assert scoped_key(scope, "k") == key
    assert await store.get(key) == 5


async def test_a_scoped_key_may_belong_to_one_owner(store: Any) -> None:
    await store.set(scoped_key(Scope.AGENT, "counter", owner="planner"), 1)
    assert await store.get("agent/planner:counter") == 1


async def test_hooks_are_applied_as_middleware_and_compose(colour: Any) -> None:
    calls: list[Any] = []
    hooks = compose_hooks(
        Hooks(after_set=lambda key, value, error: calls.append(("first", key, value, error))),
        Hooks(after_set=lambda key, value, error: calls.append(("second", key, value, error))),
    )
    store = colour.face(apply_middleware(MemoryStore(), with_hooks(hooks)))
    await store.set("key", "value")

    assert calls == [("first", "key", "value", None), ("second", "key", "value", None)]
    await store.close()


async def test_get_versioned_is_get_entry_and_compare_and_swap_is_if_revision(store: Any) -> None:
    await store.set("a", 1)
    entry = await store.get_entry("a")
    await store.set("a", 2, if_revision=entry.revision)
    with pytest.raises(RevisionConflict):
        await store.set("a", 3, if_revision=entry.revision)


# -- what was a defect there -------------------------------------------------------------------------------------------


async def test_no_stale_compare_and_swap_succeeds_after_delete_and_recreate(store: Any) -> None:
    stale = await store.set("a", 1)
    await store.delete("a")
    await store.set("a", 1)
    with pytest.raises(RevisionConflict):
        await store.set("a", 2, if_revision=stale)


async def test_no_live_object_is_handed_out(store: Any) -> None:
    await store.set("a", {"n": 1})
    (await store.get("a"))["n"] = 2
    assert await store.get("a") == {"n": 1}


async def test_middleware_does_not_lose_compare_and_swap_and_hooks_see_it(colour: Any) -> None:
    seen: list[Any] = []
    hooks = Hooks(before_set=lambda key, value: seen.append(value))
    store = colour.face(apply_middleware(MemoryStore(), with_hooks(hooks)))
    revision = await store.set("a", 1)
    await store.set("a", 2, if_revision=revision)
    with pytest.raises(RevisionConflict):
        await store.set("a", 3, if_revision=revision)

    assert (await store.get("a"), seen) == (2, [1, 2, 3])
    await store.close()


async def test_an_error_hook_cannot_make_a_failed_write_a_success(colour: Any) -> None:
    store = colour.face(apply_middleware(MemoryStore(), with_hooks(Hooks(on_error=lambda error: None))))
    with pytest.raises(ValueError, match="ttl"):
        await store.set("a", 1, ttl=-1)
    await store.set("a", 1)
    with pytest.raises(RevisionConflict):
        await store.set("a", 1, if_revision=9)
    await store.close()
