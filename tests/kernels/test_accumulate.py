"""Results of parts of the columns, merged in place, are the result over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import MASKS

from magi_attention import Mask, accumulate
from magi_attention.testing import compare_parts, random_case
from magi_attention.testing.strategies import masks
from magi_attention.testing.variants import poisoned

BACKENDS = ["blockwise", "dense"]


@given(masks(), st.data(), st.booleans())
def test_any_cuts_of_any_mask(mask, data, with_sink):
    cuts = sorted(data.draw(st.lists(st.integers(0, mask.num_cols), max_size=3)))
    sink = 3 * torch.randn(2, 2, generator=torch.Generator().manual_seed(1)) if with_sink else None
    case = poisoned(random_case(mask, heads=(2, 1), head_dim=8, sink=sink))
    result = compare_parts(case, cuts, backend="blockwise")
    assert result.ok, result


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_mask_in_two_parts(name, backend, dtype):
    case = poisoned(random_case(MASKS[name], heads=(4, 2), head_dim=32, dtype=dtype, softcap=2.0))
    result = compare_parts(case, [case.mask.num_cols // 3], backend=backend)
    assert result.ok, result


def test_a_batch_and_no_columns():
    result = compare_parts(random_case(MASKS["causal"], batch=2), [0, 50, 50])
    assert result.ok, result


def test_half_precision_results_are_summed_in_fp32():
    case = random_case(Mask.full(40, 4096), dtype=torch.bfloat16)
    whole, parts = (compare_parts(case, cuts).figures[0] for cuts in ([], list(range(64, 4096, 64))))
    assert whole.error[0] < 1e-5 and parts.error[0] < 1e-5


def call(**changed):
    case = random_case(Mask.causal(8))
    arguments = {"out": torch.zeros(8, 2, 16), "lse": torch.full((8, 2), -torch.inf)}
    arguments |= {"q": case.q, "k": case.k, "v": case.v, "mask": case.mask} | changed
    return accumulate(**arguments)


def test_max_logits_come_only_when_asked_for():
    assert call() is None and call(return_max_logits=True).shape == (2,)


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"out": torch.zeros(8, 2, 15)}, ValueError, "out"),
        ({"out": torch.zeros(8, 2, 16, dtype=torch.bfloat16)}, (TypeError, ValueError), "out"),
        ({"out": torch.zeros(2, 8, 16).transpose(0, 1)}, ValueError, "contiguous"),
        ({"lse": torch.zeros(2, 8).t()}, ValueError, "contiguous"),
        ({"lse": torch.zeros(8)}, ValueError, "lse"),
        ({"q": torch.zeros(8, 2, 16, requires_grad=True)}, NotImplementedError, "no_grad"),
        ({"out": torch.zeros(8, 2, 16, requires_grad=True)}, NotImplementedError, "no_grad"),
        ({"softmax_scale": "x"}, TypeError, "softmax_scale"),
        ({"backend": "none such"}, ValueError, "backend"),
    ],
)
def test_what_does_not_fit_is_told(changed, error, told):
    with pytest.raises(error, match=told):
        call(**changed)


def test_inputs_that_require_a_gradient_run_without_recording_one():
    with torch.no_grad():
        assert call(q=torch.zeros(8, 2, 16, requires_grad=True)) is None


def test_the_operator_tells_what_it_overwrites():
    case = random_case(Mask.causal(8), batch=1)
    out, lse = torch.zeros(1, 8, 2, 16), torch.full((1, 8, 2), -torch.inf)
    rest = (None, case.mask.table, 0.25, 0.0, False, 0, "blockwise")
    torch.library.opcheck(
        torch.ops.magi_attention.accumulate.default,
        (out, lse, case.q, case.k, case.v, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )
