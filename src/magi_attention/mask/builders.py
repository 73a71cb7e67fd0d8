"""The families of masks that have a name, each a few vectorised lines of band arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.errors import complaint
from magi_attention.mask.bands import INF, Bands

if TYPE_CHECKING:
    from magi_attention.mask.mask import Mask

Integers = Sequence[int] | NDArray[Any] | torch.Tensor
"""A list, numpy array or CPU tensor of integers."""

Window = tuple[int | None, int | None]
"""Keys visible to the left and to the right of the (bottom-right aligned) diagonal; -1 or None is unlimited."""


def integers(name: str, values: object) -> NDArray[np.int64]:
    """``values`` as a one-dimensional int64 array."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(complaint(f"{name} shape", "one dimension", array.shape))
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(complaint(f"{name} dtype", "integers", array.dtype))
    return array.astype(np.int64)


def _boundaries(name: str, values: object) -> NDArray[np.int64]:
    """Cumulative lengths: non-negative, non-decreasing, at least one."""
    cuts = integers(name, values)
    if not len(cuts) or cuts[0] < 0 or (np.diff(cuts) < 0).any():
        wanted = "a non-decreasing list of non-negative boundaries such as [0, 3, 7]"
        raise ValueError(complaint(name, wanted, cuts.tolist() if len(cuts) < 10 else f"{len(cuts)} values"))
    return cuts


def _reach(window: Window, causal: bool) -> tuple[int | None, int | None]:
    """Left and right reach with ``None`` for unlimited."""
    try:
        left, right = (-1 if side is None else operator.index(side) for side in window)
    except (TypeError, ValueError):
        remedy = "Give (left, right) as integers; -1 or None is unlimited."
        raise ValueError(complaint("window", "a pair of integers", window, remedy)) from None
    if left < -1 or right < -1:
        raise ValueError(complaint("window", "sides >= -1", window, "-1 or None means unlimited."))
    return (None if left == -1 else left), (0 if causal else None if right == -1 else right)


def _windowed(
    corners: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    window: tuple[int | None, int | None],
    keep_first: int,
    force_fa_decode: bool,
) -> Bands:
    """One band per rectangle ``(q0, q1, k0, k1)`` aligned at its bottom-right corner, and one for its first keys.

    The second band holds what the left window hides of the first ``keep_first`` keys; the two are disjoint.
    """
    q0, q1, k0, k1 = corners
    left, right = window
    diagonal = k1 - q1
    hi = diagonal + right if right is not None else np.full_like(q0, INF)
    lo = diagonal - left if left is not None else np.full_like(q0, -INF)
    if force_fa_decode:
        lo = np.where(q1 - q0 == 1, -INF, lo)
    table = np.stack([q0, q1, k0, k1, lo, hi], axis=1)
    if keep_first > 0 and left is not None:
        first = np.stack([q0, q1, k0, np.minimum(k0 + keep_first, k1), np.full_like(q0, -INF), lo - 1], axis=1)
        table = np.concatenate([table, first[lo > -INF]])
    return table[(table[:, 0] < table[:, 1]) & (table[:, 2] < table[:, 3])]


class MaskBuilders:
    """Constructors of ``Mask`` by name."""

    @classmethod
    def full(cls, num_rows: int, num_cols: int | None = None) -> Mask:
        """Every query sees every key."""
        return cls.sliding_window(num_rows, num_cols)

    @classmethod
    def causal(cls, num_rows: int, num_cols: int | None = None) -> Mask:
        """The last query sees every key, the query above it one key less, and so on."""
        return cls.sliding_window(num_rows, num_cols, causal=True)

    @classmethod
    def sliding_window(
        cls,
        num_rows: int,
        num_cols: int | None = None,
        window: Window = (-1, -1),
        causal: bool = False,
        keep_first: int = 0,
    ) -> Mask:
        """A window around the diagonal that ends in the bottom-right corner."""
        cols = num_rows if num_cols is None else num_cols
        return cls.varlen([0, num_rows], [0, cols], causal, window, keep_first)

    @classmethod
    def varlen(
        cls,
        cu_seqlens_q: Integers,
        cu_seqlens_k: Integers | None = None,
        causal: bool = False,
        window: Window = (-1, -1),
        keep_first: int = 0,
        force_fa_decode: bool = False,
    ) -> Mask:
        """Packed sequences: queries see keys of their own sequence only."""
        cuts_q = _boundaries("cu_seqlens_q", cu_seqlens_q)
        cuts_k = cuts_q if cu_seqlens_k is None else _boundaries("cu_seqlens_k", cu_seqlens_k)
        if len(cuts_q) != len(cuts_k):
            raise ValueError(complaint("cu_seqlens_k length", str(len(cuts_q)), len(cuts_k)))
        corners = (cuts_q[:-1], cuts_q[1:], cuts_k[:-1], cuts_k[1:])
        table = _windowed(corners, _reach(window, causal), keep_first, force_fa_decode)
        return cast("type[Mask]", cls)(table, int(cuts_q[-1]), int(cuts_k[-1]))
