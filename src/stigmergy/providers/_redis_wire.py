"""Connections to a Redis server, by its driver: what goes over them, and what it means when they fail.

The driver connects, authenticates, encrypts and parses. It never retries here: whether a request may be made again is
known to the request, and a write is sent once.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple, cast

from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as DriverTimeoutError

from stigmergy._core.fork import never_release
from stigmergy.errors import OutcomeUnknown, StateError, Unavailable
from stigmergy.flow import Operation
from stigmergy.providers._engine import Request

__all__ = [
    "FOREIGN",
    "NO_SCRIPT",
    "Ask",
    "RedisTransport",
    "Server",
    "Wait",
    "Write",
    "again",
    "is_quiet",
    "packed",
    "translated",
    "watched",
]

_assign = object.__setattr__

FOREIGN = (RedisError, OSError, ValueError)
"""What the driver raises; a `ValueError` where the server talks nonsense, or has an impossible name."""

NO_SCRIPT = (b"unknown",)
"""The answer that the server does not know the script. The connection is as good as before."""

# Errors of the driver, by name, since no version has them all: the word that the server said. All of them mean that it
# did nothing. Sorted; a test looks.
_REFUSALS = {
    "AskError": "ASK",
    "AuthenticationError": "NOAUTH",
    "AuthenticationWrongNumberOfArgsError": "NOAUTH",
    "AuthorizationError": "NOPERM",
    "BusyLoadingError": "LOADING",
    "ClusterCrossSlotError": "CROSSSLOT",
    "ClusterDownError": "CLUSTERDOWN",
    "ExternalAuthProviderError": "NOAUTH",
    "MasterDownError": "MASTERDOWN",
    "MovedError": "MOVED",
    "NoPermissionError": "NOPERM",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "TryAgainError": "TRYAGAIN",
}


class Ask(Request[Any]):
    """One command, packed. It may be made again if its answer is lost."""

    __slots__ = ("command",)
    command: bytes
    repeats: ClassVar[bool] = True
    waits: ClassVar[bool] = False
    lost: ClassVar[type[StateError]] = Unavailable

    def __init__(self, command: bytes) -> None:
        _assign(self, "command", command)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.command)} bytes>"


class Write(Ask):
    """It is sent once. Without its answer, nobody knows whether it happened."""

    __slots__ = ()
    repeats = False
    lost = OutcomeUnknown


class Wait(Ask):
    """It is answered when something happens, and may be interrupted."""

    __slots__ = ()
    repeats = False
    waits = True


class Server(NamedTuple):
    """Where the server is, and how to connect to it."""

    connection_class: type[Any]
    arguments: dict[str, Any]
    timeout: float

    @property
    def name(self) -> str:
        """For people: without user and password."""
        if "path" in self.arguments:
            return cast(str, self.arguments["path"])
        host = self.arguments.get("host", "localhost")
        return f"{f'[{host}]' if ':' in host else host}:{self.arguments.get('port', 6379)}"

    @property
    def database(self) -> int:
        return cast(int, self.arguments.get("db", 0))


def packed(*arguments: bytes) -> bytes:
    """`arguments` as they go over the wire, without the number of them."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(each), each) for each in arguments])


def _is_lost(error: BaseException) -> bool:
    """Whether `error`, of a request that was sent, is other than an answer of the server."""
    return not isinstance(error, ResponseError) and type(error).__name__ not in _REFUSALS


def translated(error: Exception, ask: Ask, sent: bool, server: Server) -> StateError:
    """What `error` of the driver, from `ask`, is to the users of a store."""
    if _is_lost(error):
        if sent:
            return ask.lost(f"{server.name} gave no answer ({type(error).__name__})")
        return Unavailable(f"{server.name} was not reached ({type(error).__name__})")
    if "user_script" in str(error):
        # It was in the midst of it; all that stops it before the first write is said in another way.
        return ask.lost(f"{server.name} failed in the midst of a script")
    word = _REFUSALS.get(type(error).__name__) or _first_word(str(error))
    return Unavailable(f"{server.name} refused ({word})")


