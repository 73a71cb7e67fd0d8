"""Bars of TFLOP/s from result files: ours and its peers, forward and backward, mask by mask.

    python benchmarks/plot.py benchmarks/results/hopper-masks.json docs/figures/

One PNG per file and shape, and per length where a length has several masks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

DIRECTIONS = ("forward", "backward")
# Ours stand out; peers are greys and pale tones, in the order of their first appearance.
OURS = ("#c0392b", "#e67e22", "#8e44ad", "#d35400", "#922b21")
PEERS = ("#5d6d7e", "#aeb6bf", "#2e86c1", "#85c1e9", "#7d6608", "#c7b55a")

Rows = list[dict[str, Any]]


def figures_of(rows: Rows) -> dict[str, Rows]:
    """Rows with a figure, by what shares a picture; the key is the end of its file name."""
    done = [row for row in rows if row["status"] == "ok"]
    masks: dict[tuple[Any, ...], set[str]] = {}
    for row in done:
        masks.setdefault((row["head_dim"], row["tokens"]), set()).add(row["mask"])
    found: dict[str, Rows] = {}
    for row in done:
        key = f"{row['heads']}-{row['kv_heads']}_d{row['head_dim']}"
        if len(masks[row["head_dim"], row["tokens"]]) > 3:
            key += f"_{row['tokens']}"
        found.setdefault(key, []).append(row)
    return found


def _label(row: dict[str, Any]) -> str:
    dtype = "" if row["dtype"] == "bf16" else f"\n{row['dtype']}"
    return f"{row['mask'].replace('_', ' ')}\n{row['tokens']}{dtype}"


def draw(rows: Rows, title: str, path: Path) -> None:
    """Two panels of grouped bars, forward above backward, written to ``path``."""
    groups = list(dict.fromkeys(_label(row) for row in rows))
    subjects = list(dict.fromkeys((not row["ours"], row["subject"]) for row in rows))
    subjects.sort(key=lambda item: item[0])
    colours = _colours(subjects)
    width = 0.84 / len(subjects)
    size = (max(6.0, 0.5 + len(groups) * (0.5 + 0.28 * len(subjects))), 6.4)
    figure, panels = plt.subplots(2, 1, figsize=size, sharex=True, constrained_layout=True)
    for direction, panel in zip(DIRECTIONS, panels, strict=True):
        for number, (_, subject) in enumerate(subjects):
            heights = np.full(len(groups), np.nan)
            for row in rows:
                if row["subject"] == subject and row["direction"] == direction:
                    heights[groups.index(_label(row))] = row["tflops"]
            places = np.arange(len(groups)) + (number - (len(subjects) - 1) / 2) * width
            bars = panel.bar(places, np.nan_to_num(heights), width, label=subject, color=colours[subject])
            texts = ["" if np.isnan(height) else f"{height:.3g}" for height in heights]
            panel.bar_label(bars, texts, fontsize=7, rotation=90, padding=2)
        panel.set_ylabel(f"{direction}\nTFLOP/s of the visible area")
        panel.margins(y=0.18)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(np.arange(len(groups)), groups, fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(subjects), fontsize=8
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _colours(subjects: list[tuple[bool, str]]) -> dict[str, str]:
    ours = [name for is_peer, name in subjects if not is_peer]
    peers = [name for is_peer, name in subjects if is_peer]
    return {
        name: palette[number % len(palette)]
        for names, palette in ((ours, OURS), (peers, PEERS))
        for number, name in enumerate(names)
    }


def plot_file(source: Path, folder: Path) -> list[Path]:
    """Draw every picture of a result file; returns their paths."""
    document = json.loads(source.read_text())
    device = document["environment"]["device"]
    written = []
    for key, rows in figures_of(document["rows"]).items():
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{source.stem}_{key}.png")
        shape = f"{rows[0]['heads']}/{rows[0]['kv_heads']} heads, d {rows[0]['head_dim']}"
        draw(rows, f"{device}, {shape}", folder / name)
        written.append(folder / name)
    return written


def main(argv: list[str] | None = None) -> int:
    """Command line: result files, then the folder for the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON files that run.py wrote")
    parser.add_argument("folder", type=Path, help="where the PNG files go")
    args = parser.parse_args(argv)
    for source in args.results:
        for path in plot_file(source, args.folder):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
