"""attention and Mask name every mistake: what, expected, got; and none of them reaches a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from magi_attention import DeviceMask, Mask, attention
from magi_attention.api import AttnMaskType
from magi_attention.kernels import ops


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object) -> None:
        raise AssertionError("a bad input reached the kernels")

    monkeypatch.setattr(ops, "forward", reached)


def table(num_columns: int = 6, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(2, num_columns, dtype=dtype)


VERB: dict[str, tuple[Callable, type[Exception], str]] = {
    "no_mask": (
        lambda q, k, v: attention(q, k, v, None),
        TypeError,
        "mask: expected a Mask or DeviceMask, got NoneType",
    ),
    "mask_rows": (
        lambda q, k, v: attention(q, k, v, Mask.full(7, 10)),
        ValueError,
        "mask size: expected 8 rows x 10 columns, got 7 x 10",
    ),
    "mask_columns": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 11)),
        ValueError,
        "mask size: .*got 8 x 11",
    ),
    "device_mask_size": (
        lambda q, k, v: attention(q, k, v, DeviceMask(table(), 8, 8)),
        ValueError,
        "mask size: .*got 8 x 8",
    ),
    "two_axes": (
        lambda q, k, v: attention(q[0], k, v, Mask.full(8, 10)),
        ValueError,
        r"q shape: expected \(T, H, D\) or",
    ),
    "batch_only_in_q": (
        lambda q, k, v: attention(q[None], k, v, Mask.full(8, 10)),
        ValueError,
        r"k shape: expected \(1, S, HK, 16\)",
    ),
    "dropout": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), dropout_p=1.0),
        ValueError,
        "dropout_p: expected 0 <= dropout_p < 1, got 1.0",
    ),
    "state_without_dropout": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), rng_state=torch.tensor([1, 2])),
        ValueError,
        "rng_state: expected None without dropout",
    ),
    "state": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), dropout_p=0.1, rng_state=torch.ones(2)),
        TypeError,
        "rng_state dtype: expected torch.int64",
    ),
    "slopes_shape": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), alibi_slopes=torch.ones(3)),
        ValueError,
        r"alibi_slopes shape: expected \(4\)",
    ),
    "slopes_of_bands": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), alibi_slopes=torch.ones(2, 4)),
        ValueError,
        r"alibi_slopes shape: expected \(1, 4\)",
    ),
    "slopes_gradient": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), alibi_slopes=torch.ones(4).requires_grad_()),
        NotImplementedError,
        "alibi_slopes: expected no gradient",
    ),
    "softcap": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), softcap=-2.0),
        ValueError,
        "softcap: .*got -2.0",
    ),
    "sm_margin": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), sm_margin=-2),
        ValueError,
        "sm_margin: .*got -2",
    ),
    "sink_axes": (
        lambda q, k, v: attention(q, k, v, Mask.full(8, 10), sink=torch.ones(4)),
        ValueError,
        r"sink shape: .*got \(4,\)",
    ),
}


@pytest.mark.parametrize("name", VERB)
def test_attention_names_the_mistake(name: str) -> None:
    call, error, message = VERB[name]
    with pytest.raises(error, match=message):
        call(torch.randn(8, 4, 16), torch.randn(10, 2, 16), torch.randn(10, 2, 16))


MASKS: dict[str, tuple[Callable, type[Exception], str]] = {
    "five_columns": (
        lambda: Mask([[0, 1, 0, 1, 0]], 4, 4),
        ValueError,
        r"bands shape: expected \(n, 6\).*got \(1, 5\)",
    ),
    "float_bands": (
        lambda: Mask([[0.0, 1, 0, 1, 0, 0]], 4, 4),
        TypeError,
        "bands dtype: expected integers, got float64",
    ),
    "negative_size": (lambda: Mask([], -1, 4), ValueError, "num_rows.*-1"),
    "band_outside": (lambda: Mask([[0, 5, 0, 1, 0, 0]], 4, 4), ValueError, r"\[0, 5, 0, 1\]"),
    "negative_causal": (lambda: Mask.causal(-3), ValueError, "num_rows: expected at least 0, got -3"),
    "window_side": (
        lambda: Mask.sliding_window(8, window=(-2, 0)),
        ValueError,
        r"window: expected sides >= -1, got \(-2, 0\)",
    ),
    "window_triple": (
        lambda: Mask.sliding_window(8, window=(1, 2, 3)),
        ValueError,
        "window: expected a pair of integers",
    ),
    "falling_boundaries": (
        lambda: Mask.varlen([0, 5, 3]),
        ValueError,
        r"cu_seqlens_q: .*never decrease.*got \[0, 5, 3\]",
    ),
    "float_boundaries": (
        lambda: Mask.varlen([0.0, 4.0]),
        TypeError,
        "cu_seqlens_q dtype: expected integers, got float64",
    ),
    "boundaries_of_other_length": (
        lambda: Mask.varlen([0, 4], [0, 2, 4]),
        ValueError,
        "cu_seqlens_k length: expected 2 like cu_seqlens_q, got 3",
    ),
    "late_parent": (
        lambda: Mask.prefix_tree([2, 2], [1, -1]),
        ValueError,
        r"parents\[0\]: expected -1 or the index of an earlier node, got 1",
    ),
    "block_size": (lambda: Mask.block_causal(8, 0), ValueError, "block_size: expected at least 1, got 0"),
    "device_table": (
        lambda: DeviceMask(table(dtype=torch.float32), 4, 4),
        TypeError,
        "DeviceMask table dtype: expected torch.int32, got torch.float32",
    ),
    "type_for_two": (
        lambda: Mask.from_ranges([(0, 4)], [(0, 4)], [AttnMaskType.FULL] * 2),
        ValueError,
        "attn_type_map length: expected 1",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_names_the_mistake(name: str) -> None:
    call, error, message = MASKS[name]
    with pytest.raises(error, match=message):
        call()
