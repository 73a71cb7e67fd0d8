"""The functions below FlashAttention 2's interface that ring attention and others import: no autograd, states explicit.

softmax_lse is (batch, nheads, seqlen_q), or (nheads, total_q) packed, fp32, +inf for a row that sees nothing; rng_state
int64 (2,), zeros without dropout. Other arguments and errors as in ``flash_attn_func`` and ``flash_attn_varlen_func``:
keep_first and force_fa_decode, too, make the same mask here forward and backward.
"""

from __future__ import annotations

import torch

from magi_attention.api.flash_attn_cache import Reach, attend_pages
from magi_attention.api.flash_attn_core import (
    Options,
    check_together,
    dropout_pattern,
    forward,
    to_softmax_lse,
    write_gradients,
)
from magi_attention.api.flash_attn_mask import Side, mask_of_batch, mask_of_packed, window_of
from magi_attention.errors import complaint

Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: Side,
    window_size_right: Side,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
    *,
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> Forward:
    """(out, softmax_lse, S_dmask, rng_state) of (batch, seqlen, nheads, headdim) tensors."""
    check_together(alibi_slopes, keep_first)
    window = window_size_left, window_size_right
    mask = mask_of_batch(q, k, window, causal, keep_first, force_fa_decode)
    options = Options(dropout_p, softmax_scale, softcap, alibi_slopes).with_state(q.device)
    out, lse = forward(q, k, v, mask, options)
    pattern = dropout_pattern(q, k, mask, options, None) if return_softmax else q.new_empty(0)
    return out, to_softmax_lse(lse), pattern, options.state


@torch.no_grad()
def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: Side,
    max_seqlen_k: Side,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: Side = -1,
    window_size_right: Side = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
    *,
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> Forward:
    """(out, softmax_lse, S_dmask, rng_state) of packed sequences.

    ``zero_tensors`` and ``num_splits`` change nothing: rows that see nothing are zero anyway, and splitting is a matter
    of the kernels.
    """
    options = Options(dropout_p, softmax_scale, softcap, alibi_slopes).with_state(q.device)
    window = window_size_left, window_size_right
    if block_table is not None:
        check_together(alibi_slopes, keep_first, return_softmax and dropout_p > 0)
        reach = Reach(window_of(window, causal, max_seqlen_k), keep_first, force_fa_decode)
        lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        out, lse = attend_pages(
            q, k, v, cu_seqlens_q, max_seqlen_q, lengths, block_table, leftpad_k, reach, options
        )
        return out, to_softmax_lse(lse), q.new_empty(0), options.state
    if leftpad_k is not None:
        remedy = "Begin the sequences behind their padding."
        raise NotImplementedError(complaint("leftpad_k", "None", "a tensor", remedy))
    check_together(alibi_slopes, keep_first)
    mask = mask_of_packed(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, causal,
        keep_first=keep_first, force_fa_decode=force_fa_decode, seqused_k=seqused_k,
    )  # fmt: skip
    out, lse = forward(q, k, v, mask, options)
    boundaries = (cu_seqlens_q, cu_seqlens_k)
    pattern = dropout_pattern(q, k, mask, options, boundaries) if return_softmax else q.new_empty(0)
    return out, to_softmax_lse(lse), pattern, options.state


@torch.no_grad()
def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: Side,
    window_size_right: Side,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    *,
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> torch.Tensor:
    """Writes the gradients into dq, dk and dv, those that are given; returns softmax_d, rowsum(dout * out)."""
    check_together(alibi_slopes, keep_first)
    window = window_size_left, window_size_right
    mask = mask_of_batch(q, k, window, causal, keep_first, force_fa_decode)
    options = Options(dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, None, rng_state)
    return write_gradients(dout, q, k, v, out, softmax_lse, mask, options, (dq, dk, dv))


@torch.no_grad()
def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: Side,
    max_seqlen_k: Side,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: Side,
    window_size_right: Side,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
    *,
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> torch.Tensor:
    """Writes the gradients into dq, dk and dv, those that are given; returns softmax_d, rowsum(dout * out).

    ``zero_tensors`` changes nothing: gradients of what nobody sees are zero anyway.
    """
    check_together(alibi_slopes, keep_first)
    window = window_size_left, window_size_right
    mask = mask_of_packed(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, causal,
        keep_first=keep_first, force_fa_decode=force_fa_decode,
    )  # fmt: skip
    options = Options(dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, None, rng_state)
    return write_gradients(dout, q, k, v, out, softmax_lse, mask, options, (dq, dk, dv))


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def maybe_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x`` with last stride 1, by a copy if it must be."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """The least multiple of m that is not below x."""
    return -(-x // m) * m


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Columns over which S_dmask is relative to one maximum: more than any row has."""
    return 1 << 30
