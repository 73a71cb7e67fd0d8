"""Is this mask what its author meant? Double cover, rows that see nothing, bands without a pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import K0, LO, Q0, Q1, Bands, areas, intersect, is_empty, tighten

_CHUNK = 1 << 20


class Overlap(NamedTuple):
    """Two bands that share ``area`` pairs, (``row``, ``col``) being one of them."""

    first: int
    second: int
    row: int
    col: int
    area: int


@dataclass(frozen=True)
class MaskReport:
    """What ``Mask.check()`` found.

    Attributes:
        num_bands, num_rows: size of the mask that was looked at.
        num_overlaps: number of pairs of bands that share at least one (query, key) pair.
        double_covered: total of what they share: a (query, key) pair that m bands cover counts m * (m - 1) /
            2.
        overlaps: the first overlaps, by band index.
        uncovered_rows: number of rows that see nothing (their output is 0).
        empty_bands: indices of bands that show nothing.
    """

    num_bands: int
    num_rows: int
    num_overlaps: int
    double_covered: int
    overlaps: tuple[Overlap, ...]
    uncovered_rows: int
    empty_bands: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """True when no pair is covered twice."""
        return self.num_overlaps == 0

    def __str__(self) -> str:
        lines = [f"{self.num_bands} bands over {self.num_rows} rows: {'ok' if self.ok else 'double cover'}"]
        if not self.ok:
            lines.append(
                f"  {self.num_overlaps} overlapping pairs of bands share {self.double_covered} pairs:"
            )
            lines += [
                f"    bands {o.first} and {o.second} share {o.area}, such as (row {o.row}, column {o.col})"
                for o in self.overlaps[:10]
            ]
            if self.num_overlaps > len(self.overlaps[:10]):
                lines.append(f"    ... and {self.num_overlaps - len(self.overlaps[:10])} more")
        if self.uncovered_rows:
            lines.append(f"  {self.uncovered_rows} rows see nothing")
        if self.empty_bands:
            shown = ", ".join(map(str, self.empty_bands[:10])) + (
                ", ..." if len(self.empty_bands) > 10 else ""
            )
            lines.append(f"  {len(self.empty_bands)} bands are empty: {shown}")
        return "\n".join(lines)


def check(bands: Bands, num_rows: int, limit: int = 100) -> MaskReport:
    """Sort and sweep along the axis on which fewer bands meet; never quadratic in tokens."""
    tight = tighten(bands)
    empty = is_empty(tight)
    live = np.flatnonzero(~empty)
    num_overlaps, shared_area = 0, 0
    found: list[NDArray[np.int64]] = []
    for a, b in _meeting_pairs(tight[live]):
        common = tighten(intersect(tight[live[a]], tight[live[b]]))
        real = ~is_empty(common)
        common = common[real]
        area = areas(common)
        num_overlaps += len(common)
        shared_area += sum(area.tolist())
        pair = np.sort(np.stack([live[a[real]], live[b[real]]], axis=1), axis=1)
        row = common[:, Q0]
        col = np.maximum(common[:, K0], row + common[:, LO])
        found.append(_first(np.column_stack([pair, row, col, area]), limit))
        found = [_first(np.concatenate(found), limit)]
    return MaskReport(
        num_bands=len(bands),
        num_rows=num_rows,
        num_overlaps=num_overlaps,
        double_covered=shared_area,
        overlaps=tuple(Overlap(*line) for part in found for line in part.tolist()),
        uncovered_rows=num_rows - _covered(tight[live, Q0], tight[live, Q1]),
        empty_bands=tuple(np.flatnonzero(empty).tolist()),
    )


def _first(table: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """The ``limit`` first lines in order of band index."""
    return table[np.lexsort((table[:, 1], table[:, 0]))][:limit]


def _meeting_pairs(bands: Bands) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of bands whose rows (or columns, whichever are fewer) meet, about a million at a time."""
    sweeps = [_followers(bands[:, start], bands[:, start + 1]) for start in (Q0, K0)]
    order, counts = min(sweeps, key=lambda sweep: int(sweep[1].sum()))
    total = np.cumsum(counts)
    begin = 0
    while begin < len(counts):
        done = int(total[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(total, done + _CHUNK, side="right")), begin + 1)
        part = counts[begin:end]
        a = np.repeat(np.arange(begin, end), part)
        b = a + 1 + np.arange(len(a)) - np.repeat(np.cumsum(part) - part, part)
        if len(a):
            yield order[a], order[b]
        begin = end


def _followers(
    starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order by start, and for each interval in that order how many later ones begin before it ends."""
    order = np.argsort(starts, kind="stable")
    reach = np.searchsorted(starts[order], ends[order], side="left")
    return order, reach - np.arange(len(order)) - 1


def _covered(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> int:
    """Length of the union of non-empty intervals."""
    if not len(starts):
        return 0
    order = np.argsort(starts)
    starts, reached = starts[order], np.maximum.accumulate(ends[order])
    before = np.concatenate([[starts[0]], reached[:-1]])
    return int(np.maximum(reached - np.maximum(starts, before), 0).sum())
