"""What the tests of the Redis provider share: its operations, what they look at on servers, and fixtures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import redis

from processes import PATIENCE, eventually
from servers import Server
from stigmergy import Change, Check, Compacted, Delete, Op, Set, Watch
from stigmergy.providers.redis import RedisStore
from stigmergy.testing import Colour

NewServer = Callable[..., Server]
NewStore = Callable[..., Any]

both_colours = pytest.mark.parametrize("name", ["sync", "async"])


@pytest.fixture
def namespace() -> str:
    return os.urandom(6).hex()


@pytest.fixture
def new_redis(colour: Colour) -> Iterator[NewStore]:
    """`new_redis(url=..., namespace=...)`: a store in this colour, closed afterwards."""
    with colour.stores(partial(RedisStore, timeout=PATIENCE)) as new:
        yield new


def log_of(url: str, namespace: str) -> list[Change]:
    """Every change since the first, as a store that was not there reads them."""
    with RedisStore(url, namespace=namespace) as store:
        return list(iter(store.watch(prefix="", since=0, capacity=None).get_nowait, None))


def drain(watch: Watch) -> list[Change]:
    return list(iter(watch.get_nowait, None))


def named(url: str, name: str) -> str:
    """The URL for connections that the server knows by that name."""
    return f"{url}?client_name={name}"


def connections(url: str, name: str) -> list[dict[str, str]]:
    """What the server says of the connections of that name."""
    with redis.Redis.from_url(url) as client:
        return [each for each in client.client_list() if each["name"] == name]


def is_blocked(url: str, name: str) -> bool:
    """Whether a reader of that name waits for something to happen."""
    return any("b" in each["flags"] for each in connections(url, name))


def unblock(url: str, name: str) -> None:
    """End the waiting of the readers of that name, as if the time that they wait at most had passed."""
    with redis.Redis.from_url(url) as client:
        for reader in eventually(lambda: [each for each in connections(url, name) if "b" in each["flags"]]):
            client.client_unblock(reader["id"])


def ask(server: Server, *command: str) -> Any:
    with redis.Redis.from_url(server.url) as client:
        return client.execute_command(*command)


# -- operations --------------------------------------------------------------------------------------------------------

OPERATIONS = ["get", "entry", "scan", "set", "set if", "commit", "delete", "watch", "close"]
READS = {"get", "entry", "scan", "watch", "close"}


async def performed(face: Any, operation: str) -> Any:
    """What `operation` answers if it is a write; any other has to be right."""
    match operation:
        case "get":
            assert await face.get("there") == "value"
        case "entry":
            assert (await face.get_entry("there")).revision == 1
        case "scan":
            assert list(await face.scan("the")) == ["there"]
        case "set":
            return await face.set("written", operation)
        case "set if":
            return await face.set("written", operation, if_revision=0)
        case "commit":
            return (await face.commit(Set("written", operation), Check("there", 1)))[0]
        case "delete":
            return (await face.commit(Delete("there")))[0]
        case "watch":
            await open_there(face)
        case "close":
            await face.close()
    return None


async def open_there(face: Any) -> Watch:
    """A watch that is open."""
    watch: Watch = await face.watch("there", "written")
    return watch


def told_until(watch: Watch, revision: int) -> list[Change]:
    """What `watch` delivers up to `revision`."""
    changes: list[Change] = []

    def is_told() -> bool:
        changes.extend(drain(watch))
        return watch.revision >= revision

    eventually(is_told)
    return [change for change in changes if change.revision <= revision]


# -- what watches tell -------------------------------------------------------------------------------------------------


async def ended(colour: Colour, watch: Watch) -> Compacted:
    """How `watch` ends after all that it has buffered."""
    while True:
        try:
            await colour.get(watch, PATIENCE)
        except Compacted as compacted:
            return compacted


class State:
    """What an `observe` has told so far."""

    def __init__(self, colour: Colour, watch: Watch) -> None:
        self.values: dict[str, Any] = {}
        self._colour = colour
        self._watch = watch

    async def becomes(self, values: dict[str, Any]) -> None:
        while self.values != values:
            change = await self._colour.get(self._watch, PATIENCE)
            assert change.old_value == self.values.pop(change.key, None)
            if change.op is Op.SET:
                self.values[change.key] = change.value


# -- programs ----------------------------------------------------------------------------------------------------------


def run_python(script: str, *arguments: str) -> Any:
    """What the script prints as JSON; it has to end well, without a word on stderr. None of its children is left."""
    command, pipe = [sys.executable, "-W", "error", "-c", script, *arguments], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=100)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (0, ""), f"{process.returncode}, {err}"
    return json.loads(out)
