"""Connections to Redis, in both colours: what failures are called, what is sent, and that nothing is left over."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("redis")

import redis

from processes import PATIENCE, eventually
from proxy import Cut, HalfClose, Pass, Proxy, Reset, Stall
from redis_tools import connections, named, run_python
from servers import VALKEY, Server, free_ports
from stigmergy import Op, OutcomeUnknown, Unavailable
from stigmergy.flow import Flow, arun, run
from stigmergy.providers import _redis_wire
from stigmergy.providers._engine import Encoded, Place, Value
from stigmergy.providers.redis import RedisEngine, RedisStore, open_redis

NOWHERE = Place("", 0, 0.0)
WRITE = [Encoded(Op.SET, "a", Value("json", b"1"), None, None, None, None)]


def engine(url: str, *, timeout: float = PATIENCE) -> RedisEngine:
    return RedisEngine(url, namespace=uuid4().hex, history=1_000, history_seconds=None, timeout=timeout)


class Client:
    """An engine, asked in a colour."""

    def __init__(self, engine: RedisEngine, colour: str) -> None:
        self.engine = engine
        self.runner = asyncio.Runner() if colour == "async" else None
        self.transport: Any = engine.async_transport() if colour == "async" else engine.transport()

    def run(self, flow: Flow[Any]) -> Any:
        if self.runner:
            return self.runner.run(arun(flow, self.transport.request))
        return run(flow, self.transport.request)

    def set(self) -> int:
        done = self.run(self.engine.commit(WRITE, NOWHERE))
        return int(done.revisions[0])

    def get(self) -> Any:
        return self.run(self.engine.read("a", NOWHERE))

    def idle(self) -> int:
        if self.runner:
            return sum(len(links.idle) for links, _ in self.transport._loops.values())
        return len(self.transport._idle)

    def connection(self) -> Any:
        """That of the driver, while there is one and it is idle."""
        links = [each.links.idle for each in self.transport._loops.values()] if self.runner else [self.transport._idle]
        [[link]] = links
        return link.connection

    def close(self) -> None:
        if self.runner:
            self.runner.run(self.transport.close())
            self.runner.close()
        else:
            self.transport.close()


NewClient = Callable[..., Client]


@pytest.fixture(params=["sync", "async"])
def new_client(request: pytest.FixtureRequest) -> Iterator[NewClient]:
    clients: list[Client] = []

    def new(url: str, **options: Any) -> Client:
        clients.append(Client(engine(url, **options), request.param))
        return clients[-1]

    yield new
    for each in clients:
        each.close()


@pytest.fixture
def proxy(valkey: Server) -> Iterator[Proxy]:
    with Proxy(valkey.port) as proxy:
        yield proxy


def through(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


# -- connections -------------------------------------------------------------------------------------------------------


def test_a_connection_is_used_again(new_client: NewClient, proxy: Proxy) -> None:
    client = new_client(through(proxy))
    for number in range(10):
        assert client.set() == number + 1
        client.get()
    assert (proxy.connections, client.idle()) == (1, 1)


def test_nothing_connects_before_it_is_used(new_client: NewClient, proxy: Proxy) -> None:
    new_client(through(proxy))
    RedisStore(through(proxy)).close()
    assert proxy.connections == 0


def test_a_server_that_was_restarted_is_connected_anew(
    new_client: NewClient, new_server: Callable[..., Server]
) -> None:
    server = new_server(VALKEY, appendonly=True)
    client = new_client(server.url)
    client.set()
    server.restart()
    assert client.set() == 2
    server.kill()
    server.start()
    assert client.get().revision == 2


@pytest.mark.parametrize("mode", [Reset(), HalfClose()])
def test_a_connection_that_ended_while_it_was_idle_is_replaced(new_client: NewClient, proxy: Proxy, mode: Any) -> None:
    client = new_client(through(proxy))
    client.set()
    proxy.mode = mode
    proxy.drop_all()
    proxy.mode = Pass()

    assert client.set() == 2

    assert (proxy.connections, client.idle()) == (2, 1)


def test_idle_connections_are_closed_at_the_end(new_client: NewClient, valkey: Server) -> None:
    name = uuid4().hex
    client = new_client(named(valkey.url, name))
    client.set()
    assert len(connections(valkey.url, name)) == 1
    if client.runner:
        client.runner.run(client.transport.close())
    else:
        client.transport.close()
    eventually(lambda: connections(valkey.url, name) == [])


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_unavailable(new_client: NewClient) -> None:
    port = next(free_ports())
    client = new_client(f"redis://user:secret@127.0.0.1:{port}/0")
    for ask in (client.set, client.get):
        with pytest.raises(Unavailable, match=rf"^127\.0\.0\.1:{port} was not reached \(ConnectionError\)$") as caught:
            ask()
        assert caught.value.__cause__ is not None


def test_a_server_that_accepts_and_says_nothing_is_unavailable(new_client: NewClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = new_client(f"redis://:secret@127.0.0.1:{silent.getsockname()[1]}/0", timeout=0.1)
        for ask in (client.set, client.get):
            with pytest.raises(Unavailable, match="was not reached"):
                ask()
            silent.accept()[0].close()
        assert client.idle() == 0
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # it has connected once for each
            silent.accept()


def test_a_host_that_has_no_address_is_unavailable(new_client: NewClient) -> None:
    client = new_client(f"redis://{'x' * 100}.invalid/0")
    with pytest.raises(Unavailable, match="was not reached"):
        client.set()


@pytest.mark.parametrize("cut", [Cut(after=0), Cut(after=0, reset=False), Cut(after=7)])
def test_a_commit_whose_answer_is_lost_is_sent_once(new_client: NewClient, proxy: Proxy, cut: Cut) -> None:
    client = new_client(through(proxy))
    client.set()
    proxy.mode = cut

    with pytest.raises(OutcomeUnknown, match="gave no answer"):
        client.set()

    proxy.mode = Pass()
    assert client.get().revision == 2
    assert client.idle() == 1


def test_what_may_be_repeated_is_repeated_once(new_client: NewClient, proxy: Proxy, valkey: Server) -> None:
    client = new_client(through(proxy))
    client.set()
    for flow in (lambda: client.engine.read("a", NOWHERE), lambda: client.engine.log(0, NOWHERE)):
        client.get()
        proxy.mode = Pass()
        before = proxy.connections
        proxy.mode = Cut(after=3)
        with pytest.raises(Unavailable):
            client.run(flow())
        assert proxy.connections == before + 1
        proxy.mode = Pass()
        assert client.idle() == 0


def test_connecting_and_each_answer_are_waited_for_as_long_as_the_timeout(
    new_client: NewClient, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | None] = []

    def noted(seconds: float | None, timeout: Any = asyncio.timeout) -> Any:
        asked.append(seconds)
        return timeout(seconds)

    monkeypatch.setattr(asyncio, "timeout", noted)
    client = new_client(valkey.url, timeout=17.0)

    client.get()

    connection = client.connection()
    assert connection.socket_connect_timeout == 17
    if client.runner:
        assert (asked, connection.socket_timeout) == ([17, 17], None)
    else:
        assert connection._sock.gettimeout() == 17


def test_the_timeout_of_a_store_is_that_of_its_server(valkey: Server) -> None:
    for store in RedisStore(valkey.url, timeout=17.0), open_redis(f"{valkey.url}?timeout=17"):
        with store:
            assert store._log.engine.server.timeout == 17


def test_an_operation_waits_for_two_answers_at_most_and_a_write_for_one(
    new_client: NewClient, proxy: Proxy, valkey: Server
) -> None:
    client = new_client(through(proxy), timeout=0.2)
    eventually(lambda: revision(client) == 0 and client.idle() == 1)
    with redis.Redis.from_url(valkey.url) as admin:
        admin.client_pause(10_000_000, all=False)  # no script is answered, all else is
        try:
            before = proxy.connections
            with pytest.raises(OutcomeUnknown):
                client.set()
            assert (proxy.connections, client.idle()) == (before, 0)

            eventually(lambda: revision(client) == 0 and client.idle() == 1)
            before = proxy.connections
            with pytest.raises(Unavailable):
                client.run(client.engine.log(0, NOWHERE))
            eventually(lambda: proxy.connections > before)
            assert (proxy.connections, client.idle()) == (before + 1, 0)
        finally:
            admin.client_unpause()


def test_an_answer_that_does_not_come(new_client: NewClient, proxy: Proxy) -> None:
    new_client(through(proxy)).set()  # so the server knows the script
    client = new_client(through(proxy), timeout=0.2)
    eventually(lambda: revision(client) == 0 and client.idle() == 1)
    proxy.mode = Stall()

    with pytest.raises(OutcomeUnknown, match=r"gave no answer \(TimeoutError\)"):
        client.set()
    with pytest.raises(Unavailable):
        client.get()

    proxy.mode = Pass()
    assert client.idle() == 0
    eventually(lambda: revision(client) == 1)


def revision(client: Client) -> int | None:
    """0 if there is nothing; `None` if that is not told, as a busy machine may be late."""
    with suppress(Unavailable):
        stored = client.get()
        return stored.revision if stored else 0
    return None


def test_a_wrong_password_is_unavailable_and_not_told(new_client: NewClient, new_server: Callable[..., Server]) -> None:
    server = new_server(VALKEY)
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("requirepass", "right")
    for address in ("", "user:secret@", ":secret@"):
        client = new_client(f"redis://{address}127.0.0.1:{server.port}/0")
        with pytest.raises(Unavailable, match=r"refused \((NOAUTH|ERR)\)$") as caught:
            client.set()
        assert "secret" not in f"{caught.value} {caught.value.__cause__} {client.engine.server.name}"
    assert new_client(f"redis://:right@127.0.0.1:{server.port}/3").set() == 1


def test_a_replica_refuses(new_client: NewClient, new_server: Callable[..., Server], valkey: Server) -> None:
    server = new_server(VALKEY)
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    client = new_client(server.url)
    with pytest.raises(Unavailable, match="READONLY"):
        client.set()


def test_a_server_that_talks_nonsense_is_told_from_one_that_is_not_there(new_client: NewClient) -> None:
    def talk(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n:x\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=talk, args=(listener,))
        thread.start()
        client = new_client(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        for ask in (client.set, client.get):
            with pytest.raises((Unavailable, OutcomeUnknown)):
                ask()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE)


def test_the_driver_never_retries(new_client: NewClient, new_server: Callable[..., Server]) -> None:
    server = new_server(VALKEY)
    with Proxy(server.port) as proxy, redis.Redis.from_url(server.url) as admin:
        client = new_client(through(proxy))
        client.set()
        admin.config_resetstat()
        proxy.mode = Cut(after=0)
        for _ in range(3):
            with pytest.raises(Unavailable if _ else OutcomeUnknown):
                client.set()
        commands = admin.info("commandstats")
    assert commands["cmdstat_evalsha"]["calls"] == 1
    assert commands.get("cmdstat_ping") is None


# -- what strikes in the midst of a request ----------------------------------------------------------------------------


def test_an_interrupted_request_takes_its_connection_with_it(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(engine(through(proxy)), "sync")
    client.set()

    def strike(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    connection = client.transport._idle[0].connection
    monkeypatch.setattr(connection, "read_response", strike)
    with pytest.raises(KeyboardInterrupt):
        client.set()

    assert client.idle() == 0
    assert client.get().revision == 2
    client.close()


async def test_a_cancelled_request_takes_its_connection_with_it(proxy: Proxy) -> None:
    asked = engine(through(proxy))
    transport = asked.async_transport()
    await arun(asked.commit(WRITE, NOWHERE), transport.request)
    proxy.mode = Stall()
    (here,) = transport._loops.values()  # type: ignore[attr-defined]
    assert len(here.links.idle) == 1
    task = asyncio.create_task(arun(asked.commit(WRITE, NOWHERE), transport.request))
    await asyncio.to_thread(eventually, lambda: not here.links.idle)  # the request has its connection

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert here.links.idle == []
    proxy.mode = Pass()
    done = await arun(asked.commit(WRITE, NOWHERE), transport.request)
    assert done.revisions[0] in (2, 3)
    await transport.close()


async def test_requests_cancelled_at_any_moment_mix_up_no_answers(valkey: Server) -> None:
    asked = engine(valkey.url)
    transport = asked.async_transport()
    for turns in range(40):
        task = asyncio.create_task(arun(asked.commit(WRITE, NOWHERE), transport.request))
        for _ in range(turns % 20):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert await arun(asked.read("absent", NOWHERE), transport.request) is None
    await transport.close()


async def test_a_loop_has_so_many_connections_and_no_more(proxy: Proxy) -> None:
    asked = engine(through(proxy))
    transport = asked.async_transport()
    await asyncio.gather(*(arun(asked.commit(WRITE, NOWHERE), transport.request) for _ in range(200)))
    assert proxy.connections <= 32
    stored = await arun(asked.read("a", NOWHERE), transport.request)
    assert stored is not None
    assert stored.revision == 200
    await transport.close()


def test_waiting_can_be_interrupted(valkey: Server) -> None:
    asked = engine(valkey.url, timeout=1000)
    transport = asked.transport()
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            run(asked.wait(NOWHERE, 80), transport.request)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while thread.is_alive():
        transport.interrupt()
        thread.join(0.005)
    assert [type(error) for error in failed] == [Unavailable]
    assert run(asked.commit(WRITE, NOWHERE), transport.request).revisions == (1,)
    transport.interrupt()
    assert run(asked.read("a", NOWHERE), transport.request) is not None
    transport.close()


# -- loops and processes -----------------------------------------------------------------------------------------------


LOOPS = """
import asyncio, gc, sys
from stigmergy.providers.redis import RedisStore

