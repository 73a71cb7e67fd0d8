"""flex_flash_attn_func against the definition: types, shapes, overlaps, sinks, gradients, laws."""

from __future__ import annotations

import pytest
import torch
from slice_oracle import Slices, assert_door_matches, mask_by_definition, tensors

from magi_attention.api import flex_flash_attn_func
from magi_attention.testing import random_case

FULL, CAUSAL, INVERSE, BOTH = range(4)
TYPES = pytest.mark.parametrize("kind", range(4), ids=("full", "causal", "inv_causal", "bi_causal"))

SLICES: dict[str, tuple[Slices, int, int]] = {
    "overlapping_rows": (
        [((0, 20), (0, 9), FULL), ((7, 29), (9, 31), CAUSAL), ((3, 11), (20, 31), BOTH)],
        29,
        31,
    ),
    "empty_ranges": (
        [((5, 5), (0, 9), FULL), ((0, 20), (4, 4), CAUSAL), ((2, 18), (3, 21), INVERSE)],
        20,
        23,
    ),
    "uncovered_rows": ([((4, 9), (0, 12), FULL), ((15, 20), (3, 9), CAUSAL)], 33, 14),
    "no_slices": ([], 7, 5),
    "one_token": ([((0, 1), (0, 1), CAUSAL)], 1, 1),
    "one_row_of_keys": ([((0, 1), (0, 17), BOTH)], 1, 17),
    "one_key": ([((0, 17), (0, 1), CAUSAL)], 17, 1),
    "unsorted": (
        [((20, 30), (0, 30), CAUSAL), ((0, 10), (0, 10), INVERSE), ((10, 20), (5, 20), BOTH)],
        30,
        30,
    ),
    "covered_twice": (
        [((0, 16), (0, 16), CAUSAL), ((0, 16), (0, 16), CAUSAL), ((8, 12), (2, 20), FULL)],
        16,
        20,
    ),
    "meeting_diagonals": ([((0, 16), (0, 16), CAUSAL), ((0, 15), (1, 16), INVERSE)], 16, 16),
}


@TYPES
@pytest.mark.parametrize(("sq", "sk"), [(13, 29), (21, 21), (29, 13), (5, 2), (2, 5)])
def test_each_type_for_each_shape(kind: int, sq: int, sk: int) -> None:
    slices = [((3, 3 + sq), (2, 2 + sk), kind)]
    case = random_case(mask_by_definition(slices, sq + 5, sk + 4), heads=(2, 1))
    assert_door_matches(case, slices)


