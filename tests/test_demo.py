"""`stigmergy demo`: run on real folders, on a real terminal, with real signals; and its agents on a store.

A test runs the demo in this process where the fact allows. Nothing waits for a program without a limit.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from io import BytesIO, TextIOWrapper
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import IO, Any, Self
from uuid import uuid4

import pytest

from processes import PATIENCE, eventually
from servers import VALKEY, Server
from stigmergy import (
    Commit,
    Flow,
    MemoryStore,
    Operation,
    Set,
    Store,
    StoreClosed,
    Unavailable,
    Watch,
    apply_middleware,
    open_store,
)
from stigmergy.cli import main
from stigmergy.demo import agents
from stigmergy.demo.agents import (
    Crew,
    Plan,
    Result,
    Status,
    Task,
    Totals,
    collect,
    foreman,
    noting,
    plan,
    run_tasks,
    start_agents,
    worker,
)
from stigmergy.demo.files import text_files, words_of
from stigmergy.demo.marks import MarkCodec, left_clean
from stigmergy.demo.processes import Job, Processes
from stigmergy.demo.views import printable

DEMO = [sys.executable, "-W", "error", "-m", "stigmergy", "demo"]
on_posix = pytest.mark.skipif(os.name != "posix", reason="signals, terminals and permissions are those of POSIX here")


class Outcome:
    """What a run of the demo printed."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert (done.returncode, done.stderr) == (0, "")
        self.text = done.stdout
        self.facts = dict(re.findall(r"^([a-z ]+): (.+)$", done.stdout, re.MULTILINE))
        self.words = int(self.facts["words"])
        self.files = int(self.facts["files"])
        self.commonest = re.findall(r"^ +(\d+)  (\S+)$", done.stdout, re.MULTILINE)
        self.workers = {
            name: (int(words), int(files))
            for words, files, name in re.findall(r"^ +(\d+)  words in (\d+) files by (\S+)$", done.stdout, re.MULTILINE)
        }


class Running(subprocess.Popen[bytes]):
    """A program. Leaving this ends it, its session, and on Linux whatever else it has started."""

    def __init__(
        self,
        command: list[str],
        stdout: int | IO[bytes] = subprocess.PIPE,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self._mark = f"STIGMERGY_TEST_PROGRAM={uuid4().hex}"
        environment = {**os.environ, **(env or {}), **dict([self._mark.split("=")])}
        options = {"stderr": subprocess.PIPE, "start_new_session": True, **options}
        super().__init__(command, stdout=stdout, env=environment, **options)

    def result(self, given: bytes | None = None) -> subprocess.CompletedProcess[str]:
        """What it has printed when it has ended, and no process has its output open any more."""
        output, errors = self.communicate(given, timeout=PATIENCE)
        return subprocess.CompletedProcess(
            self.args, self.returncode, (output or b"").decode(), (errors or b"").decode()
        )

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if self._mark.encode() in environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)
        self.wait(PATIENCE)
        for pipe in self.stdin, self.stdout, self.stderr:
            if pipe is not None:
                pipe.close()