store = RedisStore(sys.argv[1], namespace=sys.argv[2])

async def use(n):
    await asyncio.gather(*(store.aio.set(str(i), i) for i in range(n)))

for _ in range(3):
    asyncio.run(use(5))
gc.collect()
assert len(store.aio._transport._loops) <= 1
print(store.get("3"))
store.close()
"""


def test_loops_that_end_leave_nothing_open(valkey: Server) -> None:
    assert run_python(LOOPS, valkey.url, uuid4().hex) == 3


def test_a_loop_that_was_closed_without_a_word_does_no_harm(valkey: Server) -> None:
    asked = engine(valkey.url)
    transport = asked.async_transport()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(3):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(arun(asked.commit(WRITE, NOWHERE), transport.request))
            loop.close()
        assert len(transport._loops) == 1  # type: ignore[attr-defined]
        asyncio.run(transport.close())
        gc.collect()


def test_a_transport_closes_what_other_loops_have(valkey: Server) -> None:
    asked = engine(valkey.url)
    transport = asked.async_transport()
    with asyncio.Runner() as one, asyncio.Runner() as other:
        for runner in (one, other):
            runner.run(arun(asked.commit(WRITE, NOWHERE), transport.request))
        links = [here.links for here in transport._loops.values()]  # type: ignore[attr-defined]
        one.run(transport.close())
        other.run(asyncio.sleep(0))
        other.run(asyncio.sleep(0))
        assert [len(each.idle) for each in links] == [0, 0]
        assert transport._loops == {}  # type: ignore[attr-defined]


def test_loops_side_by_side_have_connections_of_their_own(valkey: Server) -> None:
    asked = engine(valkey.url)
    transport = asked.async_transport()

    async def work() -> None:
        for _ in range(50):
            await arun(asked.commit(WRITE, NOWHERE), transport.request)

    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = run(asked.read("a", NOWHERE), (sync := asked.transport()).request)
    sync.close()
    assert stored is not None
    assert stored.revision == 200


FORK = """
import os, sys
from stigmergy.providers.redis import RedisStore

