"""The shipped conformance suite: over the stores of the package, over the documented provider, over broken stores."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest

from broken_stores import CAUGHT_BY, Alone, ForgetsItself
from servers import OWN_URL, Server
from stigmergy import (
    AsyncStore,
    Check,
    Delete,
    Entry,
    Flow,
    Hooks,
    MemoryStore,
    OpenWatch,
    Operation,
    Set,
    Snapshot,
    Store,
    StoreClosed,
    Watch,
    apply_middleware,
    open_store,
    scoped,
    with_hooks,
)
from stigmergy.providers.redis import RedisStore
from stigmergy.providers.sqlite import SQLiteStore
from stigmergy.testing import StoreConformance, VirtualClock
from stigmergy.testing.__main__ import main
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance.bad_input import BadInput
from stigmergy.testing.conformance.concurrency import Concurrency
from stigmergy.testing.conformance.interleaving import Interleaving
from stigmergy.testing.conformance.places import Places
from stigmergy.testing.conformance.values import Values

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/writing-a-provider.md"

Make = Callable[..., Store | AsyncStore]


WRAPPED = (BadInput, Concurrency, Interleaving, Places, Values)
"""What is slow for a wrapper: these areas are judged by default over the store that it wraps. Left are reads, writes,
watches, observing, deadlines and closing (`conftest.py` goes by the attribute `slow_areas`)."""


class Told(StoreConformance):
    """Stores whose clock is told the time. What is random is short here: the command makes the whole of it."""

    examples = 5
    calls = 800
    writes = 300
    rounds = 20

    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()


# -- the stores of the package -----------------------------------------------------------------------------------------


class TestMemoryStore(Told):
    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Make:
        return partial(MemoryStore, clock=clock)


class TestForgetfulAndShared(Told):
    slow_areas = WRAPPED

    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Make:
        return partial(MemoryStore, clock=clock, history=0, copy=None)


class Blocking(MemoryStore):
    blocking = True


class TestBlockingStore(Told):
    slow_areas = BadInput, Interleaving, Places, Values  # its async interface is threads

    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Make:
        return partial(Blocking, clock=clock)


def counting(operation: Operation[Any]) -> Flow[Any]:
    return (yield operation)


def seeing(*_: object) -> None:
    pass


HOOKS = Hooks(
    before_get=seeing,
    after_get=seeing,
    before_set=seeing,
    after_set=seeing,
    on_delete=seeing,
    on_scan=seeing,
    on_watch=seeing,
    on_error=lambda error: error,
)


class TestStoreBehindMiddleware(Told):
    slow_areas = WRAPPED

    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Make:
        return lambda: apply_middleware(MemoryStore(clock=clock), with_hooks(HOOKS), counting)


class TestStoreBehindHandles(Told):
    slow_areas = WRAPPED
    longest_key = 500

    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Make:
        return lambda: apply_middleware(scoped(scoped(MemoryStore(clock=clock), "agent"), "w"), counting)


class Suspending(AsyncStore):
    """A store that was written async, and suspends in every call."""

    def __init__(self, **options: Any) -> None:
        self._memory = MemoryStore(**options)
        self.capabilities = self._memory.capabilities

    async def get_entry(self, key: str) -> Entry | None:
        await asyncio.sleep(0)
        return self._memory.get_entry(key)

    async def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        await asyncio.sleep(0)
        return self._memory.scan(prefix, keys=keys, after=after, limit=limit)

    async def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        await asyncio.sleep(0)
        return self._memory.commit(*writes)

    async def open_watch(self, request: OpenWatch) -> Watch:
        await asyncio.sleep(0)
        return self._memory.open_watch(request)

    async def close(self) -> None:
        await asyncio.sleep(0)
        self._memory.close()


class TestAsyncStore(Told):
    slow_areas = BadInput, Concurrency, Interleaving, Places, Values

    @pytest.fixture(params=["async"])
    def colour(self, request: pytest.FixtureRequest) -> Colour:
        return Colour(request.param)

    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Make:
        return partial(Suspending, clock=clock)


class Handle(Store):
    """One of several stores on one place, which outlives them: what a durable and distributed provider is."""

    capabilities = frozenset({"distributed", "durable", "isolated", "resumable"})
    blocking = False

    def __init__(self, place: MemoryStore) -> None:
        self._place = place
        self._watches: WeakSet[Watch] = WeakSet()
        self._closed = False

    def get_entry(self, key: str) -> Entry | None:
        return self._opened().get_entry(key)

    def scan(
        self, prefix: str = "", *, keys: Iterable[str] | None = None, after: str | None = None, limit: int | None = None
    ) -> Snapshot:
        return self._opened().scan(prefix, keys=keys, after=after, limit=limit)

    def commit(self, *writes: Set | Delete | Check) -> tuple[int | None, ...]:
        return self._opened().commit(*writes)

    def open_watch(self, request: OpenWatch) -> Watch:
        watch = self._opened().open_watch(request)
        self._watches.add(watch)
        if self._closed:
            watch.close()
        return watch

    def close(self) -> None:
        self._closed = True
        for watch in list(self._watches):
            watch.close()

    def _opened(self) -> MemoryStore:
        if self._closed:
            raise StoreClosed
        return self._place


class TestHandlesOnOnePlace(Told):
    slow_areas = BadInput, Concurrency, Interleaving, Values

    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Iterator[Make]:
        with MemoryStore(clock=clock) as place:
            yield partial(Handle, place)


@pytest.fixture
def namespace() -> str:
    """Of this test, on a server that others use as well."""
    return os.urandom(6).hex()


class Short(StoreConformance):
    """Stores that go by the clock of the host. What is random is short here."""

    examples = 5
    calls = 400
    writes = 300
    rounds = 20


class TestSQLiteStore(Short):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Make:
        return partial(SQLiteStore, tmp_path / "state.db")


class TestValkeyStore(Short):
    @pytest.fixture
    def make_store(self, valkey: Server, namespace: str) -> Make:
        return partial(RedisStore, valkey.url, namespace=namespace)


@pytest.mark.slow
class TestRedis62Store(Short):
    @pytest.fixture
    def make_store(self, redis62: Server, namespace: str) -> Make:
        return partial(RedisStore, redis62.url, namespace=namespace)


if OWN_URL:

    class TestOwnServer(Short):
        @pytest.fixture
        def make_store(self, own_server: str, namespace: str) -> Make:
            return partial(open_store, own_server, namespace=namespace)


# -- the documented provider -------------------------------------------------------------------------------------------


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def documented(page: Path) -> dict[str, Any]:
    """What the Python blocks of a page define, without those that show a session."""
    program = "\n".join(block for block in python_blocks(page) if not block.startswith(">>>"))
    names: dict[str, Any] = {"__name__": page.stem}
    exec(compile(program, page, "exec"), names)
    return names


PROVIDER = documented(PAGE)


class TestDocumentedProvider(PROVIDER["TestJsonStore"]):  # type: ignore[misc]
    """The subclass that the page shows, which judges the store that it shows."""

    examples = 5
    calls = 800
    writes = 300
    rounds = 20


def test_the_documented_provider_has_under_120_lines() -> None:
    provider = "".join(takewhile(lambda block: not block.startswith(">>>"), python_blocks(PAGE)))

    assert "class JsonStore(Store):" in provider
    assert len([line for line in provider.splitlines() if line.strip()]) < 120


# -- the command -------------------------------------------------------------------------------------------------------


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "stigmergy.testing", *arguments, folder=folder)


def run_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=850, check=False
    )


@pytest.mark.slow
def test_the_command_judges_a_store_by_name_and_reports(tmp_path: Path) -> None:
    ended = command("memory", "--seed", "7", folder=tmp_path)

    assert ended.returncode == 0, ended.stdout
    assert ended.stderr == ""
    report = lines(ended.stdout)
    for line in [
        "store MemoryStore",
        "capabilities isolated, resumable",
        "area sync async both at once",
        "deadlines 18 passed 18 passed",
        "concurrent updates that added up 800",
    ]:
        assert line in report
    assert any(line.startswith("not declared: durable ") for line in report)
    assert any(re.fullmatch(r"concurrency \d+ passed", line) for line in report)
    assert "warning" not in ended.stdout
    assert list(tmp_path.iterdir()) == []
    assert [line for line in shown_on_the_page() if line not in report] == []


def test_the_areas_on_the_page_have_as_many_tests_as_it_shows(tmp_path: Path) -> None:
    """In a few seconds; the slow test above compares the rest of the page as well."""
    areas = {base.__name__.lower(): base for base in StoreConformance.__mro__}
    shown = [line for line in shown_on_the_page() if line.partition(" ")[0] in areas]
    tests = [name for line in shown for name in vars(areas[line.partition(" ")[0]]) if name.startswith("test_")]

    ended = command("memory", "-k", " or ".join(tests), folder=tmp_path)

    assert len(shown) == 3
    assert set(shown) <= set(lines(ended.stdout))


def lines(text: str) -> list[str]:
    """Its lines, without what aligns them."""
    return [" ".join(line.split()) for line in text.splitlines()]


def shown_on_the_page() -> list[str]:
    """What the page shows of a report on a store that declares the same."""
    (block,) = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line for line in lines(block) if line not in ("...", "store JsonStore") and not line.startswith("$")]


def test_the_command_goes_by_nobodys_configuration(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("raise SystemExit('the conftest of the project')")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")

    ended = command("memory", "-k", "test_get_returns_what_set_took", folder=tmp_path)

    assert ended.returncode == 0, ended.stdout
    assert "2 passed" in ended.stdout
    assert re.search(r"^  not selected in this run +\d+ tests$", ended.stdout, re.MULTILINE)


def test_the_command_gives_each_test_a_place_of_its_own(tmp_path: Path) -> None:
    ended = command("sqlite:///{tmp}/state.db", "-k", "test_what_was_written_is_there_after", folder=tmp_path)

    assert ended.returncode == 0, ended.stdout
    assert "2 passed" in ended.stdout
    assert list(tmp_path.iterdir()) == []


STORES = """
from stigmergy import MemoryStore

