"""Every mistake in a call of the rotary functions is named: what, expected, got, remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from magi_attention.api.rotary import (
    RotaryEmbedding,
    apply_rotary,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)

X, TABLE = torch.zeros(2, 5, 3, 8), torch.zeros(6, 4)
PACKED, CU = torch.zeros(10, 3, 8), torch.tensor([0, 4, 10], dtype=torch.int32)
QKV, KV = torch.zeros(2, 5, 3, 3, 8), torch.zeros(2, 5, 2, 3, 8)

Bad = dict[str, tuple[Callable, dict, type[Exception], str]]


def low(**changes: object) -> dict:
    return {"x": X, "cos": TABLE, "sin": TABLE} | changes


def packed(**changes: object) -> dict:
    return low(x=PACKED, cu_seqlens=CU, max_seqlen=6) | changes


TENSORS: Bad = {
    "x_list": (apply_rotary, low(x=[1.0]), TypeError, "x: expected Tensor, got list"),
    "x_three_axes": (apply_rotary, low(x=PACKED), ValueError, r"x shape: .*got \(10, 3, 8\)\. Batches"),
    "x_four_axes": (
        apply_rotary,
        packed(x=X),
        ValueError,
        r"x shape: expected \(total, .*got \(2, 5, 3, 8\)",
    ),
    "x_integer": (apply_rotary, low(x=X.int()), TypeError, "x dtype: .*got torch.int32"),
    "cos_none": (apply_rotary, low(cos=None), TypeError, "cos: expected Tensor, got NoneType"),
    "cos_per_batch": (apply_rotary, low(cos=TABLE[None]), ValueError, r"cos shape: .*got \(1, 6, 4\)"),
    "cos_integer": (apply_rotary, low(cos=TABLE.long()), TypeError, "cos dtype: .*got torch.int64"),
    "cos_elsewhere": (
        apply_rotary,
        low(cos=TABLE.to("meta")),
        ValueError,
        "cos device: expected cpu, got meta",
    ),
    "sin_shape": (
        apply_rotary,
        low(sin=TABLE[:5]),
        ValueError,
        r"sin shape: expected \(6, 4\), got \(5, 4\)",
    ),
    "too_wide": (
        apply_rotary,
        low(cos=torch.zeros(6, 5), sin=torch.zeros(6, 5)),
        ValueError,
        "rotary_dim, .*expected at most 8, .*got 10. Tables have",
    ),
    "too_short": (
        apply_rotary,
        low(x=torch.zeros(2, 7, 3, 8)),
        ValueError,
        "rows of cos and sin: expected at least 7, got 6. Make",
    ),
    "too_short_with_an_offset": (apply_rotary, low(seqlen_offsets=2), ValueError, "at least 7, got 6"),
    "too_short_with_offsets": (
        apply_rotary,
        low(seqlen_offsets=torch.tensor([0, 3])),
        ValueError,
        "at least 8, got 6",
    ),
    "too_short_packed": (apply_rotary, packed(max_seqlen=9), ValueError, "at least 9, got 6"),
    "too_short_packed_with_offsets": (
        apply_rotary,
        packed(seqlen_offsets=torch.tensor([2, 1])),
        ValueError,
        "at least 7, got 6",
    ),
    "torch_form_rows": (
        apply_rotary_emb_torch,
        low(),
        ValueError,
        r"cos shape: expected \(5, rotary_dim / 2\), got \(6, 4\)",
    ),
    "torch_form_batch": (
        apply_rotary_emb_torch,
        low(cos=torch.zeros(3, 5, 4)),
        ValueError,
        r"cos shape: expected \(2, 5, rotary_dim / 2\), got \(3, 5, 4\)",
    ),
    "torch_form_no_heads": (apply_rotary_emb_torch, low(x=X[0, 0]), ValueError, r"x shape: .*got \(3, 8\)"),
    "half_of_odd": (rotate_half, {"x": torch.zeros(3, 5)}, ValueError, r"even d, got \(3, 5\)"),
    "table_gradient_in_place": (
        apply_rotary_emb,
        low(cos=torch.zeros(6, 4, requires_grad=True), inplace=True),
        ValueError,
        "cos and sin in place: expected tensors without gradient, .*Detach them",
    ),
}

PLACES: Bad = {
    "no_max_seqlen": (
        apply_rotary,
        packed(max_seqlen=None),
        ValueError,
        "max_seqlen with cu_seqlens: .*None. Pass",
    ),
    "max_seqlen_alone": (
        apply_rotary,
        low(max_seqlen=5),
        ValueError,
        "max_seqlen: expected None without cu_seqlens",
    ),
    "max_seqlen_short": (
        apply_rotary,
        packed(max_seqlen=5),
        ValueError,
        "max_seqlen: expected at least 6, .*got 5",
    ),
    "max_seqlen_float": (apply_rotary, packed(max_seqlen=6.0), TypeError, "max_seqlen: expected an integer"),
    "cu_dtype": (
        apply_rotary,
        packed(cu_seqlens=CU.long()),
        TypeError,
        "cu_seqlens dtype: .*got torch.int64",
    ),
    "cu_axes": (apply_rotary, packed(cu_seqlens=CU[None]), ValueError, r"cu_seqlens shape: .*got \(1, 3\)"),
    "cu_one": (apply_rotary, packed(cu_seqlens=CU[:1]), ValueError, r"cu_seqlens shape: .*got \(1,\)"),
    "cu_start": (
        apply_rotary,
        packed(cu_seqlens=CU[1:]),
        ValueError,
        r"cu_seqlens: expected 0.*got \[4, 10\]",
    ),
    "cu_decreases": (apply_rotary, packed(cu_seqlens=CU[[0, 2, 1]]), ValueError, r"got \[0, 10, 4\]"),
    "cu_beyond_the_end": (apply_rotary, packed(x=PACKED[:9]), ValueError, r"the 9 tokens, got \[0, 4, 10\]"),
    "offset_negative": (
        apply_rotary,
        low(seqlen_offsets=-1),
        ValueError,
        "seqlen_offsets: .*at least 0, got -1",
    ),
    "offset_float": (apply_rotary, low(seqlen_offsets=1.0), TypeError, "seqlen_offsets: expected an integer"),
    "offsets_negative": (
        apply_rotary,
        low(seqlen_offsets=torch.tensor([0, -2])),
        ValueError,
        "seqlen_offsets: expected at least 0, got -2",
    ),
    "offsets_shape": (
        apply_rotary,
        packed(seqlen_offsets=torch.tensor([0, 1, 2])),
        ValueError,
        r"seqlen_offsets shape: expected \(2\), got \(3,\)",
    ),
    "offsets_dtype": (
        apply_rotary,
        low(seqlen_offsets=torch.zeros(2)),
        TypeError,
        "seqlen_offsets dtype: .*got torch.float32",
    ),
    "interleaved_integer": (
        apply_rotary_emb,
        low(interleaved=1),
        TypeError,
        "interleaved: expected bool, got int",
    ),
    "inplace_none": (apply_rotary_emb, low(inplace=None), TypeError, "inplace: expected bool, got NoneType"),
    "conjugate_integer": (apply_rotary, low(conjugate=0), TypeError, "conjugate: expected bool, got int"),
}


def joint(**changes: object) -> dict:
    return {"qkv": QKV, "cos": TABLE, "sin": TABLE} | changes


def module(**arguments: object) -> Callable:
    return lambda **call: RotaryEmbedding(8, **arguments)(**call)


PACKS: Bad = {
    "four_axes_alone": (
        apply_rotary_emb_qkv_,
        joint(qkv=X),
        ValueError,
        "num_heads_q with four axes .*None. Give",
    ),
    "heads_odd": (
        apply_rotary_emb_qkv_,
        joint(qkv=X, num_heads_q=2),
        ValueError,
        "heads of qkv: .*of the .*got 3",
    ),
    "heads_too_many": (
        apply_rotary_emb_qkv_,
        joint(qkv=X, num_heads_q=4),
        ValueError,
        "heads of qkv: .*got 3",
    ),
    "heads_of_five_axes": (
        apply_rotary_emb_qkv_,
        joint(num_heads_q=2),
        ValueError,
        r"qkv shape: expected \(batch, seqlen, 3, 2, head_dim\), got \(2, 5, 3, 3, 8\)",
    ),
    "qkv_of_two": (apply_rotary_emb_qkv_, joint(qkv=KV), ValueError, r"qkv shape: .*got \(2, 5, 2, 3, 8\)"),
    "cos_k_alone": (apply_rotary_emb_qkv_, joint(cos_k=TABLE), ValueError, "cos_k and sin_k: expected both"),
    "cos_k_short": (
        apply_rotary_emb_qkv_,
        joint(cos_k=TABLE[:4], sin_k=TABLE[:4]),
        ValueError,
        "rows of cos and sin: expected at least 5, got 4",
    ),
    "kv_of_three": (
        apply_rotary_emb_kv_,
        {"kv": QKV, "cos": TABLE, "sin": TABLE},
        ValueError,
        r"kv shape: .*got \(2, 5, 3, 3, 8\)",
    ),
    "dim_odd": (RotaryEmbedding, {"dim": 7}, ValueError, "dim: expected a positive even number, got 7"),
    "dim_float": (RotaryEmbedding, {"dim": 8.0}, TypeError, "dim: expected an integer, got float"),
    "base_zero": (
        RotaryEmbedding,
        {"dim": 8, "base": 0},
        ValueError,
        "base: expected a positive number, got 0",
    ),
    "scale_base_text": (
        RotaryEmbedding,
        {"dim": 8, "scale_base": "1"},
        TypeError,
        "scale_base: expected a number",
    ),
    "module_axes": (module(), {"qkv": X[0]}, ValueError, r"qkv: expected four or five axes, got \(5, 3, 8\)"),
    "module_q_axes": (
        module(),
        {"qkv": QKV, "kv": KV},
        ValueError,
        r"q: expected \(batch, .*got \(2, 5, 3, 3, 8\)",
    ),
    "module_kv_dtype": (module(), {"qkv": X, "kv": KV.double()}, TypeError, "kv dtype: .*got torch.float64"),
    "module_heads_with_kv": (
        module(),
        {"qkv": X, "kv": KV, "num_heads_q": 3},
        ValueError,
        "num_heads_q: expected None with kv, got 3",
    ),
    "module_offsets_alone": (
        module(),
        {"qkv": QKV, "seqlen_offset": torch.tensor([0, 1])},
        ValueError,
        "max_seqlen with a tensor seqlen_offset: expected an integer, got None. Pass",
    ),
    "module_offset_negative": (
        module(),
        {"qkv": QKV, "seqlen_offset": -1},
        ValueError,
        "seqlen_offset: .*got -1",
    ),
    "module_max_seqlen_short": (
        module(),
        {"qkv": QKV, "seqlen_offset": torch.tensor([0, 1]), "max_seqlen": 5},
        ValueError,
        "rows of cos and sin: expected at least 6, got 5",
    ),
}


@pytest.mark.parametrize("name", TENSORS | PLACES | PACKS)
def test_mistakes_are_named(name: str) -> None:
    function, arguments, error, message = (TENSORS | PLACES | PACKS)[name]
    with pytest.raises(error, match=message):
        function(**arguments)


def test_the_unchanged_calls_run():
    assert torch.equal(apply_rotary(**low()), X) and torch.equal(apply_rotary(**packed()), PACKED)
    assert torch.equal(apply_rotary_emb_qkv_(**joint()), QKV)
    assert torch.equal(module()(qkv=X, kv=KV)[0], X)
