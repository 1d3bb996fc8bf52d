"""The pages tell no more than is executed: no code escapes, no link leads nowhere, no page is forgotten."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stigmergy import MemoryStore
from stigmergy.providers.redis import RedisStore
from stigmergy.providers.sqlite import SQLiteStore
from stigmergy.testing import StoreConformance

ROOT = Path(__file__).parent.parent
EXECUTED = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*EXECUTED, ROOT / "CONTRIBUTING.md"]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_code_block_is_executed_or_a_command(page: Path) -> None:
    fences = re.findall(r"^\s*(?:```|~~~)(.*)$", page.read_text("utf-8"), re.MULTILINE)

    assert set(fences[::2]) <= {"python", "console"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(("index", "folder"), [("README.md", "docs/"), ("docs/README.md", "")])
def test_an_index_links_every_page(index: str, folder: str) -> None:
    text = (ROOT / index).read_text("utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}

    assert {page for page in pages if f"({folder}{page})" not in text} == set()


def test_the_readme_sets_everything_up_in_two_commands() -> None:
    blocks = re.findall(r"^```console\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)

    assert [block.count("\n") for block in blocks] == [1, 1]
    assert all(block.startswith("python3 -m venv .venv && ") for block in blocks)
    assert [block.split()[-1] for block in blocks] == ["demo", "pytest"]


def test_the_tests_on_the_page_about_testing_pass(tmp_path: Path) -> None:
    text = (ROOT / "docs/testing.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "test_agents.py").write_text("\n".join(blocks), "utf-8")

    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert re.search(r"^105 passed", ended.stdout, re.MULTILINE), ended.stdout


def test_every_guarantee_names_tests_that_are_there() -> None:
    text = (ROOT / "docs/guarantees.md").read_text("utf-8")
    guarantees = re.findall(r"^- \*\*(G\d+)\*\*.*\n(?:  (?!- ).*\n)*((?:  - `.*`\n)*)", text, re.MULTILINE)
    suite = {name for name in dir(StoreConformance) if name.startswith("test_")}

    for number, block in guarantees:
        tests = re.findall(r"`(\S+)::(\w+)`", block)
        assert tests, number
        for place, name in tests:
            functions = suite if place == "StoreConformance" else _functions(ROOT / place)
            assert name in functions, f"{number}: {name}"


def test_the_table_of_capabilities_says_what_the_stores_declare() -> None:
    rows = re.findall(
        r"^\| `(\w+)`: .* \| (\w+) \| (\w+) \| (\w+) \|$",
        (ROOT / "docs/guarantees.md").read_text("utf-8"),
        re.MULTILINE,
    )
    with MemoryStore() as memory, SQLiteStore("never-opened.db") as sqlite, RedisStore() as redis:
        stores = [memory, sqlite, redis]

    declared = sorted({capability for store in stores for capability in store.capabilities})
    assert [capability for capability, *_ in rows] == declared
    for capability, *answers in rows:
        assert answers == ["yes" if capability in store.capabilities else "no" for store in stores], capability


def _functions(file: Path) -> set[str]:
    return set(re.findall(r"^(?:async )?def (\w+)", file.read_text("utf-8"), re.MULTILINE))


def test_the_guarantees_are_numbered_without_gaps() -> None:
    numbers = re.findall(r"^- \*\*G(\d+)\*\* ", (ROOT / "docs/guarantees.md").read_text("utf-8"), re.MULTILINE)

    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    assert numbers


@pytest.mark.slow
def test_no_id_of_a_test_depends_on_the_hash_seed() -> None:
    """Each process of pytest-xdist has its own seed, and all must collect the same tests. A set of strings shows it."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
    collected = [
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.rpartition("\n\n")[0]
        for seed in ("1", "2", "3")
    ]

    assert collected[0].count("::") > 1000
    assert collected[1:] == collected[:1] * 2
