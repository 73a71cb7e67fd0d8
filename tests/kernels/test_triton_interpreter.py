"""The Triton kernels keep the tolerance rule, in the interpreter on the CPU (on a GPU where there is one).

The interpreter cannot multiply bfloat16 matrices: fp32 and fp16 stand in for it here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernel_cases import MASKS

from magi_attention.mask import DeviceMask, Mask
from magi_attention.testing import Case, assert_matches_oracle, compare_parts, random_case
from magi_attention.testing.strategies import families, masks
from magi_attention.testing.variants import head_major_views, packed_views, poisoned, spaced_views

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT = Mask.varlen([0, 1, 8, 40, 77], causal=True)


def case_of(mask, **settings) -> Case:
    return random_case(mask, device=DEVICE, **settings)


def check(case: Case) -> None:
    assert_matches_oracle(case, backend="triton")


@given(masks(max_size=50, max_bands=4), st.sampled_from([(1, 1), (2, 1)]))
@settings(max_examples=12)
def test_random_masks(mask, heads):
    check(poisoned(case_of(mask, heads=heads)))


@given(families(max_size=50), st.sampled_from([0.0, 1.5]))
@settings(max_examples=8)
def test_named_families(mask, softcap):
    check(case_of(mask, heads=(2, 1), softcap=softcap, dtype=torch.float16))


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name):
    check(poisoned(case_of(MASKS[name], heads=(2, 1), dtype=torch.float32)))


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 1), (6, 3)])
def test_query_heads_share_key_heads(heads):
    check(case_of(Mask.causal(45), heads=heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 96, 128, 256, (64, 32), (24, 128)])
def test_head_dimensions(head_dim, dtype):
    check(case_of(SHORT, heads=(2, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("softcap", [0.5, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_softcap(softcap, dtype):
    check(case_of(SHORT, dtype=dtype, softcap=softcap, softmax_scale=1.0))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_softmax_scale_of_either_sign(scale, softcap):
    check(case_of(SHORT, softmax_scale=scale, softcap=softcap))


@pytest.mark.parametrize("magnitude", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("shape", [(1, 2), (9, 2), (77, 3, 2)], ids=str)
def test_sinks(shape, magnitude):
    check(case_of(SHORT, sink=(torch.randn(shape) + magnitude).to(DEVICE)))


def test_absent_sinks_and_rows_that_see_only_sinks():
    sink = torch.tensor([[100.0, -torch.inf], [-torch.inf, -torch.inf]], device=DEVICE)
    check(poisoned(case_of(MASKS["rows and keys in no band"], sink=sink)))
    check(poisoned(case_of(MASKS["nothing"], sink=sink)))


@pytest.mark.parametrize("only", ["dout", "dlse"])
def test_gradients_of_one_output_only(only):
    other = "dlse" if only == "dout" else "dout"
    case = case_of(MASKS["rows and keys in no band"], sink=torch.randn(2, 2, device=DEVICE))
    check(poisoned(replace(case, **{other: None})))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("view", [head_major_views, packed_views, spaced_views])
def test_any_strides(view, dtype):
    check(view(case_of(SHORT, heads=(2, 1), dtype=dtype, batch=2)))


def test_strides_that_are_no_whole_16_bytes():
    case = case_of(SHORT, heads=(2, 1), head_dim=24)
    loose = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (case.q, case.k, case.v, case.dout)]
    check(replace(case, q=loose[0], k=loose[1], v=loose[2], dout=loose[3]))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 7), (7, 1)])
def test_lengths_zero_and_one(sizes):
    check(case_of(Mask.causal(*sizes)))
    check(case_of(Mask.full(*sizes), batch=2, sink=torch.randn(2, 2, device=DEVICE)))


@pytest.mark.parametrize("name", ["window", "rows and keys in no band", "nothing"])
def test_columns_in_parts(name):
    case = poisoned(
        case_of(MASKS[name], heads=(2, 1), dtype=torch.float16, sink=torch.randn(2, 2, device=DEVICE))
    )
    result = compare_parts(case, [case.mask.num_cols // 2, case.mask.num_cols - 3], backend="triton")
    assert result.ok, result


def test_bands_given_as_a_tensor():
    mask = MASKS["covered twice"]
    check(case_of(DeviceMask(mask.table.to(DEVICE), mask.num_rows, mask.num_cols), heads=(2, 1)))
