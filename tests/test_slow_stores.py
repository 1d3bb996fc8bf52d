"""The conformance suite does not condemn a store for being slow, nor for what a busy machine does to it.

The host's time is played here: it stands still, but for what a store or the suite spends of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from broken_stores import Healthy
from stigmergy import Check, Compacted, Delete, MemoryStore, OpenWatch, Set, Store, Watch
from stigmergy.testing import Colour, HostClock, check_watched, record_watches
from stigmergy.testing import clock as clock_module
from stigmergy.testing.conformance import interleaving
from stigmergy.testing.conformance.concurrency import Concurrency
from stigmergy.testing.conformance.deadlines import Deadlines
from stigmergy.testing.conformance.interleaving import Interleaving
from stigmergy.testing.report import Figures

pytestmark = pytest.mark.thread_unsafe  # the module `time` is replaced

Writes = Set | Delete | Check
Revisions = tuple[int | None, ...]


class Host:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(clock_module, "time", host)
    return host


# -- slow stores -------------------------------------------------------------------------------------------------------


class Slow(Healthy):
    """Each commit takes as long as `pause` says: the `share` before it is a fact, the rest after."""

    def __init__(self, host: Host, pause: Callable[[int], float], share: float) -> None:
        super().__init__(clock=host.monotonic)
        self._host = host
        self._pause = pause
        self._share = share
        self._commits = count(1)

    def commit(self, *writes: Writes) -> Revisions:
        pause = self._pause(next(self._commits))
        self._host.sleep(pause * self._share)
        revisions = super().commit(*writes)
        self._host.sleep(pause * (1 - self._share))
        return revisions


PAUSES: dict[str, Callable[[int], float]] = {
    "never": lambda commit: 0.0,
    "always": lambda commit: 0.3,
    "every third commit": lambda commit: 0.0 if commit % 3 else 0.3,
    "suspended once": lambda commit: 2.0 if commit == 2 else 0.0,
}
LAWS = [
    test
    for name, test in vars(Deadlines).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["self", "store", "colour", "clock"]
]
OF_TIMERS = {"test_a_timer_expires_what_nobody_asks_for", "test_an_earlier_deadline_overtakes_a_later_one"}
"""They wait for what happens by itself, which it does not by a clock that is played."""


def judge(law: Any, store: Store, colour: Colour) -> None:
    try:
        colour.run(law(Deadlines(), colour.face(store), colour, HostClock()))
    finally:
        store.close()


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["after", "before"])
@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ not in OF_TIMERS], ids=lambda law: law.__name__)
def test_a_store_whose_commits_take_long_keeps_the_laws_of_deadlines(
    host: Host, colour: Colour, law: Any, pause: Callable[[int], float], share: float
) -> None:
    judge(law, Slow(host, pause, share), colour)


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ not in OF_TIMERS], ids=lambda law: law.__name__)
def test_a_store_that_is_far_too_slow_is_not_condemned(host: Host, colour: Colour, law: Any) -> None:
    with suppress(pytest.skip.Exception):
        judge(law, Slow(host, lambda commit: 100.0, 0.5), colour)


# -- broken stores -----------------------------------------------------------------------------------------------------


class Early(Slow):
    """Its entries are gone when half of their ttl has passed."""

    def commit(self, *writes: Writes) -> Revisions:
        return super().commit(*(_with_ttl(write, lambda ttl: ttl / 2) for write in writes))


class Never(Slow):
    """Its entries stay."""

    def commit(self, *writes: Writes) -> Revisions:
        return super().commit(*(_with_ttl(write, lambda ttl: None) for write in writes))


def _with_ttl(write: Writes, change: Callable[[float], float | None]) -> Writes:
    if isinstance(write, Set) and isinstance(write.ttl, float):
        return write._replace(ttl=change(write.ttl))
    return write


FOUND_BY = {
    Early: [Deadlines.test_an_entry_is_readable_before_its_deadline],
    Never: [
        Deadlines.test_an_entry_past_its_deadline_is_never_readable,
        Deadlines.test_entries_expire_in_the_order_of_their_deadlines,
        Deadlines.test_observe_delivers_an_expiry,
        Deadlines.test_update_keeps_a_ttl,
    ],
}


@pytest.mark.parametrize("pause", PAUSES.values(), ids=PAUSES)
@pytest.mark.parametrize(
    ("kind", "law"),
    [pytest.param(kind, law, id=f"{kind.__name__}-{law.__name__}") for kind, laws in FOUND_BY.items() for law in laws],
)
def test_a_broken_store_is_found_out_even_if_it_is_slow(
    host: Host, colour: Colour, kind: type[Slow], law: Any, pause: Callable[[int], float]
) -> None:
    with pytest.raises((AssertionError, ValueError)):
        judge(law, kind(host, pause, 0.5), colour)


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_what_is_told_to_pass_makes_no_test_late_and_what_passes_by_itself_does(host: Host) -> None:
    clock = HostClock()
    clock.advance(5 * clock.unit)
    assert not clock.is_late

    host.sleep(1.5 * clock.unit)
    assert clock.is_late

    clock.lengthen()
    assert not clock.is_late


def test_a_wall_clock_that_was_set_makes_a_test_late(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HostClock()
    monkeypatch.setattr(host, "time", lambda: host.now - 60)

    assert clock.is_late


# -- stores that forget ------------------------------------------------------------------------------------------------


class Forgets(MemoryStore):
    """Is asked for a past that it has just forgotten, the first so many times."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.times = times

    def open_watch(self, request: OpenWatch) -> Watch:
        if request.since is not None and self.times > 0:
            self.times -= 1
            raise Compacted(0, self._revision)
        return super().open_watch(request)


