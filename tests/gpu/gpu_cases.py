"""Masks for the GPU: odd lengths around a thousand, every family, given by the host or on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from magi_attention.kernels.select import modifiers_of, refusal, request_of
from magi_attention.mask import INF, DeviceMask, Mask
from magi_attention.testing import Case, assert_matches_oracle, random_case

DEVICE = "cuda"
CUTS = [0, 1, 8, 129, 130, 513, 1111]
MASKS = {
    "full": Mask.full(701, 1023),
    "causal": Mask.causal(1111),
    "causal, few queries": Mask.causal(33, 1999),
    "causal, few keys": Mask.causal(1111, 300),
    "window": Mask.sliding_window(1501, window=(200, 31)),
    "documents": Mask.varlen(CUTS, causal=True),
    "window with first keys": Mask.varlen(CUTS, window=(100, 0), keep_first=5),
    "prefix tree": Mask.prefix_tree([400, 211, 300, 111], [-1, 0, 0, 1]),
    "chunks": Mask.chunked(1111, 256),
    "covered twice": Mask([[0, 999, 0, 999, -INF, 0]] * 2 + [[300, 900, 100, 500, -400, 5]], 999, 999),
    "rows and keys in no band": Mask(
        [[70, 511, 400, 777, -INF, INF], [600, 900, 5, 333, -800, -300]], 1111, 999
    ),
    "many bands": Mask.varlen(np.arange(0, 1000, 9), causal=True),
    "one pair": Mask.full(1),
    "nothing": Mask([[4, 4, 0, 9, -INF, INF]], 9, 9),
}


def on_device(mask: Mask) -> DeviceMask:
    """The same bands, unknown to the host."""
    return DeviceMask(mask.table.to(DEVICE), mask.num_rows, mask.num_cols)


def case_of(mask: Mask | DeviceMask, **settings) -> Case:
    """Random inputs on the GPU: bf16, 4 query heads, 2 key heads, head dimension 128 unless told otherwise."""
    return random_case(
        mask, **{"device": DEVICE, "dtype": torch.bfloat16, "heads": (4, 2), "head_dim": 128, **settings}
    )


def check(case: Case, backend: str, **settings) -> None:
    """``assert_matches_oracle``, where the backend takes the case."""
    modifiers = modifiers_of(case.dropout_p > 0, case.alibi_slopes is not None)
    reason = refusal(backend, request_of(case.q, case.v, modifiers))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    assert_matches_oracle(case, backend=backend, **settings)
