"""What a run of the conformance suite says in the end: what was judged, how it did, and what was not exercised."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pytest

__all__ = ["Figures", "Judged", "report_lines"]

_PROPERTY = "stigmergy"
"""The user property in which a test of the suite tells the report about itself."""

_CAPABILITIES = ("distributed", "durable", "isolated", "resumable")
"""What the suite has laws for."""

_COLOURS = ("sync", "async", "both at once")
_WIDTH = 80


class Figures:
    """Numbers that tests noted."""

    def __init__(self, noted: dict[str, int]) -> None:
        self._noted = noted

    def note(self, text: str, number: int) -> None:
        """Add `number` to what the report says of `text`."""
        self._noted[text] = self._noted.get(text, 0) + number


class Judged:
    """One test of the suite, as it tells the report about itself: in plain values, which travel between processes."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        test = request.node
        self._told: dict[str, Any] = {
            "suite": test.parent.nodeid,
            "area": _area(request.cls, test.originalname),
            "colour": test.callspec.params["colour"] if "colour" in test.fixturenames else _COLOURS[2],
            "store": None,
            "capabilities": [],
            "figures": {},
        }
        self.figures = Figures(self._told["figures"])
        test.user_properties.append((_PROPERTY, self._told))

    def seeing(self, make_store: Callable[..., Any]) -> Callable[..., Any]:
        """`make_store`; the report hears of what it makes."""

        def make(**options: Any) -> Any:
            store = make_store(**options)
            self._told |= {"store": type(store).__qualname__, "capabilities": sorted(store.capabilities)}
            return store

        return make


def report_lines(stats: Mapping[str, list[Any]]) -> list[str]:
    """The report on the tests of the suite among `stats`, which are pytest's reports by what became of the tests."""
    suites: dict[str, dict[str, _Test]] = {}
    for outcome in ("passed", "skipped", "xfailed", "failed", "error"):  # a worse one takes the place of a better one
        for report in stats.get(outcome, ()):
            told = dict(getattr(report, "user_properties", ())).get(_PROPERTY)
            if told is not None:
                test = _Test(told, *_outcome(report, outcome))
                suites.setdefault(told["suite"], {})[report.nodeid] = test
    left_out = Counter(item.parent.nodeid for item in stats.get("deselected", ()))
    return [line for suite, tests in suites.items() for line in _suite(suite, list(tests.values()), left_out[suite])]


class _Test(NamedTuple):
    told: dict[str, Any]
    outcome: str
    reason: str
    """Why it was skipped."""


def _outcome(report: Any, outcome: str) -> tuple[str, str]:
    if outcome == "skipped":
        return "skipped", str(report.longrepr[2]).removeprefix("Skipped: ")
    if outcome == "xfailed":
        return "skipped", f"expected to fail: {report.wasxfail.removeprefix('reason: ')}"
    return ("passed" if outcome == "passed" else "failed"), ""


def _area(suite: Any, test: str) -> tuple[int, str]:
    """The place among the bases of the class that has the test, and its name in words."""
    place, owner = next((place, base) for place, base in enumerate(suite.__mro__) if test in vars(base))
    return place, "its own" if owner is suite else re.sub(r"(?<!^)(?=[A-Z])", " ", owner.__name__).lower()


def _suite(name: str, tests: list[_Test], left_out: int) -> Iterator[str]:
    stores = sorted({test.told["store"] for test in tests if test.told["store"]})
    declared = {capability for test in tests for capability in test.told["capabilities"]}
    yield f"{f' stigmergy: {name} ':-^{_WIDTH}}"
    yield f"store         {', '.join(stores) or 'none was made'}"
    yield f"capabilities  {', '.join(sorted(declared)) or 'none'}"
    yield ""
    yield from _columns([("area", *_COLOURS), *_areas(tests)])
    noted: Counter[str] = sum((Counter(test.told["figures"]) for test in tests), Counter())
    if noted:
        yield ""
        yield from _columns([("figures", ""), *((text, f"{number:,}") for text, number in sorted(noted.items()))])
    yield ""
    yield from _columns([("not exercised", ""), *_gaps(tests, declared, left_out)])


def _areas(tests: list[_Test]) -> Iterator[tuple[str, ...]]:
    for area in sorted({tuple(test.told["area"]) for test in tests}):
        outcomes = {colour: Counter[str]() for colour in _COLOURS}
        for test in tests:
            if tuple(test.told["area"]) == area:
                outcomes[test.told["colour"]][test.outcome] += 1
        yield area[1], *(_count(outcomes[colour]) for colour in _COLOURS)


def _count(outcomes: Counter[str]) -> str:
    return ", ".join(f"{outcomes[each]} {each}" for each in ("passed", "failed", "skipped") if outcomes[each])


def _gaps(tests: list[_Test], declared: set[str], left_out: int) -> Iterator[tuple[str, str]]:
    reasons = Counter(test.reason for test in tests if test.outcome == "skipped")
    for capability in _CAPABILITIES:
        if capability not in declared:
            reasons.setdefault(f"not declared: {capability}", 0)
    if left_out:
        reasons["not selected in this run"] = left_out
    for reason, number in sorted(reasons.items()):
        yield reason, f"{number} test{'s' * (number > 1)}" if number else ""
    if not reasons:
        yield "nothing: all of it ran", ""


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The rows with their columns aligned, all but the first row indented."""
    table = [(row[0] if number == 0 else f"  {row[0]}", *row[1:]) for number, row in enumerate(rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
