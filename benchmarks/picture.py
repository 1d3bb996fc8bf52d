"""One picture for the README: `python -m benchmarks.picture RESULTS.json > docs/performance.svg`.

Get, set and delivery, ours and the peers, best time on a logarithmic scale. A dot, because a bar on such a scale has no
honest length.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from math import ceil, floor, log10
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["GROUPS", "drawn"]

GROUPS = {"get": "get", "set": "set", "set and deliver": "set, until a watch has handed it over"}
"""The title of each group, by the name of its row."""

_WIDTH, _LEFT, _RIGHT = 760, 230, 90
_LINE, _HEAD, _FOOT = 20, 34, 70
_STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #3d444d; }
.title { font-weight: 600; fill: #1f2328; }
.ours { font-weight: 600; fill: #0969da; }
.soft { fill: #656d76; }
line { stroke: #8c959f; stroke-opacity: .35; }
circle { fill: #8c959f; }
circle.ours { fill: #0969da; }
circle.floor { fill: none; stroke: #656d76; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #c9d1d9; }
  .title { fill: #f0f6fc; }
  .ours { fill: #58a6ff; }
  .soft { fill: #9198a1; }
  circle { fill: #9198a1; }
  circle.ours { fill: #58a6ff; }
  circle.floor { fill: none; stroke: #9198a1; }
}"""


def drawn(data: dict[str, Any]) -> str:
    """The picture of a run, as SVG. Raises `ValueError` if it has none of the rows."""
    groups = [(GROUPS[row["name"]], _shown(row)) for row in data["rows"] if row["name"] in GROUPS]
    times = [each["best"] for _, shown in groups for each in shown]
    if not times:
        raise ValueError(f"none of the rows {', '.join(GROUPS)} was measured")
    scale = _Scale(floor(log10(min(times))), ceil(log10(max(times))))
    height = sum(_HEAD + _LINE * len(shown) for _, shown in groups) + _FOOT
    parts = [*_grid(scale, height), *_groups(scale, groups), *_legend(data["machine"], height)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="t">'
    title = '<title id="t">Time of a get, a set and a delivery: stigmergy, and the peers that can do it</title>'
    return "\n".join([head, title, f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


class _Scale:
    def __init__(self, first: int, last: int) -> None:
        self.decades = range(first, max(last, first + 1) + 1)

    def __call__(self, seconds: float) -> float:
        part = (log10(seconds) - self.decades[0]) / (len(self.decades) - 1)
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)


def _shown(row: dict[str, Any]) -> list[dict[str, Any]]:
    there = [each for each in row["contenders"] if "missing" not in each and each["name"] != "copy=None"]
    return sorted(there, key=lambda each: float(each["best"]))


def _groups(scale: _Scale, groups: list[tuple[str, list[dict[str, Any]]]]) -> Iterator[str]:
    y = 0
    for title, shown in groups:
        y += _HEAD
        yield _text(0, y - 12, title, "title")
        for each in shown:
            style = {"ours": "ours", "floor": "floor"}.get(each["kind"], "peer")
            name = "stigmergy" if style == "ours" else each["name"] + " (a queue)" * (each["kind"] == "queue")
            middle = y + _LINE // 2
            yield _text(_LEFT - 14, middle + 4, name, "ours" if style == "ours" else "", end=True)
            yield f'<line x1="{_LEFT}" y1="{middle}" x2="{scale(each["best"]):.1f}" y2="{middle}"/>'
            yield f'<circle class="{style}" cx="{scale(each["best"]):.1f}" cy="{middle}" r="5"/>'
            yield _text(scale(each["best"]) + 10, middle + 4, _time(each["best"]), style if style == "ours" else "soft")
            y += _LINE


def _grid(scale: _Scale, height: int) -> Iterator[str]:
    bottom = height - _FOOT + 6
    for decade in scale.decades:
        x = f"{scale(10.0**decade):.1f}"
        yield f'<line x1="{x}" y1="{_HEAD - 8}" x2="{x}" y2="{bottom}"/>'
        yield f'<text class="soft" x="{x}" y="{bottom + 14}" text-anchor="middle">{_time(10.0**decade)}</text>'


def _legend(machine: dict[str, Any], height: int) -> Iterator[str]:
    yield _text(0, height - 24, "best time, log scale; hollow: by hand, without isolation, revisions, watches", "soft")
    yield _text(0, height - 6, f"{machine['python']}, {machine['processor']}, {machine['date'][:10]}", "soft")


def _text(x: float, y: float, said: str, style: str, *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text class="{style}" x="{x:.1f}" y="{y}"{anchor}>{escape(said)}</text>'


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.2g} ns"


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(drawn(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