def run(
    *arguments: str, command: list[str] = DEMO, given: bytes = b"", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the demo as a program."""
    with Running([*command, *arguments], stdin=subprocess.PIPE, **options) as program:
        return program.result(given)


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in this process."""
    output, errors = (TextIOWrapper(BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    with redirect_stdout(output), redirect_stderr(errors):
        status = main(["demo", *arguments])
    texts = []
    for stream in output, errors:
        stream.seek(0)
        texts.append(stream.read())
    return subprocess.CompletedProcess(arguments, status, *texts)


def count(folder: Path, *arguments: str) -> Outcome:
    return Outcome(run_here(str(folder), *arguments))


def fill(folder: Path, files: int, seed: int = 0) -> Counter[bytes]:
    """Write so many text files, some in folders within, and return their words."""
    generator = random.Random(seed)
    words: Counter[bytes] = Counter()
    for number in range(files):
        chosen = generator.choices(
            [b"ant", b"bee", b"cow", b"dog", b"eel", b"x%d" % number], k=generator.randrange(300)
        )
        text = b"".join(word + generator.choice([b" ", b"\n", b"\t", b"\r\n", b"  ", b"\f", b"\v"]) for word in chosen)
        path = folder / f"folder{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)
        words.update(chosen)
    return words


# -- what it finds -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("wc") is None, reason="there is no wc to compare with")
def test_the_total_is_that_of_wc(tmp_path: Path) -> None:
    fill(tmp_path, files=50)
    paths = [str(path) for path in tmp_path.rglob("*.txt")]
    wc = subprocess.run(["wc", "-w", *paths], capture_output=True, check=True, encoding="utf-8", timeout=PATIENCE)

    assert Outcome(run(str(tmp_path))).words == int(wc.stdout.splitlines()[-1].split()[0]) > 1000


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_any_number_of_workers_counts_every_file_once(workers: int, tmp_path: Path) -> None:
    words = fill(tmp_path, files=20)

    outcome = count(tmp_path, f"--workers={workers}")

    assert (outcome.words, outcome.files) == (words.total(), 20)
    assert [sum(each) for each in zip(*outcome.workers.values(), strict=True)] == [words.total(), 20]
    assert [name.startswith("task") for name in outcome.workers].count(True) == workers // 2
    assert len(outcome.workers) == workers
    assert outcome.facts["missed"] == "0"
    assert int(outcome.facts["changes watched"]) >= 20


def test_half_of_the_workers_are_tasks_and_half_are_threads(tmp_path: Path) -> None:
    fill(tmp_path, files=3)

    assert list(count(tmp_path).workers) == ["task-1", "task-2", "thread-1", "thread-2"]


def test_the_twenty_commonest_words_come_first_by_number_and_then_by_name(tmp_path: Path) -> None:
    words = {f"w{number:02}": 1 + number % 3 for number in range(30)}
    for word, times in words.items():
        (tmp_path / word).write_text(f"{word} " * times, encoding="ascii")

    expected = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:20]

    assert count(tmp_path).commonest == [(str(times), word) for word, times in expected]


def test_the_folder_is_the_current_one_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = fill(tmp_path, files=3)
    monkeypatch.chdir(tmp_path)

    assert Outcome(run_here()).words == words.total()


def test_many_files_make_few_lines(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / str(number)).write_bytes(b"word")

    outcome = count(tmp_path)

    assert (outcome.words, outcome.facts["missed"]) == (200, "0")
    assert len(outcome.text.splitlines()) < 40


@on_posix
def test_what_is_hidden_binary_or_no_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"one" + b" " * 9000 + b"\0 two")
    (tmp_path / "binary").write_bytes(b"a b\0c")
    (tmp_path / ".git").mkdir()
    for hidden in ".git/text", ".hidden":
        (tmp_path / hidden).write_bytes(b"hidden")
    (tmp_path / "link").symlink_to("text")
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "pipe")

    assert list(text_files(str(tmp_path))) == [str(tmp_path / "text")]
    assert count(tmp_path).words == 3  # the NUL byte is a word, as for `bytes.split()`


@on_posix
@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_names_may_hold_anything(tmp_path: Path) -> None:
    names = [b"new\nline", b"bell\x07", b"\xff\xfe", b"task:000001", b"n" * 255, "ä/…/蟻".encode()]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"word")

    assert count(tmp_path).words == len(names)


