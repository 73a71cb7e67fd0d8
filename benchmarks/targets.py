"""What a run of a profile for Hopper GPUs should reach, held against it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.hopper import DOCUMENTS
from benchmarks.report import Report, Row
from benchmarks.timing import DIRECTIONS
from benchmarks.yardsticks import CellKey, Yardstick, load

DENSE_PEERS = {"forward": ("fa3",), "backward": ("fa3", "fa4")}
DENSE_GAIN = {"forward": 1.05, "backward": 1.08}
CUDNN_GAIN = {(64, "forward"): 1.18, (64, "backward"): 1.26, (256, "forward"): 1.12, (256, "backward"): 1.15}
MASK_PEERS = ("ffa", "fa3")
MASK_GAIN = 1.10
FLEX_GAIN = 1.6
DOCUMENT_FLEX_GAIN = 1.5
DOCUMENT_BOUND = 0.85
WORST_CELL = 0.97
FLASH_GAIN = {"forward": 1.8, "backward": 1.65}
NATIVE_SHARE = {"forward": 0.97, "backward": 0.97}
HOST_MICROSECONDS = 40.0


def speedups(rows: Iterable[Row], ours: str, peer: str) -> dict[tuple[CellKey, str], float]:
    """Speed of ``ours`` over ``peer`` by cell and direction, where both have a figure."""
    found: dict[tuple[CellKey, str], dict[str, float]] = {}
    for row in rows:
        if row.status == "ok" and row.seconds:
            cell = (row.mask, row.tokens, row.heads, row.kv_heads, row.head_dim)
            found.setdefault((cell, row.direction), {})[row.subject] = row.seconds
    return {key: s[peer] / s[ours] for key, s in found.items() if ours in s and peer in s}


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


class Judge:
    """Adds targets to a report from the speed of ``ours`` over the yardstick's peer in this run."""

    def __init__(self, report: Report, ours: str, yardstick: Yardstick) -> None:
        self.report, self.ours, self.yardstick = report, ours, yardstick
        self.gains = speedups(report.rows, ours, yardstick.relative_to)

    def mean_over(
        self, label: str, direction: str, head_dim: int, peers: Sequence[str] | None, at_least: float
    ) -> None:
        """Geometric mean of our gain over that of the best of ``peers``; over cells where one of them was measured.

        With ``peers`` None our gain itself is averaged. The name says how many cells there should be and were.
        """
        wanted = {
            cell: self.yardstick.best(cell, direction, peers) if peers else 1.0
            for cell in self.yardstick.cells
            if cell[-1] == head_dim
        }
        known = {cell: best for cell, best in wanted.items() if best}
        values = [
            self.gains[cell, direction] / best
            for cell, best in known.items()
            if (cell, direction) in self.gains
        ]
        if values:
            against = " and ".join(peers) if peers else self.yardstick.relative_to
            best_of = "the best of " if peers and len(peers) > 1 else ""
            name = f"{label} {direction}: {self.ours} / {best_of}{against}, mean of {len(values)} of {len(known)} cells"
            self.report.add_target(name, _geomean(values), at_least)

    def worst_cell(self, label: str) -> None:
        """The cell and direction in which our gain is the smallest share of the best peer's."""
        shares = {
            (cell, direction): gain / self.yardstick.best(cell, direction)  # type: ignore[operator]
            for (cell, direction), gain in self.gains.items()
            if cell in self.yardstick.cells
        }
        if shares:
            (cell, direction), share = min(shares.items(), key=lambda item: item[1])
            self.report.add_target(
                f"{label} worst cell ({_words(cell)} {direction}): {self.ours} / the best peer",
                share,
                WORST_CELL,
            )

    def smallest_gain(self, label: str, at_least: float) -> None:
        """The smallest gain on the yardstick's peer over all cells and directions of the run."""
        if self.gains:
            (cell, direction), gain = min(self.gains.items(), key=lambda item: item[1])
            peer = self.yardstick.relative_to
            self.report.add_target(
                f"{label} smallest gain ({_words(cell)} {direction}): {self.ours} / {peer}", gain, at_least
            )


def _words(cell: CellKey) -> str:
    mask, tokens, heads, kv_heads, head_dim = cell
    return f"{mask} {tokens} {heads}/{kv_heads} d{head_dim}"


def dense_targets(report: Report, ours: str) -> None:
    """Against FlashAttention 3 and 4 at d 128, against cuDNN at d 64 and 256, and no cell far behind any peer."""
    judge = Judge(report, ours, load()["dense"])
    for direction in DIRECTIONS:
        judge.mean_over("dense d128", direction, 128, DENSE_PEERS[direction], DENSE_GAIN[direction])
    for (head_dim, direction), gain in CUDNN_GAIN.items():
        judge.mean_over(f"dense d{head_dim}", direction, head_dim, None, gain)
    judge.worst_cell("dense")


def mask_targets(report: Report, ours: str) -> None:
    """Against the best specialised kernel of each mask, and against FlexAttention in every cell."""
    judge = Judge(report, ours, load()["masks"])
    for direction in DIRECTIONS:
        judge.mean_over("masks", direction, 128, MASK_PEERS, MASK_GAIN)
    judge.worst_cell("masks")
    judge.smallest_gain("masks", FLEX_GAIN)


def document_targets(report: Report, ours: str, shares: dict[str, float]) -> None:
    """Against FlexAttention, and against the bound (``shares``: ours over it, by direction)."""
    for (cell, direction), gain in speedups(report.rows, ours, "flex").items():
        if cell[0] == DOCUMENTS:
            report.add_target(f"{DOCUMENTS} {direction}: {ours} / flex", gain, DOCUMENT_FLEX_GAIN)
    for direction, share in shares.items():
        report.add_target(f"{DOCUMENTS} {direction}: {ours} / bound of tile rounding", share, DOCUMENT_BOUND)


def mean_targets(report: Report, label: str, ours: str, peer: str, at_least: Mapping[str, float]) -> None:
    """Geometric mean of the speed of ``ours`` over ``peer``, by direction, over the cells of ``ours`` in this run.

    The name says how many cells there should be and were.
    """
    gains = speedups(report.rows, ours, peer)
    for direction in DIRECTIONS:
        wanted = sum((row.subject, row.direction) == (ours, direction) for row in report.rows)
        values = [gain for (_, each), gain in gains.items() if each == direction]
        if values:
            name = f"{label} {direction}: {ours} / {peer}, mean of {len(values)} of {wanted} cells"
            report.add_target(name, _geomean(values), at_least[direction])


def host_targets(report: Report, host: Mapping[str, Mapping[str, float]]) -> None:
    """Host microseconds of a forward call by subject: as large as allowed, over measured."""
    for name, figures in host.items():
        for call in ("forward without gradients", "forward"):
            label = f"host time of {name}, {call}: {HOST_MICROSECONDS:.0f} us / measured"
            report.add_target(label, HOST_MICROSECONDS / figures[call], 1.0)
