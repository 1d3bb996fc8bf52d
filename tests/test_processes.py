"""Processes and interpreters: a store stays in its own, and a child that was forked gets a whole one."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Self

import pytest

import stigmergy
from processes import PATIENCE, eventually
from stigmergy import Hooks, MemoryStore, Set, StoreClosed, Watch, apply_middleware, with_hooks

# -- spawn -------------------------------------------------------------------------------------------------------------

BELONGINGS: dict[str, Callable[[MemoryStore], object]] = {
    "store": lambda store: store,
    "async face": lambda store: store.aio,
    "with middleware": lambda store: apply_middleware(store, with_hooks(Hooks())),
    "async with middleware": lambda store: apply_middleware(store.aio, with_hooks(Hooks())),
    "watch": lambda store: store.watch("a"),
    "bound method": lambda store: store.get,
    "inside a list": lambda store: [{"store": store}],
}
every_belonging = pytest.mark.parametrize("belonging", BELONGINGS.values(), ids=BELONGINGS.keys())


def use(anything: object) -> None:
    raise AssertionError("never reached")


@every_belonging
def test_what_belongs_to_a_process_cannot_be_copied_and_says_so(
    belonging: Callable[[MemoryStore], object],
) -> None:
    with MemoryStore() as store:
        thing = belonging(store)
        for take in (copy.deepcopy, *(lambda x, p=p: pickle.dumps(x, p) for p in range(pickle.HIGHEST_PROTOCOL + 1))):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                take(thing)
        assert store.set("a", 1) == 1


@every_belonging
def test_what_belongs_to_a_process_is_refused_by_spawn_before_a_child_starts(
    belonging: Callable[[MemoryStore], object],
) -> None:
    with MemoryStore() as store:
        process = multiprocessing.get_context("spawn").Process(target=use, args=(belonging(store),))
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            process.start()

        assert store.set("a", 1) == 1


def use_a_store_of_its_own(values: Any) -> None:
    with MemoryStore() as store:
        watch = store.watch("a", "short")
        assert store.set("a", 1) == 1
        store.set("short", 1, ttl=0.01)
        changes = [watch.get(timeout=PATIENCE) for _ in range(3)]
        values.put([(change.key, change.revision, change.expired) for change in changes])


def test_a_spawned_child_has_a_store_of_its_own() -> None:
    context = multiprocessing.get_context("spawn")
    values = context.SimpleQueue()
    with MemoryStore() as store:
        for number in range(5):
            store.set("a", number)
        process = context.Process(target=use_a_store_of_its_own, args=(values,))
        process.start()
        try:
            process.join(timeout=PATIENCE)
        finally:
            process.kill()

        assert process.exitcode == 0
        assert values.get() == [("a", 1, False), ("short", 2, False), ("short", 3, True)]
        assert store.scan().revision == 5


# -- interpreters ------------------------------------------------------------------------------------------------------

IN_AN_INTERPRETER = """
import os, sys
sys.path[:0] = {path!r}
try:
    from stigmergy import MemoryStore, StoreClosed
    store = MemoryStore()
    watch = store.watch("a", "short")
    assert store.set("a", [1]) == 1
    store.set("short", 1, if_revision=0)
    assert store.update("a", lambda value: [*value, 2]) == [1, 2]
    assert [watch.get(timeout=60).revision for _ in range(3)] == [1, 2, 3]
    store.close()
    try:
        store.get("a")
    except StoreClosed:
        os.write({descriptor}, b"well ")
except BaseException as error:
    os.write({descriptor}, repr(error).encode())
"""


def interpreters() -> ModuleType:
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(name)
        except ImportError:
            continue
    pytest.skip("this Python has no interpreters beside the main one")


def test_each_interpreter_of_a_process_has_stores_of_its_own() -> None:
    module = interpreters()
    reading, writing = os.pipe()
    try:
        with MemoryStore() as store:
            store.set("a", "of the main one")
            code = IN_AN_INTERPRETER.format(path=[str(Path(stigmergy.__file__).parents[1])], descriptor=writing)
            for _ in range(2):
                interpreter = module.create()
                try:
                    module.run_string(interpreter, code)
                finally:
                    module.destroy(interpreter)

            assert os.read(reading, 4096) == b"well well "
            assert store.get("a") == "of the main one"
            assert store.set("a", 2) == 2
    finally:
        os.close(reading)
        os.close(writing)


# -- fork in the middle of a commit ------------------------------------------------------------------------------------

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
MANY_THREADS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
MOMENTS = ["_enter_while_locked", "_decide", "_commit_point", "_settle", "touch", "publish", "_fan_out", "put"]


class Halted:
    """A thread that writes, and halts with the store's lock in hand on its way into the library's function `name`."""

    def __init__(self, write: Callable[[], object], name: str) -> None:
        self._write = write
        self._name = name
        self._there = threading.Event()
        self._go_on = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._there.wait(timeout=PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._thread.join(timeout=PATIENCE)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        sys.settrace(self._trace)
        try:
            self._write()
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> None:
        if frame.f_code.co_name == self._name and not self._there.is_set():
            self._there.set()
            self._go_on.wait(timeout=PATIENCE)


def is_locked(store: MemoryStore) -> bool:
    free = store._lock.acquire(blocking=False)
    if free:
        store._lock.release()
    return not free


def in_child(function: Callable[[], object]) -> int:
    """Call `function` in a forked child; return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE))
            function()
            code = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@FORK
