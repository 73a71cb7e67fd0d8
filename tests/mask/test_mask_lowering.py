"""Bands lowered with torch operations equal those built on the host, and bad values become invisible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_brute import count

from magi_attention.mask import DeviceMask, Mask
from magi_attention.mask.bands import INF, canonical
from magi_attention.mask.lowering import lower_ranges, lower_varlen, lower_windows

dtypes = st.sampled_from([torch.int32, torch.int64])
range_pairs = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)
slice_lists = st.lists(st.tuples(range_pairs, range_pairs, st.integers(0, 3)), max_size=5)


def table(ranges, dtype):
    return torch.tensor(ranges, dtype=dtype).reshape(-1, 2)


@given(slice_lists, dtypes)
def test_lower_ranges_equals_the_host(slices, dtype):
    q, k = table([s[0] for s in slices], dtype), table([s[1] for s in slices], dtype)
    types = torch.tensor([s[2] for s in slices], dtype=dtype)
    lowered = lower_ranges(q, k, types, 9, 9)
    assert lowered.dtype == torch.int32
    assert torch.equal(lowered, Mask.from_ranges(q, k, types, 9, 9).table)
    assert torch.equal(lower_ranges(q, k, None, 9, 9), Mask.from_ranges(q, k, None, 9, 9).table)


@given(slice_lists, st.integers(0, 9), st.integers(0, 9))
def test_clipping_to_the_tensor_moves_no_diagonal(slices, num_rows, num_cols):
    q, k = table([s[0] for s in slices], torch.int32), table([s[1] for s in slices], torch.int32)
    types = torch.tensor([s[2] for s in slices], dtype=torch.int32)
    lowered = lower_ranges(q, k, types, num_rows, num_cols)
    whole = Mask.from_ranges(q, k, types, 9, 9)
    assert (count(lowered.numpy(), 9, 9) == count(whole.clip((0, num_rows), (0, num_cols)).bands, 9, 9)).all()
    Mask(lowered, num_rows, num_cols)


def test_nonsense_shows_nothing():
    q = torch.tensor([[3, 1], [0, 4], [0, 4], [0, 4], [-5, -2], [2**40, 2**41], [-(2**40), 2**40]])
    k = torch.tensor([[0, 4], [4, 2], [0, 4], [0, 4], [0, 4], [0, 4], [0, 4]])
    types = torch.tensor([0, 0, 4, -1, 0, 1, 1])
    lowered = lower_ranges(q, k, types, 4, 4)
    assert count(lowered.numpy(), 4, 4).sum() == 0
    assert Mask(lowered, 4, 4).area == 0


sides = st.none() | st.integers(-1, 9) | st.just(2**40)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4),
    st.tuples(sides, sides),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    dtypes,
)
def test_lower_varlen_equals_the_host(pairs, window, causal, keep_first, decode, dtype):
    cu_q = torch.tensor([0, *np.cumsum([q for q, _ in pairs], dtype=int)], dtype=dtype)
    cu_k = torch.tensor([0, *np.cumsum([k for _, k in pairs], dtype=int)], dtype=dtype)
    options = {"causal": causal, "window": window, "keep_first": keep_first, "force_fa_decode": decode}
    host = Mask.varlen(cu_q, cu_k, **options)
    lowered = lower_varlen(cu_q, cu_k, host.num_rows, host.num_cols, **options)
    assert lowered.dtype == torch.int32
    assert (canonical(lowered.numpy().astype(np.int64)) == host.canonical().bands).all()
    shown = lowered[(lowered[:, 0] < lowered[:, 1]) & (lowered[:, 2] < lowered[:, 3])]
    assert (shown[:, 4] < INF).all() and (shown[:, 5] > -INF).all()


def test_unused_tokens_are_invisible_and_move_the_diagonal():
    cuts, used_q, used_k = torch.tensor([0, 4, 8]), torch.tensor([2, 4]), torch.tensor([3, 0])
    lowered = lower_varlen(cuts, None, 8, 8, causal=True, seqused_q=used_q, seqused_k=used_k)
    wanted = np.zeros((8, 8), dtype=np.int64)
    wanted[0, :2], wanted[1, :3] = 1, 1
    assert (count(lowered.numpy(), 8, 8) == wanted).all()


def test_lowering_compiles_without_breaks():
    q, k = torch.tensor([[0, 3], [3, 7]]), torch.tensor([[0, 3], [0, 7]])
    types = torch.tensor([1, 0])

    def lower(q, k, types):
        return DeviceMask(lower_ranges(q, k, types, 7, 7), 7, 7).table

    compiled = torch.compile(lower, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, types), lower(q, k, types))

    def windows(cuts):
        return lower_varlen(cuts, None, 7, 7, causal=True, window=(2, 0), keep_first=1)

    cuts = torch.tensor([0, 3, 7])
    assert torch.equal(torch.compile(windows, backend="eager", fullgraph=True)(cuts), windows(cuts))


def test_lowering_never_reads_a_value():
    """Fake tensors have no values: whatever asked for one, or for a size that depends on one, would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        ranges, types = torch.zeros(5, 2, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
        assert lower_ranges(ranges, ranges, types, 7, 7).shape == (5, 6)
        cuts = torch.zeros(6, dtype=torch.int32)
        assert lower_varlen(cuts, cuts, 7, 7, window=(2, 0), keep_first=1, seqused_k=types).shape == (10, 6)
        assert lower_windows(types, types, types, types, 7, 7).shape == (5, 6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda r: lower_ranges(r[:, 0], r, None, 4, 4), ValueError, "q_ranges shape"),
        (lambda r: lower_ranges(r, r[:1], None, 4, 4), ValueError, "k_ranges shape"),
        (lambda r: lower_ranges(r.float(), r, None, 4, 4), TypeError, "q_ranges dtype"),
        (lambda r: lower_ranges(r, r, r[:1, 0], 4, 4), ValueError, "types shape"),
        (lambda r: lower_varlen(r, None, 4, 4), ValueError, "cu_seqlens_q shape"),
        (lambda r: lower_varlen(r[:0, 0], None, 4, 4), ValueError, "cu_seqlens_q length"),
        (lambda r: lower_varlen(r[:, 0], None, 4, 4, window=(-2, 0)), ValueError, "window"),
        (lambda r: DeviceMask(r, 4, 4), ValueError, "DeviceMask table shape"),
        (lambda r: DeviceMask(torch.zeros(1, 6), 4, 4), TypeError, "DeviceMask table dtype"),
    ],
)
def test_wrong_tensors_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.tensor([[0, 2], [2, 4]]))
