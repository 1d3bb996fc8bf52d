"""The state of the work as it was seen last, what came out, and two ways to show both."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from heapq import nsmallest
from time import monotonic
from typing import TYPE_CHECKING

from stigmergy.demo.agents import Plan, Status, Totals
from stigmergy.model import Change, Op

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LiveView", "PlainView", "Progress", "Report", "printable", "view_of_stdout"]

_COMMONEST = 20
_WIDEST = 40
_SKIPPED = 5


class Progress:
    """What those marks say that everybody may follow."""

    def __init__(self, names: Iterable[str]) -> None:
        self.plan = Plan()
        self.totals = Totals()
        self.workers = dict.fromkeys(names, Status())

    @property
    def keys(self) -> list[str]:
        return ["plan", "totals", *map("worker:{}".format, self.workers)]

    @property
    def finished(self) -> bool:
        return self.plan.complete and self.totals.merged == self.plan.tasks

    @property
    def skipped(self) -> str:
        """The files that could not be read, if any, in parentheses and not too many of them."""
        paths = self.totals.skipped
        more = [f"and {len(paths) - _SKIPPED} more"] if len(paths) > _SKIPPED else []
        return f" ({'; '.join([*map(printable, paths[:_SKIPPED]), *more])})" if paths else ""

    def follow(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if change.op is Op.DELETE:
                continue  # the store has lost it, and other agents fail
            if change.key == "plan":
                self.plan = change.value
            elif change.key == "totals":
                self.totals = change.value
            else:
                self.workers[change.key.removeprefix("worker:")] = change.value

    def __str__(self) -> str:
        files = sum(status.files for status in self.workers.values())
        words = sum(status.words + status.more for status in self.workers.values())
        return f"{files} of {self.plan.tasks}{'' if self.plan.complete else ' or more'} files, {words} words"


class Report:
    """What came out, as rows of text."""

    def __init__(
        self, progress: Progress, words: Counter[bytes], missed: list[int], by: str = "", facts: Iterable[str] = ()
    ) -> None:
        commonest = nsmallest(_COMMONEST, words.items(), key=lambda item: (-item[1], item[0]))
        self.words = [(str(times), _cut(printable(word.decode(errors="replace")))) for word, times in commonest]
        self.workers = [(str(each.words), str(each.files), name) for name, each in progress.workers.items()]
        self.facts = [
            f"files: {progress.totals.files}",
            f"skipped: {len(progress.totals.skipped)}{progress.skipped}",
            f"words: {words.total()}",
            f"changes watched: {len(missed)}{f' by {by}' if by else ''}",
            f"missed: {sum(missed)}",
            *facts,
        ]


class PlainView:
    """Lines."""

    def __init__(self) -> None:
        self._due = monotonic() + 1

    def show(self, progress: Progress) -> None:
        """Print where the work is, at most once a second."""
        if progress.plan.tasks and monotonic() >= self._due:
            self._due = monotonic() + 1
            print(progress, flush=True)

    def report(self, report: Report) -> None:
        print("the commonest words:")
        for times, word in report.words:
            print(f"{times:>12}  {word}")
        print("the workers:")
        for words, files, name in report.workers:
            print(f"{words:>12}  words in {files} files by {name}")
        print(*report.facts, sep="\n")

    def close(self) -> None:
        pass


class LiveView:
    """Tables, by rich. Raises `ImportError` if that is not installed."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(markup=False, emoji=False, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def show(self, progress: Progress) -> None:
        rows = [
            (str(each.words + each.more), str(each.files), name, printable(each.path)[-_WIDEST:])
            for name, each in progress.workers.items()
        ]
        self._live.start()
        self._live.update(_table(("words", "files", "worker", "at"), rows, str(progress)), refresh=True)

    def report(self, report: Report) -> None:
        self._console.print(_table(("times", "word"), report.words, "the commonest words"))
        self._console.print(_table(("words", "files", "worker"), report.workers, "the workers"))
        self._console.print(*report.facts, sep="\n", soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def view_of_stdout() -> PlainView | LiveView:
    """Return what suits stdout: tables for a terminal if rich is installed, else lines."""
    if sys.stdout is not None and sys.stdout.isatty():
        with suppress(ImportError):
            return LiveView()
    return PlainView()


def printable(text: str) -> str:
    r"""Return `text` with escapes for what would not print, or would do something to a terminal.

    >>> printable("\x1b[31mred")
    '\\x1b[31mred'
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _table(columns: Iterable[str], rows: Iterable[tuple[str, ...]], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        number = column in ("words", "files", "times")
        table.add_column(column, justify="right" if number else "left", min_width=10 if number else 20, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