@pytest.mark.parametrize("name", SLICES)
def test_each_combination_of_slices(name: str) -> None:
    slices, num_rows, num_cols = SLICES[name]
    assert_door_matches(random_case(mask_by_definition(slices, num_rows, num_cols), heads=(4, 2)), slices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_each_dtype(dtype: torch.dtype) -> None:
    slices, num_rows, num_cols = SLICES["overlapping_rows"]
    case = random_case(
        mask_by_definition(slices, num_rows, num_cols), heads=(4, 2), dtype=dtype, head_dim=(24, 8)
    )
    assert_door_matches(case, slices)


@pytest.mark.parametrize("heads", [(1, 1), (6, 3), (6, 1)], ids=("single", "grouped", "multi_query"))
def test_query_heads_share_key_heads(heads: tuple[int, int]) -> None:
    slices, num_rows, num_cols = SLICES["unsorted"]
    assert_door_matches(random_case(mask_by_definition(slices, num_rows, num_cols), heads=heads), slices)


@pytest.mark.parametrize("num_sinks", [0, 1, 4, 11])
@pytest.mark.parametrize("layout", ["sh", "ssh"])
def test_sinks(layout: str, num_sinks: int) -> None:
    slices, num_rows, num_cols = SLICES["uncovered_rows"]
    shape = (num_sinks, 4) if layout == "sh" else (num_rows, num_sinks, 4)
    sink = torch.randn(shape) * 3
    case = random_case(mask_by_definition(slices, num_rows, num_cols), heads=(4, 2), sink=sink)
    assert_door_matches(case, slices, sink_layout=layout)


def test_large_sinks_do_not_overflow() -> None:
    slices: Slices = [((0, 9), (0, 9), CAUSAL)]
    case = random_case(mask_by_definition(slices, 9, 9), sink=torch.tensor([[200.0, -200.0], [199.0, 3.0]]))
    assert_door_matches(case, slices)


@pytest.mark.parametrize("softcap", [0.5, 15])
@pytest.mark.parametrize("scale", [None, 1.5, -0.25, 0])
def test_softcap_and_scale(softcap: float, scale: float | None) -> None:
    slices, num_rows, num_cols = SLICES["overlapping_rows"]
    case = random_case(
        mask_by_definition(slices, num_rows, num_cols),
        softcap=softcap,
        softmax_scale=scale,
        sink=torch.ones(1, 2),
    )
    assert_door_matches(case, slices)


def test_max_logits_only_on_request_and_minus_infinity_for_nothing_seen() -> None:
    q = torch.randn(6, 2, 8)
    ranges = tensors([((2, 2), (0, 6), FULL)])
    assert flex_flash_attn_func(q, q, q, *ranges)[1].max_logits is None
    meta = flex_flash_attn_func(q, q, q, *ranges, return_max_logits=True)[1]
    assert torch.equal(meta.max_logits, torch.full((2,), -torch.inf))
    assert torch.equal(meta.lse, torch.full((6, 2), -torch.inf))


def test_strided_inputs() -> None:
    slices, num_rows, _ = SLICES["unsorted"]
    case = random_case(mask_by_definition(slices, num_rows, num_rows), heads=(4, 4))
    packed = torch.stack([case.q, case.k, case.v], dim=1)
    q, k, v = packed.unbind(1)
    column_major = case.q.transpose(0, 2).contiguous().transpose(0, 2)
    want = flex_flash_attn_func(case.q, case.k, case.v, *tensors(slices))
    for query in (q, column_major):
        out, meta = flex_flash_attn_func(query, k, v, *tensors(slices))
        assert not query.is_contiguous()
        torch.testing.assert_close(out, want[0])
        torch.testing.assert_close(meta.lse, want[1].lse)


def test_keys_that_nobody_sees_may_hold_nan() -> None:
    slices: Slices = [((0, 12), (4, 16), CAUSAL)]
    case = random_case(mask_by_definition(slices, 14, 20))
    for x in (case.k, case.v):
        x[:4], x[16:] = torch.nan, torch.nan
    assert_door_matches(case, slices)


def run(slices: Slices) -> list[torch.Tensor]:
    """out, lse and gradients of fixed inputs."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(30, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, meta = flex_flash_attn_func(q, k, v, *tensors(slices))
    assert meta.lse is not None
    ((out * out.detach().cos()).sum() + (meta.lse.detach().sin() * meta.lse).sum()).backward()
    return [out.detach(), meta.lse.detach(), q.grad, k.grad, v.grad]


def assert_same(slices: Slices, others: Slices) -> None:
    for ours, theirs in zip(run(slices), run(others), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_order_of_slices_does_not_matter() -> None:
    slices = [((0, 30), (0, 8), FULL), ((5, 25), (8, 28), CAUSAL), ((0, 12), (10, 30), INVERSE)]
    assert_same(slices, [slices[2], slices[0], slices[1]])


@pytest.mark.parametrize(
    "parts",
    [
        [((0, 11), (0, 11), CAUSAL), ((11, 30), (0, 30), CAUSAL)],
        [((0, 30), (0, 30), CAUSAL), ((4, 4), (0, 30), FULL)],
        [((0, 11), (0, 11), CAUSAL), ((11, 30), (0, 11), FULL), ((11, 30), (11, 30), CAUSAL)],
    ],
    ids=("rows", "an_empty_piece", "rows_and_columns"),
)
def test_splitting_a_slice_changes_nothing(parts: Slices) -> None:
    assert_same([((0, 30), (0, 30), CAUSAL)], parts)


def test_a_slice_given_twice_counts_twice() -> None:
    once = [((0, 30), (0, 20), FULL), ((0, 30), (20, 30), FULL)]
    twice = [*once, once[1]]
    out, lse, *_ = run(twice)
    torch.manual_seed(1)
    q, k, v = (torch.randn(30, 2, 8, dtype=torch.float64) for _ in range(3))
    doubled = torch.cat([torch.arange(30), torch.arange(20, 30)])
    logits = torch.einsum("thd,shd->hts", q, k[doubled]) * 8**-0.5
    torch.testing.assert_close(lse, logits.logsumexp(2).T)
    torch.testing.assert_close(out, torch.einsum("hts,shd->thd", logits.softmax(2), v[doubled]))
