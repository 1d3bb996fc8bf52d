"""The mutation gate: known bugs, planted one by one in a copy of the package, and the tests that have to find each.

    python tests/mutants.py [--runs 10] [--only WORD] [--seed N] [--seconds 5]

A mutant is killed when its tests fail in every run, each within five seconds. Before that the same tests must pass on a
copy without a bug. They are tests of the default run, but for the mutants that only `slow` tests find; of these there
may be one in ten at most. Exits with 1 if a mutant survives a run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import stigmergy

ROOT = Path(__file__).parent.parent
PACKAGE = Path(stigmergy.__file__).parent
SECONDS = 5.0
SUITE = "tests/test_conformance.py::TestMemoryStore::"
SQLITE = "tests/test_conformance.py::TestSQLiteStore::"
LAYERED = "tests/test_conformance.py::TestStoreBehindMiddleware::"


class Mutant(NamedTuple):
    name: str
    file: str
    text: str
    """What stands in the file, once."""
    instead: str
    tests: tuple[str, ...]
    slow: bool = False
    """Whether only slow tests find it."""


MUTANTS = [
    Mutant(
        "watches hear before the commit is a fact",
        "providers/memory.py",
        "            if not pending or self._commit_point(seen, pending):",
        "            for record in pending:\n"
        "                self._hub.publish(record[1][_REVISION], record[0], record)\n"
        "            if not pending or self._commit_point(seen, pending):",
        ("tests/test_strikes.py -k disturbs_nothing[commit]",),
    ),
    Mutant(
        "conditions are checked outside the lock",
        "providers/memory.py",
        "        try:\n            with self._lock:\n                while True:\n",
        "        known = self._entries.get(key)\n"
        "        if expected is not None and expected != (0 if known is None else known[_REVISION]):\n"
        "            raise RevisionConflict(key, expected, 0 if known is None else known[_REVISION])\n"
        "        expected = None\n"
        "        try:\n            with self._lock:\n                while True:\n",
        (SUITE + "test_what_many_clients_were_told_has_one_order -k sync-line",),
    ),
    Mutant(
        "an old condition holds again after a delete",
        "providers/memory.py",
        "                    if expected is not None and expected != (0 if before",
        "                    if expected is not None and expected > (0 if before",
        (SUITE + "test_after_delete_and_recreate_an_old_revision_never_matches_again",),
    ),
    Mutant(
        "revisions begin anew when the store is empty",
        "providers/memory.py",
        "        if self._pending is pending:  # atomic: no bytecode boundary\n            self._pending = None",
        "        if self._pending is pending:  # atomic: no bytecode boundary\n            self._pending = None\n"
        "            self._revision = self._revision if self._entries else 0",
        (SUITE + "test_after_delete_and_recreate_an_old_revision_never_matches_again",),
    ),
    Mutant(
        "an expiry takes the revision of the write before it",
        "providers/memory.py",
        "            stored = (None, seen + 1, None, time.time(), None, None, seen + 1, inf)",
        "            stored = (None, seen, None, time.time(), None, None, seen, inf)",
        (SUITE + "test_expiry_is_an_ordinary_change_exactly_once",),
    ),
    Mutant(
        "a deadline takes a newer value",
        "providers/memory.py",
        "        if before is not None and before[_DEADLINE] == deadline:",
        "        if before is not None:",
        (SUITE + "test_a_deadline_never_takes_a_newer_value", SUITE + "test_a_set_without_ttl_clears_an_earlier_one"),
    ),
    Mutant(
        "a renewed entry expires in the place of its first deadline",
        "providers/memory.py",
        "        if before is not None and before[_DEADLINE] == deadline:",
        "        if before is not None and before[_DEADLINE] <= self._clock():",
        (SUITE + "test_entries_expire_in_the_order_of_their_deadlines",),
    ),
    Mutant(
        "half a commit can be read",
        "providers/memory.py",
        "        if self._pending is not None or (deadline < inf and",
        "        if (deadline < inf and",
        ("tests/test_preemption.py::test_whoever_sees_one_write_of_a_commit_sees_all",),
    ),
    Mutant(
        "an expired entry is read",
        "providers/memory.py",
        "(deadline < inf and deadline <= self._clock())",
        "(deadline < inf and deadline < self._clock())",
        ("tests/test_time.py::test_a_reader_at_the_deadline_finds_nothing_and_every_other_one_neither",),
    ),
    Mutant(
        "a change gives way without being counted",
        "subscription.py",
        "                self.missed += 1\n",
        "",
        (SUITE + "test_a_full_watch_never_blocks_the_writer_and_says_what_it_missed",),
    ),
    Mutant(
        "the newest change gives way",
        "subscription.py",
        "                del buffer[0]\n                self.missed += 1",
        "                del buffer[-1]\n                self.missed += 1",
        (SUITE + "test_missed_stands_where_the_gap_is",),
    ),
    Mutant(
        "a second change wakes nobody",
        "subscription.py",
        "        if self.waiters:  # looked at behind",
        "        if self.waiters and room == self.capacity:  # looked at behind",
        ("tests/test_watch.py::test_each_of_several_changes_at_once_wakes_a_reader",),
    ),
    Mutant(
        "a reader looks before it is registered",
        "watch.py",
        "        source.waiters.append(waiter)\n"
        "        if source.hub.locked(source.is_idle):\n            waiter.park(left)",
        "        idle = source.hub.locked(source.is_idle)\n        source.waiters.append(waiter)\n"
        "        if idle:\n            waiter.park(left)",
        ("tests/test_preemption.py::test_a_reader_that_waits_is_woken_whatever_comes_between -k line",),
    ),
    Mutant(
        "a cancelled reader keeps its wake-up",
        "watch.py",
        "                await _park_task(source)\n        except BaseException:\n            source.wake()",
        "                await _park_task(source)\n        except BaseException:\n            pass",
        ("tests/test_watch.py::test_a_reader_cancelled_after_it_was_woken_passes_the_wake_up_on",),
    ),
    Mutant(
        "a watch is subscribed a little after its opening",
        "bridge.py",
        "    async def open_watch(self, request: OpenWatch) -> Watch:\n        return self._store.open_watch(request)",
        "    async def open_watch(self, request: OpenWatch) -> Watch:\n"
        "        watch = self._store.open_watch(request)\n"
        "        watch._subscription.seen += not request.latest\n"
        "        return watch",
        (SUITE + "test_a_watch_is_subscribed_before_the_next_write",),
    ),
    Mutant(
        "an opening is opened by its first step",
        "watch.py",
        "    def __aiter__(self) -> object:\n",
        "    async def __aiter__(self) -> object:\n",
        ("tests/test_opening.py -k says_how_to_open_it[memory]",),
    ),
    Mutant(
        "a cancelled opening stays subscribed as long as its task is kept",
        "threads.py",
        "            for watch in opened:\n                watch.close()\n",
        "",
        ("tests/test_opening.py -k though_the_task_is_kept[sqlite-awaited]",),
    ),
    Mutant(
        "a write goes past a watch that was opened in its midst",
        "providers/memory.py",
        " or hub.chains is not chains or key in hub.keys",
        "",
        ("tests/test_strikes.py -k reaches_what_was_opened",),
    ),
    Mutant(
        "a write goes past the watch of a shorter prefix",
        "hub.py",
        "for length in range(len(last) + 1)]",
        "for length in range(len(last), len(last) + 1)]",
        (SUITE + "test_a_write_reaches_every_length_of_prefix",),
    ),
    Mutant(
        "a write goes past the watch of a prefix behind one of another key",
        "hub.py",
        "        place = bisect_right(self._sorted, key)\n        try",
        "        place = bisect_right(self._sorted, key) - 1\n        try",
        ("tests/test_memory.py -k hears_of_exactly_the_keys",),
    ),
    Mutant(
        "a prefix that joins or leaves in the midst of a write hides others from it",
        "hub.py",
        "            if self.chains is chains:\n                return found",
        "            if True:\n                return found",
        ("tests/test_strikes.py -k finds_every_prefix",),
    ),
    Mutant(
        "helper threads take the signals of the process",
        "_core/helpers.py",
        "        signal.pthread_sigmask(signal.SIG_BLOCK, _all_but_faults())\n",
        "",
        ("tests/test_interrupts.py -k sigwait",),
    ),
    Mutant(
        "a store that was dropped does not warn",
        "providers/_log.py",
        "        if not self.is_closed:\n            warnings.warn(",
        "        if False:\n            warnings.warn(",
        ("tests/test_sqlite.py -k freed_at_once",),
    ),
    Mutant(
        "a watch resumes one change too late",
        "hub.py",
        "for revision in range(since + 1, self.revision + 1)]",
        "for revision in range(since + 2, self.revision + 1)]",
        (SUITE + "test_since_delivers_everything_after_a_revision_and_then_goes_on",),
    ),
    Mutant(
        "a watch resumes from what was forgotten",
        "hub.py",
        "        if not oldest - 1 <= revision <= self.revision:",
        "        if not oldest - 2 <= revision <= self.revision:",
        ("tests/test_memory.py::test_since_beyond_what_is_remembered_is_compacted",),
    ),
    Mutant(
        "observe keeps the older state",
        "subscription.py",
        "                pending[key] = change\n        if self.waiters",
        "                pending[key] = replaced or change\n        if self.waiters",
        (SUITE + "test_observe_keeps_only_the_newest_of_each_key",),
    ),
    Mutant(
        "what was interrupted is not rolled forward",
        "hub.py",
        "        with self.lock:\n            self._settle_while_locked()\n        self.run_deferred()\n\n",
        "        return\n\n",
        ("tests/test_strikes.py -k its_writer[delete]",),
    ),
    Mutant(
        "closing wakes nobody",
        "hub.py",
        "        for subscription in subscriptions:\n            self.to_wake.append(subscription)\n",
        "        for subscription in subscriptions:\n",
        ("tests/test_races.py -k ends_every_reader",),
    ),
    Mutant(
        "readers share live objects",
        "providers/memory.py",
        "        value = self._copied(change.key, change.value)\n",
        "        value = change.value\n",
        (SUITE + "test_two_watches_never_share_a_value",),
    ),
    Mutant(
        "update swallows a conflict",
        "flow.py",
        "            yield from backoff(conflicts)\n        else:\n            return value\n",
        "            pass\n        return value\n",
        (SUITE + "test_update_runs_again_when_somebody_wrote_in_between",),
    ),
    Mutant(
        "a layer loses conditions",
        "middleware.py",
        "        return self._through(Commit(writes))",
        "        return self._through(\n"
        "            Commit([each._replace(if_revision=None) if isinstance(each, Set) else each for each in writes])\n"
        "        )",
        (LAYERED + "test_a_conditional_set_succeeds_only_at_its_revision",),
    ),
    Mutant(
        "an observer fails a write that happened",
        "hooks.py",
        '            _log("a hook that observes %r failed", key)',
        "            raise",
        ("tests/test_hooks.py -k cannot_fail_an_operation",),
    ),
    Mutant(
        "conditional writes go around hooks",
        "hooks.py",
        "            if isinstance(write, Set):\n                asked.append((hooks.before_set",
        "            if isinstance(write, Set) and write.if_revision is None:\n"
        "                asked.append((hooks.before_set",
        ("tests/test_hooks.py -k every_attempt",),
    ),
    Mutant(
        "a write through a claim checks nothing",
        "lease.py",
        "            return (yield from Commit((Check(lease.key, lease.revision), *signed)))[1:]",
        "            return (yield from Commit(signed))",
        ("tests/test_claims.py -k lost_claim_writes_nothing",),
    ),
    Mutant(
        "a claim of the same owner is taken for this one",
        "lease.py",
        "        return entry is not None and entry.writer == self.owner and entry.value == self._value",
        "        return entry is not None and entry.writer == self.owner",
        ("tests/test_claims.py -k lost_claim_writes_nothing",),
    ),
    Mutant(
        "a guard lets checks through",
        "scope.py",
        "                (self._read if checks else self._write).check(",
        "                (self._write if not checks else _Grants([write.key])).check(",
        ("tests/test_scope.py -k denied_before_any_effect",),
    ),
    Mutant(
        "a write in a scope loses the ttl that it keeps",
        "scope.py",
        "write._replace(key=self._inside(write.key)) for write",
        "write._replace(key=self._inside(write.key), **({'ttl': None} if 'keep' in write else {})) for write",
        ("tests/test_conformance.py::TestStoreBehindHandles::test_update_keeps_a_ttl",),
    ),
    Mutant(
        "a merge is not conditional",
        "reducers.py",
        "    return write._replace(value=value, if_revision=entry.revision)",
        "    return write._replace(value=value)",
        ("tests/test_reducers.py -k none_is_lost",),
    ),
    Mutant(
        "what came while a watch was being opened is lost",
        "providers/_log.py",
        "        if self._hub.is_beyond(epoch, revision, restarts):\n            return False\n",
        "",
        (f"{SQLITE}test_every_watch_opened_while_others_write_has_neither_gap_nor_repeat",),
    ),
    Mutant(
        "a store on an engine does not look whether that lost its past",
        "providers/sqlite.py",
        "    if head.revision < seen.revision:\n        return True\n",
        "    if head.revision < seen.revision:\n        return False\n",
        ("tests/test_sqlite.py -k set_back",),
    ),
    Mutant(
        "watches go on in another life of the engine as if nothing had happened",
        "hub.py",
        "            if isinstance(subscription, EveryChange) and not is_there:\n",
        "            if isinstance(subscription, EveryChange) and is_there:\n",
        ("tests/test_sqlite.py -k set_back",),
    ),
    Mutant(
        "a value comes back as something similar",
        "codec.py",
        "    _check((value,), _TO_JSON)\n",
        "",
        (f"{SQLITE}test_a_value_comes_back_as_it_was_or_is_refused_before_anything_changed",),
    ),
    Mutant(
        "a write is sent again when its answer is lost",
        "providers/_redis_wire.py",
        "    repeats = False\n    lost = OutcomeUnknown\n",
        "    repeats = True\n    lost = OutcomeUnknown\n",
        ("tests/test_redis_transport.py -k lost_is_sent_once",),
    ),
    Mutant(
        "an expiry happens once for each who notices",
        "providers/sqlite.py",
        '        connection.execute("DELETE FROM entries WHERE rowid = ?", (row,))',
        "        row",
        (f"{SQLITE}test_expiry_is_an_ordinary_change_exactly_once",),
    ),
]


class Run(NamedTuple):
    failed: tuple[str, ...]
    """The tests that failed or hung; none if the mutant survived."""
    seconds: float
    output: str


@contextmanager
def copy_of_the_package(mutant: Mutant | None) -> Iterator[Path]:
    """A folder with the package in it, with the bug if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "stigmergy"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            file = copy / mutant.file
            before = file.read_text(encoding="utf-8")
            assert before.count(mutant.text) == 1, f"{mutant.name}: its text is not there once in {mutant.file}"
            file.write_text(before.replace(mutant.text, mutant.instead), encoding="utf-8")
        yield Path(folder)


