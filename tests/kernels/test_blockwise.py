"""The blockwise CPU backend keeps the tolerance rule on every mask and every option."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import MASKS

from magi_attention.attention import attention
from magi_attention.mask import Mask
from magi_attention.mask.bands import K0, Q0, split
from magi_attention.testing import Case, assert_matches_oracle, random_case
from magi_attention.testing.strategies import families, masks
from magi_attention.testing.variants import head_major_views, packed_views, poisoned, spaced_views

HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
WHOLE = MASKS["causal"]


def check(case: Case) -> None:
    assert_matches_oracle(case, backend="blockwise")


@given(masks(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([(1, 1), (4, 2)]))
def test_random_masks(mask, dtype, heads):
    check(poisoned(random_case(mask, heads=heads, head_dim=8, dtype=dtype)))


@given(masks(min_size=0, max_size=25), st.sampled_from([None, 1, 3]), st.booleans())
def test_random_masks_with_sinks(mask, num_sinks, per_row):
    shape = () if num_sinks is None else ((mask.num_rows,) if per_row else ()) + (num_sinks, 2)
    sink = None if num_sinks is None else 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    check(random_case(mask, heads=(2, 1), head_dim=8, sink=sink, softcap=2.0))


@given(families(), st.sampled_from([0.0, 1.5]))
def test_named_families(mask, softcap):
    check(random_case(mask, heads=(2, 1), head_dim=(8, 16), dtype=torch.float64, softcap=softcap))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [*HALF_AND_SINGLE, torch.float64], ids=str)
def test_every_mask_in_every_dtype(name, dtype):
    check(poisoned(random_case(MASKS[name], heads=(4, 2), head_dim=32, dtype=dtype)))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (4, 1), (6, 3), (9, 3)])
def test_query_heads_share_key_heads(heads):
    check(random_case(MASKS["documents"], heads=heads, head_dim=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 96, 128, 256, 1, 7, (64, 32), (24, 128), (1, 3)])
def test_head_dimensions(head_dim, dtype):
    check(random_case(WHOLE, heads=(2, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(softcap, dtype):
    check(random_case(WHOLE, head_dim=16, dtype=dtype, softcap=softcap, softmax_scale=1.0))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.5, -0.3, 2.0])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_softmax_scale_of_either_sign(scale, softcap, dtype):
    check(random_case(WHOLE, head_dim=16, dtype=dtype, softmax_scale=scale, softcap=softcap))


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 100.0, -100.0])
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (9, 4), (131, 1, 4), (131, 3, 4), (131, 9, 4)], ids=str)
def test_sinks(shape, magnitude):
    sink = torch.randn(shape) + magnitude
    check(random_case(WHOLE, heads=(4, 2), head_dim=16, sink=sink))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_sinks_beside_other_dtypes(dtype):
    check(random_case(WHOLE, heads=(4, 2), head_dim=16, dtype=dtype, sink=torch.randn(3, 4)))
    check(random_case(WHOLE, heads=(4, 2), head_dim=16, dtype=dtype, sink=torch.randn(3, 4).to(dtype)))


def test_sinks_of_mixed_magnitude_and_absent_ones():
    sink = torch.tensor([[100.0, -100.0, 0.0, -torch.inf], [-torch.inf, 100.0, -1.0, -torch.inf]])
    check(random_case(WHOLE, heads=(4, 2), head_dim=16, sink=sink))
    check(random_case(MASKS["rows and keys in no band"], heads=(4, 2), head_dim=16, sink=sink))


def test_sinks_that_are_all_absent_change_nothing():
    case = random_case(MASKS["rows and keys in no band"])
    out, meta = attention(case.q, case.k, case.v, case.mask)
    silent = torch.full((2, 2), -torch.inf)
    with_sink, with_meta = attention(case.q, case.k, case.v, case.mask, sink=silent)
    assert torch.equal(out, with_sink)
    assert torch.equal(meta.lse, with_meta.lse)


def test_a_row_that_sees_only_sinks_has_their_logsumexp():
    sink = torch.randn(3, 2)
    case = poisoned(random_case(MASKS["nothing"], sink=sink))
    out, meta = attention(case.q, case.k, case.v, case.mask, sink=sink)
    assert (out == 0).all()
    torch.testing.assert_close(meta.lse, sink.logsumexp(0).expand(9, 2))
    check(case)


def test_sinks_per_batch_element():
    sink = torch.randn(2, 131, 3, 2)
    check(random_case(WHOLE, batch=2, sink=sink))


def test_rows_that_see_nothing_have_lse_minus_infinity_and_no_gradient():
    case = poisoned(random_case(MASKS["nothing"]))
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    out, meta = attention(*leaves, case.mask, return_max_logits=True)
    grads = torch.autograd.grad([out, meta.lse], leaves, [case.dout, case.dlse])
    assert (out == 0).all() and (meta.lse == -torch.inf).all() and (meta.max_logits == -torch.inf).all()
    assert all((grad == 0).all() for grad in grads)


def test_max_logits_come_only_when_asked_for():
    case = random_case(WHOLE)
    assert attention(case.q, case.k, case.v, WHOLE)[1].max_logits is None
    assert attention(case.q, case.k, case.v, WHOLE, return_max_logits=True)[1].max_logits.shape == (2,)


@pytest.mark.parametrize("name", ["documents", "rows and keys in no band"])
@pytest.mark.parametrize("only", ["dout", "dlse"])
def test_gradients_of_one_output_only(name, only):
    other = "dlse" if only == "dout" else "dout"
    check(poisoned(replace(random_case(MASKS[name], sink=torch.randn(2, 2)), **{other: None})))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("view", [head_major_views, packed_views, spaced_views])
def test_any_strides(view, dtype):
    check(view(random_case(WHOLE, heads=(4, 2), head_dim=16, dtype=dtype)))
    check(view(random_case(WHOLE, heads=(4, 2), head_dim=16, dtype=dtype, batch=2)))


@pytest.mark.parametrize("name", ["documents", "rows and keys in no band", "nothing"])
def test_batch_axis(name):
    check(poisoned(random_case(MASKS[name], heads=(4, 2), batch=3)))


def test_a_batch_is_its_elements():
    case = random_case(WHOLE, batch=3, dtype=torch.float64)
    out, meta = attention(case.q, case.k, case.v, WHOLE, return_max_logits=True)
    parts = [attention(case.q[b], case.k[b], case.v[b], WHOLE, return_max_logits=True) for b in range(3)]
    assert torch.equal(out, torch.stack([part[0] for part in parts]))
    assert torch.equal(meta.lse, torch.stack([part[1].lse for part in parts]))
    assert torch.equal(meta.max_logits, torch.stack([part[1].max_logits for part in parts]).amax(0))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("batch", [None, 2])
def test_lengths_zero_and_one(sizes, batch):
    check(random_case(Mask.causal(*sizes), batch=batch))
    check(random_case(Mask.full(*sizes), batch=batch, sink=torch.randn(2, 2)))


def test_a_batch_without_elements():
    case = random_case(WHOLE, heads=(4, 2), head_dim=(16, 8), batch=0)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    out, meta = attention(*leaves, WHOLE, return_max_logits=True, backend="blockwise")
    assert out.shape == (0, 131, 4, 8) and meta.lse.shape == (0, 131, 4)
    assert (meta.max_logits == -torch.inf).all()
    grads = torch.autograd.grad(out, leaves, case.dout)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


def test_tall_scores_do_not_overflow():
    case = random_case(WHOLE, dtype=torch.float32, softmax_scale=1.0)
    check(replace(case, q=case.q * 30, k=case.k * 30))


@given(masks(max_size=30), st.sampled_from([Q0, K0]), st.data())
def test_cutting_bands_changes_nothing_but_rounding(mask, axis, data):
    size = mask.num_rows if axis == Q0 else mask.num_cols
    at = data.draw(st.integers(0, size))
    pieces, _, _ = split(mask.bands, Mask.varlen([0, at, size]).bands[:, :2], axis)
    cut = Mask(pieces, mask.num_rows, mask.num_cols)
    results = []
    for each in (mask, cut):
        case = random_case(each, heads=(2, 1), head_dim=8, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        out, meta = attention(*leaves, each, backend="blockwise")
        grads = torch.autograd.grad([out, meta.lse], leaves, [case.dout, case.dlse])
        results.append([out, meta.lse, *grads])
    for whole, pieced in zip(*results, strict=True):
        torch.testing.assert_close(whole, pieced, rtol=1e-12, atol=1e-12)
