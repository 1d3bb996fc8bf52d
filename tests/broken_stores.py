"""Stores that break one promise each, and which law of the conformance suite finds it out.

`test_conformance.py` runs this file, in a process of its own; every law named here must fail of its store, and hold of
a healthy one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from functools import partial
from unicodedata import normalize

import pytest

from stigmergy import (
    Change,
    Check,
    Delete,
    Entry,
    MemoryStore,
    OpenWatch,
    RevisionConflict,
    Set,
    Snapshot,
    Store,
    StoreClosed,
    Watch,
)
from stigmergy.testing import StoreConformance, VirtualClock

Writes = Set | Delete | Check
Revisions = tuple[int | None, ...]


class Healthy(MemoryStore):
    """Everything goes through the five primitives."""

    get = Store.get
    set = Store.set
    delete = Store.delete

    def changed_watch(self, request: OpenWatch, **fields: object) -> Watch:
        asked = {name: getattr(request, name) for name in OpenWatch.__slots__}
        return MemoryStore.open_watch(self, OpenWatch(**asked | fields))


class VersionsPerKey(Healthy):
    """A version for each key, forgotten when it is deleted."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.versions: dict[str, int] = {}

    def commit(self, *writes: Writes) -> Revisions:
        for write in writes:
            actual = self.versions.get(write.key, 0)
            if write.if_revision not in (None, actual):
                raise RevisionConflict(write.key, write.if_revision, actual)
        super().commit(*(write._replace(if_revision=None) for write in writes))
        for write in writes:
            if isinstance(write, Set):
                self.versions[write.key] = self.versions.get(write.key, 0) + 1
            else:
                self.versions.pop(write.key, None)
        return tuple(self.versions.get(write.key, 1) for write in writes)


class DropsSilently(Healthy):
    def open_watch(self, request: OpenWatch) -> Watch:
        capacity = min(request.capacity or 16, 16)
        return self.changed_watch(request, capacity=capacity).map(lambda change: change._replace(missed=0))


class LiveObjects(Healthy):
    def __init__(self, **options: object) -> None:
        super().__init__(copy=None, **options)
        self.capabilities |= {"isolated"}


class IgnoresConditions(Healthy):
    def commit(self, *writes: Writes) -> Revisions:
        return super().commit(
            *(write if isinstance(write, Check) else write._replace(if_revision=None) for write in writes)
        )


class DeletesEverything(Healthy):
    """Says that it has deleted what was never there."""

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        super().delete(key, if_revision=if_revision)
        return True


class UnsortedScans(Healthy):
    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        found = super().scan(prefix, keys=keys, after=after, limit=limit)
        by_size = sorted(found, key=lambda key: (len(key), key))
        return Snapshot({key: found[key] for key in by_size}, lambda key, entry: entry, found.revision, found.bookmark)


class LateWatches(Healthy):
    """Begins to listen with its first watch, and too late for the next write."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.watches: list[Watch] = []
        self.is_listening = False

    def open_watch(self, request: OpenWatch) -> Watch:
        self.watches.append(super().open_watch(request))
        return self.watches[-1]

    def commit(self, *writes: Writes) -> Revisions:
        revisions = super().commit(*writes)
        if self.watches and not self.is_listening:
            self.is_listening = True
            self.watches[0].get_nowait()
        return revisions


class ReadsTheExpired(Healthy):
    def get_entry(self, key: str) -> Entry | None:
        return self._entry(key, self._entries[key]) if key in self._entries else super().get_entry(key)


class HidesExpiries(Healthy):
    def open_watch(self, request: OpenWatch) -> Watch:
        return super().open_watch(request).map(lambda change: change._replace(expired=False))


class ForgetsOldValues(Healthy):
    def open_watch(self, request: OpenWatch) -> Watch:
        return super().open_watch(request).map(lambda change: change._replace(old_value=None))


class HalfCommits(Healthy):
    def commit(self, *writes: Writes) -> Revisions:
        revisions: Revisions = ()
        for write in writes:
            if revisions:
                time.sleep(0)
            revisions += super().commit(write)
        return revisions


class GapAfterSince(Healthy):
    def open_watch(self, request: OpenWatch) -> Watch:
        if isinstance(request.since, int) and request.since < self._revision:
            return self.changed_watch(request, since=request.since + 1)
        return super().open_watch(request)


class RepeatsAfterSnapshot(Healthy):
    """Its bookmarks are one change too old."""

    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        found = super().scan(prefix, keys=keys, after=after, limit=limit)
        before = self._hub.bookmark(max(0, found.revision - 1))
        return Snapshot(dict(found), lambda key, entry: entry, found.revision, before)


class AnswersWhenClosed(Healthy):
    def get_entry(self, key: str) -> Entry | None:
        try:
            return super().get_entry(key)
        except StoreClosed:
            return None


class DeletesTakeRevisions(Healthy):
    def commit(self, *writes: Writes) -> Revisions:
        for write in writes:
            if isinstance(write, Delete) and write.if_revision is None:
                super().commit(Set(write.key, None))
        return super().commit(*writes)


class LossyValues(Healthy):
    """What JSON makes of a value, instead of the value, or of an error."""

    def __init__(self, **options: object) -> None:
        super().__init__(copy=lambda value: json.loads(json.dumps(value)), **options)


class NormalisesKeys(Healthy):
    def commit(self, *writes: Writes) -> Revisions:
        return super().commit(*(write._replace(key=normalize("NFC", write.key)) for write in writes))


class PrefixesAreWords(Healthy):
    """Takes `ab` for something below `a:`."""

    def open_watch(self, request: OpenWatch) -> Watch:
        return self.changed_watch(request, prefix=request.prefix and request.prefix.rstrip(":"))


class ForgetsToKeep(Healthy):
    """`ttl="keep"` clears the ttl."""

    def commit(self, *writes: Writes) -> Revisions:
        return super().commit(
            *(write._replace(ttl=None) if isinstance(write, Set) and write.ttl == "keep" else write for write in writes)
        )


class NeverClears(Healthy):
    """A set without ttl keeps the old one."""

    def commit(self, *writes: Writes) -> Revisions:
        return super().commit(
            *(write._replace(ttl="keep") if isinstance(write, Set) and write.ttl is None else write for write in writes)
        )


class ChecksThenActs(Healthy):
    def commit(self, *writes: Writes) -> Revisions:
        for write in writes:
            entry = self.get_entry(write.key)
            actual = 0 if entry is None else entry.revision
            if write.if_revision not in (None, actual):
                raise RevisionConflict(write.key, write.if_revision, actual)
        time.sleep(0)
        return super().commit(
            *(write if isinstance(write, Check) else write._replace(if_revision=None) for write in writes)
        )


class ObservesEverything(Healthy):
    def open_watch(self, request: OpenWatch) -> Watch:
        return self.changed_watch(request, latest=False)


class SwapsChanges(Healthy):
    """Every second change comes before the one before it."""

    def open_watch(self, request: OpenWatch) -> Watch:
        def swapped(change: Change) -> Change:
            return change._replace(revision=change.revision + (1 if change.revision % 2 else -1))

        return super().open_watch(request).map(swapped)


class ForgetsItself(Healthy):
    """Says that it is durable."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.capabilities |= {"durable"}


