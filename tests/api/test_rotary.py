"""Rotation equals multiplication by complex numbers, in every layout, in place or not, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from magi_attention.api.rotary import (
    RotaryEmbedding,
    apply_rotary,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)

HALVES_OR_PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])


def draws(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def tables(
    num_rows: int, rotary_dim: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles without any pattern that a wrong row or column could share."""
    angles = 2 * math.pi * torch.rand(num_rows, rotary_dim // 2, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: list[int], interleaved: bool
) -> torch.Tensor:
    """The definition for one sequence (s, h, d), token by token: pairs are complex numbers, times cos + i sin."""
    out = x.double().clone()
    rotary_dim = 2 * cos.shape[1]
    if interleaved:
        reals, imaginaries = range(0, rotary_dim, 2), range(1, rotary_dim, 2)
    else:
        reals, imaginaries = range(rotary_dim // 2), range(rotary_dim // 2, rotary_dim)
    for token, position in enumerate(positions):
        numbers = torch.complex(out[token][:, list(reals)], out[token][:, list(imaginaries)])
        numbers = numbers * torch.complex(cos[position].double(), sin[position].double())
        out[token][:, list(reals)], out[token][:, list(imaginaries)] = numbers.real, numbers.imag
    return out


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Sizes, layout and offsets of a call; ``lengths`` of several sequences, equal ones in a padded batch."""
    packed = draw(st.booleans())
    sizes = st.integers(0, 5)
    lengths = (
        draw(st.lists(sizes, min_size=1, max_size=3)) if packed else [draw(sizes)] * draw(st.integers(0, 3))
    )
    head_dim = draw(st.integers(2, 9))
    one = draw(st.integers(0, 4))
    many = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    return {
        "packed": packed,
        "lengths": lengths,
        "offsets": draw(st.sampled_from([one, many])),
        "num_heads": draw(st.integers(1, 3)),
        "head_dim": head_dim,
        "rotary_dim": 2 * draw(st.integers(1, head_dim // 2)),
        "tail": draw(st.integers(0, 2)) if packed else 0,
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
    }


def arguments_of(call: dict) -> tuple[torch.Tensor, dict]:
    """x and the keywords that place its tokens."""
    lengths, offsets = call["lengths"], call["offsets"]
    place = {"seqlen_offsets": offsets}
    if isinstance(offsets, list):
        place["seqlen_offsets"] = torch.tensor(offsets, dtype=call["index_dtype"])
    if not call["packed"]:
        seqlen = lengths[0] if lengths else 3
        return draws(len(lengths), seqlen, call["num_heads"], call["head_dim"]), place
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = draws(sum(lengths) + call["tail"], call["num_heads"], call["head_dim"])
    return x, place | {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}


def definition(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, call: dict, interleaved: bool
) -> torch.Tensor:
    lengths, offsets = call["lengths"], call["offsets"]
    offsets = offsets if isinstance(offsets, list) else [offsets] * len(lengths)
    flat = x if call["packed"] else x.flatten(0, 1)
    sequences = flat.split([*lengths, flat.shape[0] - sum(lengths)])
    parts = [
        turned(tokens, cos, sin, list(range(offset, offset + length)), interleaved)
        for tokens, offset, length in zip(sequences, offsets, lengths, strict=False)
    ]
    return torch.cat([*parts, sequences[-1].double()]).reshape(x.shape)


@given(calls(), st.booleans(), st.booleans())
def test_rotation_is_multiplication_by_complex_numbers(call, interleaved, inplace):
    x, place = arguments_of(call)
    before = x.clone()
    cos, sin = tables(9, call["rotary_dim"])
    out = apply_rotary(x, cos, sin, **place, interleaved=interleaved, inplace=inplace)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out, definition(before, cos, sin, call, interleaved), rtol=0, atol=1e-14)
    assert torch.equal(out[..., call["rotary_dim"] :], before[..., call["rotary_dim"] :])
    assert torch.equal(x, out if inplace else before)
    assert not inplace or out.data_ptr() == x.data_ptr()


@given(calls(), st.booleans())
def test_conjugate_turns_back(call, interleaved):
    x, place = arguments_of(call)
    cos, sin = tables(9, call["rotary_dim"])
    there = apply_rotary(x, cos, sin, **place, interleaved=interleaved)
    back = apply_rotary(there, cos, sin, **place, interleaved=interleaved, conjugate=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-14)


@HALVES_OR_PAIRS
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computed_in_float32_and_rounded_once(dtype, table_dtype, interleaved):
    x = draws(2, 7, 3, 16, dtype=dtype)
    cos, sin = tables(9, 12, table_dtype)
    wide = apply_rotary(x.double(), cos, sin, interleaved=interleaved)
    out = apply_rotary(x, cos, sin, interleaved=interleaved)
    assert out.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * wide.abs() + 4 * torch.finfo(torch.float32).eps
    assert ((out.double() - wide).abs() <= rounding).all()


@HALVES_OR_PAIRS
def test_products_depend_on_the_distance_only(interleaved):
    q, k = draws(1, 1, 1, 8).expand(1, 6, 1, 8), draws(1, 1, 1, 8).expand(1, 6, 1, 8)
    angles = torch.arange(6.0, dtype=torch.float64)[:, None] * torch.rand(4, dtype=torch.float64)
    q, k = (apply_rotary_emb(t, angles.cos(), angles.sin(), interleaved).squeeze() for t in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=1e-12)


@HALVES_OR_PAIRS
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (5, 3, 8)])
def test_torch_form_takes_a_row_per_token(interleaved, shape):
    x = draws(*shape)
    cos, sin = tables(5, 6)
    out = apply_rotary_emb_torch(x, cos, sin, interleaved)
    expected = apply_rotary(x.reshape(-1, 5, 3, 8), cos, sin, interleaved=interleaved)
    assert torch.equal(out, expected.reshape(shape))
    own = [table.expand(*shape[:-3], 5, 3) for table in (cos, sin)]
    assert torch.equal(apply_rotary_emb_torch(x, *own, interleaved), out)


def test_rotate_half_is_a_quarter_turn():
    x = torch.arange(1.0, 7.0)
    assert rotate_half(x).tolist() == [-4, -5, -6, 1, 2, 3]
    assert rotate_half(x, interleaved=True).tolist() == [-2, 1, -4, 3, -6, 5]
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert torch.equal(apply_rotary_emb_torch(x.reshape(1, 1, 6), zero, one).flatten(), rotate_half(x))


def test_alias():
    assert apply_rotary_emb_func is apply_rotary_emb


@HALVES_OR_PAIRS
def test_gradients_by_differences(interleaved):
    cos, sin = (table.requires_grad_() for table in tables(7, 4))
    x = draws(2, 3, 1, 5).requires_grad_()
    offsets = torch.tensor([4, 1])
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

    def batched(x, cos, sin):
        return apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)

    def packed(x, cos, sin):
        return apply_rotary_emb(x.flatten(0, 1), cos, sin, interleaved, False, 2, cu_seqlens, 3)

    def in_place(x):
        return apply_rotary_emb(x * 1, cos.detach(), sin.detach(), interleaved, True, offsets)

    assert torch.autograd.gradcheck(batched, (x, cos, sin))
    assert torch.autograd.gradcheck(packed, (x, cos, sin))
    assert torch.autograd.gradcheck(in_place, x) and torch.autograd.gradgradcheck(in_place, x)


@HALVES_OR_PAIRS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_turned_the_other_way(interleaved, inplace, dtype):
    x = draws(2, 5, 2, 8, dtype=dtype).requires_grad_()
    cos, sin = tables(6, 6, dtype)
    before = x.detach().clone()
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets=1)
    grad = torch.randn_like(out)
    kept = grad.clone()
    out.backward(grad)
    assert torch.equal(x.grad, apply_rotary(grad, cos, sin, 1, interleaved=interleaved, conjugate=True))
    assert torch.equal(grad, kept)
    assert torch.equal(x, out if inplace else before)


@pytest.mark.parametrize("returned", [False, True])
def test_in_place_on_views_of_a_packed_tensor(returned):
    """The history of the packed tensor contains the rotation, whichever of its views is used afterwards."""
    leaf = draws(2, 4, 3, 2, 6).requires_grad_()
    cos, sin = tables(4, 6)
    weight = torch.randn_like(leaf)
    qkv = leaf * 1
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    out_q, out_k = (apply_rotary_emb(x, cos, sin, inplace=True) for x in (q, k))
    whole = torch.stack((out_q, out_k, v), 2) if returned else qkv
    (gradient,) = torch.autograd.grad((whole * weight).sum(), leaf)
    expected = weight.clone()
    for part in (0, 1):
        expected[:, :, part] = apply_rotary(weight[:, :, part], cos, sin, conjugate=True)
    assert torch.equal(gradient, expected)


def compiled(function: Callable) -> Callable:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("run", [lambda function: function, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["leaf", "view_of_a_leaf", "result"])
def test_in_place_gradient_of_every_kind_of_tensor(kind, run):
    leaf = draws(2, 4, 3, 1, 6).requires_grad_()
    cos, sin = tables(4, 6)
    weight = torch.randn_like(leaf)
    expected = apply_rotary_emb_qkv_(leaf.detach().clone(), cos, sin)
    view = {"leaf": lambda x: x, "view_of_a_leaf": lambda x: x[:, :3], "result": lambda x: x * 1}[kind]
    out = run(lambda x: apply_rotary_emb_qkv_(view(x), cos, sin))(leaf)
    torch.testing.assert_close(out, view(expected))
    (out * view(weight)).sum().backward()
    if kind == "view_of_a_leaf":
        weight[:, 3:] = 0
    torch.testing.assert_close(leaf.grad, apply_rotary_emb_qkv_(weight, cos, -sin))
    assert torch.equal(view(leaf), out) == (kind != "result")


def test_writing_what_an_earlier_backward_needs_is_refused():
    x = draws(1, 3, 1, 4).requires_grad_()
    exponential = x.exp()
    out = apply_rotary_emb(exponential, *tables(3, 4), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@HALVES_OR_PAIRS
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("offsets", [2, torch.tensor([0, 3])], ids=["one", "many"])
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_queries_and_keys(interleaved, own_tables, offsets, grouped):
    cos, sin = tables(8, 4)
    cos_k, sin_k = tables(8, 4) if own_tables else (cos, sin)
    q, k, v = draws(2, 5, 4, 6), draws(2, 5, 2 if grouped else 4, 6), draws(2, 5, 2 if grouped else 4, 6)
    qkv = torch.cat((q, k, v), 2) if grouped else torch.stack((q, k, v), 2)
    extra = (cos_k, sin_k) if own_tables else (None, None)
    num_heads_q = 4 if grouped else None
    out = apply_rotary_emb_qkv_(qkv, cos, sin, *extra, interleaved, offsets, num_heads_q)
    q = apply_rotary(q, cos, sin, offsets, interleaved=interleaved)
    k = apply_rotary(k, cos_k, sin_k, offsets, interleaved=interleaved)
    assert out is qkv
    assert torch.equal(qkv, torch.cat((q, k, v), 2) if grouped else torch.stack((q, k, v), 2))


@HALVES_OR_PAIRS
def test_packed_keys(interleaved):
    kv = draws(2, 5, 2, 3, 6)
    cos, sin = tables(8, 4)
    k, v = kv.clone().unbind(2)
    assert apply_rotary_emb_kv_(kv, cos, sin, interleaved, 3) is kv
    assert torch.equal(kv, torch.stack((apply_rotary(k, cos, sin, 3, interleaved=interleaved), v), 2))


def test_gradients_of_packed_tensors():
    cos, sin = tables(6, 4)
    cos_k, sin_k = tables(6, 4)
    qkv, grouped, kv = (
        draws(*shape).requires_grad_() for shape in ((1, 3, 3, 1, 5), (1, 3, 4, 5), (1, 3, 2, 1, 5))
    )
    check = torch.autograd.gradcheck
    assert check(lambda x: apply_rotary_emb_qkv_(x * 1, cos, sin, cos_k, sin_k, True, 2), qkv)
    assert check(lambda x: apply_rotary_emb_qkv_(x * 1, cos, sin, num_heads_q=2), grouped)
    assert check(lambda x: apply_rotary_emb_kv_(x * 1, cos, sin), kv)


@pytest.mark.parametrize("packed", [False, True])
def test_noncontiguous_tensors(packed):
    x = draws(8, 2, 5, 3)[:, :, ::2].permute(2, 1, 0, 3).transpose(2, 3) if not packed else draws(8, 6, 2).mT
    cos, sin = (table.T.contiguous().T for table in tables(12, 6))
    place = {"cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32), "max_seqlen": 5} if packed else {}
    expected = apply_rotary(x.contiguous(), cos, sin, **place)
    assert torch.equal(apply_rotary(x, cos, sin, **place), expected)
    assert apply_rotary(x, cos, sin, **place, inplace=True) is x and torch.equal(x, expected)


def test_nothing_waits_for_a_device():
    """On the meta device a value that the host reads is an error."""
    x, table = torch.empty(9, 2, 8, device="meta"), torch.empty(16, 4, device="meta")
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    for inplace in (False, True):
        out = apply_rotary(x, table, table, offsets, cu_seqlens, 5, inplace=inplace)
        assert out.shape == x.shape
    module = RotaryEmbedding(8, scale_base=512, device="meta")
    assert module(torch.empty(3, 4, 3, 2, 8, device="meta"), None, offsets, 16).shape == (3, 4, 3, 2, 8)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_without_a_break(inplace):
    """While compiling, the host looks at no values: what lies beyond the tables then stays as it is."""
    cos, sin = tables(6, 4)
    x = draws(2, 4, 2, 4)
    expected = x.clone()
    expected[0] = apply_rotary(x[:1], cos, sin, 1)[0]
    expected[1, :2] = apply_rotary(x[1:, :2], cos, sin, 4)[0]
    out = compiled(apply_rotary_emb)(x, cos, sin, False, inplace, torch.tensor([1, 4]))
    torch.testing.assert_close(out, expected)
    assert torch.equal(x, out) == inplace


def test_compiled_module_follows_lengths():
    module, reference = RotaryEmbedding(8, scale_base=512), RotaryEmbedding(8, scale_base=512)
    run = compiled(module)
    for seqlen in (4, 5, 6, 3):
        qkv = draws(1, seqlen, 3, 2, 8, dtype=torch.float32)
        torch.testing.assert_close(run(qkv.clone()), reference(qkv.clone()))


def angles(num_rows: int, dim: int, base: float = 10000.0) -> torch.Tensor:
    return torch.tensor(
        [[p / base ** (2 * j / dim) for j in range(dim // 2)] for p in range(num_rows)]
    ).double()


@HALVES_OR_PAIRS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_is_the_formula(interleaved, dtype):
    module = RotaryEmbedding(6, base=500.0, interleaved=interleaved)
    qkv = draws(2, 5, 3, 2, 8, dtype=dtype)
    table = angles(8, 6, 500.0)
    expected = apply_rotary_emb_qkv_(qkv.double(), table.cos(), table.sin(), None, None, interleaved, 3)
    assert module(qkv, seqlen_offset=3) is qkv
    torch.testing.assert_close(qkv.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert module.state_dict() == {} and set(dict(module.named_buffers())) >= {"inv_freq"}


def test_module_turns_grouped_heads_and_separate_queries():
    module = RotaryEmbedding(8)
    q, kv = draws(2, 5, 4, 8), draws(2, 5, 2, 2, 8)
    qkv = torch.cat((q, kv.flatten(2, 3)), 2)
    packed = module(qkv.clone(), num_heads_q=4)
    out_q, out_kv = module(q, kv)
    assert out_q is q and out_kv is kv
    assert torch.equal(packed, torch.cat((q, kv.flatten(2, 3)), 2)) and not torch.equal(packed, qkv)


@pytest.mark.parametrize("scale_base", [None, 16.0])
def test_steps_of_a_generation_equal_the_whole(scale_base):
    module = RotaryEmbedding(8, scale_base=scale_base)
    qkv = draws(2, 7, 3, 2, 8)
    whole = module(qkv.clone(), max_seqlen=7)
    ones = [module(qkv[:, i : i + 1].clone(), seqlen_offset=i, max_seqlen=7) for i in range(7)]
    assert torch.equal(torch.cat(ones, 1), whole)
    offsets = torch.tensor([2, 4])
    windows = torch.stack([qkv[0, 2:5], qkv[1, 4:7]])
    expected = torch.stack([whole[0, 2:5], whole[1, 4:7]])
    assert torch.equal(module(windows, seqlen_offset=offsets, max_seqlen=7), expected)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("num_rows", [6, 64])
def test_xpos_products_fall_with_the_distance(num_rows, separate):
    dim, scale_base = 8, 4.0
    module = RotaryEmbedding(dim, scale_base=scale_base)
    q, k = draws(6, dim), draws(6, dim)
    if separate:
        kv = torch.stack((k, k)).reshape(2, 1, 6, 1, dim).permute(1, 2, 0, 3, 4).clone()
        out_q, out_kv = module(q.reshape(1, 6, 1, dim).clone(), kv, max_seqlen=num_rows)
        scores = out_q[0, :, 0] @ out_kv[0, :, 0, 0].T
    else:
        out = module(torch.stack((q, k, k), 1).reshape(1, 6, 3, 1, dim), max_seqlen=num_rows)
        scores = out[0, :, 0, 0] @ out[0, :, 1, 0].T
    pairs = (torch.complex(t[:, :4], t[:, 4:]) for t in (q, k))
    q, k = (t * torch.polar(torch.ones(6, 4).double(), angles(6, dim)) for t in pairs)
    zeta = (torch.arange(0, dim, 2).double() / dim + 0.4) / 1.4
    expected = torch.empty(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            expected[i, j] = (q[i] * k[j].conj() * zeta ** ((i - j) / scale_base)).real.sum()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_xpos_leaves_lengths_at_the_middle_of_the_tables():
    qkv = draws(1, 6, 3, 1, 8)
    out = RotaryEmbedding(8, scale_base=4.0)(qkv.clone(), max_seqlen=9)
    close = torch.isclose(out.norm(dim=-1), qkv.norm(dim=-1))[0, :, :2, 0]
    assert close.all(1).tolist() == close.any(1).tolist() == [position == 4 for position in range(6)]


def test_angles_stay_exact_in_a_module_cast_to_half():
    exact, cast = RotaryEmbedding(8, scale_base=512), RotaryEmbedding(8, scale_base=512).to(torch.bfloat16)
    assert cast.inv_freq.dtype == cast.scale.dtype == torch.bfloat16
    q, kv = draws(1, 300, 1, 8, dtype=torch.float32), draws(1, 300, 2, 1, 8, dtype=torch.float32)
    for got, want in zip(cast(q.clone(), kv.clone()), exact(q, kv), strict=True):
        assert torch.equal(got, want)


def test_tables_are_kept_until_they_are_too_short_or_of_another_kind():
    module = RotaryEmbedding(4)
    module(torch.zeros(1, 6, 3, 1, 4))
    first = module._cos_cached
    module(torch.zeros(1, 2, 3, 1, 4), seqlen_offset=4)
    assert module._cos_cached is first
    module(torch.zeros(1, 3, 3, 1, 4), seqlen_offset=4)
    assert module._cos_cached is not first and module._cos_cached.shape == (7, 2)
    module(torch.zeros(1, 3, 3, 1, 4, dtype=torch.bfloat16))
    assert module._cos_cached.dtype == torch.bfloat16


def test_tables_made_for_inference_do_not_hinder_training():
    module = RotaryEmbedding(4)
    with torch.inference_mode():
        module(torch.zeros(1, 6, 3, 1, 4))
    qkv = draws(1, 6, 3, 1, 4, dtype=torch.float32).requires_grad_()
    weight = torch.randn_like(qkv)
    (module(qkv) * weight).sum().backward()
    table = angles(6, 4).float()
    back = apply_rotary_emb_qkv_(weight.clone(), table.cos(), -table.sin())
    torch.testing.assert_close(qkv.grad, back)


def test_module_leaves_both_tensors_alone_when_it_refuses_one():
    q = torch.ones(2, 5, 4, 8)
    with pytest.raises(ValueError, match=r"kv shape: expected \(2, seqlen_k, 2, num_heads_k, 8\)"):
        RotaryEmbedding(8)(q, torch.ones(2, 5, 3, 4, 8))
    assert torch.equal(q, torch.ones(2, 5, 4, 8))
