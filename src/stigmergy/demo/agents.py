"""The agents: a planner, workers, a collector; and the crew of threads that they run in."""

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
from typing import Any, NamedTuple, Self

from stigmergy.demo.files import text_files, words_of
from stigmergy.errors import RevisionConflict, StoreClosed, WatchClosed
from stigmergy.flow import Call, Commit, Flow, Next, OpenWatch, Operation
from stigmergy.middleware import Middleware
from stigmergy.model import Change, Delete, Op, Set
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
    "noting",
    "plan",
    "run_tasks",
    "start_agents",
    "worker",
]

_PAUSE = 0.05
_HANDFUL = 50


class Plan(NamedTuple):
    tasks: int = 0
    complete: bool = False


class Task(NamedTuple):
    path: str
    owner: str | None = None


class Status(NamedTuple):
    files: int = 0
    words: int = 0
    path: str = ""
    """Of the file that the worker is at."""


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
    crew.start(run_tasks, store, [name for name in names if name.startswith("task")])
    for name in names:
        if name.startswith("thread"):
            crew.start(store.run, worker(name, rest=_go_on))
    crew.start(plan, store, folder)


def plan(store: Store, folder: str) -> None:
    """Make a task of each text file, a handful at a time: each commit wakes every worker that waits."""
    paths, tasks = text_files(folder), 0
    while handful := list(islice(paths, _HANDFUL)):
        numbered = enumerate(handful, tasks + 1)
        tasks += len(handful)
        store.commit(*[Set(f"task:{number:06}", Task(path)) for number, path in numbered], Set("plan", Plan(tasks)))
    store.set("plan", Plan(tasks, complete=True))


def worker(name: str, rest: Callable[[], object]) -> Flow[None]:
    """Claim tasks, count their words, report. Written once: threads run this flow, and so do tasks; only that those
    must `rest` now and then, for the others of their event loop.

    `observe` begins with the tasks that are there already, and shows each as it is by now: one that somebody else
    claimed meanwhile arrives as claimed.
    """
    done = Status()
    with suppress(StoreClosed, WatchClosed):  # so everybody is sent home
        tasks = yield from OpenWatch(prefix="task:", latest=True)
        while True:
            task = yield from Next(tasks)
            if task.value.owner is None and (yield from claim(task, name)):
                done = yield from count(task, name, done, rest)


def run_tasks(store: Store, names: Iterable[str]) -> None:
    """Run workers as tasks of one event loop."""

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(store.aio.run(worker(name, rest=partial(asyncio.sleep, 0))))

    asyncio.run(together())


def claim(task: Change, name: str) -> Flow[bool]:
    """Put a name on the task, on condition that it still is as it was seen: of all who try, one succeeds."""
    try:
        yield from Commit((Set(task.key, task.value._replace(owner=name), if_revision=task.revision),))
    except RevisionConflict:
        return False
    return True


def count(task: Change, name: str, done: Status, rest: Callable[[], object]) -> Flow[Status]:
    """Count the words of a task's file, and leave the result together with what the worker has done by then."""
    path, counts, words = task.value.path, Counter[bytes](), done.words
    try:
        for chunk in words_of(path):
            counts.update(chunk)
            words += len(chunk)
            yield from Commit((Set(f"worker:{name}", Status(done.files, words, path)),))
            yield from Call(rest)
        done, result = Status(done.files + 1, words), Result(path, counts)
    except OSError as error:
        result = Result(path, Counter(), error.strerror or str(error))
    yield from Commit((Set(task.key.replace("task", "result"), result), Set(f"worker:{name}", done)))
    return done


def collect(store: Store, results: Watch) -> None:
    """Merge the results. A merge copies every word that is known, so they wait until there is much to merge, or all."""
    waiting: dict[str, Result] = {}
    totals, known = Totals(), 0
    for changes in batches(results, timeout=_PAUSE):
        waiting.update((change.key, change.value) for change in changes if change.op is Op.SET)
        much = 4 * sum(len(result.counts) for result in waiting.values()) >= known
        if waiting and (much or store.get("plan") == Plan(totals.merged + len(waiting), complete=True)):
            known = len(store.update("words", partial(with_words, waiting.values()), default=Counter()))
            totals = store.update("totals", partial(with_files, waiting.values()), default=totals)
            store.commit(*map(Delete, waiting))
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
        with _signals_left_to_this_thread():
            thread.start()

    def check(self) -> None:
        """Raise what went wrong in a thread."""
        if self._failures:
            raise self._failures[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()
        deadline = monotonic() + 0.5  # who waits for a disk is left behind
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0, deadline - monotonic()))

    def _run(self, agent: Callable[..., object], *args: Any) -> None:
        try:
            agent(*args)
        except (StoreClosed, WatchClosed):
            pass
        except BaseException as error:
            self._failures.append(error)
            self._store.close()  # nobody else would do its work


@contextmanager
def _signals_left_to_this_thread() -> Iterator[None]:
    """Let threads that are started here hear no Ctrl-C."""
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
