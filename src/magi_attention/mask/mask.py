"""``Mask``: which query row sees which key column, as an immutable value."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from magi_attention.errors import complaint
from magi_attention.mask import bands as algebra
from magi_attention.mask.bands import INF, Bands, as_bands
from magi_attention.mask.builders import MaskBuilders


@dataclass(frozen=True, eq=False)
class Mask(MaskBuilders):
    """A union of bands over ``num_rows`` queries and ``num_cols`` keys.

    Args:
        bands: anything numpy can read as an (n, 6) integer table of ``(q0, q1, k0, k1, lo, hi)``;
            row i sees column j through a band iff ``q0 <= i < q1``, ``k0 <= j < k1`` and ``lo <= j - i <= hi``.
        num_rows: number of query tokens.
        num_cols: number of key tokens.

    A pair that two bands cover counts twice in the softmax (the union is a multiset union); ``check()`` reports it.
    Equality and hash go by the canonical band list and the two sizes.

    Raises:
        ValueError: sizes negative or too large, or a band that reaches outside the rectangle.
    """

    bands: Bands
    num_rows: int
    num_cols: int
    table: torch.Tensor = field(init=False, repr=False)
    """The bands as an int32 CPU tensor (n, 6): what the kernels read."""

    def __post_init__(self) -> None:
        bands = as_bands(self.bands)
        for name, size in (("num_rows", self.num_rows), ("num_cols", self.num_cols)):
            if not 0 <= size < INF // 2:
                raise ValueError(complaint(f"Mask {name}", f"0 <= size < {INF // 2}", size))
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
        object.__setattr__(self, "table", torch.from_numpy(bands.astype(np.int32)))
