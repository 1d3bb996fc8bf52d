"""One strike at each place where one can come, inside each operation: an interrupt, or somebody who uses the store.

CPython lets signal handlers and finalisers in around calls, at the start of functions, where containers are allocated,
and at the end of a loop's round. `strike` is there.
"""

from __future__ import annotations

import dis
import gc
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from threading import RLock
from types import CodeType, FrameType
from typing import Any

import pytest

import stigmergy
from stigmergy import Change, Delete, MemoryStore, Op, OpenWatch, RevisionConflict, Set, Watch
from stigmergy.hub import Hub

LIBRARY = str(Path(stigmergy.__file__).parent)

OPERATIONS: dict[str, Callable[[MemoryStore], object]] = {
    "set": lambda store: store.set("a", 1),
    "set with ttl": lambda store: store.set("a", 2, ttl=1000),
    "create": lambda store: store.set("new", 3),
    "commit": lambda store: store.commit(Set("b", 1), Set("a", 4), Delete("c")),
    "delete": lambda store: store.delete("a"),
    "update": lambda store: store.update("a", lambda value: (value or 0) + 1),
    "scan": lambda store: store.scan("a"),
    "expire": lambda store: (store._clock.advance(10), store.get("short")),  # type: ignore[attr-defined]
    "watch": lambda store: store.watch("a", since=store.scan().revision).close(),
    "observe": lambda store: store.observe(prefix="").get_nowait(),
}


@cache
def places(code: CodeType) -> frozenset[int]:
    """The offsets of what is executed right after instructions that let somebody in."""
    instructions = list(dis.get_instructions(code))
    letting_in = ("CALL", "RESUME", "POP_JUMP_BACKWARD", "BUILD_")
    behind = {after.offset for each, after in pairwise(instructions) if each.opname.startswith(letting_in)}
    return frozenset(behind | {each.argval for each in instructions if each.opname.startswith("JUMP_BACKWARD")})


Place = tuple[CodeType, int]


def in_library(code: CodeType) -> bool:
    # Finalisers and the callbacks of weak references belong to what an earlier round left.
    return code.co_filename.startswith(LIBRARY) and code.co_name not in ("__del__", "_stop", "_forget")


def traced(function: Callable[[], object], at: Callable[[Place], None]) -> None:
    """Call `function`, and `at` at each place inside the library that this thread comes by."""
    gc.disable()
    try:
        (traced_by_monitoring if sys.version_info >= (3, 12) else traced_by_settrace)(function, at)
    finally:
        gc.enable()


def traced_by_settrace(function: Callable[[], object], at: Callable[[Place], None]) -> None:
    def local(frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode" and frame.f_lasti in places(frame.f_code):
            at((frame.f_code, frame.f_lasti))
        return local

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not in_library(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return local

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)


def traced_by_monitoring(function: Callable[[], object], at: Callable[[Place], None]) -> None:
    # From 3.12 on `settrace` traces the opcodes of a code object now, and another time does not.
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined, unused-ignore]
    tool, event, thread = monitoring.DEBUGGER_ID, monitoring.events.INSTRUCTION, threading.get_ident()

    def instruction(code: CodeType, offset: int) -> Any:
        if not in_library(code):
            return monitoring.DISABLE
        if threading.get_ident() == thread and offset in places(code):
            at((code, offset))
        return None

    monitoring.use_tool_id(tool, "strikes")
    monitoring.register_callback(tool, event, instruction)
    monitoring.set_events(tool, event)
    try:
        function()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


def places_in(function: Callable[[], object]) -> list[Place]:
    """The places that a call of `function` comes by, each once."""
    found: dict[Place, None] = {}
    traced(function, lambda place: found.setdefault(place))
    assert len(found) > 10
    return list(found)


def strike(function: Callable[[], object], place: Place, action: Callable[[], object]) -> None:
    """Call `function`, and `action` when it comes by `place` for the first time."""
    struck = False

    def at(here: Place) -> None:
        nonlocal struck
        if here == place and not struck:
            struck = True
            action()

    traced(function, at)


def filled(clock: Any) -> MemoryStore:
    store = MemoryStore(history=4, clock=clock)
    for key in "abc":
        store.set(key, 0)
    store.set("short", 0, ttl=5)
    return store


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("operation", ["set", "set with ttl", "commit", "delete"])
def test_a_parked_reader_hears_of_a_write_wherever_an_interrupt_strikes_its_writer(operation: str, clock: Any) -> None:
    operate = OPERATIONS[operation]
    store = filled(clock)
    store.watch("a")
    for place in places_in(partial(operate, store)):
        store = filled(clock)
        watch = store.watch("a")
        reader = parked(watch)
        before = store._revision
        with suppress(KeyboardInterrupt):
            strike(partial(operate, store), place, interrupt)

        if store._revision > before:
            reader.join(timeout=60)
            assert not reader.is_alive(), place
        store.close()
        reader.join(timeout=60)
        assert not reader.is_alive(), place


