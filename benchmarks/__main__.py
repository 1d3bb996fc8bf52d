"""`python -m benchmarks`: measure, and print the table. The exit code says nothing about time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks.measure import FULL, QUICK
from benchmarks.rows import ROWS, chosen, measured
from benchmarks.table import as_data, as_text, machine


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="the row of this name, or those with it in theirs; repeatable"
    )
    parser.add_argument(
        "--quick", action="store_true", help="everything once through, small and short: the figures say little"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in seconds and bytes")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and measure nothing")
    options = parser.parse_args(arguments)
    try:
        rows = chosen(options.only) if options.only else ROWS
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print(*(row.name for row in rows), sep="\n")
        return
    about = machine()
    results = []
    for result in measured(rows, QUICK if options.quick else FULL):
        results.append(result)
        print(f"{len(results)}/{len(rows)} {result.row.name}", file=sys.stderr)
    data = as_data(about, results)
    print(json.dumps(data, indent=1) if options.json else as_text(data))


if __name__ == "__main__":
    main()
