"""On a GPU both backends keep the tolerance rule for every mask, option and layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE, MASKS, case_of, check, on_device

from magi_attention.mask import Mask
from magi_attention.testing import compare_parts
from magi_attention.testing.variants import head_major_views, packed_views, poisoned, spaced_views

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]
WHOLE = MASKS["documents"]


@pytest.fixture(params=["hopper", "triton"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, dtype, backend):
    check(poisoned(case_of(MASKS[name], dtype=dtype)), backend)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_given_on_the_device(name, backend):
    check(poisoned(case_of(on_device(MASKS[name]))), backend)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 96, 128, 192, 256, (192, 128), (64, 256)])
@pytest.mark.parametrize("name", ["causal", "window"])
def test_head_dimensions(name, head_dim, dtype, backend):
    check(case_of(MASKS[name], head_dim=head_dim, dtype=dtype), backend)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (6, 3), (20, 4)])
def test_query_heads_share_key_heads(heads, backend):
    check(case_of(WHOLE, heads=heads, head_dim=64), backend)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(softcap, head_dim, backend):
    check(case_of(WHOLE, head_dim=head_dim, softcap=softcap), backend)


@pytest.mark.parametrize("scale", [0.0, 0.02, -0.1])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_softmax_scale_of_either_sign(scale, softcap, backend):
    check(case_of(WHOLE, softmax_scale=scale, softcap=softcap), backend)


@pytest.mark.parametrize("magnitude", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (9, 4), (1111, 1, 4), (1111, 9, 4)], ids=str)
def test_sinks(shape, magnitude, backend):
    sink = torch.randn(shape, device=DEVICE) + magnitude
    check(case_of(WHOLE, sink=sink), backend)


def test_absent_sinks_and_rows_that_see_only_sinks(backend):
    sink = torch.tensor(
        [[100.0, -100.0, 0.0, -torch.inf], [-torch.inf, 100.0, -1.0, -torch.inf]], device=DEVICE
    )
    check(poisoned(case_of(MASKS["rows and keys in no band"], sink=sink)), backend)
    check(poisoned(case_of(MASKS["nothing"], sink=sink)), backend)


@pytest.mark.parametrize("only", ["dout", "dlse"])
def test_gradients_of_one_output_only(only, backend):
    other = "dlse" if only == "dout" else "dout"
    case = case_of(MASKS["rows and keys in no band"], sink=torch.randn(2, 4, device=DEVICE))
    check(poisoned(replace(case, **{other: None})), backend)


@pytest.mark.parametrize("head_dim", [64, 128, 40])
@pytest.mark.parametrize("view", [head_major_views, packed_views, spaced_views])
@pytest.mark.parametrize("batch", [None, 3])
def test_any_strides(view, batch, head_dim, backend):
    check(view(case_of(WHOLE, head_dim=head_dim, batch=batch)), backend)


def test_strides_that_are_no_whole_16_bytes(backend):
    case = case_of(WHOLE, head_dim=24)
    loose = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (case.q, case.k, case.v, case.dout)]
    check(replace(case, q=loose[0], k=loose[1], v=loose[2], dout=loose[3]), backend)


@pytest.mark.parametrize("name", ["causal", "documents", "rows and keys in no band"])
def test_batch_axis(name, backend):
    check(poisoned(case_of(MASKS[name], batch=3)), backend)
    check(poisoned(case_of(on_device(MASKS[name]), batch=3)), backend)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 7), (7, 1)])
@pytest.mark.parametrize("place", [lambda mask: mask, on_device], ids=["host", "device"])
def test_lengths_zero_and_one(sizes, place, backend):
    check(case_of(place(Mask.causal(*sizes)), dtype=torch.float32), backend)
    sink = torch.randn(2, 4, device=DEVICE)
    check(case_of(place(Mask.full(*sizes)), dtype=torch.float32, batch=2, sink=sink), backend)


@pytest.mark.parametrize("name", ["documents", "window", "rows and keys in no band"])
def test_deterministic_gradients(name, backend):
    sink = torch.randn(2, 4, device=DEVICE)
    check(poisoned(case_of(MASKS[name], sink=sink)), backend, deterministic=True)


@pytest.mark.parametrize("name", ["causal", "documents", "rows and keys in no band", "nothing"])
@pytest.mark.parametrize("head_dim", [40, 128, 256])
def test_columns_in_parts(name, head_dim, backend):
    case = poisoned(case_of(MASKS[name], head_dim=head_dim, sink=torch.randn(2, 4, device=DEVICE)))
    result = compare_parts(case, [case.mask.num_cols // 3, case.mask.num_cols // 3 + 1], backend=backend)
    assert result.ok, result


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 128), (3, 3, 64), (8, 1, 40)], ids=str)
@pytest.mark.parametrize("modifiers", ["dropout", "alibi", "both"])
@pytest.mark.parametrize("name", ["documents", "window", "rows and keys in no band"])
def test_dropout_and_alibi(name, modifiers, shape, dtype, backend):
    *heads, head_dim = shape
    sink = torch.randn(2, heads[0], device=DEVICE)
    case = case_of(MASKS[name], dtype=dtype, sink=sink, heads=tuple(heads), head_dim=head_dim)
    if modifiers != "alibi":
        case = replace(case, dropout_p=0.2, rng_state=torch.tensor([2**40 + 5, -9], device=DEVICE))
    if modifiers != "dropout":
        case = replace(case, alibi_slopes=torch.rand(len(case.mask.table), heads[0], device=DEVICE))
    check(poisoned(case), backend)


@pytest.mark.parametrize("place", [lambda mask: mask, on_device], ids=["host", "device"])
@pytest.mark.parametrize("name", ["causal, few queries", "full", "covered twice", "nothing", "many bands"])
def test_dropout_and_alibi_with_softcap_in_batches(name, place, backend):
    case = case_of(place(MASKS[name]), batch=2, softcap=20.0)
    slopes = torch.rand(2, 4, device=DEVICE) - 0.2  # some reward distance
    state = torch.tensor([5, 7], device=DEVICE)
    check(poisoned(replace(case, dropout_p=0.5, rng_state=state, alibi_slopes=0.1 * slopes)), backend)