@pytest.mark.parametrize("closing", [lambda store, watch: store.close(), lambda store, watch: watch.close()])
def test_readers_wake_wherever_an_interrupt_strikes_a_close(closing: Callable[..., None], clock: Any) -> None:
    store = filled(clock)
    for place in places_in(partial(closing, store, store.watch("a"))):
        store = filled(clock)
        watch = store.watch("a")
        reader = parked(watch)
        with suppress(KeyboardInterrupt):
            strike(partial(closing, store, watch), place, interrupt)

        if watch._subscription.ended:
            reader.join(timeout=60)
            assert not reader.is_alive(), place
        store.close()
        reader.join(timeout=60)
        assert not reader.is_alive(), place


def parked(watch: Watch) -> threading.Thread:
    """A thread that reads `watch` to its end, or its first change, and waits for it already."""
    reader = threading.Thread(target=next, args=(watch, None))
    reader.start()
    while not watch._subscription.waiters:
        pass
    return reader


@pytest.mark.parametrize("outer", OPERATIONS)
def test_whoever_uses_the_store_inside_an_operation_disturbs_nothing(outer: str, clock: Any) -> None:
    operate = OPERATIONS[outer]
    inners = cycle(OPERATIONS.values())
    for place in places_in(partial(operate, watched(clock)[0])):
        for inner in islice(inners, 2):
            store, every, small, state = watched(clock)
            with suppress(RevisionConflict):
                strike(partial(operate, store), place, partial(inner, store))

            agree(store, list(iter(every.get_nowait, None)), list(iter(state.get_nowait, None)))
            assert small.dropped == sum(change.missed for change in iter(small.get_nowait, None)), place
            store.close()


def watched(clock: Any) -> tuple[MemoryStore, Watch, Watch, Watch]:
    store = filled(clock)
    every = store.watch(prefix="", since=0, capacity=None)
    return store, every, store.watch(prefix="", capacity=1), store.observe(prefix="")


def agree(store: MemoryStore, changes: list[Change], states: list[Change]) -> None:
    """The watch has every revision with a true old value, and ends where the dict, a scan and observe are."""
    present = {key: entry.value for key, entry in store.scan().items()}
    assert [change.revision for change in changes] == list(range(1, store._revision + 1))
    assert replayed(changes) == present == replayed(states)
    assert {key: store.get(key) for key in present} == present


