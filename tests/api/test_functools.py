"""The documented helpers: golden values, and masks as slices against the pairs they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.api import functools as f
from magi_attention.common import AttnMaskType, AttnRange, AttnRanges
from magi_attention.mask import Mask

NAMES = {"causal": "causal", "bi": "bi_causal", "inv": "inv_causal", "full": "full"}


def listed(found) -> list[tuple[tuple[int, int], tuple[int, int], str]]:
    queries, keys, types = found[:3]
    short = {long: name for name, long in NAMES.items()}
    return [
        ((q.start, q.end), (k.start, k.end), short[kind.value])
        for q, k, kind in zip(queries, keys, types, strict=True)
    ]


def counts(found, num_rows: int, num_cols: int) -> np.ndarray:
    seen = np.zeros((num_rows, num_cols), dtype=int)
    for band in Mask.from_ranges(*found[:3], num_rows, num_cols).bands:
        seen += Mask(band[None], num_rows, num_cols).to_dense()
    return seen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1024, 6, 208), 224),
        ((10244, 8, 451), 580),
        ((3840, 10, 128), 0),
        ((42817, 12, 892), 10703),
        ((13000, 17, 369), 5819),
        ((1789, 2, 900), 11),
    ],
)
def test_compute_pad_size(arguments, expected):
    assert f.compute_pad_size(*arguments) == expected


ALL = (0, 10)
WINDOWS = [
    (
        (5, 15),
        (5, 15),
        (2, 3),
        [((5, 7), (5, 10), "causal"), ((7, 12), (5, 15), "bi"), ((12, 15), (10, 15), "inv")],
    ),
    ((5, 15), (5, 15), (-1, 0), [((5, 15), (5, 15), "causal")]),
    ((5, 15), (5, 15), (0, 0), [((5, 15), (5, 15), "bi")]),
    ((5, 15), (5, 15), (100, 100), [((5, 15), (5, 15), "full")]),
    ((5, 15), (5, 15), (2, 0), [((5, 7), (5, 7), "causal"), ((7, 15), (5, 15), "bi")]),
    ((5, 15), (5, 15), (3, -1), [((5, 8), (5, 15), "full"), ((8, 15), (5, 15), "inv")]),
    (ALL, ALL, (9, 0), [(ALL, ALL, "causal")]),
    (ALL, ALL, (0, 9), [(ALL, ALL, "inv")]),
    (ALL, ALL, (8, 8), [((0, 2), ALL, "causal"), ((2, 8), ALL, "full"), ((8, 10), ALL, "inv")]),
    ((0, 4), ALL, (2, 1), [((0, 3), (4, 10), "bi"), ((3, 4), (7, 10), "inv")]),
    ((0, 4), ALL, (-1, -1), [((0, 4), ALL, "full")]),
    ((0, 4), ALL, (-1, 0), [((0, 4), ALL, "causal")]),
    ((0, 4), ALL, (0, 0), [((0, 4), (6, 10), "bi")]),
    ((0, 4), ALL, (0, -1), [((0, 4), (6, 10), "inv")]),
    (ALL, (0, 4), (1, 1), [((6, 7), (0, 2), "causal"), ((7, 9), (0, 4), "bi"), ((9, 10), (2, 4), "inv")]),
    (ALL, (0, 4), (-1, 0), [((6, 10), (0, 4), "causal")]),
    (ALL, (0, 4), (1, -1), [((6, 7), (0, 4), "full"), ((7, 10), (0, 4), "inv")]),
    ((3, 3), ALL, (1, 1), []),
    (ALL, (4, 4), (1, 1), []),
]


@pytest.mark.parametrize(("q", "k", "window", "expected"), WINDOWS)
def test_documented_windows(q, k, window, expected):
    found = f.infer_attn_mask_from_sliding_window(AttnRange(*q), AttnRange(*k), window)
    assert listed(found) == expected


def test_documented_windows_of_packed_sequences():
    cuts = torch.tensor([0, 4, 10], dtype=torch.int32)
    found = f.infer_attn_mask_from_cu_seqlens(cuts, cuts, window_size=(2, 0))
    assert [kind for *_, kind in listed(found)] == ["causal", "bi", "causal", "bi"] and found[3:] == (10, 10)
    assert [q for q, *_ in listed(found)] == [(0, 2), (2, 4), (4, 6), (6, 10)]
    assert [k for _, k, _ in listed(found)] == [(0, 2), (0, 4), (4, 6), (4, 10)]
    found = listed(f.infer_attn_mask_from_cu_seqlens(cuts, cuts, window_size=(2, 0), global_window_size=2))
    assert [q for q, *_ in found] == [(0, 1), (1, 4), (2, 4), (4, 5), (5, 10), (6, 8), (8, 10)]
    assert [k for _, k, _ in found] == [(0, 1), (0, 2), (2, 4), (4, 5), (4, 6), (6, 8), (6, 10)]
    assert [kind for *_, kind in found] == ["causal", "full", "causal", "causal", "full", "causal", "bi"]


sides = st.integers(-1, 12)


@given(st.integers(0, 9), st.integers(0, 9), sides, sides)
def test_a_window_is_its_slices(rows, cols, left, right):
    found = f.infer_attn_mask_from_sliding_window(AttnRange(0, rows), AttnRange(0, cols), (left, right))
    i, j = np.arange(rows)[:, None] + cols - rows, np.arange(cols)[None]
    seen = np.ones((rows, cols), dtype=bool)
    if 0 <= left < cols - 1:
        seen &= j >= i - left
    if 0 <= right < cols - 1:
        seen &= j <= i + right
    seen &= i >= 0  # rows before the first key are left out
    assert np.array_equal(counts(found, rows, cols), seen) and len(found[2]) <= 3


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=3),
    sides,
    sides,
    st.integers(0, 6),
)
def test_packed_windows_with_first_keys_are_their_slices(sizes, left, right, first):
    cuts = [torch.tensor([0, *np.cumsum([size[n] for size in sizes])]) for n in (0, 1)]
    found = f.infer_attn_mask_from_cu_seqlens(*cuts, window_size=(left, right), global_window_size=first)
    seen = np.zeros((int(cuts[0][-1]), int(cuts[1][-1])), dtype=int)
    for n, (rows, cols) in enumerate(sizes):
        i, j = np.arange(rows)[:, None] + cols - rows, np.arange(cols)[None]
        limited = 0 <= left < cols - 1
        inside = (j >= i - left) | (j < first) if limited else np.ones((rows, cols), dtype=bool)
        if right >= 0 and (left, right) != (-1, -1):
            inside &= (j <= i + right) | (right >= cols - 1 and not (limited and first))
        if (left, right) != (-1, -1) and not (limited and first):
            inside &= i >= 0
        seen[int(cuts[0][n]) : int(cuts[0][n + 1]), int(cuts[1][n]) : int(cuts[1][n + 1])] += inside
    assert np.array_equal(counts(found, *seen.shape), seen)


def test_padding():
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    assert f.pad_at_dim(x, 0, 2, value=7.0).tolist() == [*x.tolist(), [7] * 3, [7] * 3]
    assert f.pad_at_dim(x, -1, 1, side="left").tolist() == [[0, *row] for row in x.tolist()]
    for dim in (0, 1, -1):
        assert torch.equal(f.unpad_at_dim(f.pad_at_dim(x, dim, 2), dim, 2), x)
    f.unpad_at_dim(x, 1, 1).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0]] * 2
    assert f.squash_batch_dim(torch.zeros(2, 3, 4)).shape == (6, 4)
    queries, keys = AttnRanges.from_ranges([(0, 5)]), AttnRanges.from_ranges([(0, 5)])
    padded = f.apply_padding(queries, keys, [AttnMaskType.CAUSAL], 5, 3)
    assert listed(padded) == [((0, 5), (0, 5), "causal"), ((5, 8), (0, 0), "full")] and len(queries) == 1


def test_batches_as_packed_sequences():
    cuts_q, cuts_k = f.infer_varlen_mask_from_batch(3, 5)
    assert cuts_q.tolist() == cuts_k.tolist() == [0, 5, 10, 15] and cuts_q.dtype == torch.int32
    assert cuts_q is not cuts_k


X, CUTS = torch.zeros(2, 3), torch.tensor([0, 4])
BAD = {
    "chunk": (lambda: f.compute_pad_size(8, 2, 0), ValueError, "chunk_size: expected at least 1"),
    "dim": (lambda: f.pad_at_dim(X, 2, 1), ValueError, "dim: expected an axis"),
    "side": (lambda: f.pad_at_dim(X, 0, 1, side="top"), ValueError, "side: expected"),
    "unpad": (lambda: f.unpad_at_dim(X, 0, 3), ValueError, "pad_size: expected at most 2, got 3"),
    "squash": (lambda: f.squash_batch_dim(X[0]), ValueError, "x shape: expected"),
    "window": (lambda: f.infer_attn_mask_from_sliding_window(AttnRange(0, 4), AttnRange(0, 4), 3), TypeError, "a pair"),
    "minus": (
        lambda: f.infer_attn_mask_from_cu_seqlens(CUTS, CUTS, window_size=(-2, 0)),
        ValueError,
        "window_size: expected at least -1",
    ),
    "both": (
        lambda: f.infer_attn_mask_from_cu_seqlens(CUTS, CUTS, True, (2, 0)),
        ValueError,
        "with causal, got",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