store = RedisStore(sys.argv[1], namespace=sys.argv[2])
store.set("a", 1)
child = os.fork()
if child == 0:
    for _ in range(40):
        store.update("a", lambda n: n + 1)
    os._exit(0)
for _ in range(40):
    store.update("a", lambda n: n + 1)
assert os.waitpid(child, 0)[1] == 0
print(store.get("a"))
store.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_process_has_connections_of_its_own(valkey: Server) -> None:
    assert run_python(FORK, valkey.url, uuid4().hex) == 81


# -- what a URL says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://", "localhost:6379/0"),
        ("redis", "localhost:6379/0"),
        ("redis://user:secret@host:1234/5", "host:1234/5"),
        ("REDISS://:secret@host/?db=7", "host:6379/7"),
        ("valkey://[::1]:1/2", "[::1]:1/2"),
        ("valkeys://host?ssl_cert_reqs=none", "host:6379/0"),
        ("unix:///tmp/secretless.sock?db=1&password=secret", "/tmp/secretless.sock/1"),
        ("redis://host?password=secret&username=user&client_name=me", "host:6379/0"),
    ],
)
def test_a_store_shows_where_it_is_and_no_password(url: str, shown: str) -> None:
    with open_redis(url, namespace="team") as store:
        assert repr(store) == f"<RedisStore {shown}, namespace 'team'>"


