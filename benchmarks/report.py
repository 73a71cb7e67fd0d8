"""Rows, ratios, the JSON file and the table."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
FLOP_FACTOR = {"forward": 4.0, "backward": 10.0}


@dataclass
class Row:
    """One subject in one direction of one configuration.

    ``status`` is "ok", "wrong" (failed its check), "failed" (raised), "unsupported" or "skipped"; only "ok"
    rows have figures, the others have a ``reason``. ``check`` holds the errors, see ``check.Verdict``, and ``timed``
    says how a sample was taken. ``area`` is that of one of the ``batch`` sequences. ``bytes_read`` is what a call must
    read, where that is what limits it: then the figure is GB/s.
    """

    mask: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    direction: str
    subject: str
    ours: bool
    area: int
    status: str = "ok"
    reason: str = ""
    seconds: float | None = None
    seconds_q1: float | None = None
    seconds_q3: float | None = None
    rounds: int = 0
    tflops: float | None = None
    check: dict[str, dict[str, float]] = field(default_factory=dict)
    batch: int = 1
    timed: str = ""
    bytes_read: int = 0
    gbps: float | None = None

    def fill(self, figures: dict[str, float]) -> None:
        """Take median and quartiles, and count the operations of the unmasked area and the bytes."""
        for name, value in figures.items():
            setattr(self, name, value)
        work = FLOP_FACTOR[self.direction] * self.area * self.batch * self.heads * self.head_dim
        self.tflops = work / figures["seconds"] * 1e-12
        self.gbps = self.bytes_read / figures["seconds"] * 1e-9 if self.bytes_read else None

    @property
    def configuration(self) -> tuple[Any, ...]:
        shape = (self.mask, self.tokens, self.heads, self.kv_heads, self.head_dim, self.dtype)
        return (*shape, self.batch, self.direction)

    @property
    def shape(self) -> str:
        """Heads, head dimension and, unless it is 1, the batch, for people."""
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{batch}{self.heads}/{self.kv_heads} d{self.head_dim}"

    def line(self) -> str:
        """What is printed when the row is done."""
        head = f"{self.mask:>16} {self.tokens:>7} {self.shape:>15} {self.direction:>8} {self.subject:>14}  "
        if self.status == "wrong":
            return f"{head}WRONG  {self.reason}"
        if self.status != "ok":
            return f"{head}{self.status}: {self.reason}"
        spread = (self.seconds_q3 - self.seconds_q1) / self.seconds * 100
        if self.gbps is not None:
            figures = f"{self.seconds * 1e6:9.2f} us  {self.gbps:8.1f} GB/s  spread {spread:.1f}%"
            return f"{head}{figures}  {self.timed}"
        return f"{head}{self.tflops:8.3g} TFLOP/s  {self.seconds * 1e3:9.3f} ms  spread {spread:.1f}%"


def ratios(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Speed of ours over each peer's, within each configuration of this run."""
    done: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.status == "ok":
            done.setdefault(row.configuration, []).append(row)
    return [
        {
            "mask": mine.mask,
            "tokens": mine.tokens,
            "shape": mine.shape,
            "direction": mine.direction,
            "ours": mine.subject,
            "peer": peer.subject,
            "ratio": peer.seconds / mine.seconds,
        }
        for group in done.values()
        for mine in group
        if mine.ours
        for peer in group
        if not peer.ours
    ]