class Short(Concurrency):
    rounds = 10


def test_a_snapshot_that_a_store_has_forgotten_is_taken_again() -> None:
    with Forgets(3) as store:
        Short().test_every_watch_opened_while_others_write_has_neither_gap_nor_repeat(store, Figures({}))
        assert store.times == 0


def test_a_store_that_forgets_the_present_is_found_out() -> None:
    with Forgets(float("inf")) as store, pytest.raises(Compacted):
        Short().test_every_watch_opened_while_others_write_has_neither_gap_nor_repeat(store, Figures({}))


def test_readers_of_a_store_that_forgets_everything_go_on_from_now(seed: str) -> None:
    for number in range(100):
        log, watched = record_watches(MemoryStore(history=0), seed=f"{seed}/{number}", writes=200)
        assert check_watched(log, watched) == []
        if any(each.delivered and each.since and not each.request.latest for each in watched):
            return
    pytest.fail("no watch was opened among the writes")


# -- calls that do not overlap -----------------------------------------------------------------------------------------


def one_order(seed: str, noted: dict[str, int]) -> None:
    few = type("Few", (Interleaving,), {"calls": 80})()
    with Colour("sync").stores(MemoryStore) as new:
        few.test_what_many_clients_were_told_has_one_order(new, Colour("sync"), "line", seed, Figures(noted))


def test_a_history_without_overlap_is_recorded_again(monkeypatch: pytest.MonkeyPatch, seed: str) -> None:
    overlaps = iter([0.0, 0.1, 0.9])
    monkeypatch.setattr(interleaving, "overlap", lambda history: next(overlaps))
    noted: dict[str, int] = {}

    one_order(seed, noted)

    assert noted == {"concurrent calls, found linearizable": 80}
    assert list(overlaps) == []


def test_where_calls_never_overlap_nothing_is_said_of_the_store(monkeypatch: pytest.MonkeyPatch, seed: str) -> None:
    monkeypatch.setattr(interleaving, "overlap", lambda history: 0.0)
    noted: dict[str, int] = {}

    with pytest.raises(pytest.skip.Exception, match="did not overlap enough"):
        one_order(seed, noted)

    assert noted == {}
