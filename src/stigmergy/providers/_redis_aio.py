"""Connections to a Redis server for event loops: each loop has its own, and they end with it."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, NamedTuple, cast
from weakref import finalize

from redis.asyncio import connection as driver
from redis.exceptions import NoScriptError

from stigmergy._core.fork import never_release
from stigmergy.flow import Operation
from stigmergy.providers._redis_wire import FOREIGN, NO_SCRIPT, Ask, Server, again, is_quiet, translated, watched

__all__ = ["AsyncRedisTransport"]

_MOST_CONNECTIONS = 32
"""Of one loop. Requests beyond wait their turn."""


class _Link:
    """A connection, used by one request at a time."""

    __slots__ = ("connection", "readable")
    sent = True
    """The loop sends later what it could not send at once, and nobody hears how much that was."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.readable = watched(connection._writer.get_extra_info("socket").fileno())

    def is_usable(self) -> bool:
        writer, reader = self.connection._writer, self.connection._reader
        if writer is None or writer.transport.is_closing() or reader.at_eof():
            return False
        return is_quiet(self.readable)  # for the loop may have been too busy to hear of its end

    async def exchange(self, command: bytes) -> Any:
        await self.connection.send_packed_command([command], check_health=False)
        try:
            return await self.connection.read_response(disable_decoding=True)
        except NoScriptError:
            return NO_SCRIPT


class _Links:
    """The connections of one loop."""

    def __init__(self) -> None:
        self.idle: list[_Link] = []
        self.limit = asyncio.Semaphore(_MOST_CONNECTIONS)
        self.is_open = True

    async def take(self) -> _Link | None:
        while self.idle:
            link = self.idle.pop()
            if link.is_usable():
                return link
            await _drop(link.connection)
        return None

    async def give_back(self, link: _Link) -> None:
        if self.is_open:
            self.idle.append(link)
        else:
            await _drop(link.connection)


class _Here(NamedTuple):
    """What one loop has."""

    links: _Links
    guard: AsyncGenerator[None, None]


_Loops = dict[AbstractEventLoop, _Here]


class AsyncRedisTransport:
    """Connections to one server, for any number of loops."""

    def __init__(self, server: Server) -> None:
        # The driver would time each command by `asyncio.wait_for`, which loses cancellations before Python 3.12. What
        # is timed here is all of a request, and all of connecting.
        self._server = server._replace(arguments=server.arguments | {"socket_timeout": None})
        self._class = getattr(driver, server.connection_class.__name__)
        self._live_on({})

    async def request(self, request: Operation[Any]) -> Any:
        ask = cast(Ask, request)
        links, _ = self._loops.get(asyncio.get_running_loop()) or await self._enter()
        async with links.limit:
            link = await links.take() or await self._connect(ask)
            try:
                answer = await self._exchange(link, ask)
            except FOREIGN as error:
                again(error, ask, link.sent, self._server)
                link = await self._connect(ask)
                try:
                    answer = await self._exchange(link, ask)
                except FOREIGN as another:
                    raise translated(another, ask, link.sent, self._server) from another
            await links.give_back(link)
            return answer

    async def close(self) -> None:
        here = asyncio.get_running_loop()
        while self._loops:
            with suppress(KeyError):
                loop, (_, guard) = self._loops.popitem()
                if loop is here:
                    await guard.aclose()
                else:
                    _close_there(loop, guard)

    def close_soon(self) -> None:
        _close_all(self._loops)

    def abandon(self) -> None:
        never_release(self._loops)
        self._finalizer.detach()
        self._live_on({})

    def _live_on(self, loops: _Loops) -> None:
        self._loops = loops
        # Held from there, connections are still whole when a transport that nobody closed goes, with all in its cycle.
        self._finalizer = finalize(self, _close_all, loops)
        self._finalizer.atexit = False

    async def _enter(self) -> _Here:
        for loop in list(self._loops):
            if loop.is_closed():
                self._loops.pop(loop, None)
        links = _Links()
        here = self._loops[asyncio.get_running_loop()] = _Here(links, _guard(links))
        await anext(here.guard)  # from now on the loop knows it, and ends it when it ends itself
        return here

    async def _connect(self, ask: Ask) -> _Link:
        connection = self._class(**self._server.arguments)
        try:
            async with asyncio.timeout(self._server.timeout):
                await connection.connect()
            return _Link(connection)
        except FOREIGN as error:
            await _drop(connection)
            raise translated(error, ask, False, self._server) from error
        except BaseException:
            await _drop(connection)
            raise

    async def _exchange(self, link: _Link, ask: Ask) -> Any:
        try:
            async with asyncio.timeout(self._server.timeout):
                return await link.exchange(ask.command)
        except BaseException:
            await _drop(link.connection)
            raise


async def _guard(links: _Links) -> AsyncGenerator[None, None]:
    """Started on a loop, it closes the connections there when the loop ends, or nobody needs them any more."""
    try:
        yield
    finally:
        links.is_open = False
        while links.idle:
            await _drop(links.idle.pop().connection)


async def _drop(connection: Any) -> None:
    """Close `connection`, at once: nothing here waits."""
    if connection._writer is not None:
        connection._writer.transport.abort()  # closing alone would first send what is not sent yet
    with suppress(*FOREIGN):
        await connection.disconnect(nowait=True)


def _close_all(loops: _Loops) -> None:
    while loops:
        with suppress(KeyError):
            loop, (_, guard) = loops.popitem()
            _close_there(loop, guard)


def _close_there(loop: AbstractEventLoop, guard: AsyncGenerator[None, None]) -> None:
    with suppress(RuntimeError):  # that loop is closed
        loop.call_soon_threadsafe(lambda: loop.create_task(cast(Any, guard.aclose())))
