"""Dropout and ALiBi: by the definition on every backend, and the same weights dropped everywhere, every time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import MASKS

from magi_attention.attention import attention, attention_backward
from magi_attention.mask import Mask
from magi_attention.testing import Case, assert_matches_oracle, random_case
from magi_attention.testing.strategies import masks
from magi_attention.testing.variants import poisoned

STATE = torch.tensor([0x123456789ABCDEF, -(2**40) - 3])


def modified(case: Case, dropout_p: float, slopes: str, state: torch.Tensor = STATE) -> Case:
    """The case with dropout if the probability is not 0, and with slopes per "head", per "row" (of a table) or "none"."""
    heads, generator = case.q.shape[-2], torch.Generator().manual_seed(3)
    rows = case.q.shape[0] if case.q.dim() == 4 else len(case.mask.table)
    shapes = {"none": None, "head": (heads,), "row": (rows, heads)}
    shape = shapes[slopes]
    return replace(
        case,
        dropout_p=dropout_p,
        rng_state=state if dropout_p else None,
        alibi_slopes=None if shape is None else torch.rand(shape, generator=generator),
    )


COMBINATIONS = [(0.2, "none"), (0.0, "head"), (0.0, "row"), (0.6, "row")]


@given(masks(max_size=40), st.sampled_from(COMBINATIONS), st.sampled_from([0.0, 1.5]))
def test_random_masks_blockwise(mask, combination, softcap):
    case = random_case(mask, heads=(4, 2), head_dim=8, softcap=softcap)
    assert_matches_oracle(poisoned(modified(case, *combination)), backend="blockwise")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@given(masks(max_size=40, max_bands=4), st.sampled_from(COMBINATIONS), st.sampled_from([0.0, 1.5]))
@settings(max_examples=10)
def test_random_masks_triton(mask, combination, softcap):
    pytest.importorskip("triton")
    case = random_case(mask, heads=(4, 2), softcap=softcap)
    assert_matches_oracle(poisoned(modified(case, *combination)), backend="triton")


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("name", ["causal, few keys", "window", "documents", "covered twice"])
def test_batches_and_sinks(name, combination, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    sink = torch.randn(3, 2, generator=torch.Generator().manual_seed(5))
    case = random_case(MASKS[name], heads=(2, 1), batch=2, sink=sink, dtype=torch.float16)
    assert_matches_oracle(modified(case, *combination), backend=backend)


@pytest.mark.parametrize("backend", ["blockwise", "dense"])
def test_gradcheck(backend):
    mask = Mask.varlen([0, 4, 9], causal=True)
    case = modified(random_case(mask, head_dim=3, dtype=torch.float64), 0.3, "row")

    def function(q, k, v):
        out, meta = attention(q, k, v, mask, backend=backend, **case.modifiers)
        return out, meta.lse

    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(function, inputs)


def dropped_share(state: torch.Tensor | None, p: float = 0.3, backend: str | None = None) -> torch.Tensor:
    """(2, 96, 3, 128): which of 128 keys each row of two batch entries and three heads drops."""
    q, k = torch.zeros(2, 96, 3, 16), torch.zeros(2, 128, 3, 16)
    v = torch.eye(128)[None, :, None].expand(2, 128, 3, 128)
    out, meta = attention(q, k, v, Mask.full(96, 128), dropout_p=p, rng_state=state, backend=backend)
    assert torch.allclose(meta.lse, torch.full_like(meta.lse, 128.0).log())  # of all weights, dropped or not
    kept = out * 128 * (1 - p)
    assert ((kept - kept.round()).abs() < 1e-4).all()
    return kept.round() == 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_weights(p):
    dropped = dropped_share(STATE, p).double()
    total = dropped.numel()
    assert abs(dropped.mean().item() - p) < 4 * (p * (1 - p) / total) ** 0.5
    # Neighbours, rows, heads and batch entries drop independently of each other.
    centred = dropped - p
    for dim in range(4):
        products = centred.narrow(dim, 1, dropped.shape[dim] - 1) * centred.narrow(
            dim, 0, dropped.shape[dim] - 1
        )
        assert abs(products.mean().item()) < 4 * p * (1 - p) / products.numel() ** 0.5
    # Rows multiply the same keys of columns: what two rows do in two columns tells nothing of the fourth weight.
    rectangles = (centred[:, 1:] * centred[:, :-1])[..., 1:] * (centred[:, 1:] * centred[:, :-1])[..., :-1]
    assert abs(rectangles.mean().item()) < 4 * (p * (1 - p)) ** 2 / rectangles.numel() ** 0.5


def test_backends_drop_the_same_weights():
    expected = dropped_share(STATE, backend="dense")
    assert torch.equal(dropped_share(STATE, backend="blockwise"), expected)
    pytest.importorskip("triton")
    assert torch.equal(dropped_share(STATE, backend="triton"), expected)


def test_the_default_generator_repeats_a_call():
    torch.manual_seed(7)
    first, second = dropped_share(None), dropped_share(None)
    torch.manual_seed(7)
    assert torch.equal(dropped_share(None), first)
    assert not torch.equal(second, first)


def test_any_half_of_the_state_changes_what_is_dropped():
    seen = [
        dropped_share(torch.tensor(state))
        for state in ([1, 1], [2, 1], [1, 2], [1 + 2**32, 1], [1, 1 + 2**32])
    ]
    for n, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:n])


def test_alibi_is_measured_from_the_lower_right_corner():
    q, k, v = torch.zeros(3, 1, 8), torch.zeros(5, 1, 8), torch.zeros(5, 1, 8)
    _, meta = attention(q, k, v, Mask.causal(3, 5), alibi_slopes=torch.tensor([0.5]))
    # Row i stands at key i + 2: distances 0, 1, 2, ... to the left.
    expected = [torch.logsumexp(-0.5 * torch.arange(i + 3.0), 0) for i in range(3)]
    assert torch.allclose(meta.lse[:, 0], torch.stack(expected))


def test_dropout_under_activation_checkpointing():
    q, k, v = (torch.randn(40, 2, 16, requires_grad=True) for _ in range(3))

    def layer(q, k, v):
        return attention(q, k, v, Mask.causal(40), dropout_p=0.4)[0]

    found = []
    for run in (layer, lambda *x: torch.utils.checkpoint.checkpoint(layer, *x, use_reentrant=False)):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(run(q, k, v).sum(), (q, k, v)))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("backend", ["blockwise", "triton", "dense"])
@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("batched", [False, True])
def test_gradients_from_an_out_and_lse_that_are_there(batched, scale, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    case = random_case(Mask.causal(20, 30), heads=(4, 2), batch=2 if batched else None, softmax_scale=scale)
    case = modified(case, 0.3, "head")
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    out, meta = attention(q, k, v, case.mask, softmax_scale=scale, backend=backend, **case.modifiers)
    expected = torch.autograd.grad((out, meta.lse), (q, k, v), (case.dout, case.dlse))
    found = attention_backward(
        case.dout, q, k, v, out, meta.lse, case.mask, dlse=case.dlse, softmax_scale=scale, backend=backend,
        **case.modifiers,
    )  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_columns_in_parts_share_the_gradient():
    case = random_case(Mask.causal(24, 40), dtype=torch.float64)
    out, meta = attention(case.q, case.k, case.v, case.mask)
    whole = attention_backward(case.dout, case.q, case.k, case.v, out, meta.lse, case.mask)
    parts = [
        attention_backward(
            case.dout,
            case.q,
            case.k[a:b],
            case.v[a:b],
            out,
            meta.lse,
            case.mask.localise([(0, 24)], [(a, b)]),
        )
        for a, b in ((0, 17), (17, 40))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for n in (1, 2):
        torch.testing.assert_close(torch.cat([part[n] for part in parts]), whole[n])


def test_bad_inputs_of_the_backward():
    x, lse = torch.zeros(6, 2, 8), torch.zeros(6, 2)
    mask = Mask.full(6)
    with pytest.raises(ValueError, match="rng_state: expected that of the forward"):
        attention_backward(x, x, x, x, x, lse, mask, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"lse shape: expected \(6, 2\)"):
        attention_backward(x, x, x, x, x, lse.T, mask)
    with pytest.raises(TypeError, match=r"dout dtype: expected torch\.float32"):
        attention_backward(x.double(), x, x, x, x, lse, mask)
