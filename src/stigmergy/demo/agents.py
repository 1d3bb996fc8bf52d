"""The agents: a planner, workers, a collector, a foreman; and the crew of threads that they run in."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from threading import Thread
from time import monotonic, sleep
from types import TracebackType
from typing import Any, NamedTuple, Self

from stigmergy.demo.files import text_files, words_of
from stigmergy.errors import ClaimLost, RevisionConflict, StoreClosed, WatchClosed
from stigmergy.flow import Call, Commit, Flow, GetEntry, Next, OpenWatch, Operation
from stigmergy.middleware import Middleware
from stigmergy.model import Change, Check, Delete, Op, Set
from stigmergy.store import Store
from stigmergy.watch import Watch

__all__ = [
    "Crew",
    "Plan",
    "Result",
    "Status",
    "Task",
    "Totals",
    "batches",
    "collect",
    "foreman",
    "noting",
    "plan",
    "run_tasks",
    "start_agents",
    "start_workers",
    "team",
    "uninterrupted",
    "worker",
]

_PAUSE = 0.05
_HANDFUL = 50
_AHEAD = 1000
"""So many files, and a handful more, may have a task or a result. Removing them takes a fraction of a second."""


class Plan(NamedTuple):
    tasks: int = 0
    complete: bool = False


class Task(NamedTuple):
    """A file to count. Its key is deleted by the commit that sets the result."""

    path: str
    owner: str | None = None


class Status(NamedTuple):
    files: int = 0
    words: int = 0
    """Of these files."""
    path: str = ""
    """Of the file that the worker is at."""
    more: int = 0
    """How many words of that it has counted so far."""


class Result(NamedTuple):
    path: str
    counts: Counter[bytes]
    error: str | None = None


class Totals(NamedTuple):
    files: int = 0
    skipped: tuple[str, ...] = ()
    """Path and reason of each file that could not be read."""

    @property
    def merged(self) -> int:
        return self.files + len(self.skipped)


def start_agents(crew: Crew, store: Store, folder: str, names: Iterable[str]) -> None:
    """Start everybody; in any order, but that the collector's watch is open before there can be results."""
    crew.start(collect, store, store.watch(prefix="result:", capacity=None))
    start_workers(crew, store, names)
    crew.start(plan, store, folder)


def start_workers(crew: Crew, store: Store, names: Iterable[str], lease: str | None = None) -> None:
    """Start those who are called `team(...)`."""
    tasks = [name for name in names if "task-" in name]
    crew.start(run_tasks, store, tasks, lease)
    for name in names:
        if name not in tasks:
            crew.start(store.run, worker(name, _go_on, lease))


def team(workers: int, process: str = "") -> list[str]:
    """The names of so many workers of one process: half are tasks, half threads."""
    tasks = workers // 2
    names = [f"task-{n + 1}" for n in range(tasks)] + [f"thread-{n + 1}" for n in range(workers - tasks)]
    return [f"{process}/{name}" for name in names] if process else names


def plan(store: Store, folder: str) -> None:
    """Make a task of each text file, a handful at a time: each commit wakes every worker that waits.

    The planner stays a limited number of files ahead of the collector. So a run that is interrupted has little to
    remove, however large the folder is.
    """
    paths, tasks = text_files(folder), 0

    def is_near(totals: Totals) -> bool:
        return totals.merged > tasks - _AHEAD

    while handful := list(islice(paths, _HANDFUL)):
        numbered = enumerate(handful, tasks + 1)
        tasks += len(handful)
        store.commit(*[Set(f"task:{number:06}", Task(path)) for number, path in numbered], Set("plan", Plan(tasks)))
        if tasks >= _AHEAD:
            store.wait_for("totals", is_near)
    store.set("plan", Plan(tasks, complete=True))


def worker(name: str, rest: Callable[[], object], lease: str | None = None) -> Flow[None]:
    """Claim tasks, count their words, report. Written once: threads run this flow, and so do tasks; only that those
    must `rest` now and then, for the others of their event loop.

    `observe` begins with the tasks that are there already, and shows each as it is by now: one that somebody else
    claimed meanwhile arrives as claimed.
    """
    done = Status()
    with suppress(StoreClosed, WatchClosed, ClaimLost):  # so everybody is sent home
        tasks = yield from OpenWatch(prefix="task:", latest=True)
        while True:
            task = yield from Next(tasks)
            if task.op is Op.SET and task.value.owner is None:
                revision = yield from claim(task, name, lease)
                if revision:
                    done = yield from count(task, revision, name, done, rest)


def run_tasks(store: Store, names: Iterable[str], lease: str | None = None) -> None:
    """Run workers as tasks of one event loop. The first error of one ends all, and is raised."""

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(store.aio.run(worker(name, partial(asyncio.sleep, 0), lease)))

    try:
        asyncio.run(together())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def claim(task: Change, name: str, lease: str | None) -> Flow[int]:
    """Put a name on the task, on condition that it still is as it was seen: of all who try, one succeeds.

    Returns the revision of the task by then, 0 for those who failed. Who works in a process that may vanish needs its
    `lease` as well: a task claimed without one would never be given back. Raises `ClaimLost` when that is gone.
    """
    named = Set(task.key, task.value._replace(owner=name), if_revision=task.revision)
    while True:
        checks = () if lease is None else ((yield from is_held(lease, name)),)
        try:
            *_, revision = yield from Commit((*checks, named))
        except RevisionConflict as conflict:
            if conflict.key != lease:  # else it was renewed since
                return 0
        else:
            return revision or 0


