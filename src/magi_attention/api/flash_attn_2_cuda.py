"""The positional functions of the extension module ``flash_attn_2_cuda``, below FlashAttention 2's Python.

Optional tensors may be None; results are lists, as the extension's. Shapes as in ``flash_attn_internals``.
"""

from __future__ import annotations

from typing import Any

import torch

from magi_attention.api import flash_attn_internals as internals
from magi_attention.api.flash_attn_core import written_into
from magi_attention.api.flash_attn_mask import Side

Optional = torch.Tensor | None


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
    return_softmax: bool,
    gen: Any = None,
) -> list[torch.Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]; into ``out`` if it is given."""
    _refuse_generator(gen)
    result, *others = internals._flash_attn_forward(
        q, k, v, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    )  # fmt: skip
    return [written_into("out", out, result), *others]


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
    return_softmax: bool,
    gen: Any = None,
    num_splits: int = 0,
) -> list[torch.Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of packed sequences; into ``out`` if it is given."""
    _refuse_generator(gen)
    result, *others = internals._flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, is_causal,
        window_size_left, window_size_right, softcap, alibi_slopes, return_softmax, block_table, leftpad_k, seqused_k,
        zero_tensors, num_splits,
    )  # fmt: skip
    return [written_into("out", out, result), *others]


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
    deterministic: bool,
    gen: Any = None,
    rng_state: Optional = None,
) -> list[torch.Tensor]:
    """[dq, dk, dv, softmax_d]; into those that are given."""
    _refuse_generator(gen)
    dq, dk, dv = _places((q, dq), (k, dk), (v, dv))
    delta = internals._flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, p_dropout, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state,
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
    deterministic: bool,
    gen: Any = None,
    rng_state: Optional = None,
) -> list[torch.Tensor]:
    """[dq, dk, dv, softmax_d] of packed sequences; into those that are given."""
    _refuse_generator(gen)
    dq, dk, dv = _places((q, dq), (k, dk), (v, dv))
    delta = internals._flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state, zero_tensors,
    )  # fmt: skip
    return [dq, dk, dv, delta]


def _refuse_generator(gen: Any) -> None:
    if gen is not None:
        # FlashAttention's own error, type and words that its callers look for.
        raise RuntimeError(
            "The `generator` argument is no longer supported: expected None. Seed with torch.manual_seed."
        )


def _places(*pairs: tuple[torch.Tensor, Optional]) -> list[torch.Tensor]:
    """Where gradients go: what was given for them beside each input, or new memory."""
    return [torch.empty_like(x) if given is None else given for x, given in pairs]