def test_options_are_taken_from_the_url_and_given_ones_win() -> None:
    url = "redis://host/1?namespace=a%20b&history=500&db=3&history_seconds=1.5&timeout=2"
    with open_redis(url) as store:
        assert repr(store) == "<RedisStore host:6379/3, namespace 'a b'>"
        assert store._log.engine.server.timeout == 2  # type: ignore[attr-defined]
    with open_redis(url, namespace="mine") as store:
        assert repr(store) == "<RedisStore host:6379/3, namespace 'mine'>"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://host/0?histroy=5", "'histroy'"),
        ("redis://host/0?history=many", "'history'"),
        ("redis://host/0?history=99", "history"),
        ("redis://host/0?timeout=0", "timeout"),
        ("redis://host/0?timeout=nan", "timeout"),
        ("redis://host/0?history_seconds=-1", "history_seconds"),
        ("redis://host/0?namespace=", "namespace"),
        ("redis://host/0?namespace={a}", "namespace"),
        ("redis://host/0?namespace=a%0a", "namespace"),
        ("redis://host/0?db=x", "db"),
        ("redis://host/0?socket_timeout=5", "'socket_timeout'"),
        ("redis://host/0?protocol=3", "'protocol'"),
        ("redis://host/0?retry_on_timeout=true", "'retry_on_timeout'"),
        ("redis://host/0?decode_responses=true", "'decode_responses'"),
        ("redis://host/0?ssl_cert_reqs=none", "'ssl_cert_reqs'"),
        ("redis://host/nought", "not the URL"),
        ("redis://host:port/0", "not the URL"),
        ("redis://:pa/ss@host/0", "not the URL"),
        ("redis://:12#secret@host/0", "not the URL"),
        ("redis://:12?secret@host/0", "not the URL"),
        ("unix://", "not the URL"),
        ("http://host", "begins with one of redis"),
        ("", "begins with one of redis"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_redis(url)
    assert "secret" not in str(caught.value)
    assert "ss@host" not in str(caught.value)


def test_the_table_of_refusals_is_sorted() -> None:
    assert list(_redis_wire._REFUSALS) == sorted(_redis_wire._REFUSALS)