class Broken(MemoryStore):
    def get(self, key, default=None):
        return "something else"

class stores:
    good = MemoryStore

number = 7
"""


def test_the_command_judges_what_a_callable_makes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STORES)

    assert command("mine:stores.good", "-k", "test_get_returns", folder=tmp_path).returncode == 0


def test_a_store_that_fails_ends_the_command_with_one_and_shows_the_values(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STORES)

    ended = command("mine:Broken", "-k", "test_get_returns_what_set_took", folder=tmp_path)

    assert ended.returncode == 1
    assert "AssertionError: assert 'something else' == 1" in ended.stdout
    assert re.search(r"^  reads +1 failed +1 failed$", ended.stdout, re.MULTILINE)
    assert "Warning" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("nosuch", "no provider is called 'nosuch'; known: "),
        ("nosuch://host/0", "no provider is called 'nosuch'; known: "),
        ("nosuch:Store", "No module named 'nosuch'"),
        ("mine:nosuch", "module 'mine' has no 'nosuch'"),
        ("mine:stores.nosuch", "module 'mine' has no 'stores.nosuch'"),
        ("mine:number", "'mine:number' is not callable"),
        ("memory://?nosuch=1", "a memory store has no option 'nosuch' of this kind in its URL"),
        ("redis://127.0.0.1:1/0", "127.0.0.1:1 was not reached"),
    ],
)
def test_an_unknown_target_is_one_line_and_exit_code_two(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    complaint: str,
) -> None:
    (tmp_path / "mine.py").write_text(STORES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    assert main([target]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"stigmergy.testing: no store to judge: {complaint}")
    assert err.count("\n") == 1


def test_the_help_says_what_a_target_is(tmp_path: Path) -> None:
    ended = command("--help", folder=tmp_path)

    assert ended.returncode == 0
    assert ended.stdout.startswith("usage: python -m stigmergy.testing [-h] [--seed N] TARGET [pytest arguments]\n")
    assert "module:callable" in ended.stdout


# -- stores that break a promise ---------------------------------------------------------------------------------------


def test_every_broken_store_is_found_out() -> None:
    """By the laws named for it, which all hold of a healthy store; but for those that need what it does not declare."""
    laws = {f"Test{kind.__name__}::{law}" for kind, named in CAUGHT_BY.items() for law in named}
    needs_more = {law for kind in (ForgetsItself, Alone) for law in CAUGHT_BY[kind]}
    healthy = {f"TestHealthy::{law}" for named in CAUGHT_BY.values() for law in named if law not in needs_more}
    ended = run_python(
        *["-m", "pytest", "-rA", "--tb=no", "-q", "-p", "no:cacheprovider"],
        *["-c", os.devnull, "--rootdir", str(HERE), "--noconftest"],
        *[f"broken_stores.py::{each}" for each in sorted(laws | healthy)],
        folder=HERE,
    )
    found = re.findall(r"^(PASSED|FAILED|ERROR) broken_stores\.py::(\S+)", ended.stdout, re.MULTILINE)
    assert found, ended.stdout + ended.stderr

    def outcomes(law: str) -> set[str]:
        """Of all its variants."""
        return {outcome for outcome, test in found if re.match(rf"{re.escape(law)}($|\[)", test)}

    assert {law: outcomes(law) for law in laws if outcomes(law) != {"FAILED"}} == {}
    assert {law: outcomes(law) for law in healthy if outcomes(law) != {"PASSED"}} == {}
