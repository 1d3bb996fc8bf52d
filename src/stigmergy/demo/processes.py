"""Further processes that work on the same job.

Each begins anew, as `python -m stigmergy demo --join`, and has a pipe from the first one: on it comes what to do. When
it ends, the first process has ended, however that was, and everybody goes home. While it works it holds a lease, a
claim on `process:NAME`: when that is gone, because it was killed, say, the foreman gives its tasks back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing, suppress
from io import FileIO
from threading import Event
from typing import NamedTuple, Self

from stigmergy.claims import claim
from stigmergy.demo.agents import Crew, start_workers, uninterrupted
from stigmergy.demo.marks import clean, open_marks
from stigmergy.errors import StateError
from stigmergy.model import Op
from stigmergy.scope import scoped
from stigmergy.store import Store

__all__ = ["Job", "Processes", "read_job", "work_on"]

_TTL = 10.0
"""In seconds. Of the lease of a process that cannot be seen to have ended: one that was suspended, say."""


class Job(NamedTuple):
    """What a process is told."""

    url: str
    scope: str
    process: str
    workers: list[str]


class Processes:
    """Those that the first process has started. Leaving this kills them: they have nothing that is not in the store.

    A thread of the crew waits for the end of each, and leaving the crew waits for its threads: one limit for all.
    """

    def __init__(self, crew: Crew, store: Store) -> None:
        self.lost: list[str] = []
        """Who has ended before that."""
        self._crew = crew
        self._store = store
        self._running: list[subprocess.Popen[bytes]] = []
        self._leaving = False

    def start(self, job: Job) -> None:
        """Start one more."""
        # The URL may hold a password, and everybody can read a command line. Modules are found where they are here.
        command = [sys.executable, "-P", "-m", "stigmergy", "demo", "--join"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipe = subprocess.PIPE
        with uninterrupted():
            # In a session of its own, where no Ctrl-C gets to.
            process = subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=pipe, env=environment, start_new_session=True
            )
            self._running.append(process)
            self._crew.start(self._see_off, job.process, process)
        assert process.stdin is not None
        with suppress(OSError):  # it has ended already
            process.stdin.write(json.dumps(job).encode() + b"\n")

    def wait_until_ready(self) -> None:
        """Come back when each works, or has ended."""
        for process in self._running:
            assert process.stdout is not None
            process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            self._leaving = True
            for process in self._running:
                process.kill()
                for pipe in process.stdin, process.stdout:
                    assert pipe is not None
                    pipe.close()

    def _see_off(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Let its lease end with it."""
        process.wait()
        if not self._leaving:
            self.lost.append(name)
            self._store.delete(f"process:{name}")


def read_job(pipe: FileIO) -> Job:
    """Return what comes on the pipe first. Raises `TypeError`, `ValueError` if that is no job."""
    return Job(*json.loads(pipe.readline()))


def work_on(job: Job, pipe: FileIO) -> None:
    """Be a further process: work until the pipe ends, or the lease is lost.

    What goes wrong with the store is not told: who has started this process will find out.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ended = Event()
    with suppress(StateError), closing(open_marks(job.url)) as shared:
        try:
            _work(shared, job, pipe, ended)
        finally:
            if ended.is_set():  # each does so after its workers have gone: when all have gone, nothing is left
                clean(shared, job.scope)


def _work(shared: Store, job: Job, pipe: FileIO, ended: Event) -> None:
    store, lease = scoped(shared, job.scope), f"process:{job.process}"
    with claim(scoped(shared, job.scope), lease, f"{job.process}, pid {os.getpid()}", _TTL), Crew(store) as crew:
        changes = store.watch(lease)
        start_workers(crew, store, job.workers, lease)
        crew.start(_go_home, store, pipe, ended)
        with suppress(OSError):  # nobody is there to read it
            print("ready", flush=True)
        for change in changes:
            if change.op is Op.DELETE:
                break
    crew.check()


def _go_home(store: Store, pipe: FileIO, ended: Event) -> None:
    pipe.read()
    ended.set()
    store.close()
