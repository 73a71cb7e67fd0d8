"""``Mask``: which query row sees which key column, as an immutable value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.errors import complaint
from magi_attention.mask import bands as algebra
from magi_attention.mask import check, dense, show, slices
from magi_attention.mask.bands import INF, Bands, as_bands
from magi_attention.mask.builders import MaskBuilders

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from magi_attention.common import AttnMaskType, AttnRanges

Ranges = Sequence[tuple[int, int]] | NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Mask(MaskBuilders):
    """A union of bands over ``num_rows`` queries and ``num_cols`` keys.

    Args:
        bands: anything numpy can read as an (n, 6) integer table of ``(q0, q1, k0, k1, lo, hi)``;
            row i sees column j through a band iff ``q0 <= i < q1``, ``k0 <= j < k1`` and ``lo <= j - i <=
            hi``.
        num_rows: number of query tokens.
        num_cols: number of key tokens.

    A pair that two bands cover counts twice in the softmax (the union is a multiset union); ``check()``
    reports it. Two masks are equal when they have the same sizes and list the same bands, in any order and
    with any slack in their rectangles; a mask cut into other pieces is a different list.

    Raises:
        ValueError: sizes negative or too large, bands without six columns, or one that reaches outside the
            rectangle.
        TypeError: bands or sizes that are not integers.
    """

    bands: Bands
    num_rows: int
    num_cols: int
    table: torch.Tensor = field(init=False)
    """The bands as an int32 CPU tensor (n, 6): what the kernels read."""

    def __post_init__(self) -> None:
        bands = as_bands(self.bands)
        for name in ("num_rows", "num_cols"):
            size = operator.index(getattr(self, name))
            if not 0 <= size < INF // 2:
                raise ValueError(complaint(f"Mask {name}", f"0 <= size < {INF // 2}", size))
            object.__setattr__(self, name, size)
        bounds = np.array([self.num_rows, self.num_rows, self.num_cols, self.num_cols])
        outside = ((bands[:, :4] < 0) | (bands[:, :4] > bounds)).any(axis=1)
        if outside.any():
            worst = int(np.argmax(outside))
            raise ValueError(
                complaint(
                    f"Mask band {worst}",
                    f"rows within [0, {self.num_rows}) and columns within [0, {self.num_cols})",
                    bands[worst, :4].tolist(),
                    "Clip the band, or give the mask its true size.",
                )
            )
        bands.setflags(write=False)
        object.__setattr__(self, "bands", bands)
        # Not an inference tensor even when built in inference mode: a later training step may save it.
        with torch.inference_mode(False):
            object.__setattr__(self, "table", torch.from_numpy(bands.astype(np.int32)))

    @cached_property
    def area(self) -> int:
        """Number of visible (query, key) pairs, a pair counted once per band that covers it."""
        return sum(algebra.areas(self.bands).tolist())

    @cached_property
    def _fingerprint(self) -> str:
        return algebra.fingerprint(self.bands, self.num_rows, self.num_cols)

    def fingerprint(self) -> str:
        """128-bit hex digest of sizes and canonical bands; equal for equal masks, in every process."""
        return self._fingerprint

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self is other or self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __reduce__(self) -> tuple[type[Mask], tuple[Bands, int, int]]:
        return type(self), (self.bands, self.num_rows, self.num_cols)

    def __repr__(self) -> str:
        return show.describe(self.bands, self.num_rows, self.num_cols, self.area)

    def canonical(self) -> Mask:
        """The same mask with tight bands, none empty, sorted."""
        return Mask(algebra.canonical(self.bands), self.num_rows, self.num_cols)

    def transpose(self) -> Mask:
        """Queries and keys swapped."""
        return Mask(algebra.transpose(self.bands), self.num_cols, self.num_rows)

    def shift(self, rows: int = 0, cols: int = 0) -> Mask:
        """Moved down by ``rows`` and right by ``cols``; the rectangle grows (or shrinks) by as much.

        Raises:
            ValueError: a negative shift that moves a band out of the rectangle; ``clip`` first.
        """
        moved = algebra.shift(self.bands, rows, cols)
        return Mask(moved, self.num_rows + rows, self.num_cols + cols)

    def clip(self, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Mask:
        """Only the pairs of these half-open ranges of rows and columns; the size stays."""
        inside = algebra.clip(self.bands, rows or (0, self.num_rows), cols or (0, self.num_cols))
        return Mask(algebra.compact(inside), self.num_rows, self.num_cols)

    def localise(self, row_ranges: Ranges, col_ranges: Ranges) -> Mask:
        """The mask of some rows and columns, renumbered in the order given: ``dense[rows][:, cols]``.

        Args:
            row_ranges, col_ranges: (m, 2) half-open ranges, disjoint among themselves, in any order.

        Raises:
            ValueError: ranges that overlap or leave the mask.
        """
        rows = _selection("row_ranges", row_ranges, self.num_rows)
        cols = _selection("col_ranges", col_ranges, self.num_cols)
        sizes = [int((part[:, 1] - part[:, 0]).sum()) for part in (rows, cols)]
        return Mask(algebra.localise(self.bands, rows, cols), *sizes)

    def check(self, limit: int = 100) -> check.MaskReport:
        """Pairs covered twice, rows that see nothing, empty bands; lists at most ``limit`` overlaps."""
        return check.check(self.bands, self.num_rows, limit)

    def to_dense(self) -> NDArray[np.bool_]:
        """(num_rows, num_cols) booleans: True where a band covers the pair. Quadratic in memory."""
        return dense.to_dense(self.bands, self.num_rows, self.num_cols)

    def to_slices(self) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
        """Query ranges, key ranges and types (full, causal, inv_causal, bi_causal) that cover the same pairs.

        Always possible, with at most three slices per band: the left edge of a band stands still and then
        moves with the diagonal, the right edge moves and then stands still, and between those two rows
        nothing changes.
        """
        return slices.to_slices(self.bands)

    def show(self, width: int = 64, owners: Sequence[int] | NDArray[Any] | None = None) -> str:
        """A text picture, at most ``width`` characters wide.

        One character per pair when the mask fits, else per cell of pairs: ``.`` nothing visible, ``x`` all
        visible, ``o`` some visible, and a digit (``+`` above 9) for a pair covered more than once.

            >>> print(Mask.causal(3).show())
            x..
            xx.
            xxx

        Args:
            owners: (num_rows,) numbers from 0, such as the rank of each row: what is visible is a letter then, A to Z for
                0 to 25 and again from A, small where only some of a cell is visible. A cell has its first row's.

        Raises:
            ValueError: ``width`` below 1, ``owners`` of another length.
        """
        return show.picture(self.bands, self.num_rows, self.num_cols, width, owners)

    def figure(self, owners: Sequence[int] | NDArray[Any] | None = None, resolution: int = 256) -> Figure:
        """A matplotlib figure; needs no display.

        Args:
            owners: (num_rows,) small integers, such as the rank of each row, drawn as colours. One colour
                when None.
            resolution: largest number of cells per side.

        Raises:
            ImportError: matplotlib is not installed (``pip install magi_attention[viz]``).
            ValueError: ``owners`` of another length.
        """
        return show.figure(self.bands, self.num_rows, self.num_cols, owners, resolution)


def _selection(name: str, ranges: Ranges, size: int) -> NDArray[np.int64]:
    """``ranges`` as (m, 2) int64, checked to lie in [0, size) and to be disjoint."""
    table = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
    filled = table[table[:, 1] != table[:, 0]]
    if ((filled[:, 0] < 0) | (filled[:, 1] > size) | (filled[:, 0] > filled[:, 1])).any():
        raise ValueError(complaint(name, f"half-open ranges within [0, {size})", table.tolist()))
    ordered = filled[np.argsort(filled[:, 0])]
    if (ordered[1:, 0] < ordered[:-1, 1]).any():
        raise ValueError(complaint(name, "disjoint ranges", table.tolist()))
    return filled
