"""Set algebra on tables of half-open intervals, int64 (n, 2), without a loop over intervals.

A table is *merged* when every interval starts strictly behind the end of the one before.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Intervals: TypeAlias = NDArray[np.int64]


def is_merged(table: Intervals) -> bool:
    """Whether the intervals are sorted, apart from each other and not touching."""
    return bool((table[1:, 0] > table[:-1, 1]).all())


def merge(table: Intervals) -> Intervals:
    """Sorted intervals of the same positions; overlapping and touching ones joined, lone empty ones kept."""
    if is_merged(table):
        return table
    table = table[np.argsort(table[:, 0], kind="stable")]
    reach = np.maximum.accumulate(table[:, 1])
    first = np.flatnonzero(np.concatenate(([True], table[1:, 0] > reach[:-1])))
    last = np.append(first[1:], len(table)) - 1
    return np.stack((table[first, 0], reach[last]), axis=1)


def total_size(table: Intervals) -> int:
    """Sum of the lengths, counted with multiplicity."""
    return int((table[:, 1] - table[:, 0]).sum())


def overlap(a: Intervals, b: Intervals) -> Intervals:
    """Positions in both of two merged tables, as a merged table without empty intervals."""
    segments, in_a, in_b = _segments(a, b)
    return merge(segments[in_a & in_b])


def difference(a: Intervals, b: Intervals) -> Intervals:
    """Positions in merged table ``a`` and not in merged table ``b``, merged, without empty intervals."""
    segments, in_a, in_b = _segments(a, b)
    return merge(segments[in_a & ~in_b])


def hosts(merged: Intervals, table: Intervals) -> NDArray[np.intp]:
    """For every interval of ``table`` the row of ``merged`` that contains it, or -1."""
    host = np.searchsorted(merged[:, 0], table[:, 0], side="right") - 1
    inside = host >= 0
    inside[inside] = table[inside, 1] <= merged[host[inside], 1]
    return np.where(inside, host, -1)


def offsets(table: Intervals) -> Intervals:
    """Where each interval begins once all are laid end to end, and the total: int64 (n + 1,)."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(table[:, 1] - table[:, 0])))


def stack(table: Intervals, label: Intervals, stride: int) -> Intervals:
    """Intervals of several axes on one: those of label l moved by l * ``stride``, which is above all their ends.

    Merging, overlap and difference then treat all axes at once.
    """
    return table + label[:, None] * stride


def unstack(table: Intervals, stride: int) -> tuple[Intervals, Intervals]:
    """The intervals that ``stack`` moved where they were, and the label of each."""
    label = table[:, 0] // stride
    return table - label[:, None] * stride, label


def chunks(table: Intervals, chunk_size: int) -> list[Intervals]:
    """Lay the intervals end to end and cut every ``chunk_size`` positions; empty intervals are left out."""
    table = table[table[:, 1] > table[:, 0]]
    offset = offsets(table)
    total = int(offset[-1])
    begin = np.union1d(offset[:-1], np.arange(0, total, chunk_size))
    host = np.searchsorted(offset, begin, side="right") - 1
    start = table[host, 0] + begin - offset[host]
    pieces = np.stack((start, start + np.diff(begin, append=total)), axis=1)
    first_of_chunk = np.flatnonzero(begin % chunk_size == 0)
    return np.split(pieces, first_of_chunk[1:]) if total else []


def _segments(a: Intervals, b: Intervals) -> tuple[Intervals, NDArray[np.bool_], NDArray[np.bool_]]:
    """The pieces between neighbouring end points of two merged tables, and which table covers each."""
    points = np.union1d(a, b)
    segments = np.stack((points[:-1], points[1:]), axis=1)
    return segments, hosts(a, segments) >= 0, hosts(b, segments) >= 0
