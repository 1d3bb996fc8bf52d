"""Forced preemption: the tool itself, and what holds between any two lines or opcodes of the store."""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from stigmergy import Entry, MemoryStore, Set
from stigmergy.testing.preemption import preemption
from stigmergy.testing.traffic import Between, all_at_once

ROUNDS = 300


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_what_was_set_is_as_before_afterwards(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(threading.settrace, threading.gettrace()))
    threading.settrace(lambda *_: None)  # a tool that measures coverage, say
    before = sys.getswitchinterval(), threading.gettrace()

    with preemption(1, between="opcode"):
        assert sys.getswitchinterval() < before[0]
        assert threading.gettrace() is not before[1]

    assert (sys.getswitchinterval(), threading.gettrace()) == before


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="threads need nobody's leave to run there"
)
@pytest.mark.parametrize("between", ["line", "opcode"])
def test_threads_take_turns_though_nobody_takes_the_gil_from_them(between: Between, seed: str) -> None:
    turns, deadline = [""], time.monotonic() + 30

    def take_turn(name: str) -> None:
        if turns[-1] != name:
            turns.append(name)

    def work(name: str) -> None:
        while len(turns) < 10 and time.monotonic() < deadline:
            take_turn(name)

    with preemption(seed, between=between, inside=Path(__file__).parent):
        sys.setswitchinterval(5)  # without the tracer, six turns in half a minute
        all_at_once([partial(work, "a"), partial(work, "b")])

    assert len(turns) >= 10


def value(entry: Entry | None) -> int:
    return 0 if entry is None else entry.value


@pytest.mark.parametrize("between", ["line", "opcode"])
@pytest.mark.parametrize(
    "read",
    [lambda store, key: store.get(key, 0), lambda store, key: value(store.get_entry(key))],
    ids=["get", "get_entry"],
)
def test_whoever_sees_one_write_of_a_commit_sees_all(
    store: MemoryStore, between: Between, read: Callable[[MemoryStore, str], int], seed: str
) -> None:
    done = threading.Event()

    def write() -> None:
        for number in range(1, ROUNDS + 1):
            store.commit(Set("a", number), Set("b", number), Set("c", number))
        done.set()

    def look() -> None:
        while not done.is_set():
            seen = [read(store, key) for key in "abc"]
            assert seen == sorted(seen), "half a commit"

    with preemption(seed, between=between, share=0.05 if between == "line" else 0.01):
        all_at_once([write, look, look])


@pytest.mark.parametrize("between", ["line", "opcode"])
def test_a_reader_that_waits_is_woken_whatever_comes_between(store: MemoryStore, between: Between, seed: str) -> None:
    there, back = store.watch("there"), store.watch("back")

    def ask() -> None:
        with store:  # whoever fails lets the other one go
            for number in range(2 * ROUNDS):
                store.set("there", number)
                assert back.get(timeout=60).value == number

    def answer() -> None:
        with store:
            for number in range(2 * ROUNDS):
                assert there.get(timeout=60).value == number
                store.set("back", number)

    with preemption(seed, between=between, share=0.02 if between == "line" else 0.003):
        all_at_once([ask, answer])