def is_held(lease: str, name: str) -> Flow[Check]:
    """Return the condition that the lease is still held as it is now."""
    entry = yield from GetEntry(lease)
    if entry is None:
        raise ClaimLost(lease, name, 0)
    return Check(lease, entry.revision)


def count(task: Change, revision: int, name: str, done: Status, rest: Callable[[], object]) -> Flow[Status]:
    """Count the words of a task's file, and leave the result together with what the worker has done by then.

    All that on condition that the task is still at the `revision` of the claim. Who was taken for dead, and was not,
    finds that it is somebody else's, and that nothing it writes is taken.
    """
    path, counts, more, shown = task.value.path, Counter[bytes](), 0, monotonic()
    with suppress(RevisionConflict):
        try:
            for chunk in words_of(path):
                counts.update(chunk)
                more += len(chunk)
                if monotonic() >= shown + _PAUSE:  # nobody looks more often
                    status, shown = Status(done.files, done.words, path, more), monotonic()
                    yield from Commit((Check(task.key, revision), Set(f"worker:{name}", status)))
                yield from Call(rest)
            now, result = Status(done.files + 1, done.words + more), Result(path, counts)
        except OSError as error:
            now, result = done, Result(path, Counter(), error.strerror or str(error))
        finished = Delete(task.key, if_revision=revision)
        yield from Commit((finished, Set(task.key.replace("task", "result"), result), Set(f"worker:{name}", now)))
        return now
    return done


def foreman(store: Store, leases: Watch) -> None:
    """Give back what a process has claimed and not done, as soon as its lease is gone: others will do it."""
    for change in leases:
        if change.op is Op.DELETE:
            workers = change.key.removeprefix("process:") + "/"
            for key, entry in store.scan("task:").items():
                task: Task = entry.value
                if task.owner is not None and task.owner.startswith(workers):
                    files, words, *_ = store.get(f"worker:{task.owner}", Status())
                    given_back = Set(key, Task(task.path), if_revision=entry.revision)
                    with suppress(RevisionConflict):  # it was done in the last moment
                        store.commit(given_back, Set(f"worker:{task.owner}", Status(files, words)))


def collect(store: Store, results: Watch) -> None:
    """Merge the results. A merge copies every word that is known, so they wait until there is much to merge, or all.

    Half of what the planner may be ahead is always much: the planner waits for a merge and would wait for ever.
    """
    waiting: dict[str, Result] = {}
    totals, known = Totals(), 0
    for changes in batches(results, timeout=_PAUSE):
        waiting.update((change.key, change.value) for change in changes if change.op is Op.SET)
        much = len(waiting) >= _AHEAD // 2 or 4 * sum(len(result.counts) for result in waiting.values()) >= known
        if waiting and (much or store.get("plan") == Plan(totals.merged + len(waiting), complete=True)):
            known = len(store.update("words", partial(with_words, waiting.values()), default=Counter()))
            store.commit(*map(Delete, waiting))  # before the planner sees the totals, and goes on
            totals = store.update("totals", partial(with_files, waiting.values()), default=totals)
            waiting.clear()


def with_words(results: Iterable[Result], words: Counter[bytes]) -> Counter[bytes]:
    """Return `words` and those of the results."""
    words = words.copy()
    for result in results:
        words.update(result.counts)
    return words


def with_files(results: Iterable[Result], totals: Totals) -> Totals:
    """Return `totals` and the files of the results."""
    skipped = [f"{result.path}: {result.error}" for result in results if result.error is not None]
    counted = sum(result.error is None for result in results)
    return Totals(totals.files + counted, (*totals.skipped, *skipped))


def batches(watch: Watch, *, timeout: float | None = None) -> Iterator[list[Change]]:
    """Yield all that waits to be read, then pause so that more can come, and so on until the watch ends.

    What waits is nothing when nothing has come for `timeout` seconds.
    """
    with suppress(WatchClosed):
        while True:
            first: list[Change] = []
            with suppress(TimeoutError):
                first = [watch.get(timeout)]
            yield [*first, *iter(watch.get_nowait, None)]
            sleep(_PAUSE)


def noting(missed: list[int]) -> Middleware:
    """Return a middleware that notes the `missed` of every change that a watch of the store delivers, to anybody."""

    def note(change: Change) -> Change:
        missed.append(change.missed)  # needs no lock
        return change

    def around(operation: Operation[Any]) -> Flow[Any]:
        result = yield operation
        if isinstance(operation, OpenWatch):
            result.map(note)
        return result

    return around


class Crew:
    """The threads of the agents. Leaving it closes the store, which sends everybody home."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._threads: list[Thread] = []
        self._failures: list[BaseException] = []

    def start(self, agent: Callable[..., object], *args: Any) -> None:
        """Run `agent(*args)` in a thread."""
        thread = Thread(target=self._run, args=(agent, *args), daemon=True)
        self._threads.append(thread)
        with uninterrupted():  # which the thread inherits
            thread.start()

    def check(self) -> None:
        """Raise what went wrong in a thread."""
        if self._failures:
            raise self._failures[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with uninterrupted():
            self._store.close()
            deadline = monotonic() + 1  # for all: a thread that waits for a disk is left behind
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join(max(0, deadline - monotonic()))
        if isinstance(error, StoreClosed):
            self.check()  # says who closed it, and why

    def _run(self, agent: Callable[..., object], *args: Any) -> None:
        try:
            agent(*args)
        except (StoreClosed, WatchClosed):
            pass
        except BaseException as error:
            self._failures.append(error)
            self._store.close()  # nobody else would do its work


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hear no Ctrl-C until later. Threads that are started here never do."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows only the main thread does
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _go_on() -> None:
    pass
