"""The benchmarks run, say what they measured, and have every row that the sources speak of; no time is asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks import engines
from benchmarks.measure import QUICK, Effort, Figures, interleaved
from benchmarks.model import BASELINE_SET, Row, less_than, more, more_sets, sets, times
from benchmarks.peers import MODULES, PEERS
from benchmarks.picture import GROUPS, drawn
from benchmarks.rows import ROWS, Result, chosen, measured
from benchmarks.table import as_data, as_text, machine

import stigmergy
from processes import PATIENCE
from servers import VALKEY, not_exercised

ROOT = Path(__file__).parent.parent
NAMES = [row.name for row in ROWS]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, encoding="utf-8", timeout=PATIENCE)


def without_peers(row: Row) -> Row:
    """They take long to import, where they are installed."""
    own = {name: each for name, each in row.contenders.items() if name not in MODULES}
    return Row(**{**vars(row), "contenders": own})


def result_of(name: str) -> Result:
    (result,) = measured(map(without_peers, chosen([name])), QUICK)
    return result


# -- the program -------------------------------------------------------------------------------------------------------


def test_a_quick_run_prints_the_table() -> None:
    done = run("benchmarks", "--quick", "--only", "set beside 10,000", "--only", "memory of an idle")

    assert done.returncode == 0, done.stderr
    assert "set beside 10,000 watches: " in done.stdout
    assert "1.1 x without: " in done.stdout
    assert "memory of an idle watch: " in done.stdout
    assert "over budget: " in done.stdout


def test_a_quick_run_prints_json() -> None:
    done = run("benchmarks", "--quick", "--json", "--only", "set with hooks")

    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    ours, base, baseline = row["contenders"]
    assert (row["name"], ours["name"], base["name"]) == ("set with hooks", "ours", "without")
    assert ours["to_base"] == pytest.approx(ours["best"] / base["best"])
    assert ours["figure"] == pytest.approx((ours["best"] - base["best"]) / baseline["best"])
    assert ours["verdict"] in ("ok", "over")


def test_a_name_that_no_row_has_is_a_usage_error() -> None:
    done = run("benchmarks", "--only", "dance")

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("error: no row has 'dance' in its name")


# -- the rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_row_can_be_measured(name: str) -> None:
    result = result_of(name)

    if result.lacking:
        not_exercised(VALKEY.name, result.lacking, excused=not VALKEY.has_wheel)
    assert result.figures
    for contender, figures in result.figures.items():
        assert 0 < figures.best <= figures.median, contender


def test_a_row_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STIGMERGY_BENCH_REDIS_URL", raising=False)
    monkeypatch.setattr(engines, "_BINARIES", {})

    data = as_data(machine(), measured(chosen(["redis"]), QUICK))

    assert {row["name"] for row in data["rows"]} >= {"get, redis", "set, redis", "process to process, redis"}
    assert all(row["contenders"] == [] for row in data["rows"])
    assert as_text(data).count("  not measured: ") == len(data["rows"])


@pytest.mark.parametrize("name", ["sqlite", "redis"])
def test_what_is_done_by_hand_is_the_same_work(name: str) -> None:
    """One revision for each write, and a log with what was there before."""
    row, *_ = chosen([f"get, {name}"])
    if row.lacking():
        not_exercised(VALKEY.name, row.lacking(), excused=not VALKEY.has_wheel)
    with engines.BY_HAND[name].open() as names:
        store = names["store"]
        first = store.set("key", 5)
        assert store.commit([("key", 6), ("other", [7])]) == first + 2

        assert (store.get("key"), store.get("other"), store.get("none")) == (6, [7], None)
        assert store.logged()[-3:] == [("key", 1, 5), ("key", 5, 6), ("other", None, [7])]


def test_the_names_of_rows_are_all_different() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_every_row_that_the_sources_name_exists() -> None:
    named = {
        " ".join(name.split())
        for path in sorted(Path(stigmergy.__file__).parent.rglob("*.py"))
        for name in re.findall(r"benchmark: ([^)]+)\)", path.read_text("utf-8"))
    }

    assert chosen(named)


def test_a_row_is_chosen_by_its_name_before_it_is_by_a_part_of_one() -> None:
    assert [row.name for row in chosen(["set"])] == ["set"]
    assert [row.name for row in chosen(["among 1,000,000"])] == [name for name in NAMES if "among 1,000,000" in name]


def test_every_peer_says_what_it_gives_up_and_does_only_what_rows_ask_for() -> None:
    for peer in PEERS:
        assert peer.title in MODULES
        assert peer.gives_up
        assert set(peer.does) <= set(NAMES), peer.title


# -- the method --------------------------------------------------------------------------------------------------------


def test_the_contenders_take_turns_in_every_round() -> None:
    calls: list[str] = []

    def contender(name: str, took: float) -> Any:
        def run(often: int) -> float:
            calls.append(name)
            return took * often

        return run

    runs = {"one": contender("one", 1.0), "two": contender("two", 3.0)}
    figures = interleaved(runs, Effort(rounds=8, seconds=0.0, largest=1), Random(1), times=5)

    turns = [set(calls[n : n + 2]) for n in range(0, 16, 2)]
    assert turns == [{"one", "two"}] * 8
    assert calls[0::2] != calls[:1] * 8, "always in the same order"
    assert (figures["one"].best, figures["two"].median) == (1.0, 3.0)


def test_a_first_sample_that_was_held_up_does_not_make_the_others_short() -> None:
    calls: list[int] = []

    def run(often: int) -> float:
        calls.append(often)
        return often * 1e-6 + (0.0 if calls[1:] else 1.0)

    interleaved({"one": run}, Effort(rounds=1, seconds=1e-3, largest=1), Random(1))

    assert calls[-1] == pytest.approx(1000, rel=0.01)


def test_the_best_of_samples_taken_one_by_one_is_their_best_median() -> None:
    samples = iter([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])

    (figures,) = interleaved(
        {"one": lambda _: next(samples)}, Effort(rounds=2, seconds=0, largest=1), Random(1), times=3
    ).values()

    assert (figures.best, figures.median) == (2.0, 4.5)
    assert figures.p99 is not None
    assert figures.p99 >= 9.0


def test_a_budget_says_ok_up_to_its_limit_and_over_beyond() -> None:
    found = {"ours": Figures(3.0, 4.0), "floor": Figures(1.0, 1.0), BASELINE_SET: Figures(0.5, 0.5)}

    assert [times(limit, "floor").verdict(found) for limit in (3.0, 2.9)] == ["ok", "over"]
    assert [more(limit, "floor", "").verdict(found) for limit in (2.0, 1.9)] == ["ok", "over"]
    assert [less_than(limit, "").verdict(found) for limit in (3.0, 2.9)] == ["ok", "over"]
    assert [sets(limit).verdict(found) for limit in (6.0, 5.9)] == ["ok", "over"]
    assert [more_sets(limit, "floor").verdict(found) for limit in (4.0, 3.9)] == ["ok", "over"]


def test_every_budget_is_about_contenders_of_its_row() -> None:
    for row in ROWS:
        found = {name: Figures(1.0, 1.0) for name in row.contenders if name not in MODULES}
        assert row.budget is None or row.budget.verdict(found) in ("ok", "over"), row.name


# -- the table and the picture -----------------------------------------------------------------------------------------


def data_with(row: str, *contenders: dict[str, Any]) -> dict[str, Any]:
    common = {"kind": "store", "note": "", "median": 2e-6, "p99": None, "to_ours": 2.0, "budget": None, "verdict": None}
    return {
        "machine": machine(),
        "rows": [{"name": row, "about": "a <row>", "unit": "time", "base": None, "contenders": [
            {**common, **contender} for contender in contenders
        ]}],
    }  # fmt: skip


def test_a_peer_that_is_not_installed_is_said_to_be_so() -> None:
    (row,) = chosen(["get"])
    own = without_peers(row)
    (result,) = measured([own], QUICK)
    missing = Result(row, result.figures, tuple(set(row.contenders) - set(own.contenders)))

    text = as_text(as_data(machine(), [missing]))

    assert "  not installed: " in text
    assert "cachetools" in text.partition("not installed: ")[2].splitlines()[0]


def test_the_table_names_what_is_over_budget() -> None:
    data = data_with(
        "get",
        {"name": "ours", "kind": "ours", "best": 1e-6, "budget": "2 us more", "verdict": "over", "figure": 3e-6}
        | {"counted": False},
        {"name": "peer", "best": 2e-6, "budget": "slower than ours", "verdict": "ok", "note": "no watch"},
    )

    text = as_text(data)

    assert "over budget: get (ours)\n" in text
    assert "2 us more: over, 3 us\n" in text
    assert "2.00" in text
    assert text.endswith("[1] no watch")


def test_the_picture_is_well_formed_and_shows_every_contender() -> None:
    data = data_with("get", {"name": "ours", "kind": "ours", "best": 1e-7}, {"name": "<peer> & co", "best": 3e-5})

    picture = ElementTree.fromstring(drawn(data))

    texts = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    circles = list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    assert {"get", "stigmergy", "<peer> & co", "100 ns", "30 µs"} <= set(texts)
    assert len(circles) == 2


def test_the_picture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the rows get, set, set and deliver was measured"):
        drawn(data_with("scan", {"name": "ours", "best": 1e-6}))


def test_the_picture_is_made_of_rows_that_exist() -> None:
    assert set(GROUPS) <= set(NAMES)
