"""Every example is run, as a program of its own, and says what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from processes import PATIENCE

EXAMPLES = Path(__file__).parent.parent / "examples"

# What each prints; word_count.py takes a folder, and has tests of its own.
PRINTED = {
    "blackboard.py": """\
        ['plan by planner', 'refused by critic', 'refused by poet']
        ['critic: too long', 'poet: too dry']
        a book about ants
    """,
    "handles_and_claims.py": """\
        the worker reads the plan: ['look', 'write']
        this handle may not write 'global:plan'
        this handle may not read 'agent/planner:mood'
        an anthill, by worker
        worker lost global:task:write and wrote None
    """,
    "hooks_and_middleware.py": """\
        refused: budget/tokens takes numbers
        refused: this handle may not write 'config/model'
        left: 488
        log: commit, get_entry, commit, commit: ValueError, commit: AccessDenied, get_entry
    """,
    "pipeline.py": """\
        30 tasks, each done once and approved, though 5 workers died at work
    """,
    "resume_from_a_bookmark.py": """\
        scanned 1 keys {'fact:sky': 'blue'}
        followed 2 changes {'fact:sky': 'grey', 'fact:sea': 'blue'}
        scanned 2 keys {'fact:sea': 'blue', 'fact:tide': 99}
        followed 0 changes {'fact:sea': 'blue', 'fact:tide': 99}
    """,
    "watch_from_threads_and_tasks.py": """\
        1. room/degrees: None -> 17
        2. room/heating: None -> on
        3. room/degrees: 17 -> 23
        4. room/heating: on -> off
    """,
}


def run(name: str, *arguments: str) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, check=False, encoding="utf-8", timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"word_count.py", *PRINTED}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_teaches(name: str) -> None:
    assert run(name) == [line.strip() for line in PRINTED[name].strip().splitlines()]


def test_word_count_counts_every_file_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(20):
        (tmp_path / "deep" / f"{number}.txt").write_text("to be or not to be\n" * number, encoding="ascii")
    (tmp_path / ".hidden").write_text("hidden", encoding="ascii")

    *words, summary = run("word_count.py", str(tmp_path))

    assert sorted(words) == sorted(
        [f"{380:>8}  'be'", f"{380:>8}  'to'", f"{190:>8}  'not'", f"{190:>8}  'or'"],
    )
    assert summary.startswith("1140 words, missed: 0, ")
    assert sum(map(int, re.findall(r"'\w+': (\d+)", summary))) == 20


def test_word_count_is_a_program_of_under_60_lines() -> None:
    assert len((EXAMPLES / "word_count.py").read_text(encoding="utf-8").splitlines()) < 60
