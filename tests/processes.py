"""Processes for tests: forked from a server that has imported what they need, so that each takes milliseconds to start.

`start(function, *args)` calls `function(link, *args)` in a process of its own. Both sides talk over a pipe: what one
`say`s the other `hear`s. A process that raises fails its parent, with its traceback, when that next hears.

The server itself never opens a store, for a child must not inherit a connection to a database.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import recv_handle, send_handle
from types import FrameType
from typing import Any, NoReturn, Protocol, Self

import pytest

__all__ = [
    "PATIENCE",
    "Child",
    "ChildFailed",
    "Link",
    "Nursery",
    "Start",
    "all_hear",
    "eventually",
    "nursery",
    "start",
    "timers",
]

PATIENCE = 60.0
"""Seconds after which what has not happened hangs: more than any busy machine takes, and so much less than a test may
that its failure, and the cleaning up after it, come before the limit."""


class ChildFailed(Exception):
    """What a child process raised, with its traceback."""


class Link:
    """A child's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, message: object = None) -> None:
        self._pipe.send(("said", message))

    def hear(self) -> Any:
        return self._pipe.recv()


class Start(Protocol):
    def __call__(self, function: Callable[..., object], *args: Any) -> Child: ...


class Child:
    """A process as its parent sees it."""

    def __init__(self, nursery: Nursery, pid: int, pipe: Connection) -> None:
        self.pid = pid
        self.pipe = pipe
        self._nursery = nursery
        self._code: int | None = None

    def say(self, message: object = None) -> None:
        self.pipe.send(message)

    def hear(self, timeout: float = PATIENCE) -> Any:
        """Return what it said next. Raises `ChildFailed`, `EOFError` when it has ended."""
        if not self.pipe.poll(timeout):
            raise TimeoutError(f"the process has said nothing for {timeout} s")
        try:
            kind, message = self.pipe.recv()
        except OSError as error:  # killed in the midst of a word
            raise EOFError from error
        if kind == "raised":
            raise ChildFailed(message)
        return message

    def rest(self) -> list[Any]:
        """Return what it said until it ended."""
        said = []
        with suppress(EOFError):
            while True:
                said.append(self.hear())
        return said

    def signal(self, number: int) -> None:
        if self._code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def stop(self) -> None:
        """Suspend it, and come back when it is."""
        self.signal(signal.SIGSTOP)
        eventually(lambda: _state(self.pid) == "T")

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def join(self) -> int:
        """Wait until it has ended; return its exit code."""
        if self._code is None:
            self._code = self._nursery.join(self.pid)
        return self._code


class Nursery:
    """The server. It ends with the process that started it, and so do its children."""

    def __enter__(self) -> Self:
        self._pipe, theirs = Pipe()
        with theirs:
            arguments = [sys.executable, __file__, str(theirs.fileno())]
            self._server = subprocess.Popen(arguments, pass_fds=[theirs.fileno()], start_new_session=True)
        self._pipe.send(sys.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        try:
            self._server.wait(PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()

    @contextmanager
    def children(self) -> Iterator[Start]:
        """`start`, whose children are killed afterwards."""
        started: list[Child] = []

        def start(function: Callable[..., object], *args: Any) -> Child:
            started.append(self._start(function, args))
            return started[-1]

        try:
            yield start
        finally:
            for child in started:
                child.kill()
            for child in started:
                child.join()
                child.pipe.close()

    def join(self, pid: int) -> int:
        self._pipe.send(("join", pid))
        return self._answer()

    def _start(self, function: Callable[..., object], args: tuple[Any, ...]) -> Child:
        ours, theirs = Pipe()
        with theirs:
            self._pipe.send(("start", pickle.dumps((function, args))))
            send_handle(self._pipe, theirs.fileno(), self._server.pid)
            return Child(self, self._answer(), ours)

    def _answer(self) -> int:
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError("the server of processes does not answer")
        answer: int | str = self._pipe.recv()
        if isinstance(answer, str):
            raise ChildFailed(answer)
        return answer


def all_hear(children: list[Child], seconds: float) -> Iterator[tuple[int, Any]]:
    """What they say within so many seconds: the number of each, and its message."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        ready = wait([child.pipe for child in children], left)
        for number, child in enumerate(children):
            if child.pipe in ready:
                yield number, child.hear()


def eventually(condition: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """Return what `condition()` returns as soon as that is true."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not so within {timeout} s"
        time.sleep(0.002)
    return result


def timers(calls: object) -> int:
    """How many threads wait for `calls` of a store's sweeper, to make its deadlines come due."""
    return sum(waits_for(calls, frame) for frame in sys._current_frames().values())


def waits_for(calls: object, frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "_sweep_for_ever":
        frame = frame.f_back
    return frame is not None and frame.f_locals["calls"] is calls


def _state(pid: int) -> str:
    """One letter: "T" for stopped."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


# -- in the server -----------------------------------------------------------------------------------------------------


def _serve(parent: Connection) -> None:
    sys.path[:] = parent.recv()
    try:
        while True:
            request, argument = parent.recv()
            try:
                if request == "start":
                    parent.send(_fork(parent, argument))
                else:
                    parent.send(_join(parent, argument))
            except Exception:
                parent.send(traceback.format_exc())
    except (EOFError, ConnectionError):
        _end()


def _end() -> None:
    os.killpg(0, signal.SIGKILL)  # this process, its children, and theirs


def _join(parent: Connection, pid: int) -> int:
    hung_up = select.poll()
    hung_up.register(parent, 0)  # for nothing but that the parent has gone
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if hung_up.poll(5):
            _end()
    return os.waitstatus_to_exitcode(ended[1])


def _fork(parent: Connection, what: bytes) -> int:
    with Connection(recv_handle(parent)) as pipe:
        function, args = pickle.loads(what)  # imports its module here, once for all children
        pid = os.fork()
        if pid == 0:
            signal.alarm(1200)  # in case the server is killed
            parent.close()
            _live(pipe, function, args)
        return pid


def _live(pipe: Connection, function: Callable[..., object], args: tuple[Any, ...]) -> NoReturn:
    code = 1
    try:
        function(Link(pipe), *args)
        code = 0
    except BaseException:
        with suppress(OSError):
            pipe.send(("raised", traceback.format_exc()))
    finally:
        os._exit(code)


if __name__ == "__main__":
    import processes  # the module that tests know, and not `__main__`

    processes._serve(Connection(int(sys.argv[1])))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Where the child processes of a module come from."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def start(nursery: Nursery) -> Iterator[Start]:
    """`start(function, *args)`: a child process that calls `function(link, *args)`; none is left at the end."""
    with nursery.children() as start:
        yield start
