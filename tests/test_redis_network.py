"""The Redis provider over a network that fails, and calls whose answers nobody waits for any more."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from types import FrameType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

pytest.importorskip("redis")


from processes import PATIENCE, eventually
from proxy import Blackhole, Cut, Delay, Dribble, HalfClose, Mode, Pass, Proxy, Reset, Stall
from redis_tools import (
    OPERATIONS,
    READS,
    NewStore,
    both_colours,
    connections,
    drain,
    log_of,
    named,
    open_there,
    performed,
    told_until,
)
from redis_tools import namespace as namespace
from redis_tools import new_redis as new_redis
from servers import Server, free_ports
from stigmergy import Change, Check, OutcomeUnknown, Set, StateError, Unavailable
from stigmergy.providers.redis import RedisStore
from stigmergy.testing import Colour
from stigmergy.testing.laws import check_log
from stigmergy.testing.traffic import all_at_once

# -- answers that nobody waits for any more ----------------------------------------------------------------------------


class Call(NamedTuple):
    """One that was made while calls were cancelled or interrupted."""

    action: str
    value: str
    answer: Any
    """`None` if nobody waited for it."""


@pytest.mark.parametrize("enough", [60, pytest.param(1000, marks=pytest.mark.slow)])
async def test_no_answer_of_a_cancelled_call_belongs_to_another(valkey: Server, namespace: str, enough: int) -> None:
    made: list[Call] = []
    cancelled = 0
    draw = random.Random(enough)

    async def call_and_cancel(number: int) -> None:
        nonlocal cancelled
        action, value = draw.choice(["set", "if", "get", "entry", "scan", "commit"]), f"value of {number}"
        task = asyncio.ensure_future(each(action, f"read/{number % 10}", f"{number % 7}/written", value))
        await asyncio.wait([task], timeout=None if number % 3 == 0 else draw.uniform(0, 0.025))
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
        cancelled += task.cancelled()
        made.append(Call(action, value, None if task.cancelled() else task.result()))

    async def each(action: str, read: str, written: str, value: str) -> Any:
        match action:
            case "set":
                return await store.set(written, value)
            case "if":
                return await store.set(value, value, if_revision=0)
            case "commit":
                return (await store.commit(Set(written, value), Check("nothing", 0)))[0]
            case "get":
                assert await store.get(read) == f"value of {read}"
            case "entry":
                assert (await store.get_entry(read)).value == f"value of {read}"
            case "scan":
                assert {key: entry.value for key, entry in (await store.scan(read)).items()} == {
                    read: f"value of {read}"
                }
        return True

    with Proxy(valkey.port) as proxy:
        url = named(f"redis://127.0.0.1:{proxy.port}", namespace)
        store = RedisStore(url, namespace=namespace, timeout=PATIENCE).aio
        async with store:
            for number in range(10):
                await store.set(f"read/{number}", f"value of read/{number}")
            proxy.mode = Delay(0.0005, 0.005)
            numbers = count()

            async def client() -> None:
                while cancelled < enough:
                    await call_and_cancel(next(numbers))

            await asyncio.gather(*(client() for _ in range(12)))
            proxy.mode = Pass()
            assert await store.set("last", "value") <= (await store.scan()).revision
            await asyncio.to_thread(eventually, lambda: len(connections(valkey.url, namespace)) <= 33)

    assert len(made) - cancelled > enough / 4
    written = {change.value: change for change in log_of(valkey.url, namespace)}
    assert len(written) == len(log_of(valkey.url, namespace))
    for action, value, answer in made:
        if action in ("set", "if", "commit") and answer is not None:
            assert written[value].revision == answer


class Interrupted(BaseException):
    """What a signal handler raises."""


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """`alarm(seconds)`: raise `Interrupted` in the main thread after so many seconds; 0: do not."""
    before = signal.signal(signal.SIGUSR1, interrupt)
    timers: list[threading.Timer] = []

    def set_alarm(seconds: float) -> None:
        if timers:
            timers[-1].cancel()
            timers[-1].join()
        if seconds:
            timers.append(threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGUSR1]))
            timers[-1].start()

    yield set_alarm
    set_alarm(0)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # the driver's, when it is struck as it connects
@pytest.mark.parametrize("enough", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_no_answer_of_an_interrupted_call_belongs_to_another(
    valkey: Server, namespace: str, alarm: Callable[[float], None], enough: int
) -> None:
    draw = random.Random(enough)
    answers: dict[str, int] = {}
    interrupted = 0
    with Proxy(valkey.port) as proxy:
        url = named(f"redis://127.0.0.1:{proxy.port}", namespace)
        with RedisStore(url, namespace=namespace, timeout=PATIENCE) as store:
            for number in range(10):
                store.set(f"read/{number}", f"value of read/{number}")
            proxy.mode = Delay(0.0002, 0.004)
            numbers = count()
            while min(interrupted, len(answers)) < enough:
                number = next(numbers)
                read = f"read/{number % 10}"
                try:
                    alarm(0 if number % 3 == 0 else draw.uniform(0.0005, 0.02))
                    if number % 2:
                        answers[f"value {number}"] = store.set("written", f"value {number}")
                    else:
                        assert store.get(read) == f"value of {read}"
                    alarm(0)
                except Interrupted:
                    interrupted += 1
            proxy.mode = Pass()
            last = store.set("last", "value")
            assert last == store.scan().revision
            eventually(lambda: len(connections(valkey.url, namespace)) <= 2)

    log = log_of(valkey.url, namespace)
    assert check_log(log) == []
    assert max(Counter(change.value for change in log).values()) == 1
    assert {value: log[revision - 1].value for value, revision in answers.items()} == {each: each for each in answers}


# -- a network that fails ----------------------------------------------------------------------------------------------


SILENT: list[Mode] = [Stall(), Blackhole()]
"""What only a timeout ends."""
QUICK = 0.2
"""A timeout that a busy machine may reach where nothing is lost."""
every_mode = pytest.mark.parametrize(
    ("mode", "timeout"),
    [
        *[pytest.param(mode, QUICK, id=f"{mode}") for mode in SILENT],
        *[pytest.param(mode, 3.0, id=f"{mode} for 3 s", marks=pytest.mark.slow) for mode in SILENT],
        *[(mode, PATIENCE) for mode in (Reset(), HalfClose(), Cut(0), Cut(0, reset=False), Cut(3), Dribble())],
        pytest.param(Delay(0.005, 0.05), PATIENCE, marks=pytest.mark.slow),
    ],
    ids=str,
)


class Tried(NamedTuple):
    """What became of one operation in the face of a network that fails."""

    operation: str
    answer: Any
    log: list[Change]
    """Afterwards."""


async def tried(colour: Colour, url: str, operation: str, mode: Mode, *, warm: bool, timeout: float) -> Tried:
    """Try `operation` while the network is in `mode`. When that is over, everything has to work again."""
    namespace = os.urandom(6).hex()
    with RedisStore(url, namespace=namespace) as judge, proxied(url) as proxy:
        judge.set("there", "value")
        with RedisStore(f"redis://127.0.0.1:{proxy.port}", namespace=namespace, timeout=timeout) as store:
            face = colour.face(store)
            watch = await works(timeout, partial(open_there, face)) if warm else None
            if warm:
                assert await works(timeout, partial(face.get, "there")) == "value"
            proxy.mode = mode
            try:
                answer: Any = await performed(face, operation)
            except (Unavailable, OutcomeUnknown) as error:
                answer = error
            proxy.mode = Pass()

            if operation != "close":
                assert await works(timeout, partial(face.get, "absent", 7)) == 7
                last = await works(timeout, partial(face.set, "last", "value"))
                assert last <= (await works(timeout, face.scan)).revision
                await works(timeout, partial(open_there, face))
            log = drain(judge.watch(prefix="", since=0))
            if watch is not None and operation != "close":
                assert told_until(watch, log[-1].revision) == [change for change in log[1:] if change.key != "last"]
    assert check_log(log) == []
    return Tried(operation, answer, log)


async def works(timeout: float, call: Callable[[], Any]) -> Any:
    """What `call` answers, the first time unless it timed out on a busy machine."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await call()
        except StateError as error:
            if timeout != QUICK or "TimeoutError" not in str(error) or time.monotonic() > deadline:
                raise


