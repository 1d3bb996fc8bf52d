"""`python -m stigmergy.testing TARGET`: judge a store from the command line."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from stigmergy.aio import AsyncStore
from stigmergy.errors import Unavailable
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance import target

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conformance suite in a process of its own, and return what pytest returned."""
    chosen, for_pytest = _parser().parse_known_args(arguments)
    try:
        with TemporaryDirectory() as place:
            store = target.maker(chosen.target, place)()
            colour = Colour("async" if isinstance(store, AsyncStore) else "sync")
            colour.run(_ask(colour.face(store)))
    except Exception as error:
        print(f"stigmergy.testing: no store to judge: {_in_one_line(error)}", file=sys.stderr)
        return 2
    seed = [] if chosen.seed is None else [f"--stigmergy-seed={chosen.seed}"]
    command = [
        *[sys.executable, "-m", "pytest", "-q", target.__file__, f"--stigmergy-url={chosen.target}", *seed],
        # whatever project this is called in, its configuration is not ours
        *["-c", os.devnull, "--rootdir", os.path.dirname(target.__file__), "--noconftest"],
        *["-p", "no:cacheprovider", "-p", "stigmergy", *for_pytest],
    ]
    with TemporaryDirectory() as scratch:  # and nothing is left behind in it
        environment = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": scratch, "PYTEST_ADDOPTS": ""}
        return subprocess.run(command, env=environment, check=False).returncode


async def _ask(store: Any) -> None:
    """Close `store`. Raises `Unavailable` where there is no engine: the suite would wait for it in each test."""
    async with store as asked:
        try:
            await asked.get("stigmergy")
        except Unavailable:
            raise
        except Exception:
            return  # that is for the suite to say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stigmergy.testing",
        description="Judge a store: run the conformance suite over it, in both colours, and report.",
        epilog="Ends with pytest's exit code: 0 if the store keeps the contract. Everything else that is given goes to "
        "pytest: `-k deadline` selects tests by their names, `-x` stops at the first failure.",
        usage="%(prog)s [-h] [--seed N] TARGET [pytest arguments]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a name or URL that open_store takes (memory), or module:callable; each call makes an empty store. In it, "
        "{tmp} is a new folder for each test, for stores that leave something behind: sqlite:///{tmp}/state.db, "
        "redis://localhost/0?namespace={tmp}",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the seed of random tests, to repeat a run")
    return parser


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
