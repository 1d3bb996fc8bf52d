"""The command line: `stigmergy`, or `python -m stigmergy`."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from types import FrameType

__all__ = ["main"]

_MAX_WORKERS = 256
_MAX_PROCESSES = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stigmergy` with the arguments `argv`, those of the process by default, and return the exit status.

    0: done. 1: the system failed, a full disk, say. 2: cannot be done; as for 1, one line on stderr says why. 130:
    after Ctrl-C. 141: the reader of the output has gone. SIGINT stays blocked after the first Ctrl-C, and at the end
    of a call without `argv`: the process is about to end, and a signal would only disturb that.
    """
    try:
        with _interrupted_once():
            return _run(argv)
    except KeyboardInterrupt:
        _block_sigint()  # the signal may have come before there was a handler
        print("stigmergy: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"stigmergy: {error.strerror or error}", file=sys.stderr)
        return 1
    finally:
        if argv is None:
            _block_sigint()
            gc.freeze()  # else Python searches all that is left for cycles: half a second on a busy machine


def _run(argv: Sequence[str] | None) -> int:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a word of the folder may be beyond the terminal's encoding
    try:
        status = _dispatch(argv)
    except SystemExit:
        _flush()
        raise
    _flush()
    return status


def _dispatch(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        from importlib.metadata import version

        print("stigmergy", version("stigmergy"))
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    return _demo(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from stigmergy.demo import DemoError, join, run

    try:
        if arguments.join:
            join()
        else:
            run(arguments.folder, arguments.workers, arguments.store, arguments.processes)
    except DemoError as error:
        print(f"stigmergy demo: {error}", file=sys.stderr)
        return error.status
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stigmergy", description="Watchable shared state for software agents.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", dest="command")
    about = "Count the words of a folder's text files with agents that share one store."
    demo = commands.add_parser("demo", help=about, description=about)
    demo.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="where to look (default: here)")
    demo.add_argument(
        "--workers",
        metavar="N",
        type=partial(_number, _MAX_WORKERS),
        default=4,
        help="how many in each process: half are tasks, half threads (default: 4)",
    )
    demo.add_argument(
        "--store",
        metavar="URL",
        default="memory",
        help="what they share: sqlite:///FILE, redis://HOST/0; their keys are removed in the end (default: memory)",
    )
    demo.add_argument(
        "--processes",
        metavar="N",
        type=partial(_number, _MAX_PROCESSES),
        default=1,
        help="how many work together; several need a store that they can share (default: 1)",
    )
    demo.add_argument("--join", action="store_true", help=argparse.SUPPRESS)  # how further processes are started
    return parser


def _number(most: int, text: str) -> int:
    """`text` as a number from 1 to `most`."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(f"a number from 1 to {most} is needed, not {text!r}")
    return number


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """Let the first Ctrl-C raise `KeyboardInterrupt`, and block all others, unless the host handles SIGINT itself."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        first, interrupted = not interrupted, True
        # Blocked at once: a flood of signals would leave no time for anything but their handler. The call itself runs
        # the handler again for a signal that is pending.
        _block_sigint()
        if first:
            raise KeyboardInterrupt

    # The handler stays: in place of one that has just been taken away, CPython reports a race, with a traceback.
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if ours and not interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _block_sigint() -> None:
    """Block SIGINT in this thread. The demo's other threads have it blocked from their start."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()
