"""Bands to and from slices: a query range, a key range and one of four types.

type         int   visible iff (i, j local to the slice)    3 x 3    diagonal of the band
full          0    always                                    xxx
                                                             xxx
                                                             xxx
causal        1    j <= i + (sk - sq)                        x..      hi = k1 - q1
                                                             xx.
                                                             xxx
inv_causal    2    j >= i                                    xxx      lo = k0 - q0
                                                             .xx
                                                             ..x
bi_causal     3    both                                      x..      both
                                                             .x.
                                                             ..x
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.errors import complaint
from magi_attention.mask.arguments import regular
from magi_attention.mask.bands import HI, INF, K0, K1, LO, Q0, Q1, Bands, compact, relax

if TYPE_CHECKING:
    from magi_attention.common import AttnMaskType, AttnRanges

FULL, CAUSAL, INV_CAUSAL, BI_CAUSAL = range(4)
TYPE_NAMES = {"full": FULL, "causal": CAUSAL, "inv_causal": INV_CAUSAL, "bi_causal": BI_CAUSAL}


def from_ranges(
    q_ranges: object, k_ranges: object, types: object, num_rows: int | None, num_cols: int | None
) -> tuple[Bands, int, int]:
    """One band per slice, in order, and the two sizes (the largest end when not given)."""
    table = slice_table(q_ranges, k_ranges, types, num_rows, num_cols)
    sizes = [
        int(table[:, end].max(initial=0)) if size is None else size
        for end, size in ((1, num_rows), (3, num_cols))
    ]
    return bands_of(table), sizes[0], sizes[1]


def slice_table(
    q_ranges: object,
    k_ranges: object,
    types: object,
    num_rows: int | None,
    num_cols: int | None,
    name_of_types: str = "attn_type_map",
) -> NDArray[np.int64]:
    """(n, 5) q0, q1, k0, k1 and type integer of slices, checked.

    Args:
        name_of_types: what messages call ``types``.
    """
    q = _range_table("q_ranges", q_ranges, num_rows)
    k = _range_table("k_ranges", k_ranges, num_cols)
    if len(q) != len(k):
        raise ValueError(complaint("k_ranges length", f"{len(q)} like q_ranges", len(k)))
    return np.column_stack([q, k, _type_codes(types, len(q), name_of_types)])


def bands_of(slices: NDArray[np.int64]) -> Bands:
    """One band per line of ``slice_table``."""
    q0, q1, k0, k1, codes = slices.T
    lo = np.where(codes & INV_CAUSAL, k0 - q0, -INF)
    hi = np.where(codes & CAUSAL, k1 - q1, INF)
    return np.column_stack([q0, q1, k0, k1, lo, hi])


def _range_table(name: str, ranges: object, size: int | None) -> NDArray[np.int64]:
    """(n, 2) int64, each line checked."""
    if hasattr(ranges, "to_naive_ranges"):
        ranges = ranges.to_naive_ranges()
    table = regular(name, ranges)
    if table.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(complaint(f"{name} shape", "(n, 2)", table.shape, "Each range is (start, end)."))
    if table.dtype.kind not in "iu":
        raise TypeError(complaint(f"{name} dtype", "integers", table.dtype))
    table = table.astype(np.int64)
    for wrong, wanted in (
        (table[:, 0] > table[:, 1], "start <= end"),
        (table[:, 0] < 0, "start >= 0"),
        (table[:, 1] > (INF if size is None else size), f"end <= {size}, the number of tokens"),
    ):
        if wrong.any():
            worst = int(np.argmax(wrong))
            raise ValueError(complaint(f"{name}[{worst}]", wanted, tuple(table[worst].tolist())))
    return table


def _type_codes(types: object, count: int, name: str) -> NDArray[np.int64]:
    """(count,) type integers from integers, names, enum members, one of them for all, or None for full."""
    if types is None:
        return np.zeros(count, dtype=np.int64)
    if isinstance(types, torch.Tensor):
        types = types.cpu().numpy()
    if isinstance(types, np.ndarray):
        types = types[()]
    if isinstance(types, str) or np.ndim(types) == 0:  # type: ignore[arg-type]
        return np.full(count, _type_code(0, types), dtype=np.int64)
    listed: Any = types
    if len(listed) != count:
        remedy = "Give one type per slice, or a single one for all."
        raise ValueError(complaint(f"{name} length", f"{count} like q_ranges", len(listed), remedy))
    if isinstance(listed, np.ndarray) and listed.dtype.kind in "iu":
        codes = listed.astype(np.int64).reshape(-1)
        bad = (codes < FULL) | (codes > BI_CAUSAL)
        if bad.any():
            worst = int(np.argmax(bad))
            raise _unknown_type(worst, codes[worst])
        return codes
    return np.array([_type_code(index, item) for index, item in enumerate(listed)], dtype=np.int64)


def _type_code(index: int, item: object) -> int:
    value = getattr(item, "value", item)
    if isinstance(value, str) and value in TYPE_NAMES:
        return TYPE_NAMES[value]
    if isinstance(value, (int, np.integer)) and FULL <= value <= BI_CAUSAL:
        return int(value)
    raise _unknown_type(index, item)


def _unknown_type(index: int, got: object) -> ValueError:
    names = ", ".join(f"{code} ({name})" for name, code in TYPE_NAMES.items())
    return ValueError(complaint(f"mask type of slice {index}", f"one of {names}", got))


def split_by_type(bands: Bands) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Query ranges (m, 2), key ranges (m, 2) and type integers (m,) that cover the same pairs; m <= 3 n.

    The left edge max(k0, i + lo) stands still above row k0 - lo and moves from there on; the right edge
    min(k1, i + hi + 1) moves above row k1 - hi and stands still from there on. Between those two rows a band
    is one
    slice: its keys run from the left edge of its first row to the right edge of its last row.
    """
    tight = relax(compact(bands))
    q0, q1, k0, k1, lo, hi = (tight[:, column] for column in (Q0, Q1, K0, K1, LO, HI))
    left_moves = np.clip(k0 - lo, q0, q1)
    right_stands = np.clip(k1 - hi, q0, q1)
    left_moves = np.where(lo == -INF, q1, left_moves)
    right_stands = np.where(hi == INF, q0, right_stands)
    cuts = np.stack(
        [q0, np.minimum(left_moves, right_stands), np.maximum(left_moves, right_stands), q1], axis=1
    )
    begin, end = cuts[:, :-1], cuts[:, 1:]
    moving_left = begin >= left_moves[:, None]
    moving_right = end <= right_stands[:, None]
    first_key = np.where(moving_left, begin + lo[:, None], k0[:, None])
    last_key = np.where(moving_right, end + hi[:, None], k1[:, None])
    types = CAUSAL * moving_right + INV_CAUSAL * moving_left
    real = end > begin
    return (
        np.stack([begin[real], end[real]], axis=1),
        np.stack([first_key[real], last_key[real]], axis=1),
        types[real],
    )


def to_slices(bands: Bands) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
    """``split_by_type`` in the documented vocabulary."""
    from magi_attention.common import AttnMaskType, AttnRanges

    q, k, codes = split_by_type(bands)
    members = {code: AttnMaskType(name) for name, code in TYPE_NAMES.items()}
    return (
        AttnRanges.from_ranges([tuple(line) for line in q.tolist()]),
        AttnRanges.from_ranges([tuple(line) for line in k.tolist()]),
        [members[code] for code in codes.tolist()],
    )
