"""Batches with padding, packed sequences or both, as bands: the tokens stay where they are, nothing is unpadded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask import Mask
from magi_attention.mask.bands import INF

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sight:
    """What a query sees of its own sequence. Left and right are keys beside its own; -1 is unlimited."""

    causal: bool = True
    left: int = -1
    right: int = 0
    keep_first: int = 0
    force_fa_decode: bool = False

    @property
    def window(self) -> tuple[int, int]:
        return self.left, self.right


@dataclass(frozen=True)
class _Runs:
    """Stretches of one sequence without a gap: columns [begin, end) of a batch row; ``group`` numbers the sequences."""

    row: Ints
    begin: Ints
    end: Ints
    group: Ints


def batch_mask(numbers: Ints, num_rows: int, num_cols: int, sight: Sight) -> Mask:
    """The mask of a batch whose rows of queries, and of keys, lie one behind the other.

    Args:
        numbers: (batch, n <= num_cols) the number of the sequence that each key belongs to, 0 for padding; keys beyond n
            are nobody's. The queries stand at the last ``num_rows`` of the n columns. If attention is not causal and
            ``num_rows != n``, they stand nowhere and see all keys that are no padding.
        num_rows, num_cols: queries and keys of one batch entry.

    Distances are those between columns. ``keep_first`` counts from the first column of a sequence.
    """
    batch, length = numbers.shape
    runs = _runs(numbers)
    everywhere = not sight.causal and num_rows != length
    if everywhere:
        bands = np.full((len(runs.row), 6), INF, dtype=np.int64)
        bands[:, 0], bands[:, 1] = runs.row * num_rows, (runs.row + 1) * num_rows
        bands[:, 2], bands[:, 3] = runs.row * num_cols + runs.begin, runs.row * num_cols + runs.end
        bands[:, 4] = -INF
    else:
        bands = _windows(runs, length - num_rows, num_rows, num_cols, sight)
    filled = (bands[:, 0] < bands[:, 1]) & (bands[:, 2] < bands[:, 3]) & (bands[:, 4] <= bands[:, 5])
    return Mask(bands[filled], batch * num_rows, batch * num_cols)


def _runs(numbers: Ints) -> _Runs:
    batch, length = numbers.shape
    starts = np.ones((batch, length), dtype=bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    row, begin = np.nonzero(starts)
    end = np.append(begin[1:], length)
    end = np.where(end == 0, length, end)  # the next run begins a row
    number = numbers[row, begin]
    real = number != 0
    row, begin, end, number = (x[real].astype(np.int64) for x in (row, begin, end, number))
    order = np.lexsort((begin, number, row))
    row, begin, end, number = (x[order] for x in (row, begin, end, number))
    is_first = np.ones(len(row), dtype=bool)
    is_first[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
    return _Runs(row, begin, end, np.cumsum(is_first) - 1)


def _windows(runs: _Runs, first_query: int, num_rows: int, num_cols: int, sight: Sight) -> Ints:
    """Every stretch of queries with every stretch of keys of the same sequence: a window, and what is kept behind it."""
    queries_begin = np.maximum(runs.begin, first_query)
    num_queries = np.bincount(runs.group, np.maximum(runs.end - queries_begin, 0)).astype(np.int64)
    of_queries, of_keys = _pairs(runs.group)
    row, group = runs.row[of_queries], runs.group[of_queries]
    table = np.empty((len(row), 6), dtype=np.int64)
    to_row, to_col = row * num_rows - first_query, row * num_cols
    table[:, 0], table[:, 1] = to_row + queries_begin[of_queries], to_row + runs.end[of_queries]
    table[:, 2], table[:, 3] = to_col + runs.begin[of_keys], to_col + runs.end[of_keys]
    own = to_col - to_row  # of the key in the query's column
    table[:, 4] = own - sight.left if sight.left >= 0 else -INF
    table[:, 5] = own + sight.right if sight.right >= 0 else INF
    if sight.left < 0:
        return table
    if sight.force_fa_decode:
        table[num_queries[group] == 1, 4] = -INF
    if not sight.keep_first:
        return table
    first_column = runs.begin[np.searchsorted(runs.group, group)]
    kept = table.copy()
    kept[:, 3] = np.minimum(kept[:, 3], to_col + first_column + sight.keep_first)
    kept[:, 5] = np.minimum(kept[:, 5], kept[:, 4] - 1)
    kept[:, 4] = -INF
    return np.concatenate([table, kept[table[:, 4] > -INF]])


def _pairs(group: Ints) -> tuple[Ints, Ints]:
    """All pairs (i, j) of positions in the sorted ``group`` with the same value."""
    sizes = np.bincount(group)[group] if len(group) else group
    first = np.repeat(np.arange(len(group)), sizes)
    begin = np.searchsorted(group, group[first])
    within = np.arange(len(first)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return first, begin + within


def left_padding(numbers: Ints, num_rows: int, num_cols: int) -> Ints | None:
    """(batch,) columns of padding on the left of one sequence a row; None if anything else is in ``numbers``.

    Nor is it only that if keys are missing, or if queries are padding.
    """
    if numbers.shape[1] != num_cols or not numbers.size:
        return None
    pads = (numbers != 0).argmax(axis=1)
    is_alone = numbers == (np.arange(num_cols) >= pads[:, None])
    return pads if is_alone.all() and pads.max() <= num_cols - num_rows else None


def stored_columns(numbers: Ints, num_rows: int, num_cols: int, sight: Sight) -> Ints | None:
    """The columns of ``numbers`` whose keys a cache still has, which has dropped what no later query sees.

    It has the last ``left`` keys before the call, and the first ``keep_first`` of the sequence with the most padding on
    its left. None if that is not what ``num_cols`` keys can be.
    """
    batch, length = numbers.shape
    seen = length - num_rows
    padding = int(np.where(numbers.any(axis=1), (numbers != 0).argmax(axis=1), length).max()) if batch else 0
    head = sight.keep_first + padding
    if sight.left < 0 or sight.force_fa_decode or num_cols != min(seen, head + sight.left) + num_rows:
        return None
    return np.concatenate([numbers[:, :head], numbers[:, head + length - num_cols :]], axis=1)