def again(error: Exception, ask: Ask, sent: bool, server: Server) -> None:
    """Return if `ask`, which failed by `error`, may be made once more; else raise what that means."""
    if not (ask.repeats and _is_lost(error)):
        raise translated(error, ask, sent, server) from error


def _first_word(answer: str) -> str:
    word = answer.partition(" ")[0]
    return word if word.isalpha() and word.isupper() else "ERR"


# -- is an idle connection still one? ----------------------------------------------------------------------------------


def watched(number: int) -> Callable[[], bool]:
    """Whether there is something to read on the socket of that file number: asked of an idle connection, its end."""
    if not hasattr(select, "poll"):  # Windows
        return lambda: bool(select.select([number], [], [], 0)[0])
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return lambda: bool(poll.poll(0))


def is_quiet(readable: Callable[[], bool]) -> bool:
    """Whether an idle connection may be used: there is nothing to read, not even its end."""
    try:
        return not readable()
    except (OSError, ValueError):
        return False


# -- the transport -----------------------------------------------------------------------------------------------------


class _Link:
    """A connection, used by one request at a time."""

    __slots__ = ("connection", "readable", "sent", "socket")

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.socket: socket.socket = connection._sock
        self.readable = watched(self.socket.fileno())
        self.sent = False
        """Whether the server may have the whole of the last command."""

    def exchange(self, command: bytes) -> Any:
        self.sent = False
        try:
            self.connection.send_packed_command([command], check_health=False)
        except DriverTimeoutError:
            self.sent = True  # a signal handler may have raised a TimeoutError when everything had left
            raise
        self.sent = True
        try:
            return self.connection.read_response(disable_decoding=True)
        except NoScriptError:
            return NO_SCRIPT

    def shut(self) -> None:
        """End it under whoever waits on it. From any thread; closing it would give its number away."""
        with suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # of an SSLSocket too, whose own is not for this

    def drop(self) -> None:
        with suppress(*FOREIGN):
            self.connection.disconnect()


class RedisTransport:
    """Connections to one server, each used by one thread at a time. There is no lock: lists do each step at once."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._idle: list[_Link] = []
        self._waiting: list[_Link] = []
        self._closed = False

    def request(self, request: Operation[Any]) -> Any:
        ask, idle = cast(Ask, request), self._idle
        link = self._take(ask, idle)
        try:
            answer = self._exchange(link, ask)
        except FOREIGN as error:
            again(error, ask, link.sent, self._server)
            link = self._connect(ask)
            try:
                answer = self._exchange(link, ask)
            except FOREIGN as another:
                raise translated(another, ask, link.sent, self._server) from another
        idle.append(link)  # to the list of that time: after a fork in between, to that of the parent
        if self._closed:
            self.close()
        return answer

    def interrupt(self) -> None:
        for link in self._waiting[:]:
            link.shut()

    def close(self) -> None:
        self._closed = True
        while (link := _popped(self._idle)) is not None:
            link.drop()

    def abandon(self) -> None:
        never_release((self._idle, self._waiting))
        self._idle, self._waiting = [], []

    def _take(self, ask: Ask, idle: list[_Link]) -> _Link:
        while (link := _popped(idle)) is not None:
            if is_quiet(link.readable):
                return link
            link.drop()
        return self._connect(ask)

    def _connect(self, ask: Ask) -> _Link:
        connection = self._server.connection_class(**self._server.arguments)
        try:
            connection.connect()
            return _Link(connection)
        except FOREIGN as error:
            connection.disconnect()
            raise translated(error, ask, False, self._server) from error
        except BaseException:
            connection.disconnect()
            raise

    def _exchange(self, link: _Link, ask: Ask) -> Any:
        if not ask.waits:
            return self._exchanged(link, ask)
        waiting = self._waiting
        waiting.append(link)
        try:
            return self._exchanged(link, ask)
        finally:
            waiting.remove(link)

    def _exchanged(self, link: _Link, ask: Ask) -> Any:
        try:
            return link.exchange(ask.command)
        except BaseException:
            link.drop()
            raise


def _popped(idle: list[_Link]) -> _Link | None:
    try:
        return idle.pop()
    except IndexError:
        return None