def run(folder: Path, mutant: Mutant, seed: int, limit: int) -> Run:
    """Run its tests on the package in `folder`, up to the first that fails or takes more than `limit` seconds."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        *["-q", "-x", "-n", "0", "-p", "no:cacheprovider", f"--seed={seed}"],
        *(["-m", "slow", f"--limit={limit / 10}"] if mutant.slow else [f"--limit={limit}"]),
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
    started = time.perf_counter()
    result = subprocess.run(
        [*command, *(word for test in mutant.tests for word in test.split())],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    seconds = time.perf_counter() - started
    if result.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(mutant.tests)} could not be run:\n{result.stdout}{result.stderr}")
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", result.stdout, re.MULTILINE)
    if result.stderr.startswith("Timeout (") or "\nTimeout (" in result.stderr:
        failed += [*re.findall(r"^  File .* in (test_\w+)$", result.stderr, re.MULTILINE), "a test that hung"][:1]
    assert bool(failed) == bool(result.returncode), result.stdout + result.stderr
    return Run(tuple(failed), seconds, result.stdout)


def judge(mutant: Mutant, runs: int, seed: int, seconds: float) -> bool:
    """Whether `mutant` was killed in time in every run; says so."""
    with copy_of_the_package(None) as folder:
        sound = run(folder, mutant, seed, limit=180)
    with copy_of_the_package(mutant) as folder:
        limit = max(2, int(0.4 * seconds))
        found = [run(folder, mutant, seed + number, limit) for number in range(runs)]
    kills = sum(bool(each.failed) for each in found)
    slowest = max(each.seconds for each in found)
    killers = Counter(name for each in found for name in each.failed)
    fine = not sound.failed and kills == runs and slowest <= seconds
    print(f"{'killed' if fine else 'ALIVE '} {kills:2}/{runs} {slowest:4.1f} s  {mutant.name}{' (slow)' * mutant.slow}")
    for name, times in killers.most_common(2):
        print(f"{'':20}{name} ({times} x)")
    if sound.failed:
        print(f"{'':20}but without it {', '.join(sound.failed)} failed, too\n{sound.output}")
    sys.stdout.flush()
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only", default="", metavar="WORD", help="only mutants with this in their name")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long a run may take on a busy machine")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N", help="how many mutants are judged at once")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.name]
    with ThreadPoolExecutor(options.side_by_side) as threads:
        killed = sum(
            threads.map(partial(judge, runs=options.runs, seed=options.seed, seconds=options.seconds), mutants)
        )
    print(f"{killed} of {len(mutants)} mutants were killed in {options.runs} of {options.runs} runs")
    slow = sum(mutant.slow for mutant in MUTANTS)
    print(f"{slow} of all {len(MUTANTS)} need slow tests")
    sys.exit(killed < len(mutants) or 10 * slow > len(MUTANTS))


if __name__ == "__main__":
    main()
