"""What every provider promises that several processes share: each works on one place, and all of them see one order."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial

import pytest

from processes import PATIENCE, Child, Link, Start
from stigmergy import open_store
from stigmergy.testing.history import Client, Invocation, overlap
from stigmergy.testing.linearizability import check_linearizable, check_revisions
from stigmergy.testing.traffic import all_at_once

KEYS = ("a", "b", "c")

PLACES: dict[str, Callable[[pytest.FixtureRequest], str]] = {
    "sqlite": lambda request: f"sqlite:///{request.getfixturevalue('tmp_path') / 'state.db'}",
    "valkey": lambda request: f"{request.getfixturevalue('valkey').url}?namespace={os.urandom(6).hex()}",
    "redis62": lambda request: f"{request.getfixturevalue('redis62').url}?namespace={os.urandom(6).hex()}",
}
"""How to get the URL of a fresh place."""


@pytest.fixture(params=["sqlite", "valkey", pytest.param("redis62", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest) -> str:
    return PLACES[request.param](request)


def begin_together(children: list[Child]) -> None:
    for child in children:
        assert child.hear() == "ready"
    for child in children:
        child.say("go")


def record(link: Link, url: str, clients: list[int], keys: list[str], calls: int, seed: str) -> None:
    history: list[Invocation] = []
    with open_store(url) as store:
        store.get("a")
        link.say("ready")
        link.hear()
        traffic = [Client(store, number, history).traffic(keys, calls, seed) for number in clients]
        all_at_once([partial(store.run, flow) for flow in traffic])
    link.say(history)


@pytest.mark.parametrize("calls", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_clients_in_four_processes_see_one_order_of_all_that_happens(
    url: str, start: Start, calls: int, seed: str
) -> None:
    for attempt in range(5):  # a busy machine may let them run one after the other
        keys = [f"{key}{attempt}" for key in KEYS]
        children = [start(record, url, [2 * number, 2 * number + 1], keys, calls, seed) for number in range(4)]
        begin_together(children)

        # The clock of the histories is CLOCK_MONOTONIC, which all processes share.
        history = [invocation for child in children for invocation in child.hear()]

        assert check_linearizable(history) == []
        assert check_revisions(history) == []
        if overlap(history) >= 0.5:
            return
    pytest.fail("the processes have never met")


def change_there(link: Link, url: str) -> None:
    with open_store(url) as store:
        while (key := link.hear()) is not None:
            link.say(store.set(key, {"by": "another process"}))


def test_a_change_of_another_process_arrives(url: str, start: Start) -> None:
    with open_store(url) as store:
        watch, state = store.watch("a"), store.observe(prefix="")
        child = start(change_there, url)
        for _ in range(20):
            child.say("a")
            revision = child.hear()
            for change in (watch.get(timeout=PATIENCE), state.get(timeout=PATIENCE)):
                assert (change.key, change.value, change.revision) == ("a", {"by": "another process"}, revision)
        child.say(None)
        assert child.join() == 0


def test_what_one_process_wrote_another_one_reads_at_once(url: str, start: Start) -> None:
    with open_store(url) as store:
        child = start(change_there, url)
        for number in range(20):
            child.say(f"k{number}")
            revision = child.hear()
            entry = store.get_entry(f"k{number}")
            assert entry is not None
            assert entry.revision == revision == store.scan().revision


def wait_for_a_signal(link: Link, url: str) -> None:
    with open_store(url) as store, store.watch("a") as watch:
        store.set("a", 1)
        watch.get(timeout=PATIENCE)  # so whatever watches the place in the background has begun
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        link.say("ready")
        link.hear()
        link.say(signal.sigwait({signal.SIGTERM}))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_goes_to_the_thread_of_the_program_that_waits_for_it(url: str, start: Start) -> None:
    child = start(wait_for_a_signal, url)
    assert child.hear() == "ready"
    child.signal(signal.SIGTERM)
    child.say("go")
    assert child.hear() == signal.SIGTERM


def hear_of_changes(link: Link, url: str) -> None:
    with open_store(url) as store, store.watch(prefix="") as watch:
        link.say("ready")
        for change in watch:
            link.say((change.key, change.value, change.revision, change.old_revision, change.writer))
            if change.key == "end":
                return


def test_each_process_hears_of_the_same_changes_in_the_same_order(url: str, start: Start) -> None:
    with open_store(url) as store:
        children = [start(hear_of_changes, url) for _ in range(3)]
        for child in children:
            assert child.hear() == "ready"
        for number in range(100):
            store.set(f"k{number % 5}", number)
        store.set("end", None)

        heard = [child.rest() for child in children]

    assert [len(each) for each in heard] == [101] * 3
    assert heard[0] == heard[1] == heard[2]
    assert [revision for _, _, revision, _, _ in heard[0]] == list(range(1, 102))
