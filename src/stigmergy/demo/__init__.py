"""The demo: agents count the words of a folder together, and none of them talks to another.

Each leaves marks in one store, and the marks tell the others what to do:

    key              what it says                              left by             followed by
    task:000001      a file; and who claimed it                planner, workers    workers
    plan             how many tasks, and whether that is all   planner             progress
    worker:NAME      what one worker has done, and is at       that worker         progress
    result:000001    the words of one file                     workers             collector
    words, totals    what all results come to                  collector           progress

`files` finds the files and their words, `agents` are those who work, `views` show how it goes.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import closing

from stigmergy.demo.agents import Crew, batches, noting, start_agents
from stigmergy.demo.views import Progress, Report, printable, view_of_stdout
from stigmergy.middleware import apply_middleware
from stigmergy.providers.memory import MemoryStore

__all__ = ["DemoError", "run"]


class DemoError(Exception):
    """The demo cannot be run; the message is for people."""


def run(folder: str, workers: int) -> None:
    """Count the words of the text files below `folder` with so many workers, and print what came out.

    Text files are regular files without a NUL byte in their first 8 KiB. Symbolic links and what is hidden (`.git`) are
    left out. Files that cannot be read are skipped, and named at the end. Raises `DemoError`.
    """
    _check_folder(folder)
    missed: list[int] = []
    names = [f"task-{n + 1}" for n in range(workers // 2)] + [f"thread-{n + 1}" for n in range(workers - workers // 2)]
    progress = Progress(names)
    # No value is ever changed in place, so none has to be copied; and nobody looks back, so nothing replaced is kept.
    store = apply_middleware(MemoryStore(copy=None, history=0), noting(missed))
    with Crew(store) as crew, closing(view_of_stdout()) as view:
        start_agents(crew, store, folder, names)
        for changes in batches(store.observe(*progress.keys)):
            progress.follow(changes)
            if progress.finished:
                break
            view.show(progress)
        crew.check()
        words = store.get("words", Counter())
    if not progress.totals.files:
        raise DemoError(f"no text file to read in {printable(folder)}{progress.skipped}")
    view.report(Report(progress, words, missed))


def _check_folder(folder: str) -> None:
    try:
        os.scandir(folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DemoError(f"cannot list the folder {printable(folder)}: {reason}") from None
