"""Boolean matrices to bands and back: exact, for masks that come as a picture or as a predicate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.errors import complaint
from magi_attention.mask.bands import INF, Bands, row_intervals

_BLOCK_ELEMENTS = 1 << 22

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""FlexAttention's predicate ``(b, h, q_idx, kv_idx) -> bool`` on integer scalars."""

Runs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Row, first column and end column of each maximal visible interval, sorted by row and column."""


def to_dense(bands: Bands, num_rows: int, num_cols: int) -> NDArray[np.bool_]:
    """(num_rows, num_cols) booleans, one band at a time."""
    dense = np.zeros((num_rows, num_cols), dtype=bool)
    cols = np.arange(num_cols)
    for band in bands:
        rows = np.arange(band[0], band[1])
        left, right = row_intervals(band[None], rows)
        dense[band[0] : band[1]] |= (cols >= left[0][:, None]) & (cols < right[0][:, None])
    return dense


def runs_of(block: NDArray[np.bool_], first_row: int = 0) -> Runs:
    """The visible intervals of each row of a boolean matrix whose first row is row ``first_row``."""
    edges = np.diff(np.pad(block, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    return rows + first_row, starts, ends


def from_runs(runs: Runs) -> Bands:
    """Bands that cover these intervals exactly, each interval once.

    From one row to the next the left edge of a band first stands still and then moves by one, and the right
    edge first moves by one and then stands still. Intervals are chained while their edges obey, so each
    chain is one band. The chains are the longest possible, hence the fewest for intervals that do not merge.
    """
    row, left, right = runs
    if not len(row):
        return np.zeros((0, 6), dtype=np.int64)
    below, linked = _successors(row, left, right)
    order = _along_chains(below, linked)
    row, left, right, linked = row[order], left[order], right[order], linked[order]
    # A step is the move from one interval of the reordered list to the next; it exists inside chains only.
    steps = linked[:-1]
    left_moves, right_moves = steps & (np.diff(left) == 1), steps & (np.diff(right) == 1)
    breaks = np.zeros(len(steps), dtype=bool)
    both = steps[1:] & steps[:-1]
    breaks[1:] = both & ((left_moves[:-1] & ~left_moves[1:]) | (~right_moves[:-1] & right_moves[1:]))
    breaks &= _every_other(breaks)
    first = np.concatenate([[True], ~steps | breaks])
    last = np.append(first[1:], True)
    q0, k0, k1 = row[first], left[first], right[last]
    lo = np.where(left[last] > k0, left[last] - row[last], -INF)
    hi = np.where(right[first] < k1, right[first] - 1 - q0, INF)
    return np.stack([q0, row[last] + 1, k0, k1, lo, hi], axis=1)


def _successors(
    row: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Index of the interval in the next row whose two edges moved by 0 or 1, and whether there is one.

    There is at most one, and it succeeds at most one interval: two such intervals would touch and be one.
    """
    width = int(right.max()) + 2
    key = row * width + left
    below = np.searchsorted(key, (row + 1) * width + left)
    below = np.minimum(below, len(row) - 1)
    shift_left, shift_right = left[below] - left, right[below] - right
    linked = row[below] == row + 1
    for shift in (shift_left, shift_right):
        linked &= (shift == 0) | (shift == 1)
    return below, linked


def _along_chains(below: NDArray[np.int64], linked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Permutation that lists the chains one after the other, each from top to bottom.

    The head of each chain is found by pointer doubling: log2(longest chain) vectorised steps.
    """
    count = len(below)
    above = np.arange(count)
    above[below[linked]] = np.flatnonzero(linked)
    head = above
    while True:
        further = head[head]
        if np.array_equal(further, head):
            break
        head = further
    return np.argsort(head, kind="stable")


def _every_other(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True at the first, third, fifth, ... of each streak of consecutive True.

    A break removes its step, so the break that follows immediately has nothing left to disagree with.
    """
    index = np.arange(len(flags))
    streak_start = np.maximum.accumulate(np.where(flags, 0, index + 1))
    return flags & ((index - streak_start) % 2 == 0)


def from_dense(dense: object) -> tuple[Bands, int, int]:
    """Bands of a boolean matrix, and its sizes."""
    if isinstance(dense, torch.Tensor):
        dense = dense.detach().cpu().numpy()
    matrix = np.asarray(dense)
    if matrix.ndim != 2:
        raise ValueError(complaint("dense mask shape", "(num_rows, num_cols)", matrix.shape))
    if matrix.dtype != np.bool_:
        remedy = "True is visible; convert an additive mask with `mask == 0`."
        raise TypeError(complaint("dense mask dtype", "bool", matrix.dtype, remedy))
    height = max(1, _BLOCK_ELEMENTS // max(matrix.shape[1], 1))
    blocks = [runs_of(matrix[top : top + height], top) for top in range(0, matrix.shape[0], height)]
    return from_runs(_stitch(blocks)), matrix.shape[0], matrix.shape[1]


def from_flex(
    mask_mod: MaskMod, num_rows: int, num_cols: int, batch: int, num_heads: int, device: str | torch.device
) -> Bands:
    """Bands of a FlexAttention predicate, evaluated on blocks of rows to bound memory."""
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    predicate = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    cols = torch.arange(num_cols, device=device)
    height = max(1, _BLOCK_ELEMENTS // max(num_cols, 1))
    blocks: list[Runs] = []
    for top in range(0, num_rows if num_cols else 0, height):
        rows = torch.arange(top, min(top + height, num_rows), device=device)

        def block(b: int, h: int, rows: torch.Tensor = rows) -> torch.Tensor:
            visible = predicate(torch.tensor(b, device=device), torch.tensor(h, device=device), rows, cols)
            if visible.dtype != torch.bool:
                raise TypeError(complaint("mask_mod result", "bool", visible.dtype))
            return visible

        common = block(0, 0)
        for b, h in np.ndindex(batch, num_heads):
            if (b or h) and not torch.equal(block(b, h), common):
                wanted = "the same answer for every batch entry and head"
                got = f"another one for batch entry {b}, head {h}"
                raise ValueError(
                    complaint("mask_mod", wanted, got, "Build one Mask per batch entry or head.")
                )
        blocks.append(runs_of(common.cpu().numpy(), top))
    return from_runs(_stitch(blocks))


def _stitch(blocks: list[Runs]) -> Runs:
    """Intervals of consecutive row blocks as one list."""
    if not blocks:
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing, nothing
    row, left, right = (np.concatenate([block[part] for block in blocks]) for part in range(3))
    return row, left, right
