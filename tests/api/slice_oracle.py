"""The definition of slices, pair by pair, and the door held against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import torch

from magi_attention.api import flex_flash_attn_func
from magi_attention.mask import INF, Mask
from magi_attention.testing import Case, assert_matches_oracle

Slices = Sequence[tuple[tuple[int, int], tuple[int, int], int]]
"""(query range, key range, type integer) each."""


def sees(i: int, j: int, sq: int, sk: int, kind: int) -> bool:
    """Whether local row i of sq sees local column j of sk, in the words of the documentation."""
    causal, inverse = j <= i + sk - sq, j >= i
    return (True, causal, inverse, causal and inverse)[kind]


def mask_by_definition(slices: Slices, num_rows: int, num_cols: int) -> Mask:
    """One band per visible pair."""
    bands = [
        (i, i + 1, j, j + 1, -INF, INF)
        for (q0, q1), (k0, k1), kind in slices
        for i in range(q0, q1)
        for j in range(k0, k1)
        if sees(i - q0, j - k0, q1 - q0, k1 - k0, kind)
    ]
    return Mask(bands, num_rows, num_cols)


def tensors(slices: Slices, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slices as int32 range and type tensors."""
    columns = zip(*slices, strict=True) if slices else ((), (), ())
    q, k, types = (torch.tensor(list(column), dtype=torch.int32, device=device) for column in columns)
    return q.reshape(-1, 2), k.reshape(-1, 2), types


def assert_door_matches(case: Case, slices: Slices, *, device: str = "cpu", **door: object) -> None:
    """``flex_flash_attn_func`` of the slices keeps the tolerance rule on the mask of ``case``."""
    ranges = tensors(slices, device)

    def through_the_door(q, k, v, _, *, backend, **settings):
        return flex_flash_attn_func(q, k, v, *ranges, backend=backend, **settings, **door)

    with mock.patch("magi_attention.testing.oracle.attention", through_the_door):
        assert_matches_oracle(case)
