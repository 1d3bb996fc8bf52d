"""What other tests lean on: real servers that start, stop, die and come back, and a proxy that fails as it is told."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import servers
from processes import PATIENCE
from proxy import Blackhole, Cut, Delay, Dribble, HalfClose, Mode, Pass, Proxy, Reset, Stall
from servers import VALKEY, Engine, PortTaken, Server, ServerFailed, on_every_engine, started

pytest_plugins = ["pytester"]

NewServer = Callable[..., Server]
PONG = b"+PONG\r\n"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def ask(port: int, command: bytes) -> bytes:
    """The answer of one line, on a connection of its own."""
    with connect(port) as client:
        return ask_on(client, command)


def ask_on(client: socket.socket, command: bytes) -> bytes:
    client.sendall(command + b"\r\n")
    return receive(client, until=b"\r\n")


def receive(client: socket.socket, *, until: bytes) -> bytes:
    return b"".join(pieces_until(client, until))


def pieces_until(client: socket.socket, end: bytes) -> list[bytes]:
    pieces: list[bytes] = []
    while not b"".join(pieces[-len(end) :]).endswith(end) and (piece := client.recv(100_000)):
        pieces.append(piece)
    return pieces


def receive_all(client: socket.socket) -> bytes:
    with client.makefile("rb") as answers:
        return answers.read()


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "version"), [("valkey", "9."), ("redis62", "6.2.")])
def test_the_servers_of_the_session_are_what_they_are_called(
    request: pytest.FixtureRequest, name: str, version: str
) -> None:
    server: Server = request.getfixturevalue(name)

    assert server.version.startswith(version)
    assert ask(server.port, b"PING") == PONG


def test_each_url_leads_to_a_server(redis_url: str) -> None:
    url = urlsplit(redis_url)

    socket.create_connection((url.hostname, url.port or 6379), timeout=PATIENCE).close()


@on_every_engine
def test_a_server_keeps_its_port_but_no_data_over_a_stop_and_a_kill(new_server: NewServer, engine: Engine) -> None:
    server = new_server(engine)
    port = server.port

    for end in (server.stop, server.kill):
        assert ask(port, b"SET a 1") == b"+OK\r\n"
        end()
        with pytest.raises(ConnectionRefusedError):
            connect(port)
        server.start()

        assert server.port == port
        assert ask(port, b"GET a") == b"$-1\r\n"


@on_every_engine
def test_what_an_appendonly_server_has_acknowledged_outlives_a_kill(new_server: NewServer, engine: Engine) -> None:
    server = new_server(engine, appendonly=True)
    with connect(server.port) as client:
        for _ in range(100):
            ask_on(client, b"INCR a")

    server.kill()
    server.start()

    assert ask(server.port, b"INCR a") == b":101\r\n"


@on_every_engine
def test_a_server_that_saves_keeps_its_data_over_a_restart(new_server: NewServer, engine: Engine) -> None:
    server = new_server(engine, save="3600 1")
    ask(server.port, b"INCR a")

    server.restart()

    assert ask(server.port, b"INCR a") == b":2\r\n"


def test_options_are_handed_to_the_server(new_server: NewServer) -> None:
    server = new_server(VALKEY, options={"maxmemory": "1mb", "appendfsync": "no"})

    with connect(server.port) as client:
        client.sendall(b"CONFIG GET maxmemory\r\nQUIT\r\n")
        assert b"1048576" in receive_all(client)


def test_a_kill_ends_the_connections(new_server: NewServer) -> None:
    server = new_server(VALKEY)

    with connect(server.port) as client:
        ask_on(client, b"PING")
        server.kill()

        assert client.recv(1) == b""


STARTS_A_SERVER = """
import sys, pathlib, servers
with servers.Server(servers.VALKEY, pathlib.Path(sys.argv[1])) as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""


def test_a_server_ends_with_the_process_that_started_it_even_if_that_is_killed(valkey: Server, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_A_SERVER, tmp_path],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as starter:
        assert starter.stdout
        with connect(int(starter.stdout.readline())) as client:
            assert ask_on(client, b"PING") == PONG
            starter.kill()

            assert client.recv(1) == b""


def test_a_server_outlives_the_thread_that_started_it(new_server: NewServer) -> None:
    server = new_server(VALKEY)
    thread = threading.Thread(target=server.restart)
    thread.start()
    thread.join(PATIENCE)

    assert ask(server.port, b"PING") == PONG


def test_a_server_that_does_not_start_says_what_its_log_says(valkey: Server, tmp_path: Path) -> None:
    server = Server(VALKEY, tmp_path, options={"maxmemory": "much"})

    with pytest.raises(ServerFailed, match=r"^the server ended with status 1; its log:\n(.|\n)*maxmemory"):
        server.start()