class Alone(Healthy):
    """Says that it is distributed."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.capabilities |= {"distributed"}


CAUGHT_BY = {
    VersionsPerKey: [
        "test_every_write_that_changes_something_takes_the_next_revision",
        "test_after_delete_and_recreate_an_old_revision_never_matches_again",
    ],
    DropsSilently: ["test_a_full_watch_never_blocks_the_writer_and_says_what_it_missed"],
    LiveObjects: ["test_nobody_changes_state_by_changing_an_object", "test_two_watches_never_share_a_value"],
    IgnoresConditions: [
        "test_a_conditional_set_succeeds_only_at_its_revision",
        "test_if_revision_zero_means_the_key_must_be_absent",
        "test_of_racing_creates_exactly_one_wins",
    ],
    DeletesEverything: [
        "test_delete_says_whether_the_key_was_there[sync]",
        "test_of_racing_deletes_exactly_one_returns_true",
    ],
    UnsortedScans: ["test_scan_returns_the_keys_that_begin_with_a_prefix_sorted_by_code_points"],
    LateWatches: ["test_a_watch_is_subscribed_before_the_next_write"],
    ReadsTheExpired: ["test_the_first_to_meet_an_expired_entry_does_not_read_it[sync-get]"],
    HidesExpiries: ["test_expiry_is_an_ordinary_change_exactly_once"],
    ForgetsOldValues: ["test_a_watch_delivers_every_change_of_its_key_in_order"],
    HalfCommits: [
        "test_a_commit_with_one_condition_that_fails_changes_nothing",
        "test_changes_of_one_commit_share_its_last_revision",
        "test_nobody_sees_half_a_commit",
    ],
    GapAfterSince: ["test_a_gap_behind_a_backlog_stands_behind_the_backlog"],
    RepeatsAfterSnapshot: ["test_a_watch_from_a_snapshots_bookmark_goes_on_without_gap_or_repeat"],
    AnswersWhenClosed: ["test_a_closed_store_refuses_every_operation"],
    DeletesTakeRevisions: ["test_deleting_an_absent_key_changes_nothing"],
    LossyValues: ["test_a_value_comes_back_as_it_was_or_is_refused_before_anything_changed[sync-tuple]"],
    NormalisesKeys: ["test_different_keys_stay_different"],
    PrefixesAreWords: ["test_a_watch_of_a_prefix_has_one_order"],
    ForgetsToKeep: ["test_keep_keeps_the_deadline", "test_update_keeps_a_ttl"],
    NeverClears: ["test_a_set_without_ttl_clears_an_earlier_one"],
    ChecksThenActs: ["test_of_racing_creates_exactly_one_wins", "test_concurrent_updates_add_up_exactly"],
    ObservesEverything: ["test_observe_keeps_only_the_newest_of_each_key"],
    SwapsChanges: ["test_a_watch_of_several_keys_has_one_order"],
    ForgetsItself: [
        "test_what_was_written_is_there_after_closing_and_opening_again",
        "test_revisions_go_on_after_opening_again_and_never_come_back",
        "test_a_bookmark_resumes_after_opening_again",
    ],
    Alone: [
        "test_stores_of_one_place_see_each_others_writes",
        "test_updates_through_several_stores_of_one_place_add_up_exactly",
    ],
}


class Judgement(StoreConformance):
    kind: type[MemoryStore]

    @pytest.fixture
    def clock(self):
        return VirtualClock()

    @pytest.fixture
    def make_store(self, clock):
        return partial(self.kind, clock=clock)


def judgement(kind: type[MemoryStore], laws: Iterable[str]) -> type[Judgement]:
    """The suite over stores of this kind, without all the other laws: to collect them takes longer than to judge."""
    asked = {law.partition("[")[0] for law in laws}
    others = [name for name in dir(StoreConformance) if name.startswith("test_") and name not in asked]
    return type(f"Test{kind.__name__}", (Judgement,), {"kind": kind, **dict.fromkeys(others)})


for kind, laws in {**CAUGHT_BY, Healthy: [law for named in CAUGHT_BY.values() for law in named]}.items():
    globals()[f"Test{kind.__name__}"] = judgement(kind, laws)
