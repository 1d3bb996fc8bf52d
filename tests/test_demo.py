"""`stigmergy demo`: run on real folders, on a real terminal, with real signals; and its agents on a store."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from stigmergy import MemoryStore, Store, StoreClosed, apply_middleware
from stigmergy.demo.agents import Crew, Result, Task, Totals, collect, noting, run_tasks, start_agents, worker
from stigmergy.demo.files import text_files, words_of
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


def run(*arguments: str, command: list[str] = DEMO, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], capture_output=True, check=False, encoding="utf-8", timeout=30, **options
    )


def count(folder: Path, *arguments: str) -> Outcome:
    return Outcome(run(str(folder), *arguments))


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
    wc = subprocess.run(["wc", "-w", *paths], capture_output=True, check=True, encoding="utf-8", timeout=30)

    assert count(tmp_path).words == int(wc.stdout.splitlines()[-1].split()[0]) > 1000


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


def test_the_folder_is_the_current_one_by_default(tmp_path: Path) -> None:
    words = fill(tmp_path, files=3)

    assert Outcome(run(cwd=tmp_path)).words == words.total()


def test_a_thousand_files_make_few_lines(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / str(number)).write_bytes(b"word")

    outcome = count(tmp_path)

    assert (outcome.words, outcome.facts["missed"]) == (1000, "0")
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

    outcome = count(tmp_path)

    os.remove("leaf")
    for _ in range(depth):
        os.chdir("..")
        os.rmdir("d")
    assert outcome.words == 2


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

    outcome = Outcome(run(str(tmp_path), env={**os.environ, "PYTHONIOENCODING": "ascii"}))

    assert outcome.commonest == [("1", r"\u87fb")]


def test_printable_text_is_left_alone() -> None:
    assert printable("a ä 蟻") == "a ä 蟻"
    assert printable("\x00\x85\u2028\udcff") == r"\x00\x85\u2028\udcff"


# -- what it refuses, and what it skips --------------------------------------------------------------------------------

# The superuser may read everything, so this gives its rights away first; with them may go those to import anything.
UNPRIVILEGED = [
    sys.executable,
    "-c",
    "import asyncio, encodings.unicode_escape, os, shutil, sys, stigmergy.bridge, stigmergy.demo\n"
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
    assert_refused(run(str(tmp_path / "missing")), "No such file or directory|cannot find the path")
    assert_refused(run(str(tmp_path / "odd\n\x1b[31mname")), r"odd\\n\\x1b\[31mname")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"word")

    assert_refused(run(str(tmp_path / "file")), "Not a directory|directory name is invalid")


def test_a_folder_without_text_files_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\0")

    assert_refused(run(str(tmp_path)), "no text file to read")


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
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_of_many_workers_exactly_one_claims_each_task(tmp_path: Path) -> None:
    words = fill(tmp_path, files=60)
    store = MemoryStore(history=0)
    tasks, results = (store.watch(prefix=prefix, capacity=None) for prefix in ("task:", "result:"))

    with crew_on(store) as crew:
        start_agents(crew, store, str(tmp_path), [f"task-{n}" for n in range(8)] + [f"thread-{n}" for n in range(8)])
        store.wait_for("totals", lambda totals: totals.files == 60, timeout=20)
        assert store.get("words") == words
        assert len(store.scan("task:")) == 60

    claimed = Counter(change.key for change in tasks if change.value.owner is not None)
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
        result: Result = store.wait_for("result:000002", lambda result: True, timeout=20).value

    assert result.counts == {b"one": 1, b"two": 1}


def test_workers_of_one_event_loop_take_turns(tmp_path: Path) -> None:
    store = MemoryStore()
    for number in range(6):
        (tmp_path / str(number)).write_bytes(b"word")
        store.set(f"task:{number}", Task(str(tmp_path / str(number))))

    with crew_on(store) as crew:
        crew.start(run_tasks, store, ["task-1", "task-2", "task-3"])
        for name in "task-1", "task-2", "task-3":
            store.wait_for(f"worker:{name}", lambda status: status.files == 2, timeout=20)


def test_a_file_that_vanished_since_it_was_listed_is_skipped(tmp_path: Path) -> None:
    store = MemoryStore()
    store.set("task:000001", Task(str(tmp_path / "vanished")))

    with crew_on(store) as crew:
        crew.start(collect, store, store.watch(prefix="result:"))
        crew.start(run_tasks, store, ["task-1"])
        totals: Totals = store.wait_for("totals", lambda totals: True, timeout=20).value

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
            store.wait_for("anything", bool, timeout=20)
        with pytest.raises(LookupError, match="lost"):
            crew.check()


def test_every_watch_of_the_store_is_audited_whoever_opens_it() -> None:
    missed: list[int] = []
    store = apply_middleware(MemoryStore(), noting(missed))
    narrow, wide, latest = store.watch("a", capacity=2), store.aio.watch("a"), store.observe("a")

    for number in range(5):
        store.set("a", number)
    for watch in narrow, wide, latest:
        assert watch.get_nowait() is not None

    assert sorted(missed) == [0, 0, 3]


# -- interrupted, and on a terminal ------------------------------------------------------------------------------------


def fill_with_work(folder: Path) -> None:
    """Files that take long to count and little room: all are one."""
    (folder / "0").write_bytes(b"all work and no play\n" * 1_000_000)
    for number in range(1, 60):
        os.link(folder / "0", folder / str(number))


Interrupt = Callable[[], None]


@contextmanager
def interrupted(program: subprocess.Popen[Any]) -> Iterator[Interrupt]:
    """Send Ctrl-C from within, as often as is asked for; the program must end soon after."""
    started = monotonic()
    try:
        yield lambda: program.send_signal(signal.SIGINT)
        status = program.wait(timeout=30)
        assert (status, monotonic() - started < 5) == (130, True)
    finally:
        program.kill()


@on_posix
@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_while_big_files_are_counted_ends_it_at_once(again: bool, tmp_path: Path) -> None:
    fill_with_work(tmp_path)

    with subprocess.Popen([*DEMO, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert re.fullmatch(rb"\d+ of \d+( or more)? files, \d+ words\n", program.stdout.readline())
        with interrupted(program) as interrupt:
            interrupt()
            while again and program.poll() is None:
                interrupt()
        assert program.stderr.read() == b"stigmergy: interrupted\n"


class Terminal:
    """A pseudo-terminal, and a program on it."""

    def __init__(self, command: list[str]) -> None:
        self.screen, slave = os.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"}
        self.program = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str) -> None:
        while not re.search(pattern, self.text):
            self.text += os.read(self.screen, 65536).decode()

    def read_all(self) -> str:
        try:
            while data := os.read(self.screen, 65536):
                self.text += data.decode(errors="replace")
        except OSError:  # how Linux says that nobody is on the terminal any more
            pass
        os.close(self.screen)
        return self.text


@on_posix
def test_on_a_terminal_it_shows_a_live_table(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    words = fill(tmp_path, files=5)
    (tmp_path / "markup").write_bytes(b"[red]x[/red] [/nothing] :ant:\n" * 100)

    terminal = Terminal([*DEMO, str(tmp_path)])
    text = terminal.read_all()

    assert terminal.program.wait(timeout=30) == 0
    assert "\x1b[1A" in text  # it was drawn again over itself
    assert re.search(r"thread-2.*the commonest words.*\[/nothing\].*missed: 0", text, re.DOTALL)
    assert f"words: {words.total() + 300}\r\n" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


@on_posix
def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    fill_with_work(tmp_path)

    terminal = Terminal([*DEMO, str(tmp_path)])
    terminal.read_until("files, [1-9]")
    with interrupted(terminal.program) as interrupt:
        interrupt()
        text = terminal.read_all()

    assert text.endswith("stigmergy: interrupted\r\n")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "Traceback" not in text


@on_posix
def test_without_rich_a_terminal_gets_plain_lines(tmp_path: Path) -> None:
    words = fill(tmp_path, files=5)
    program = "import sys; sys.modules['rich'] = None; from stigmergy.cli import main; sys.exit(main())"

    terminal = Terminal([sys.executable, "-c", program, "demo", str(tmp_path)])
    text = terminal.read_all()

    assert terminal.program.wait(timeout=30) == 0
    assert f"\r\nwords: {words.total()}\r\n" in text
    assert "\x1b" not in text