def test_a_server_whose_port_is_taken_tries_another(
    valkey: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = next(servers.free_ports())
    monkeypatch.setattr(servers, "free_ports", lambda: iter([valkey.port, free]))

    with Server(VALKEY, tmp_path) as server:
        assert server.port == free


def test_a_server_does_not_come_back_on_another_port(new_server: NewServer) -> None:
    server = new_server(VALKEY)
    server.stop()

    with socket.create_server(("127.0.0.1", server.port)), pytest.raises(PortTaken):
        server.start()


def test_a_free_port_is_none_that_a_client_gets() -> None:
    assert max(port for port, _ in zip(servers.free_ports(), range(20), strict=False)) < 32768


# -- what cannot be had ------------------------------------------------------------------------------------------------

NOWHERE = Engine("Nowhere 1", "no_such_package", "no-such-binary", has_wheel=True)


def test_what_is_not_installed_skips_and_fails_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = r"^not exercised: Nowhere 1 \(no_such_package is not installed\)$"

    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        started(Server(NOWHERE, tmp_path))

    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=reason):
        started(Server(NOWHERE, tmp_path))


def test_what_has_no_wheel_here_is_excused_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    with pytest.raises(pytest.skip.Exception, match="has no wheel for this Python"):
        started(Server(dataclasses.replace(NOWHERE, has_wheel=False), tmp_path))


def test_what_does_not_start_fails_in_ci(valkey: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    with pytest.raises(pytest.fail.Exception, match=r"^not exercised: Valkey 9 \(ended with status 1\)$"):
        started(Server(VALKEY, tmp_path, options={"maxmemory": "much"}))


@pytest.mark.parametrize("options", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["here", "-n 2"])
def test_the_end_of_a_run_says_what_was_not_exercised(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest(f"""
        import sys
        sys.path.append({str(Path(__file__).parent)!r})  # of the other processes of pytest-xdist, too
        from servers import not_exercised, pytest_terminal_summary
    """)
    pytester.makepyfile("""
        import pytest
        from servers import not_exercised

        @pytest.mark.parametrize("number", [1, 2])
        def test_something(number):
            not_exercised("Nowhere 1", "it is (not) there")
    """)

    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)

    result.stdout.fnmatch_lines(["*= not exercised =*", "Nowhere 1 (it is (not) there): 2 tests skipped"])


# -- the proxy ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(valkey: Server) -> Iterator[Proxy]:
    with Proxy(valkey.port, seed=1) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    """A client that has gone through the proxy once."""
    with connect(proxy.port) as client:
        assert ask_on(client, b"PING") == PONG
        yield client


def is_silent(client: socket.socket) -> bool:
    """Whether nothing comes for a while, nor the end."""
    client.settimeout(0.02)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE)
    return False


def test_connections_are_counted(proxy: Proxy) -> None:
    for _ in range(3):
        ask(proxy.port, b"PING")

    assert proxy.connections == 3


def test_much_passes_both_ways(proxy: Proxy, client: socket.socket) -> None:
    size = 3_000_000
    client.sendall(b"*2\r\n$4\r\nECHO\r\n$%d\r\n" % size + b"x" * size + b"\r\n")

    assert receive(client, until=b"x\r\n") == b"$%d\r\n" % size + b"x" * size + b"\r\n"


def test_the_end_of_either_side_is_the_end_of_the_other(proxy: Proxy, client: socket.socket) -> None:
    assert ask_on(client, b"QUIT") == b"+OK\r\n"
    assert client.recv(1) == b""

    with connect(proxy.port) as other:
        other.sendall(b"PING\r\n")
        other.shutdown(socket.SHUT_WR)
        assert receive_all(other) == PONG


def test_a_delay_is_as_long_as_it_was_said(proxy: Proxy, client: socket.socket) -> None:
    proxy.mode = Delay(0.01, 0.02)
    began = time.monotonic()
    assert ask_on(client, b"PING") == PONG
    assert time.monotonic() - began >= 0.02


def test_what_is_stalled_goes_on_when_the_mode_changes(proxy: Proxy, client: socket.socket) -> None:
    proxy.mode = Stall()
    with connect(proxy.port) as other:
        for each in (client, other):
            each.sendall(b"PING\r\n")
            assert is_silent(each)

        proxy.mode = Pass()

        for each in (client, other):
            assert receive(each, until=b"\r\n") == PONG


def test_what_a_client_has_said_in_a_stall_arrives_after_it_has_gone(
    proxy: Proxy, client: socket.socket, valkey: Server
) -> None:
    proxy.mode = Stall()
    client.sendall(b"LPUSH late 1\r\n")
    client.close()
    with connect(valkey.port) as other:
        other.sendall(b"BLPOP late 60\r\n")
        assert is_silent(other)

        proxy.mode = Pass()

        assert receive(other, until=b"$1\r\n1\r\n")