def replayed(changes: list[Change]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for change in changes:
        assert state.get(change.key) == change.old_value
        if change.op is Op.SET:
            state[change.key] = change.value
        else:
            del state[change.key]
    return dict(sorted(state.items()))


# -- what another thread does meanwhile --------------------------------------------------------------------------------


def test_a_reader_of_a_closed_watch_wakes_wherever_an_interrupt_strikes_the_one_who_wakes_it(clock: Any) -> None:
    def closed_by_another_thread() -> tuple[MemoryStore, threading.Thread]:
        store = filled(clock)
        watch = store.watch("b")
        reader = parked(watch)
        with store._hub.lock:
            store._hub._end([watch._subscription])  # and before it wakes anybody, the next one writes
        return store, reader

    write = OPERATIONS["set"]
    for place in places_in(partial(write, closed_by_another_thread()[0])):
        store, reader = closed_by_another_thread()
        with suppress(KeyboardInterrupt):
            strike(partial(write, store), place, interrupt)
        store.set("c", 1)

        reader.join(timeout=60)
        assert not reader.is_alive(), place


def test_a_full_watch_stays_in_order_though_another_thread_releases_what_it_drops() -> None:
    class Writes:
        def __init__(self, store: MemoryStore) -> None:
            self.store = store

        def __del__(self) -> None:
            self.store.set("b", "from the finaliser")

    def full() -> tuple[MemoryStore, Watch]:
        store = MemoryStore(history=0, copy=None)
        watch = store.watch(prefix="", capacity=2)
        store.set("a", Writes(store))
        store.delete("a")
        store.set("c", 1)  # and so the oldest change has the only reference
        return store, watch

    def write(store: MemoryStore) -> None:
        store.set("b", 2)

    store, watch = full()
    for place in places_in(partial(write, store)):
        store, watch = full()
        strike(partial(write, store), place, store._hub.to_release.clear)

        revisions = [change.revision for change in iter(watch.get_nowait, None)]
        assert revisions == sorted(revisions), place


def test_the_timer_goes_on_wherever_an_interrupt_strikes_its_start() -> None:
    for place in places_in(lambda: MemoryStore().set("a", 1, ttl=3600)):
        with MemoryStore() as store, store.watch("b") as watch:
            with suppress(KeyboardInterrupt):
                strike(lambda: store.set("a", 1, ttl=3600), place, interrupt)
            store.set("b", 1, ttl=0.005)

            assert [watch.get(timeout=60).expired for _ in range(2)] == [False, True], place


# -- writes that nobody watches: one section, without the way of the others --------------------------------------------


def unwatched() -> MemoryStore:
    store = MemoryStore(history=4)
    for key in "abc":
        store.set(key, 0)
    return store


OPENINGS: dict[str, Callable[[MemoryStore], Watch]] = {
    "its key": lambda store: store.watch("a"),
    "a prefix": lambda store: store.watch(prefix="a"),
    "everything": lambda store: store.watch(prefix=""),
}


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_write_that_nobody_watched_reaches_what_was_opened_in_its_midst(opening: str) -> None:
    write = OPERATIONS["set"]
    opened: list[tuple[Watch, int]] = []

    def open_one() -> None:
        watch = OPENINGS[opening](store)
        opened.append((watch, watch.revision))

    for place in places_in(partial(write, unwatched())):
        store = unwatched()
        strike(partial(write, store), place, open_one)
        watch, since = opened.pop()
        store.set("a", 2)

        heard = [(change.revision, change.value) for change in iter(watch.get_nowait, None)]
        assert heard == [(4, 1), (5, 2)][since - 3 :], place


@pytest.mark.parametrize("inner", [name for name in OPERATIONS if name != "expire"])
def test_whoever_uses_the_store_inside_a_write_that_nobody_watches_disturbs_nothing(inner: str) -> None:
    for place in places_in(partial(OPERATIONS["set"], unwatched())):
        store = unwatched()
        strike(partial(OPERATIONS["set"], store), place, partial(OPERATIONS[inner], store))
        store.set("c", 5)

        changes = list(iter(store.watch(prefix="", since=max(store._revision - 4, 0)).get_nowait, None))
        assert [change.revision for change in changes] == list(range(store._revision + 1))[-len(changes) :], place
        for key in "abc":
            latest = [change.value for change in changes if change.key == key][-1:]
            assert latest in ([], [store.get(key)]), place
        assert store._pending is None


def test_an_interrupt_leaves_a_write_that_nobody_watches_done_or_not_done() -> None:
    for place in places_in(partial(OPERATIONS["set"], unwatched())):
        store = unwatched()
        with suppress(KeyboardInterrupt):
            strike(partial(OPERATIONS["set"], store), place, interrupt)
        done = store.get("a")

        assert store.set("b", 2) == 4 + done, place
        changes = list(iter(store.watch(prefix="", since=3).get_nowait, None))
        assert [(change.key, change.value) for change in changes] == [("a", 1)] * done + [("b", 2)], place


def test_a_write_finds_every_prefix_though_watches_join_and_leave_in_its_midst() -> None:
    prefixes = ["job/1", "job/12", "job/12/a", "job/13"]

    def open_hub() -> tuple[Hub, list[Watch]]:
        # Of a log: what is published there is not published again by whoever comes in between.
        hub = Hub(lock=RLock(), settle=bool, key=str, changed=lambda each: each, deliver=lambda each: each, history=0)
        return hub, [open_in(hub, prefix) for prefix in [*prefixes, "job/11", "z"]]

    def open_in(hub: Hub, prefix: str) -> Watch:
        return hub.locked(hub.open, OpenWatch(prefix=prefix), list)

    def publish(hub: Hub) -> None:
        hub.locked(hub.publish, 1, "job/12/a", Change(Op.SET, "job/12/a", 1, None, 1, 0, 1, None, 0.0, False, 0, None))

    hub, watches = open_hub()
    for place in places_in(partial(publish, hub)):
        for others in (["job/0"], ["job/12/"], ["zz"], ["job/12/a/b", ""]):
            hub, watches = open_hub()
            joined: list[Watch] = []
            strike(partial(publish, hub), place, lambda: joined.extend(open_in(hub, other) for other in others))  # noqa: B023
            reached = [watch.get_nowait() is not None for watch in watches]
            assert reached == [True, True, True, False, False, False], (place, others)

            hub, watches = open_hub()
            joined = [open_in(hub, other) for other in others]
            strike(partial(publish, hub), place, lambda: [watch.close() for watch in joined])  # noqa: B023
            reached = [watch.get_nowait() is not None for watch in watches]
            assert reached == [True, True, True, False, False, False], (place, others)