@MANY_THREADS
@pytest.mark.parametrize("times", [1, pytest.param(13, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fork_in_the_middle_of_a_commit_gives_the_child_all_of_it_or_nothing(moment: str, times: int) -> None:
    for _ in range(times):
        with MemoryStore() as store:
            store.commit(Set("a", 0), Set("b", 0), Set("old", 0, ttl=3600))
            watch = store.watch(prefix="", capacity=None)

            def child(store: MemoryStore = store, watch: Watch = watch) -> None:
                snapshot = store.scan()
                values = [store.get(key) for key in ("a", "b", "c")]
                assert values in ([0, 0, None], [1, 1, 1]), values
                assert snapshot.revision == (3 if values[0] == 0 else 6)
                told = [change.revision for change in watch]  # what was buffered, and then the end
                assert told == ([] if values[0] == 0 else [4, 5, 6]), told
                mine = store.watch("a")
                assert store.set("a", 2) == snapshot.revision + 1
                assert mine.get(timeout=PATIENCE).old_value == values[0]
                store.close()

            def write(store: MemoryStore = store) -> None:
                store.commit(Set("a", 1), Set("b", 1), Set("c", 1, ttl=3600))

            with Halted(write, moment):
                assert is_locked(store)
                assert in_child(child) == 0

            assert [change.revision for change in iter(watch.get_nowait, None)] == [4, 5, 6]
            assert store.get_many(["a", "b", "c"]) == {"a": 1, "b": 1, "c": 1}
            assert store.set("a", 2) == 7


@contextmanager
def halted_in_clock() -> Iterator[tuple[MemoryStore, threading.Thread]]:
    """A store whose lock is held by a thread that waits for the time."""
    asked, tell = threading.Event(), threading.Event()

    def clock() -> float:
        if threading.current_thread() is thread:
            asked.set()
            tell.wait(timeout=PATIENCE)
        return 0.0

    store = MemoryStore(clock=clock)
    thread = threading.Thread(target=lambda: store.set("a", 1, ttl=10))
    thread.start()
    try:
        assert asked.wait(timeout=PATIENCE)
        yield store, thread
    finally:
        tell.set()
        thread.join(timeout=PATIENCE)
        store.close()


@FORK
@MANY_THREADS
def test_a_fork_while_the_clock_keeps_a_writer_waiting_leaves_both_processes_a_store_that_works() -> None:
    with halted_in_clock() as (store, thread):
        assert is_locked(store)

        def child() -> None:
            assert store.get("a") is None
            assert store.set("a", 2, ttl=20) == 1

        assert in_child(child) == 0
        assert thread.is_alive()
    assert not thread.is_alive()


@FORK
@MANY_THREADS
@pytest.mark.parametrize("moment", ["_end", "end", "_members"])
def test_a_fork_in_the_middle_of_a_close_gives_the_child_a_closed_store(moment: str) -> None:
    store = MemoryStore()
    watch = store.watch("a")
    store.set("a", 1)

    def child() -> None:
        for operation in (lambda: store.get("a"), lambda: store.set("a", 1), store.scan, lambda: store.watch("a")):
            with pytest.raises(StoreClosed):
                operation()
        assert [change.value for change in watch] == [1]

    with Halted(store.close, moment):
        assert in_child(child) == 0

    assert [change.value for change in watch] == [1]
    with pytest.raises(StoreClosed):
        store.get("a")


@FORK
@MANY_THREADS
def test_a_fork_while_a_reader_is_parked_leaves_the_reader_to_the_parent() -> None:
    with MemoryStore() as store:
        watch = store.watch("a")
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.append(watch.get(timeout=PATIENCE).value))
        reader.start()
        eventually(lambda: watch._subscription.waiters)

        def child() -> None:
            assert list(watch) == []
            store.set("a", "the child's")

        assert in_child(child) == 0
        assert not got
        store.set("a", "the parent's")
        reader.join(timeout=PATIENCE)
        assert got == ["the parent's"]


@FORK
def test_a_forked_child_of_a_forked_child_has_a_store_too() -> None:
    with MemoryStore() as store:
        store.set("a", 1)

        def grandchild() -> None:
            assert store.update("a", lambda value: value + 1) == 3

        def child() -> None:
            assert store.update("a", lambda value: value + 1) == 2
            assert in_child(grandchild) == 0
            assert store.get("a") == 2

        assert in_child(child) == 0
        assert store.get("a") == 1


DETACHES = """
import os, sys, threading
from stigmergy import MemoryStore
from stigmergy._core.fork import after_fork_in_child

class Owner:
    pass

def fail(owner):
    raise ZeroDivisionError

owner = Owner()
after_fork_in_child(owner, fail)
store = MemoryStore()
held, go_on = threading.Event(), threading.Event()

def hold():
    with store._lock:
        held.set()
        go_on.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(store.set("a", 1))
go_on.set()
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_one_that_cannot_be_detached_in_a_child_keeps_no_other_from_it() -> None:
    done = subprocess.run([sys.executable, "-c", DETACHES], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    assert done.stderr.count("ZeroDivisionError") == 1
