"""A TCP proxy on loopback that does to connections what networks do to them.

    with Proxy(server.port) as proxy, connect(proxy.port) as client:
        proxy.mode = Cut(after=3)

A mode applies from its assignment on, to the connections that are open and to all that come.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

PATIENCE = 60
"""Seconds until a proxy that does not do as it is told has failed."""


@dataclass(frozen=True, slots=True)
class Pass:
    """As if there were no proxy, but that a connection to a target that is down is reset after it was accepted."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Each chunk of bytes waits, either way, for a time that is drawn by the seed of the proxy. Order is kept."""

    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing goes through, either way, until the mode changes: then all does, however late."""


@dataclass(frozen=True, slots=True)
class Blackhole:
    """All is accepted, and lost. What has lost something is reset when the mode changes, for TCP knows no gaps."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Connections are reset."""


@dataclass(frozen=True, slots=True)
class HalfClose:
    """The client reads the end; what it writes still goes through, now and after the mode has changed."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Each connection ends when its client has got that many more bytes; with 0, when it would have got the first.

    So what the client has asked for is done.
    """

    after: int
    reset: bool = True
    """By a reset, or by an orderly end."""


@dataclass(frozen=True, slots=True)
class Dribble:
    """Bytes go through one by one."""


Mode = Pass | Delay | Stall | Blackhole | Reset | HalfClose | Cut | Dribble


class Proxy:
    """Listens on `port` while it is entered, and connects each of its clients to the port `target` on loopback.

    It works in a thread of its own. What it draws depends on the seed, the number of the connection and the way only.
    """

    def __init__(self, target: int, *, seed: int = 0) -> None:
        self.target = target
        self.seed = seed
        self.port = 0
        self.connections = 0
        """How many it has accepted so far."""
        self.flowing = asyncio.Event()
        """Set unless the mode is Stall. For connections."""
        self._mode: Mode = Pass()
        self._open: set[Connection] = set()
        self._closing = asyncio.Event()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"proxy on port {self.port}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Reset the open connections, and refuse any more."""
        with suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(PATIENCE)

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        asyncio.run_coroutine_threadsafe(self._change_mode(mode), self._loop).result(PATIENCE)

    def drop_all(self) -> None:
        """Reset the open connections, at both ends."""
        asyncio.run_coroutine_threadsafe(self._drop_all(), self._loop).result(PATIENCE)

    # -- on the event loop ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._listener, asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.flowing.set()
        async with asyncio.TaskGroup() as self._connected:
            self._loop.add_reader(self._listener, self._accept)
            await self._closing.wait()
            self._loop.remove_reader(self._listener)
            await self._drop_all()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it has gone already
            return
        self.connections += 1
        connection = Connection(self, client, f"{self.seed} {self.connections}")
        connection.task = self._connected.create_task(connection.run())
        connection.task.add_done_callback(lambda _: self._forget(connection))
        self._open.add(connection)
        connection.meet(self.mode)

    def _forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.client.close()
        connection.server.close()

    async def _change_mode(self, mode: Mode) -> None:
        self._mode = mode
        if isinstance(mode, Stall):
            self.flowing.clear()
        else:
            self.flowing.set()
        for connection in self._open:
            connection.meet(mode)
        await self._until_the_ended_are_closed()

    async def _drop_all(self) -> None:
        for connection in self._open:
            connection.end(reset=True)
        await self._until_the_ended_are_closed()

    async def _until_the_ended_are_closed(self) -> None:
        ended = [connection.task for connection in self._open if connection.task.cancelling()]
        if ended:
            await asyncio.wait(ended)


class Connection:
    """A client, and the way to the target and back. Used on the event loop of its proxy only."""

    task: asyncio.Task[None]

    def __init__(self, proxy: Proxy, client: socket.socket, seed: str) -> None:
        self.proxy = proxy
        self.client = client
        self.server = socket.socket()
        for end in (self.client, self.server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._seed = seed
        self._lost = False
        self._half_closed = False
        self._cut: Cut | None = None
        self._left = 0

    async def run(self) -> None:
        """Until both ends have ended, or one is broken, or this is told to end."""
        try:
            if isinstance(self.proxy.mode, Blackhole):
                self._lost = True
                await self._carry(self.client, self.server)
            else:
                await self._connect()
        except* OSError:
            self.end(reset=True)

    async def _connect(self) -> None:
        await self.proxy.flowing.wait()
        await asyncio.get_running_loop().sock_connect(self.server, ("127.0.0.1", self.proxy.target))
        async with asyncio.TaskGroup() as ways:
            ways.create_task(self._carry(self.client, self.server))
            ways.create_task(self._carry(self.server, self.client))

    def meet(self, mode: Mode) -> None:
        """Do what has to be done at once in that mode."""
        if isinstance(mode, Reset) or (self._lost and not isinstance(mode, Blackhole)):
            self.end(reset=True)
        elif isinstance(mode, HalfClose):
            self._half_closed = True
            shut(self.client)

    def end(self, *, reset: bool) -> None:
        if reset:
            for end in (self.client, self.server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.task.cancel()

    async def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        chance = random.Random(f"{self._seed} {sink is self.client}")
        while data := await asyncio.get_running_loop().sock_recv(source, 65536):
            mode = self.proxy.mode
            if isinstance(mode, Delay):
                await asyncio.sleep(chance.uniform(mode.least, mode.most))
            await self.proxy.flowing.wait()
            await self._hand_on(data, sink)
        await self.proxy.flowing.wait()
        if isinstance(self.proxy.mode, Blackhole):
            self._lost = True
        else:
            shut(sink)

    async def _hand_on(self, data: bytes, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        match self.proxy.mode:
            case Blackhole():
                self._lost = True
            case _ if self._half_closed and sink is self.client:
                pass
            case Dribble():
                for byte in data:
                    await loop.sock_sendall(sink, bytes([byte]))
                    await asyncio.sleep(0)
            case Cut() as cut if sink is self.client:
                await self._cut_off(cut, data)
            case _:
                await loop.sock_sendall(sink, data)

    async def _cut_off(self, cut: Cut, data: bytes) -> None:
        if self._cut is not cut:
            self._cut, self._left = cut, cut.after
        data = data[: self._left]
        self._left -= len(data)
        await asyncio.get_running_loop().sock_sendall(self.client, data)
        if not self._left:
            self.end(reset=cut.reset)


def shut(end: socket.socket) -> None:
    """Let the other side read the end."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_WR)
