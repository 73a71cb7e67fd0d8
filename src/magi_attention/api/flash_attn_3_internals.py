"""The functions below FlashAttention 3's interface that Megatron, TransformerEngine and ring attention import.

Without autograd. softmax_lse is (batch, nheads, seqlen_q), or (nheads, total_q) packed, fp32, -inf for a row that sees
nothing. Other arguments and errors as in ``flash_attn_3.flash_attn_func`` and ``flash_attn_varlen_func``.
"""

from __future__ import annotations

import torch

from magi_attention.api import flash_attn_3 as fa3
from magi_attention.api.flash_attn_3_kvcache import flash_attn_with_kvcache
from magi_attention.api.flash_attn_core import Options, write_gradients, written_into
from magi_attention.api.flash_attn_mask import Side, Window, mask_of_batch, mask_of_packed
from magi_attention.errors import complaint

Optional = torch.Tensor | None


@torch.no_grad()
def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_new: Optional = None,
    v_new: Optional = None,
    qv: Optional = None,
    out_: Optional = None,
    cu_seqlens_q: Optional = None,
    cu_seqlens_k: Optional = None,
    cu_seqlens_k_new: Optional = None,
    seqused_q: Optional = None,
    seqused_k: Optional = None,
    max_seqlen_q: Side | None = None,
    max_seqlen_k: Side | None = None,
    page_table: Optional = None,
    kv_batch_idx: Optional = None,
    leftpad_k: Optional = None,
    rotary_cos: Optional = None,
    rotary_sin: Optional = None,
    seqlens_rotary: Optional = None,
    q_descale: Optional = None,
    k_descale: Optional = None,
    v_descale: Optional = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: Side = -1,
    window_size_right: Side = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Optional = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    """(out, softmax_lse, None, None); into ``out_`` if it is given.

    ``scheduler_metadata``, ``num_splits`` and ``pack_gqa`` change nothing here. With what belongs to a cache (k_new,
    v_new, cu_seqlens_k_new, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary), k and v are
    the cache and seqused_k how much of it is in use, as in ``flash_attn_with_kvcache``.
    """
    window = window_size_left, window_size_right
    new = (k_new, v_new, qv, rotary_cos, rotary_sin)
    places = (cu_seqlens_k_new, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary)
    if any(x is not None for x in (k_new, v_new, *places)):
        if cu_seqlens_k is not None or seqused_q is not None:
            remedy = "seqused_k has the lengths of a cache, cu_seqlens_q those of the queries."
            raise ValueError(complaint("cu_seqlens_k, seqused_q", "None with a cache", "a tensor", remedy))
        longest = max_seqlen_q if isinstance(max_seqlen_q, int) else None
        out, lse, *_ = flash_attn_with_kvcache(
            q, k, v, *new, seqused_k, kv_batch_idx, leftpad_k, page_table, cu_seqlens_q, cu_seqlens_k_new, longest,
            seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal, window, attention_chunk, softcap,
            rotary_interleaved, sm_margin=sm_margin, return_softmax_lse=True,
        )  # fmt: skip
        return written_into("out_", out_, out), lse, None, None
    rest = (softmax_scale, causal, qv, q_descale, k_descale, v_descale, window, attention_chunk, softcap)
    settings = {
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "sm_margin": sm_margin,
        "return_attn_probs": True,
    }
    if cu_seqlens_q is None and cu_seqlens_k is None:
        _refuse_lengths(seqused_q, seqused_k)
        out, lse = fa3.flash_attn_func(q, k, v, *rest, **settings)  # type: ignore[arg-type]
    else:
        cuts = _both(cu_seqlens_q, cu_seqlens_k)
        lengths = (_given(max_seqlen_q, len(q)), _given(max_seqlen_k, len(k)), seqused_q, seqused_k)
        out, lse = fa3.flash_attn_varlen_func(q, k, v, *cuts, *lengths, *rest, **settings)  # type: ignore[arg-type]
    return written_into("out_", out_, out), lse, None, None


@torch.no_grad()
def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: Optional = None,
    cu_seqlens_k: Optional = None,
    sequed_q: Optional = None,
    sequed_k: Optional = None,
    max_seqlen_q: Side | None = None,
    max_seqlen_k: Side | None = None,
    dq: Optional = None,
    dk: Optional = None,
    dv: Optional = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: Side = -1,
    window_size_right: Side = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    *,
    causal: bool = False,
    window_size: Window | None = None,
) -> torch.Tensor:
    """Writes the gradients into dq, dk and dv, those that are given; returns softmax_d, rowsum(dout * out).

    ``causal`` and ``window_size`` are what older releases call is_causal and the sides of the window.
    """
    window = (window_size_left, window_size_right) if window_size is None else window_size
    is_causal = is_causal or causal
    if cu_seqlens_q is None and cu_seqlens_k is None:
        _refuse_lengths(sequed_q, sequed_k)
        mask = mask_of_batch(q, k, window, is_causal)
    else:
        lengths = (_given(max_seqlen_q, len(q)), _given(max_seqlen_k, len(k)))
        mask = mask_of_packed(
            q, k, *_both(cu_seqlens_q, cu_seqlens_k), *lengths, window, is_causal, seqused_q=sequed_q, seqused_k=sequed_k
        )  # fmt: skip
    options = Options(0.0, softmax_scale, softcap, None, deterministic, sm_margin=sm_margin)
    return write_gradients(dout, q, k, v, out, softmax_lse, mask, options, (dq, dk, dv))


def _both(cu_seqlens_q: Optional, cu_seqlens_k: Optional) -> tuple[torch.Tensor, torch.Tensor]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError(complaint("cu_seqlens_q, cu_seqlens_k", "both or neither", "one"))
    return cu_seqlens_q, cu_seqlens_k


def _given(length: Side | None, otherwise: int) -> Side:
    return otherwise if length is None else length


def _refuse_lengths(*lengths: Optional) -> None:
    if any(x is not None for x in lengths):
        remedy = "Pack the sequences and give cu_seqlens_q and cu_seqlens_k."
        raise NotImplementedError(complaint("seqused of batches", "None", "a tensor", remedy))
