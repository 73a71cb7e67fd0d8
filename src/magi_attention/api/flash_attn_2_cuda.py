"""The positional functions of the extension module ``flash_attn_2_cuda``, below FlashAttention 2's Python.

Optional tensors may be None; results are lists, as the extension's. Shapes as in ``flash_attn_internals``.

What stands behind softcap differs between releases, and the number of arguments tells which it is: SWAA has keep_first
and force_fa_decode there, before those of FlashAttention 2.8.3; later releases have num_splits at varlen_fwd's end.
"""

from __future__ import annotations

from typing import Any

import torch

from magi_attention.api import flash_attn_internals as internals
from magi_attention.api.flash_attn_core import written_into
from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache
from magi_attention.api.flash_attn_mask import Side
from magi_attention.errors import check_count, check_type, complaint

Optional = torch.Tensor | None

_SWAA = ("keep_first", "force_fa_decode")
_FORWARD = ("return_softmax", "gen")
_CACHE = ("rotary_interleaved", "num_splits")
_BACKWARD = ("deterministic", "gen", "rng_state")


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Optional,
    alibi_slopes: Optional,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: Side,
    window_size_right: Side,
    softcap: float,
    /,
    *rest: Any,
) -> list[torch.Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]; into ``out`` if it is given.

    ``rest``: return_softmax, gen; or keep_first, force_fa_decode, return_softmax, gen.
    """
    others = _behind_softcap("fwd", 11, rest, _FORWARD, (*_SWAA, *_FORWARD))
    result, *states = internals._flash_attn_forward(
        q, k, v, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes,
        **others,
    )  # fmt: skip
    return [written_into("out", out, result), *states]


def varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Optional,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: Optional,
    leftpad_k: Optional,
    block_table: Optional,
    alibi_slopes: Optional,
    max_seqlen_q: Side,
    max_seqlen_k: Side,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: Side,
    window_size_right: Side,
    softcap: float,
    /,
    *rest: Any,
) -> list[torch.Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of packed sequences; into ``out`` if it is given.

    ``rest``: return_softmax, gen; or those and num_splits; or keep_first, force_fa_decode, return_softmax, gen.
    """
    others = _behind_softcap("varlen_fwd", 19, rest, _FORWARD, (*_FORWARD, "num_splits"), (*_SWAA, *_FORWARD))
    result, *states = internals._flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, is_causal,
        window_size_left, window_size_right, softcap, alibi_slopes, block_table=block_table, leftpad_k=leftpad_k,
        seqused_k=seqused_k, zero_tensors=zero_tensors, **others,
    )  # fmt: skip
    return [written_into("out", out, result), *states]


def fwd_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: Optional,
    v: Optional,
    seqlens_k: Optional,
    rotary_cos: Optional,
    rotary_sin: Optional,
    cache_batch_idx: Optional,
    leftpad_k: Optional,
    block_table: Optional,
    alibi_slopes: Optional,
    out: Optional,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: Side,
    window_size_right: Side,
    softcap: float,
    /,
    *rest: Any,
) -> list[torch.Tensor]:
    """[out, softmax_lse] of queries and a cache, as in ``flash_attn_with_kvcache``; into ``out`` if it is given."""
    others = _behind_softcap("fwd_kvcache", 18, rest, _CACHE, (*_SWAA, *_CACHE))
    window = window_size_left, window_size_right
    result, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, seqlens_k, cache_batch_idx, leftpad_k, block_table,
        softmax_scale, is_causal, window, softcap, alibi_slopes=alibi_slopes, return_softmax_lse=True, **others,
    )  # fmt: skip
    return [written_into("out", out, result), lse]


def bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: Optional,
    dk: Optional,
    dv: Optional,
    alibi_slopes: Optional,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: Side,
    window_size_right: Side,
    softcap: float,
    /,
    *rest: Any,
) -> list[torch.Tensor]:
    """[dq, dk, dv, softmax_d]; into those that are given.

    ``rest``: deterministic, gen, rng_state; or keep_first, force_fa_decode, deterministic, gen, rng_state.
    """
    others = _behind_softcap("bwd", 16, rest, _BACKWARD, (*_SWAA, *_BACKWARD))
    dq, dk, dv = _places((q, dq), (k, dk), (v, dv))
    delta = internals._flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, p_dropout, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, alibi_slopes, **others,
    )  # fmt: skip
    return [dq, dk, dv, delta]


def varlen_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: Optional,
    dk: Optional,
    dv: Optional,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    alibi_slopes: Optional,
    max_seqlen_q: Side,
    max_seqlen_k: Side,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: Side,
    window_size_right: Side,
    softcap: float,
    /,
    *rest: Any,
) -> list[torch.Tensor]:
    """[dq, dk, dv, softmax_d] of packed sequences; into those that are given.

    ``rest``: deterministic, gen, rng_state; or keep_first, force_fa_decode, deterministic, gen, rng_state.
    """
    others = _behind_softcap("varlen_bwd", 21, rest, _BACKWARD, (*_SWAA, *_BACKWARD))
    dq, dk, dv = _places((q, dq), (k, dk), (v, dv))
    delta = internals._flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes,
        zero_tensors=zero_tensors, **others,
    )  # fmt: skip
    return [dq, dk, dv, delta]


def _behind_softcap(
    function: str, before: int, rest: tuple[Any, ...], *orders: tuple[str, ...]
) -> dict[str, Any]:
    """Arguments behind the ``before`` first ones by name, but for gen: in that order which has as many.

    Raises:
        RuntimeError: a generator. TypeError: another number of arguments, or SWAA's two of other types: those of
            FlashAttention 2 in their places.
    """
    named = next((dict(zip(order, rest, strict=True)) for order in orders if len(order) == len(rest)), None)
    if named is None:
        expected = " or ".join(str(before + len(order)) for order in orders) + " arguments"
        remedy = f"Behind softcap give {', or '.join(' '.join(order) for order in orders)}."
        raise TypeError(complaint(function, expected, before + len(rest), remedy))
    if named.pop("gen", None) is not None:
        # FlashAttention's own error, type and words that its callers look for.
        raise RuntimeError(
            "The `generator` argument is no longer supported: expected None. Seed with torch.manual_seed."
        )
    check_count("keep_first", named.get("keep_first", 0))
    check_type("force_fa_decode", named.get("force_fa_decode", False), bool)
    return named


def _places(*pairs: tuple[torch.Tensor, Optional]) -> list[torch.Tensor]:
    """Where gradients go: what was given for them beside each input, or new memory."""
    return [torch.empty_like(x) if given is None else given for x, given in pairs]