def geomeans(pairs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean of the ratios by direction, our subject and peer."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for pair in pairs:
        groups.setdefault((pair["direction"], pair["ours"], pair["peer"]), []).append(pair["ratio"])
    return [
        {
            "direction": direction,
            "ours": ours,
            "peer": peer,
            "geomean": math.exp(float(np.mean(np.log(values)))),
            "configurations": len(values),
        }
        for (direction, ours, peer), values in groups.items()
    ]


def _output(*command: str) -> str:
    """Stripped standard output, or "" when the command is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def machine_state(device: torch.device) -> dict[str, Any]:
    """What may have moved the figures: load average, or the GPU's clock (MHz), power (W), temperature (C)."""
    if device.type == "cpu":
        return {"load_average": os.getloadavg()[0]}
    names = ("clocks.sm", "power.draw", "temperature.gpu")
    query = f"--query-gpu={','.join(names)}"
    values = _output("nvidia-smi", query, "--format=csv,noheader,nounits").split("\n")[0].split(", ")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Where the figures come from. ``commit`` names the code where the checkout has no git history."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cuda_driver": driver if on_gpu else None,
        "commit": commit or _output("git", "rev-parse", "HEAD") or None,
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


@dataclass
class Report:
    """Everything of one run; written to ``path`` after each addition, so that a killed run leaves figures."""

    environment: dict[str, Any]
    arguments: dict[str, Any]
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)
    placements: list[dict[str, Any]] = field(default_factory=list)
    told: set[tuple[str, str]] = field(default_factory=set)

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            # That a subject does not know a mask is said once, not for each length and direction.
            known = row.status == "unsupported" and (row.subject, row.reason) in self.told
            self.told.add((row.subject, row.reason))
            if not known:
                print(row.line(), flush=True)
        self.write()

    def add_cost(self, name: str, value: Any) -> None:
        """A figure that is not a speed: a time in seconds, a memory size, or why it could not be had."""
        self.costs[name] = value
        print(f"{name}: {value}", flush=True)
        self.write()

    def add_target(self, name: str, value: float, at_least: float) -> None:
        met = value >= at_least
        self.targets.append({"name": name, "value": value, "at_least": at_least, "met": met})
        print(
            f"target {name}: {value:.2f}, wanted >= {at_least:.2f}: {'met' if met else 'MISSED'}", flush=True
        )
        self.write()

    def document(self) -> dict[str, Any]:
        pairs = ratios(self.rows)
        return {
            "environment": self.environment,
            "arguments": self.arguments,
            "rows": [asdict(row) for row in self.rows],
            "ratios": pairs,
            "geomeans": geomeans(pairs),
            "targets": self.targets,
            "costs": self.costs,
            "states": self.states,
            "placements": self.placements,
        }

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        # An error that is not finite is written as a string: JSON has no infinity.
        draft.write_text(json.dumps(_finite(self.document()), indent=1, allow_nan=False) + "\n")
        draft.replace(self.path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: TFLOP/s by subject, then the ratio of each of ours to each peer.

    Where bytes are what counts, a line for every row: microseconds, GB/s, and the speed over each peer's.
    """
    if any(row.bytes_read for row in rows):
        return _bytes_cells(rows)
    subjects = list(dict.fromkeys(row.subject for row in rows))
    by_key = {(row.configuration, row.subject): row for row in rows}
    pairs = list(dict.fromkeys((p["ours"], p["peer"]) for p in ratios(rows)))
    header = ["mask", "tokens", "shape", "direction", *subjects, *(f"{mine}/{peer}" for mine, peer in pairs)]
    lines = []
    for configuration in dict.fromkeys(row.configuration for row in rows):
        shape = next(row.shape for row in rows if row.configuration == configuration)
        cells = [configuration[0], str(configuration[1]), shape, configuration[-1]]
        found = {name: by_key.get((configuration, name)) for name in subjects}
        for row in found.values():
            if row is None or row.status in ("unsupported", "skipped"):
                cells.append("–")
            else:
                cells.append(f"{row.tflops:.3g}" if row.status == "ok" else row.status.upper())
        for names in pairs:
            mine, peer = (found[name] for name in names)
            both = mine is not None and peer is not None and mine.status == peer.status == "ok"
            cells.append(f"{peer.seconds / mine.seconds:.2f}" if both else "–")
        lines.append(cells)
    return header, lines


def _bytes_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    peers = list(dict.fromkeys(row.subject for row in rows if not row.ours))
    header = ["work", "subject", "keys", "shape", "us", "GB/s", *(f"speed/{peer}" for peer in peers)]
    seconds = {(row.configuration, row.subject): row.seconds for row in rows}
    lines = []
    for row in rows:
        cells = [row.mask, row.subject, str(row.tokens), row.shape]
        if row.seconds is None or row.gbps is None:
            lines.append([*cells, row.status.upper(), *["–"] * (1 + len(peers))])
            continue
        cells += [f"{row.seconds * 1e6:.1f}", f"{row.gbps:.0f}"]
        theirs = [seconds.get((row.configuration, peer)) if row.ours else None for peer in peers]
        lines.append(cells + [f"{each / row.seconds:.2f}" if each else "–" for each in theirs])
    return header, lines


def print_table(rows: list[Row]) -> None:
    """TFLOP/s and ratios by configuration, then the geometric means; with rich when it is installed."""
    if not rows:
        return
    header, lines = table_cells(rows)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        for cells in (header, *lines):
            print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    else:
        table = Table(*header)
        for cells in lines:
            table.add_row(*cells)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    for mean in geomeans(ratios(rows)):
        print(
            f"geometric mean {mean['direction']} {mean['ours']}/{mean['peer']}: {mean['geomean']:.3f}"
            f" over {mean['configurations']} configurations"
        )
