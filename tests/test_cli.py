"""The command line, run as a program."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest

from processes import PATIENCE
from stigmergy import cli
from stigmergy.cli import main

on_posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes are those of POSIX here")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "stigmergy", *arguments]
    return subprocess.run(command, capture_output=True, check=False, encoding="utf-8", timeout=PATIENCE, **options)  # type: ignore[call-overload, no-any-return]


def test_version_is_that_of_the_package() -> None:
    done = run("--version")

    assert (done.returncode, done.stdout) == (0, f"stigmergy {version('stigmergy')}\n")


def test_the_installed_script_is_the_same_program() -> None:
    script = shutil.which("stigmergy", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed with its script")

    done = subprocess.run([script, "--version"], capture_output=True, check=True, encoding="utf-8", timeout=PATIENCE)

    assert done.stdout == run("--version").stdout


def test_without_a_command_it_prints_its_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    output = capsys.readouterr().out
    assert output.startswith("usage: stigmergy ")
    assert "demo" in output


@pytest.mark.parametrize("number", ["0", "-1", "many", "", "1.5", "257", "\x1b[31m"])
@pytest.mark.parametrize("option", ["--workers", "--processes"])
def test_a_number_that_is_none_is_a_usage_error(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["demo", f"{option}={number}"])

    assert exit.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"stigmergy demo: error: argument {option}: a number from 1 to ")
    assert line.isprintable()


def test_the_help_says_what_becomes_of_the_store(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])

    text = " ".join(capsys.readouterr().out.split())

    assert "--store URL" in text
    assert "their keys are removed in the end" in text
    assert "--processes N" in text
    assert "--join" not in text


def test_an_unknown_command_is_a_usage_error() -> None:
    done = run("dance")

    assert (done.returncode, done.stdout) == (2, "")
    assert "dance" in done.stderr


def test_only_the_demo_imports_the_demo() -> None:
    program = "import sys; from stigmergy.cli import main; main(['--version']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, encoding="utf-8", timeout=PATIENCE
    )

    modules = done.stdout.split()

    assert "stigmergy.cli" in modules
    assert [each for each in modules if each.startswith(("stigmergy.demo", "rich", "asyncio"))] == []


def test_main_leaves_the_signals_of_its_host_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)

    assert main(["--version"]) == 0

    assert signal.getsignal(signal.SIGINT) is before
    assert os.name != "posix" or not is_sigint_blocked()
    assert capsys.readouterr().out.startswith("stigmergy ")


def test_main_runs_in_any_thread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one two", encoding="ascii")
    statuses: list[int] = []
    thread = Thread(target=lambda: statuses.append(main(["demo", str(tmp_path)])), daemon=True)

    thread.start()
    thread.join(PATIENCE)

    assert statuses == [0]
    assert "words: 2\n" in capsys.readouterr().out


def is_sigint_blocked() -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@on_posix
@pytest.mark.usefixtures("ctrl_c_raises")
def test_the_first_ctrl_c_blocks_all_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaning_up: list[bool] = []

    def work(_: object) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            cleaning_up.append(is_sigint_blocked())
            signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(cli, "_dispatch", work)

    assert main([]) == 130
    assert cleaning_up == [True]
    assert is_sigint_blocked()
    assert capsys.readouterr().err == "stigmergy: interrupted\n"


@on_posix
@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_does_not_disturb_the_end_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stigmergy", "--version"])

    status = main()
    gc.unfreeze()

    assert status == 0
    assert is_sigint_blocked()


@on_posix
@pytest.mark.parametrize("arguments", [["demo", "."], ["--help"]])
def test_it_ends_quietly_when_nobody_reads_its_output(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two", encoding="ascii")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "stigmergy", *arguments]

    with open(writer, "wb") as nobody:
        done = subprocess.run(
            command, stdout=nobody, stderr=subprocess.PIPE, cwd=tmp_path, check=False, timeout=PATIENCE
        )

    assert done.stderr == b""
    assert done.returncode == 141 or "demo" not in arguments  # argparse has its own way to be quiet


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here is always full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two", encoding="ascii")
    command = [sys.executable, "-m", "stigmergy", "demo", str(tmp_path)]

    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=PATIENCE)

    assert (done.returncode, done.stderr) == (1, b"stigmergy: No space left on device\n")
