"""Lengths, boundaries and windows as users write them, checked and made uniform."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.errors import complaint
from magi_attention.mask.bands import INF

Integers = Sequence[int] | NDArray[Any] | torch.Tensor
"""A list, numpy array or CPU tensor of integers."""

Window = tuple[int | None, int | None]
"""Keys visible left and right of the (bottom-right aligned) diagonal; -1 or None is unlimited."""


def regular(name: str, values: object) -> NDArray[Any]:
    """``values`` as an array; rows of different lengths are refused in our words."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(complaint(name, "pairs (start, end)", values)) from None


def integers(name: str, values: object) -> NDArray[np.int64]:
    """``values`` as a one-dimensional int64 array."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(complaint(f"{name} shape", "one dimension", array.shape))
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(complaint(f"{name} dtype", "integers", array.dtype))
    return array.astype(np.int64)


def size(name: str, value: int) -> int:
    """``value`` as a Python integer, at least 0."""
    number = operator.index(value)
    if number < 0:
        raise ValueError(complaint(name, "at least 0", number))
    return number


def boundaries(name: str, values: object) -> NDArray[np.int64]:
    """Cumulative lengths: at least one, non-negative, never decreasing."""
    cuts = integers(name, values)
    if not len(cuts) or cuts[0] < 0 or (np.diff(cuts) < 0).any():
        wanted = "non-negative boundaries that never decrease, such as [0, 3, 7]"
        raise ValueError(complaint(name, wanted, cuts.tolist() if len(cuts) < 10 else f"{len(cuts)} values"))
    return cuts


def reach(window: Window, causal: bool) -> tuple[int | None, int | None]:
    """Left and right reach of a window, ``None`` for unlimited: also when longer than any sequence."""
    try:
        left, right = (-1 if side is None else operator.index(side) for side in window)
    except (TypeError, ValueError):
        remedy = "Give (left, right); -1 or None is unlimited."
        raise ValueError(complaint("window", "a pair of integers", window, remedy)) from None
    if left < -1 or right < -1:
        raise ValueError(complaint("window", "sides >= -1", window, "-1 or None is unlimited."))
    left_reach, right_reach = (side if 0 <= side < INF // 2 else None for side in (left, right))
    return left_reach, 0 if causal else right_reach