@pytest.mark.skipif(sys.platform != "linux", reason="paths must be shorter elsewhere")
def test_a_tree_deeper_than_the_recursion_limit_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = sys.getrecursionlimit() + 50
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("leaf").write_bytes(b"deep down")

    found = list(text_files(str(tmp_path)))

    os.remove("leaf")
    for _ in range(depth):
        os.chdir("..")
        os.rmdir("d")
    assert found == [str(tmp_path / Path(*"d" * depth, "leaf"))]


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 19])
@pytest.mark.parametrize("unit", [b"x", b"word ", b" \n", b"\xff\x85\xa0 \x1c\x1d", b"a" * 70_000 + b"\t"])
def test_words_read_in_chunks_are_those_of_the_whole(unit: bytes, size: int, tmp_path: Path) -> None:
    data = (unit * (size // len(unit) + 1))[:size]
    (tmp_path / "file").write_bytes(data)

    assert [word for words in words_of(str(tmp_path / "file")) for word in words] == data.split()


@on_posix
def test_a_file_that_became_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    assert list(words_of(str(tmp_path / "pipe"))) == []


def test_nothing_that_a_word_says_to_a_terminal_gets_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x1b[31mred \x9b31m \xe2\x80\xaertl \x07 [bold]x :ant: \xff" + b" " + b"w" * 100)

    text = count(tmp_path).text

    assert all(each.isprintable() for line in text.splitlines() for each in line)
    assert r"\x1b[31mred" in text
    assert "w" * 41 not in text


def test_a_terminal_that_lacks_a_letter_gets_its_number(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("蟻", encoding="utf-8")

    outcome = Outcome(run(str(tmp_path), env={"PYTHONIOENCODING": "ascii"}))

    assert outcome.commonest == [("1", r"\u87fb")]


def test_printable_text_is_left_alone() -> None:
    assert printable("a ä 蟻") == "a ä 蟻"
    assert printable("\x00\x85\u2028\udcff") == r"\x00\x85\u2028\udcff"


# -- what it refuses, and what it skips --------------------------------------------------------------------------------

# The superuser may read everything, so this gives its rights away first; with them may go those to import anything.
UNPRIVILEGED = [
    sys.executable,
    "-c",
    "import asyncio, encodings.unicode_escape, os, shutil, sys, urllib.parse\n"
    "import stigmergy.bridge, stigmergy.demo, stigmergy.providers.memory\n"
    "from stigmergy.cli import main\n"
    "os.geteuid() or os.seteuid(65534)\n"
    "sys.exit(main())",
    "demo",
]


@contextmanager
def permissions(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    yield
    path.chmod(before)


def assert_refused(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"stigmergy demo: .*({reason}).*\n", done.stderr)


def test_a_folder_that_is_missing_is_refused_in_one_line(tmp_path: Path) -> None:
    assert_refused(run_here(str(tmp_path / "missing")), "No such file or directory|cannot find the path")
    assert_refused(run_here(str(tmp_path / "odd\n\x1b[31mname")), r"odd\\n\\x1b\[31mname")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"word")

    assert_refused(run_here(str(tmp_path / "file")), "Not a directory|directory name is invalid")


def test_a_folder_without_text_files_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\0")

    assert_refused(run_here(str(tmp_path)), "no text file to read")


def test_files_without_words_are_counted(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    outcome = count(tmp_path)

    assert (outcome.files, outcome.words, outcome.commonest) == (1, 0, [])


@on_posix
@pytest.mark.parametrize(
    ("mode", "reason"), [(0o000, "cannot list the folder closed: Permission"), (0o444, r"no text .*\(closed/file: ")]
)
def test_a_folder_that_cannot_be_read_is_refused_in_one_line(mode: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "file").write_bytes(b"word")

    with permissions(tmp_path, 0o755), permissions(tmp_path / "closed", mode):
        assert_refused(run("closed", command=UNPRIVILEGED, cwd=tmp_path), reason)


@on_posix
def test_what_cannot_be_read_is_named_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    odd = "closed\x1b[31m"
    for name in "open", odd, "secret/file":
        (tmp_path / name).write_bytes(b"word")

    with permissions(tmp_path, 0o755), permissions(tmp_path / odd, 0), permissions(tmp_path / "secret", 0):
        outcome = Outcome(run(command=UNPRIVILEGED, cwd=tmp_path))

    assert (outcome.words, outcome.files) == (1, 1)
    skipped = re.fullmatch(r"2 \((.+); (.+)\)", outcome.facts["skipped"])
    assert skipped is not None
    assert {*skipped.groups()} == {r"./closed\x1b[31m: Permission denied", "./secret: Permission denied"}


# -- the agents --------------------------------------------------------------------------------------------------------


@contextmanager
def crew_on(store: Store) -> Iterator[Crew]:
    """A crew, all of which goes home in the end."""
    before = {*threading.enumerate()}
    with Crew(store) as crew:
        yield crew
    crew.check()
    for thread in {*threading.enumerate()} - before:
        thread.join(timeout=PATIENCE)
        assert not thread.is_alive()


def test_of_many_workers_exactly_one_claims_each_task(tmp_path: Path) -> None:
    words = fill(tmp_path, files=60)
    store = MemoryStore(history=0)
    tasks, results = (store.watch(prefix=prefix, capacity=None) for prefix in ("task:", "result:"))

    with crew_on(store) as crew:
        start_agents(crew, store, str(tmp_path), [f"task-{n}" for n in range(8)] + [f"thread-{n}" for n in range(8)])
        store.wait_for("totals", lambda totals: totals.files == 60, timeout=PATIENCE)
        assert store.get("words") == words
        assert list(store.scan("task:")) == []

    claimed = Counter(change.key for change in tasks if change.op == "set" and change.value.owner is not None)
    counted = Counter(change.key for change in results if change.op == "set")
    assert claimed == dict.fromkeys(claimed, 1)
    assert counted == dict.fromkeys((key.replace("task", "result") for key in claimed), 1)
    assert len(claimed) == 60


def test_a_worker_that_comes_late_finds_what_is_still_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one two")
    store = MemoryStore()
    store.set("task:000001", Task("somebody else's", owner="early"))
    store.set("task:000002", Task(str(tmp_path / "file")))

    with crew_on(store) as crew:
        crew.start(store.run, worker("late", rest=lambda: None))
        result: Result = store.wait_for("result:000002", lambda result: True, timeout=PATIENCE).value

    assert result.counts == {b"one": 1, b"two": 1}


def test_workers_of_one_event_loop_take_turns(tmp_path: Path) -> None:
    store = MemoryStore()
    for number in range(6):
        (tmp_path / str(number)).write_bytes(b"word")
        store.set(f"task:{number}", Task(str(tmp_path / str(number))))

    with crew_on(store) as crew:
        crew.start(run_tasks, store, ["task-1", "task-2", "task-3"])
        for name in "task-1", "task-2", "task-3":
            store.wait_for(f"worker:{name}", lambda status: status.files == 2, timeout=PATIENCE)


def test_what_several_workers_of_one_event_loop_meet_is_one_error() -> None:
    def refuse(operation: Operation[Any]) -> Flow[Any]:
        if isinstance(operation, Commit):
            raise Unavailable("nobody is there")
        return (yield operation)

    with MemoryStore() as store:
        store.commit(Set("task:000001", Task("one")), Set("task:000002", Task("another")))
        with pytest.raises(Unavailable, match="nobody is there"):
            run_tasks(apply_middleware(store, refuse), ["task-1", "task-2"])


def test_leaving_the_crew_waits_for_all_threads_together_no_longer_than_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float | None] = []

    def noted(thread: Thread, timeout: float | None = None, join: Callable[..., None] = Thread.join) -> None:
        asked.append(timeout)
        join(thread, timeout)

    monkeypatch.setattr(Thread, "join", noted)
    end = threading.Event()
    with Crew(MemoryStore()) as crew:
        for _ in range(5):
            crew.start(end.wait)
    end.set()

    assert len(asked) == 5
    assert None not in asked
    assert sum(filter(None, asked)) < 2


@on_posix
def test_leaving_the_processes_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[Thread] = []

    def noted(process: Any, timeout: float | None = None, wait: Callable[..., int] = subprocess.Popen.wait) -> int:
        waiting.append(threading.current_thread())
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", noted)
    store = MemoryStore()
    with crew_on(store) as crew, Processes(crew, store) as further:
        further.start(Job("memory", "demo/1", "p2", []))

    assert threading.current_thread() not in waiting
    assert [process.returncode for process in further._running] == [-signal.SIGKILL]


def test_the_planner_stays_a_limited_number_of_files_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "_AHEAD", 40)
    monkeypatch.setattr(agents, "_HANDFUL", 10)
    fill(tmp_path, files=100)
    (tmp_path / "first").write_text(" ".join(map(str, range(5000))))  # so no other result is much to merge
    store = MemoryStore(history=0)
    there: set[str] = set()
    sizes: dict[int, int] = {}

    with crew_on(store) as crew:
        results, changes = store.watch(prefix="result:", capacity=None), store.watch(prefix="", capacity=None)
        crew.start(plan, store, str(tmp_path))
        store.wait_for("plan", lambda plan: plan.tasks >= 40, timeout=PATIENCE)
        crew.start(collect, store, results)
        crew.start(run_tasks, store, ["task-1"])
        store.wait_for("totals", lambda totals: totals.files == 101, timeout=PATIENCE)

    for change in changes:
        there = there - {change.key} if change.op == "delete" else there | {change.key}
        sizes[change.commit] = sum(key.startswith(("task:", "result:")) for key in there)
    assert 40 <= max(sizes.values()) <= 50
    assert there == {"plan", "totals", "words", "worker:task-1"}


def test_a_file_that_vanished_since_it_was_listed_is_skipped(tmp_path: Path) -> None:
    store = MemoryStore()
    store.set("task:000001", Task(str(tmp_path / "vanished")))

    with crew_on(store) as crew:
        crew.start(collect, store, store.watch(prefix="result:"))
        crew.start(run_tasks, store, ["task-1"])
        totals: Totals = store.wait_for("totals", lambda totals: True, timeout=PATIENCE).value

    assert totals.files == 0
    assert [each.split(": ", 1)[0] for each in totals.skipped] == [str(tmp_path / "vanished")]


def test_when_an_agent_fails_everybody_goes_home_and_its_error_is_raised() -> None:
    def fail() -> None:
        raise LookupError("lost")

    store = MemoryStore()
    with Crew(store) as crew:
        crew.start(store.run, worker("thread-1", rest=fail))
        crew.start(fail)
        with pytest.raises(StoreClosed):
            store.wait_for("anything", bool, timeout=PATIENCE)
        with pytest.raises(LookupError, match="lost"):
            crew.check()


def test_every_watch_of_the_store_is_audited_whoever_opens_it() -> None:
    missed: list[int] = []
    store = apply_middleware(MemoryStore(), noting(missed))

    async def open_async() -> Watch:
        return await store.aio.watch("a")

    narrow, wide, latest = store.watch("a", capacity=2), asyncio.run(open_async()), store.observe("a")

    for number in range(5):
        store.set("a", number)
    for watch in narrow, wide, latest:
        assert watch.get_nowait() is not None

    assert sorted(missed) == [0, 0, 3]


def give_back(store: Store, key: str) -> None:
    store.update(key, lambda task: task._replace(owner=None))


def test_what_a_worker_counted_is_not_taken_once_its_task_was_given_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one two")
    store = MemoryStore()
    store.set("task:000001", Task(str(tmp_path / "file")))
    results, claims = store.watch(prefix="result:"), store.watch("task:000001")
    before_the_result = iter([lambda: give_back(store, "task:000001")])

    with crew_on(store) as crew:
        crew.start(store.run, worker("slow", rest=lambda: next(before_the_result, lambda: None)()))
        store.wait_for("worker:slow", lambda status: status == Status(1, 2), timeout=PATIENCE)

    assert [change.value.counts for change in results] == [{b"one": 1, b"two": 1}]
    assert [(change.op, change.value and change.value.owner) for change in claims] == [
        ("set", "slow"),
        ("set", None),
        ("set", "slow"),
        ("delete", None),
    ]


def test_the_foreman_gives_back_what_a_vanished_process_has_not_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one two")
    store = MemoryStore()
    store.set("task:000001", Task(str(tmp_path / "file"), "p2/task-1"))
    store.set("task:000002", Task("somebody else's", "p22/task-1"))
    store.set("worker:p2/task-1", Status(1, 10, "file", more=5))
    leases = store.watch(prefix="process:")
    store.set("process:p2", "here", ttl=0.01)

    with crew_on(store) as crew:
        crew.start(foreman, store, leases)
        crew.start(store.run, worker("p1/task-1", rest=lambda: None))
        store.wait_for("worker:p1/task-1", lambda status: status.files == 1, timeout=PATIENCE)
        assert store.get("worker:p2/task-1") == Status(1, 10)
        assert list(store.scan("task:")) == ["task:000002"]


def test_a_process_without_its_lease_claims_nothing() -> None:
    store = MemoryStore()
    store.set("task:000001", Task("file"))

    store.run(worker("p2/task-1", rest=lambda: None, lease="process:p2"))  # goes home

    assert store.get("task:000001") == Task("file")


def test_a_lease_that_is_renewed_meanwhile_keeps_nobody_from_claiming(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = MemoryStore()
    store.set("process:p2", 0)

    def renewed_once(operation: Any) -> Any:
        entry = yield operation
        if getattr(operation, "key", "") == "process:p2" and entry.value == 0:
            store.set("process:p2", 1)
        return entry

    with crew_on(store) as crew:
        crew.start(apply_middleware(store, renewed_once).run, worker("p2/task-1", lambda: None, "process:p2"))
        store.set("task:000001", Task(str(tmp_path / "file")))
        store.wait_for("worker:p2/task-1", lambda status: status.files == 1, timeout=PATIENCE)


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        Counter({bytes(range(256)): 1, b"": 2, b"\xff": 3}),
        Plan(3, complete=True),
        Result("\udcff/ä/蟻\n", Counter({b"word": 2})),
        Result("file", Counter(), "gone"),
        Status(1, 2, "file", 3),
        Task("file", "p2/task-1"),
        Totals(1, ("a: gone", "b: gone")),
        {"claim": "abc"},
    ],
    ids=lambda mark: type(mark).__name__,
)
def test_every_mark_comes_back_as_it_was(mark: Any) -> None:
    again = MarkCodec().decode(MarkCodec().encode(mark))

    assert (again, type(again), repr(again)) == (mark, type(mark), repr(mark))


def test_what_is_no_mark_is_refused() -> None:
    with pytest.raises(LookupError):
        MarkCodec().encode(("a", "tuple"))


@pytest.fixture(params=["sqlite", pytest.param("valkey", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store that processes can share."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'marks.db'}"
    pytest.importorskip("redis")
    return f"{request.getfixturevalue('valkey').url}?namespace={uuid4().hex}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def _warnings_are_errors_in_further_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")


def fill_with_work(folder: Path) -> None:
    """Files that take minutes to count and little room: all are one."""
    (folder / "0").write_bytes(b"all work and no play\n" * 1_000_000)
    for number in range(1, 1000):
        os.link(folder / "0", folder / str(number))


def fill_with_many_files(folder: Path) -> None:
    for number in range(3000):
        (folder / str(number)).write_bytes(b"one two")


def totals(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.words, outcome.files, outcome.facts["skipped"], outcome.commonest


def fill_with_some_work(folder: Path, files: int) -> Counter[bytes]:
    """So many files that take a while each."""
    (folder / "0").write_bytes(b"all work and no play\n" * 200_000)
    for number in range(1, files):
        (folder / str(number)).unlink(missing_ok=True)
        os.link(folder / "0", folder / str(number))
    return Counter(dict.fromkeys([b"all", b"work", b"and", b"no", b"play"], files * 200_000))


def assert_nothing_is_left(url: str) -> None:
    with open_store(url) as store:
        assert list(store.scan()) == []


@pytest.mark.parametrize("url", ["sqlite", "valkey"], indirect=True)
def test_processes_that_share_a_store_count_the_same_as_one(url: str, folder: Path) -> None:
    words = fill(folder, files=60)

    outcome = count(folder, f"--store={url}", "--processes=3")

    assert totals(outcome) == totals(count(folder))
    assert [sum(each) for each in zip(*outcome.workers.values(), strict=True)] == [words.total(), 60]
    assert list(outcome.workers) == [
        f"p{process}/{kind}-{number}" for process in (1, 2, 3) for kind in ("task", "thread") for number in (1, 2)
    ]
    assert outcome.facts["changes watched"].endswith(" by p1")
    assert outcome.facts["missed"] == "0"
    assert outcome.facts["store"] == url.partition("?")[0]
    assert outcome.facts["processes"] == "3"
    assert_nothing_is_left(url)


@pytest.mark.parametrize("url", ["sqlite", "valkey"], indirect=True)
def test_one_process_may_use_any_store(url: str, folder: Path) -> None:
    fill(folder, files=5)

    outcome = count(folder, f"--store={url}")

    assert totals(outcome) == totals(count(folder))
    assert list(outcome.workers) == ["task-1", "task-2", "thread-1", "thread-2"]
    assert outcome.facts["processes"] == "1"
    assert_nothing_is_left(url)


def test_a_run_is_not_confused_by_what_others_left(url: str, folder: Path) -> None:
    fill(folder, files=5)
    with open_store(url, codec=MarkCodec()) as store:
        store.set("demo/killed:task:000001", Task(str(folder / "gone")))
        store.set("demo/killed:totals", Totals(100))
        store.set("task:000001", Task(str(folder / "gone")))

    again = count(folder, f"--store={url}", "--processes=2")

    assert totals(again) == totals(count(folder))
    with open_store(url) as store:
        assert list(store.scan()) == ["demo/killed:task:000001", "demo/killed:totals", "task:000001"]


@on_posix
def test_names_and_words_may_hold_anything_on_any_store(url: str, folder: Path) -> None:
    name = os.path.join(os.fsencode(folder), "ä".encode() if sys.platform == "darwin" else b"\xff\n\xfe")
    with open(name, "wb") as file:
        file.write(bytes(range(1, 256)))

    assert totals(count(folder, f"--store={url}")) == totals(count(folder))


def has_task(process: str, mark: Any) -> bool:
    """Whether `mark` is a task that a worker of `process` has claimed and not done."""
    return isinstance(mark, Task) and str(mark.owner).startswith(f"{process}/")


def is_suspended(pid: int) -> bool:
    """Whether all threads are; on systems that do not tell, it is taken for granted."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


class Program:
    """A run of the demo in several processes, whose marks are watched."""

    def __init__(self, folder: Path, url: str, processes: int = 3) -> None:
        self.store = open_store(url, codec=MarkCodec(), timeout=2)
        self.changes: Watch = self.store.watch(prefix="demo/", capacity=None)
        self.process = Running([*DEMO, str(folder), f"--store={url}", f"--processes={processes}"])

    def stop_second_process_at_work(self) -> int:
        """Suspend the second process while it has a task that is not done, and no lock; return its number.

        0 if all was done before.
        """
        second, begun = 0, False
        while True:
            change = self.changes.get(timeout=PATIENCE)
            if change.key.endswith(":plan") and change.op == "delete":
                return 0
            if change.key.endswith(":process:p2") and change.op == "set":
                second = int(str(change.writer).rpartition(" ")[2])
            begun = begun or has_task("p2", change.value)
            with suppress(ProcessLookupError):
                if begun:
                    os.kill(second, signal.SIGSTOP)
                    eventually(partial(is_suspended, second))
                    with suppress(Unavailable):
                        self.store.delete("nothing")
                        if any(has_task("p2", entry.value) for entry in self.store.scan("demo/").values()):
                            return second
                    os.kill(second, signal.SIGCONT)
                    eventually(self._can_write)  # when it has let go of the lock

    def _can_write(self) -> bool:
        with suppress(Unavailable):
            self.store.delete("nothing")
            return True
        return False

    def wait_for_plan(self) -> None:
        """Come back when the planner has found all files, or as many as it may be ahead."""
        while True:
            mark = self.changes.get(timeout=PATIENCE).value
            if isinstance(mark, Plan) and (mark.complete or mark.tasks >= agents._AHEAD):
                return

    def wait_for_work(self) -> None:
        """Come back when each process has claimed a task."""
        idle = {"p1", "p2", "p3"}
        while idle:
            mark = self.changes.get(timeout=PATIENCE).value
            idle -= {process for process in idle if has_task(process, mark)}

    def outcome(self) -> Outcome:
        return Outcome(self.process.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.__exit__()
        self.store.close()


@contextmanager
def second_process_stopped_at_work(folder: Path, url: str) -> Iterator[tuple[Program, int, Counter[bytes], int]]:
    """A program, the number of its second process, and the words and files that there are.

    It may have done all before that process can be stopped. Then there is more to do the next time.
    """
    for files in 20, 200, 2000:
        words = fill_with_some_work(folder, files)
        with Program(folder, url) as program:
            second = program.stop_second_process_at_work()
            if second:
                yield program, second, words, files
                return
    pytest.fail("it was too fast")


@on_posix
def test_what_a_killed_process_was_at_others_do(url: str, folder: Path) -> None:
    with second_process_stopped_at_work(folder, url) as (program, second, words, files):
        os.kill(second, signal.SIGKILL)
        outcome = program.outcome()

    assert (outcome.words, outcome.files) == (words.total(), files)
    assert [sum(each) for each in zip(*outcome.workers.values(), strict=True)] == [words.total(), files]
    assert {word: int(times) for times, word in outcome.commonest} == {
        word.decode(): times for word, times in words.items()
    }
    assert outcome.facts["processes"] == "3 (p2 ended early, and others did its work)"
    assert_nothing_is_left(url)


@on_posix
@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [False, True])
def test_what_a_suspended_process_was_at_others_do(goes_on: bool, url: str, folder: Path) -> None:
    with second_process_stopped_at_work(folder, url) as (program, second, words, files):
        while goes_on and not program.changes.get(timeout=PATIENCE).expired:
            pass
        if goes_on:
            os.kill(second, signal.SIGCONT)
        outcome = program.outcome()

    assert (outcome.words, outcome.files) == (words.total(), files)
    assert [sum(each) for each in zip(*outcome.workers.values(), strict=True)] == [words.total(), files]
    assert_nothing_is_left(url)


@on_posix
@pytest.mark.parametrize("flood", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ctrl_c_ends_all_processes_and_leaves_nothing(flood: bool, url: str, folder: Path) -> None:
    fill_with_work(folder)

    with Program(folder, url) as program:
        program.wait_for_work()
        assert_interrupted(program.process, flood)

    assert_nothing_is_left(url)


@on_posix
@pytest.mark.slow
@pytest.mark.parametrize("flood", [False, True])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("fill_folder", [fill_with_work, fill_with_many_files])
def test_ctrl_c_ends_it_when_there_is_the_most_to_remove(
    fill_folder: Callable[[Path], None], processes: int, flood: bool, url: str, folder: Path
) -> None:
    fill_folder(folder)

    with Program(folder, url, processes) as program:
        program.wait_for_plan()
        started = monotonic()
        assert_interrupted(program.process, flood)
        print(f"it took {monotonic() - started:.2f} s")

    assert_nothing_is_left(url)


def hears_ctrl_c(thread: Path) -> bool:
    try:
        status = (thread / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
        return False
    blocked = re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
    assert blocked is not None
    return not int(blocked[1], 16) >> (signal.SIGINT - 1) & 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not tell")
def test_only_the_first_thread_hears_ctrl_c(url: str, folder: Path) -> None:
    fill_with_work(folder)

    with Program(folder, url) as program:
        program.wait_for_work()
        first = Path(f"/proc/{program.process.pid}/task/{program.process.pid}")
        eventually(partial(hears_ctrl_c, first))  # not while it starts a thread
        assert [thread for thread in first.parent.iterdir() if thread != first and hears_ctrl_c(thread)] == []


@on_posix
def test_nobody_outlives_the_first_process_when_it_is_killed(url: str, folder: Path) -> None:
    fill_with_work(folder)

    with Program(folder, url) as program:
        program.wait_for_work()
        program.process.kill()
        assert program.process.result().stderr == ""  # its processes had it open

    assert_nothing_is_left(url)


def test_a_store_that_processes_cannot_share_is_refused_in_one_line(folder: Path) -> None:
    fill(folder, files=1)

    assert_refused(run_here(str(folder), "--processes=2"), "this store is not 'distributed'")
    assert_refused(
        run_here(str(folder), "--processes=2", "--store=memory://?history=5"), "this store is not 'distributed'"
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "no kind of store is called that; known: .*sqlite"),
        ("secret@host", "no kind of store is called that"),
        ("sqlit:///secret.db", "no kind of store is called 'sqlit'"),
        ("sqlite://user:secret@host/state.db", "a SQLite store is named by a path"),
        ("sqlite:///secret.db?secure=\n", "has no option 'secure'"),
        ("memory://secret", "a memory store has no name"),
        ("redis://:sec/ret@localhost", "not the URL of a Redis server"),
        ("redis://user:secret@localhost/0?colour=red", "has no option 'colour'"),
    ],
)
def test_a_url_that_names_no_store_is_refused_in_one_line(url: str, reason: str, folder: Path) -> None:
    fill(folder, files=1)
    if url.startswith("redis"):
        pytest.importorskip("redis")

    done = run_here(str(folder), "--processes=2", f"--store={url}")

    assert_refused(done, reason)
    assert "sec" not in done.stderr.replace("secure", "")


@pytest.mark.parametrize("url", ["sqlite:///no/such/folder/state.db", "redis://user:secret@127.0.0.1:1/0"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_store_that_cannot_be_reached_is_one_line(url: str, processes: int, folder: Path) -> None:
    fill(folder, files=1)
    if url.startswith("redis"):
        pytest.importorskip("redis")

    done = run_here(str(folder), f"--store={url}", f"--processes={processes}")

    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("stigmergy demo: .*(cannot be opened|was not reached).*\n", done.stderr)
    assert "secret" not in done.stderr


@on_posix
@pytest.mark.slow
def test_a_store_that_goes_away_ends_the_run_in_one_line(new_server: Callable[..., Server], folder: Path) -> None:
    pytest.importorskip("redis")
    fill_with_work(folder)
    server = new_server(VALKEY)

    with Program(folder, server.url) as program:
        program.wait_for_work()
        program.store.close()
        server.kill()
        done = program.process.result()

    assert done.returncode == 1
    assert re.fullmatch("stigmergy demo: .*(was not reached|gave no answer).*\n", done.stderr)


def test_a_further_process_that_nobody_started_is_refused() -> None:
    assert_refused(run("--join", given=b"[]\n"), "--join is for")


# -- interrupted, and on a terminal ------------------------------------------------------------------------------------


def interrupt(program: Running, flood: bool = False) -> None:
    """Send Ctrl-C; in a flood, again and again until the program has ended."""
    deadline = monotonic() + PATIENCE
    program.send_signal(signal.SIGINT)
    while flood and program.poll() is None and monotonic() < deadline:
        program.send_signal(signal.SIGINT)


def assert_interrupted(program: Running, flood: bool) -> None:
    interrupt(program, flood)
    done = program.result()
    assert (done.returncode, done.stderr) == (130, "stigmergy: interrupted\n")


@on_posix
@pytest.mark.slow
@pytest.mark.parametrize("flood", [False, True])
def test_ctrl_c_while_big_files_are_counted_ends_it(flood: bool, tmp_path: Path) -> None:
    fill_with_work(tmp_path)

    with Running([*DEMO, str(tmp_path)]) as program:
        assert program.stdout is not None
        assert select.select([program.stdout], [], [], PATIENCE)[0]
        assert re.fullmatch(rb"\d+ of \d+( or more)? files, \d+ words\n", program.stdout.readline())
        assert_interrupted(program, flood)


@on_posix
@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize("failed", [False, True])
def test_ctrl_c_while_the_store_is_cleaned_leaves_nothing_there(failed: bool) -> None:
    def work() -> None:
        with left_clean(apply_middleware(store, interrupted), "demo/1"):
            if failed:
                raise LookupError

    def interrupted(operation: Operation[Any]) -> Flow[Any]:
        signal.raise_signal(signal.SIGINT)
        return (yield operation)

    with MemoryStore() as store:
        store.commit(*[Set(f"demo/1:{number}", 0) for number in range(1000)])
        with pytest.raises(KeyboardInterrupt):
            work()
        assert list(store.scan()) == []


class Terminal(Running):
    """A program on a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self._screen, slave = os.openpty()
        size = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"}
        super().__init__(command, stdin=slave, stdout=slave, stderr=slave, env=size)
        os.close(slave)
        self.text = ""
        self._decode = getincrementaldecoder("utf-8")("replace").decode

    def read_until(self, pattern: str) -> None:
        while not re.search(pattern, self.text):
            assert self._read(), self.text

    def read_all(self) -> str:
        while self._read():
            pass
        return self.text

    def _read(self) -> bool:
        """Read on. Returns whether there may be more."""
        assert select.select([self._screen], [], [], PATIENCE)[0], f"nothing comes after {self.text!r}"
        data = b""
        with suppress(OSError):  # how Linux says that no program is on the terminal any more
            data = os.read(self._screen, 65536)
        self.text += self._decode(data)
        return bool(data)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        os.close(self._screen)


@on_posix
def test_on_a_terminal_it_shows_a_live_table(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    words = fill(tmp_path, files=5)
    (tmp_path / "markup").write_bytes(b"[red]x[/red] [/nothing] :ant:\n" * 400_000)  # takes long enough to be seen

    with Terminal([*DEMO, str(tmp_path)]) as terminal:
        text = terminal.read_all()
        assert terminal.wait(PATIENCE) == 0

    assert "\x1b[1A" in text  # it was drawn again over itself
    assert re.search(r"thread-2.*the commonest words.*\[/nothing\].*missed: 0", text, re.DOTALL)
    assert f"words: {words.total() + 1_200_000}\r\n" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


@on_posix
def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    fill_with_work(tmp_path)

    with Terminal([*DEMO, str(tmp_path)]) as terminal:
        terminal.read_until("files, [1-9]")
        interrupt(terminal)
        text = terminal.read_all()
        assert terminal.wait(PATIENCE) == 130

    assert text.endswith("stigmergy: interrupted\r\n")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "Traceback" not in text


@on_posix
def test_without_rich_a_terminal_gets_plain_lines(tmp_path: Path) -> None:
    words = fill(tmp_path, files=5)
    program = "import sys; sys.modules['rich'] = None; from stigmergy.cli import main; sys.exit(main())"

    with Terminal([sys.executable, "-c", program, "demo", str(tmp_path)]) as terminal:
        text = terminal.read_all()
        assert terminal.wait(PATIENCE) == 0

    assert f"\r\nwords: {words.total()}\r\n" in text
    assert "\x1b" not in text