def test_a_blackhole_loses_all_and_tells_nobody(proxy: Proxy, client: socket.socket, valkey: Server) -> None:
    proxy.mode = Blackhole()
    with connect(proxy.port) as other:
        for each in (client, other):
            each.sendall(b"INCR lost\r\n")
            assert is_silent(each)

        proxy.mode = Pass()

        for each in (client, other):
            with pytest.raises(ConnectionResetError):
                each.recv(1)
    assert ask(valkey.port, b"GET lost") == b"$-1\r\n"
    assert ask(proxy.port, b"PING") == PONG


def test_who_was_silent_in_a_blackhole_comes_out_of_it(proxy: Proxy, client: socket.socket) -> None:
    proxy.mode = Blackhole()
    proxy.mode = Pass()

    assert ask_on(client, b"PING") == PONG


def test_a_reset_strikes_open_connections_and_new_ones(proxy: Proxy, client: socket.socket) -> None:
    proxy.mode = Reset()

    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionError):
        ask(proxy.port, b"PING")

    proxy.mode = Pass()
    assert ask(proxy.port, b"PING") == PONG


def test_a_half_closed_connection_takes_commands_but_gives_no_answers(
    proxy: Proxy, client: socket.socket, valkey: Server
) -> None:
    proxy.mode = HalfClose()
    with connect(valkey.port) as blocked, connect(proxy.port) as other:
        for number, each in enumerate((client, other)):
            assert each.recv(1) == b""
            each.sendall(b"LPUSH half %d\r\n" % number)
            blocked.sendall(b"BLPOP half 60\r\n")
            assert receive(blocked, until=b"$1\r\n%d\r\n" % number)


@pytest.mark.parametrize("after", range(len(PONG) + 1))
def test_an_answer_is_cut_after_some_bytes_by_a_reset(proxy: Proxy, client: socket.socket, after: int) -> None:
    proxy.mode = Cut(after)
    client.sendall(b"PING\r\n")

    assert b"".join(client.recv(1) for _ in range(after)) == PONG[:after]
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_an_answer_is_cut_by_an_orderly_end(proxy: Proxy, client: socket.socket) -> None:
    proxy.mode = Cut(5, reset=False)
    client.sendall(b"PING\r\n")

    assert receive_all(client) == PONG[:5]


def test_a_cut_counts_the_bytes_of_each_connection_over_its_answers(proxy: Proxy, client: socket.socket) -> None:
    proxy.mode = Cut(len(PONG) + 2, reset=False)
    with connect(proxy.port) as other:
        for each in (client, other):
            assert ask_on(each, b"PING") == PONG
            each.sendall(b"PING\r\n")
            assert receive_all(each) == PONG[:2]


def test_what_was_asked_is_done_when_its_answer_is_cut(proxy: Proxy, client: socket.socket, valkey: Server) -> None:
    proxy.mode = Cut(0)
    client.sendall(b"INCR cut\r\n")

    with pytest.raises(ConnectionResetError):
        client.recv(1)

    assert ask(valkey.port, b"INCR cut") == b":2\r\n"


def test_bytes_dribble_one_by_one(proxy: Proxy, client: socket.socket) -> None:
    proxy.mode = Dribble()
    pieces = []
    for asked in range(1, 10_000):
        client.sendall(b"PING\r\n")
        pieces += pieces_until(client, b"\r\n")
        if len(pieces) > asked + 50:  # the system may put some together
            break

    assert len(pieces) > asked + 50
    assert b"".join(pieces) == PONG * asked


def test_all_connections_are_dropped_by_a_reset_at_both_ends(
    proxy: Proxy, client: socket.socket, valkey: Server
) -> None:
    with connect(proxy.port) as other:
        ask_on(client, b"CLIENT SETNAME dropped")
        ask_on(other, b"CLIENT SETNAME dropped")

        proxy.drop_all()

        for each in (client, other):
            with pytest.raises(ConnectionResetError):
                each.recv(1)
    with connect(valkey.port) as observer:
        observer.sendall(b"CLIENT LIST\r\nQUIT\r\n")
        assert b"dropped" not in receive_all(observer)


def test_a_target_that_is_down_resets_its_clients(new_server: NewServer) -> None:
    server = new_server(VALKEY)
    with Proxy(server.port) as proxy, connect(proxy.port) as client:
        ask_on(client, b"PING")
        server.kill()
        assert client.recv(1) == b""
        with pytest.raises(ConnectionError):
            ask(proxy.port, b"PING")

        server.start()

        assert ask(proxy.port, b"PING") == PONG


@pytest.mark.parametrize("mode", [Pass(), Delay(600, 600), Stall(), Blackhole(), HalfClose()], ids=repr)
def test_a_proxy_that_closes_leaves_nothing(valkey: Server, mode: Mode) -> None:
    before = set(threading.enumerate())
    with Proxy(valkey.port) as proxy, connect(proxy.port) as client:
        ask_on(client, b"PING")
        proxy.mode = mode
        client.sendall(b"PING\r\n")
        connect(proxy.port).close()

        proxy.close()

        with pytest.raises(ConnectionRefusedError):
            connect(proxy.port)
    assert not set(threading.enumerate()) - before
