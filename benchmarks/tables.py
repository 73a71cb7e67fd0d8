"""Tables of result files in a Markdown page, between marks that name the file.

    python benchmarks/tables.py docs/performance.md benchmarks/results/hopper-*.json

``<!-- table NAME -->`` and ``<!-- end NAME -->`` on lines of their own hold the table of ``NAME.json``; what lies
between them is replaced. A mark whose file is not given keeps what it holds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Row, table_cells


def _markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    rules = ["---" if column < 2 else "---:" for column in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rules, *lines)]


def _costs(costs: dict[str, Any]) -> list[str]:
    return [f"- {name}: {_words(value)}" for name, value in costs.items()]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " x ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


PLACEMENTS = {
    "ranks": ("ranks", "d"),
    "tokens": ("tokens", "d"),
    "algorithm": ("algorithm", "s"),
    "plan ms": ("plan_ms", ".1f"),
    "work, most / mean": ("imbalance", ".3f"),
    "received, most": ("received_most", ",.0f"),
    "mean": ("received_mean", ",.0f"),
    "MiB, most": ("mebibytes_most", ",.0f"),
    "from other nodes": ("between_nodes_mean", ",.0f"),
    "once a node": ("between_nodes_once_mean", ",.0f"),
}
"""Columns of plans: the figure and its format."""


def _placements(lines: list[dict[str, Any]]) -> list[str]:
    cells = [[format(line[figure], form) for figure, form in PLACEMENTS.values()] for line in lines]
    return _markdown(list(PLACEMENTS), cells)


def text_of(document: dict[str, Any]) -> str:
    """Where the figures come from, TFLOP/s and ratios, geometric means, costs and targets of a result file."""
    where = document["environment"]
    names = ("device", "torch", "triton", "cuda_driver")
    source = ", ".join(
        f"{name} {where[name]}" if name != "device" else where[name] for name in names if where[name]
    )
    known = {field.name for field in fields(Row)}
    rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in document["rows"]]
    parts = [[f"{source}, commit {(where['commit'] or 'unknown')[:12]}, {where['date'][:10]}."]]
    if rows:
        parts.append(_markdown(*table_cells(rows)))
        ways = sorted({re.sub(r"[0-9]+", "n", row.timed.split(" (")[0]) for row in rows if row.timed})
        parts.append([f"Timed by: {'; '.join(ways)}."] if ways else [])
    parts.append(
        [
            f"- geometric mean {m['direction']}, {m['ours']} / {m['peer']}: {m['geomean']:.3f}"
            f" ({m['configurations']} configurations)"
            for m in document["geomeans"]
        ]
    )
    parts.append(_costs(document["costs"]))
    if document.get("placements"):
        parts.append(_placements(document["placements"]))
    aims = [
        [t["name"], f"{t['value']:.3f}", f"{t['at_least']:.2f}", "yes" if t["met"] else "no"]
        for t in document["targets"]
    ]
    parts.append(_markdown(["target", "value", "at least", "met"], aims) if aims else [])
    return "\n\n".join("\n".join(part) for part in parts if part)


def fill(page: str, tables: dict[str, str]) -> str:
    """``page`` with the text between the marks of each name replaced.

    Raises:
        ValueError: a name without marks in the page.
    """
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        if begin not in page or end not in page:
            raise ValueError(
                f"page: expected the marks {begin} and {end}, found none. Add them where the table goes."
            )
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end, 1)[1]}"
    return page


def main(argv: list[str] | None = None) -> int:
    """Command line: the page, then result files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files that run.py wrote")
    args = parser.parse_args(argv)
    tables = {path.stem: text_of(json.loads(path.read_text())) for path in args.results}
    args.page.write_text(fill(args.page.read_text(), tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
