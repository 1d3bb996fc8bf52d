"""The demo: agents count the words of a folder together, and none of them talks to another.

Each leaves marks in one store, and the marks tell the others what to do:

    key              what it says                              left by             followed by
    task:000001      a file to count; who claimed it           planner, workers    workers
    plan             how many tasks, and whether that is all   planner             progress
    worker:NAME      what one worker has done, and is at       that worker         progress
    result:000001    the words of one file                     workers             collector
    words, totals    what all results come to                  collector           progress
    process:NAME     a further process lives                   that process        foreman

`files` finds the files and their words, `agents` are those who work, `views` show how it goes. With further `processes`
the same agents work on a store that all of them open; `marks` says how.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from io import FileIO

from stigmergy.demo.agents import Crew, batches, foreman, noting, start_agents, team
from stigmergy.demo.marks import address, left_clean, new_scope, open_marks
from stigmergy.demo.processes import Job, Processes, read_job, work_on
from stigmergy.demo.views import Progress, Report, printable, view_of_stdout
from stigmergy.errors import ProviderNotFound, StateError, Unsupported
from stigmergy.middleware import apply_middleware
from stigmergy.scope import scoped
from stigmergy.store import Store

__all__ = ["DemoError", "join", "run"]


class DemoError(Exception):
    """The demo cannot be run (`status` 2), or went wrong (1); the message is for people."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def run(folder: str, workers: int, url: str = "memory", processes: int = 1) -> None:
    """Count the words of the text files below `folder` with so many workers in each process; print what came out.

    Text files are regular files without a NUL byte in their first 8 KiB. Symbolic links and what is hidden (`.git`) are
    left out. Files that cannot be read are skipped, and named at the end. Raises `DemoError`.

    The processes share the store at `url`. This one plans, collects and shows, and its workers work as those of the
    others do. The keys of a run are its own, and are removed in the end.
    """
    _check_folder(folder)
    missed: list[int] = []
    teams = _teams(workers, processes)
    first, *others = teams
    progress = Progress([name for names in teams.values() for name in names])
    scope, facts = new_scope(), [f"store: {printable(address(url))}", f"processes: {processes}"]
    with _said_in_one_line(), closing(_open(url, processes)) as shared, left_clean(shared, scope):
        store = scoped(apply_middleware(shared, noting(missed)), scope)
        with Crew(store) as crew, Processes(crew, store) as further, closing(view_of_stdout()) as view:
            crew.start(foreman, store, store.watch(prefix="process:", capacity=None))
            for name in others:
                further.start(Job(url, scope, name, teams[name]))
            further.wait_until_ready()
            start_agents(crew, store, folder, teams[first])
            for changes in batches(store.observe(*progress.keys)):
                progress.follow(changes)
                if progress.finished:
                    break
                view.show(progress)
            crew.check()
            words = store.get("words", Counter())
    if not progress.totals.files:
        raise DemoError(f"no text file to read in {printable(folder)}{progress.skipped}")
    if further.lost:
        facts[-1] += f" ({', '.join(sorted(further.lost))} ended early, and others did its work)"
    view.report(Report(progress, words, missed, first, facts if url != "memory" else ()))


def join() -> None:
    """Be one of the further processes, and work on what comes on stdin. Raises `DemoError`."""
    pipe = FileIO(0, closefd=False)
    try:
        job = read_job(pipe)
    except (TypeError, ValueError):
        raise DemoError("--join is for processes that the demo starts") from None
    work_on(job, pipe)


def _teams(workers: int, processes: int) -> dict[str, list[str]]:
    """Who works in which process. A single one has no name, and theirs are short."""
    names = [f"p{number + 1}" for number in range(processes)] if processes > 1 else [""]
    return {name: team(workers, name) for name in names}


def _open(url: str, processes: int) -> Store:
    """Open the store. No message shows the URL: there may be a password in it."""
    try:
        store = open_marks(url)
    except ProviderNotFound as error:
        name = repr(error.name) if re.fullmatch(r"[a-z][a-z0-9+.-]*", error.name) else "that"
        raise DemoError(f"no kind of store is called {name}; known: {', '.join(error.known)}") from None
    except (ImportError, TypeError, ValueError) as error:
        raise DemoError(printable(f"cannot open the store: {error}")) from None
    try:
        return store.require("distributed") if processes > 1 else store
    except Unsupported as error:
        store.close()
        raise DemoError(f"{error}: several processes need one that is, such as --store sqlite:///FILE") from None


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    try:
        yield
    except StateError as error:
        raise DemoError(printable(str(error)), status=1) from None


def _check_folder(folder: str) -> None:
    try:
        os.scandir(folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DemoError(f"cannot list the folder {printable(folder)}: {reason}") from None