def proxied(url: str) -> Proxy:
    port = urlsplit(url).port
    assert port is not None
    return Proxy(port)


def is_true(tried: Tried) -> bool:
    """Whether the outcome is what the log says."""
    done = [change.revision for change in tried.log if change.key != "last" and change.revision > 1]
    if tried.operation in READS:
        return not done and not isinstance(tried.answer, OutcomeUnknown)
    if isinstance(tried.answer, OutcomeUnknown):
        return len(done) <= 1
    return done == ([] if isinstance(tried.answer, Unavailable) else [tried.answer])


@both_colours
@every_mode
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_whatever_the_network_does_an_operation_ends_and_its_outcome_is_true(
    valkey: Server, name: str, mode: Mode, timeout: float, warm: bool
) -> None:
    def run(operation: str) -> Tried:
        colour = Colour(name)
        return colour.run(tried(colour, valkey.url, operation, mode, warm=warm, timeout=timeout))

    outcomes = all_at_once([partial(run, operation) for operation in OPERATIONS])

    assert [each for each in outcomes if not is_true(each)] == []
    if mode not in SILENT:
        assert [each for each in outcomes if "TimeoutError" in str(each.answer)] == []
    if isinstance(mode, (Delay, Dribble)):
        assert [each for each in outcomes if isinstance(each.answer, StateError)] == []
    if isinstance(mode, Cut) and mode.after == 0 and warm:
        outcomes_of_writes = {each.operation: each for each in outcomes if each.operation not in READS}
        assert {type(each.answer) for each in outcomes_of_writes.values()} == {OutcomeUnknown}
        assert {len(each.log) for each in outcomes_of_writes.values()} == {3}
    if isinstance(mode, (Reset, Cut)) and not warm:
        assert {type(each.answer) for each in outcomes if each.operation != "close"} == {Unavailable}


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each != "close"])
async def test_a_server_that_is_not_there_is_unavailable(
    colour: Colour, new_redis: NewStore, namespace: str, operation: str
) -> None:
    store = new_redis(url=f"redis://127.0.0.1:{next(free_ports())}", namespace=namespace)

    with pytest.raises(Unavailable, match=r"^127\.0\.0\.1:\d+ was not reached \(ConnectionError\)$"):
        await performed(store, operation)


async def test_a_read_is_made_again_once_and_a_write_is_not(
    valkey: Server, colour: Colour, new_redis: NewStore, namespace: str
) -> None:
    with Proxy(valkey.port) as proxy:
        store = new_redis(url=f"redis://127.0.0.1:{proxy.port}", namespace=namespace)
        for number in range(20):
            await store.set("a", number)
            before = proxy.connections
            proxy.drop_all()

            assert await store.get("a") == number

            assert proxy.connections == before + 1
