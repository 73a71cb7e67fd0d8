"""FlashAttention 3's training functions, as ``from flash_attn_interface import ...`` knows them."""

from __future__ import annotations

import torch

from magi_attention.api.flash_attn_core import Options, forward, sink_of
from magi_attention.api.flash_attn_interface import documented
from magi_attention.api.flash_attn_mask import Side, Window, mask_of_batch, mask_of_packed
from magi_attention.errors import check_count, check_tensor, check_type, complaint
from magi_attention.mask import DeviceMask, Mask

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_TEXT = """{summary}

A row sees the keys of its own sequence that the window shows, aligned at the bottom-right corner: query i of sq sees key
j of sk iff ``i + sk - sq - left <= j <= i + sk - sq + right``. A row that sees nothing has out 0 and zero gradients.

Args:
{tensors}
    softmax_scale: headdim ** -0.5 when None; with qv (headdim + headdim_v) ** -0.5.
    causal: sets the right side of the window to 0.
    qv: ({rows}, nheads, headdim_v): adds ``qv . v`` to ``q . k``. Computed as one product of longer heads.
    q_descale, k_descale, v_descale: (batch, nheads_k) fp32, what q, k and v in fp8 e4m3 are multiplied by. fp8 is
        computed in bf16, out is bf16; without gradient.
    window_size: (left, right), integers or 0-d integer tensors; a negative side, or one not shorter than the longest
        sequence of keys, is unlimited.
    attention_chunk: a query sees only the keys of its own chunk of so many positions; 0 is off.
    softcap: scores become ``softcap * tanh(score / softcap)``; 0 or less is off.
    num_splits, pack_gqa: performance hints, without effect here.
    deterministic, sm_margin: see ``magi_attention.attention``.
    return_attn_probs: return softmax_lse as well.
    s_aux, learnable_sink: two names for logits in the softmax's denominator: one a head (nheads,), several (s_sink,
        nheads), or as many for each row ({rows}, s_sink, nheads). Differentiable.

Returns:
    out {out} in q's dtype; with return_attn_probs (out, softmax_lse): softmax_lse {lse} fp32, -inf for a row that sees
    nothing.

Raises:
    TypeError, ValueError: arguments that do not fit together. NotImplementedError: a combination that no kernel has.
"""
_HEADS = "q: ({0}, nheads, headdim); k: ({1}, nheads_k, headdim); v: ({1}, nheads_k, headdim_v); fp16, bf16, fp32 or fp64"


@documented(_TEXT, "Attention of (batch, seqlen, nheads, headdim) tensors.", "batch, seqlen_q",
            _HEADS.format("batch, seqlen_q", "batch, seqlen_k"))  # fmt: skip
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
) -> Result:
    _check_hints(attention_chunk, num_splits, pack_gqa)
    mask = mask_of_batch(q, k, window_size, causal, chunk=attention_chunk)
    q, k, v = _descaled(q, k, v, (q_descale, k_descale, v_descale), None)
    sink = sink_of(s_aux, learnable_sink)
    options = Options(0.0, softmax_scale, softcap, None, deterministic, sink, None, sm_margin)
    return _attend(q, k, v, qv, mask, options, return_attn_probs)


@documented(
    _TEXT,
    "Attention of sequences of different lengths, packed without padding.",
    "total_q",
    _HEADS.format("total_q", "total_k"),
    "cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 boundaries. On a GPU the host does not wait for them.",
    "max_seqlen_q, max_seqlen_k: the longest, integers or 0-d tensors; with attention_chunk max_seqlen_k is an integer.",
    "seqused_q, seqused_k: (batch,) int32, how many tokens of each sequence are in use.",
)
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: Side,
    max_seqlen_k: Side,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
) -> Result:
    _check_hints(attention_chunk, num_splits, pack_gqa)
    num_chunks = 0
    if attention_chunk:
        check_type("max_seqlen_k", max_seqlen_k, int, "With attention_chunk it sets the number of bands.")
        num_chunks = -(-int(max_seqlen_k) // attention_chunk)
    mask = mask_of_packed(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size, causal,
        seqused_q=seqused_q, seqused_k=seqused_k, chunk=attention_chunk, num_chunks=num_chunks,
    )  # fmt: skip
    q, k, v = _descaled(q, k, v, (q_descale, k_descale, v_descale), (cu_seqlens_q, cu_seqlens_k))
    sink = sink_of(s_aux, learnable_sink)
    options = Options(0.0, softmax_scale, softcap, None, deterministic, sink, None, sm_margin)
    return _attend(q, k, v, qv, mask, options, return_attn_probs)


@documented(
    _TEXT,
    "Attention of packed queries, keys and values.",
    "batch, seqlen",
    "qkv: (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 nheads_k, headdim) with num_heads_q",
    "num_heads_q: query heads of a qkv with four axes.",
)
def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
) -> Result:
    q, k, v = _unpacked(qkv, num_heads_q)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, sm_margin=sm_margin, return_attn_probs=return_attn_probs,
        s_aux=s_aux, learnable_sink=learnable_sink,
    )  # fmt: skip


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge results over disjoint keys, by ``lse = logsumexp(lse_partial)`` and weights ``exp(lse_partial - lse)``.

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, headdim) fp32. lse_partial: (num_splits, batch, seqlen, nheads)
            fp32, -inf where a part saw nothing; out_partial may hold anything there.
        out: where to write the result, or None. out_dtype: its dtype, when out is None; fp32 by default.

    Returns:
        out (batch, seqlen, nheads, headdim) and lse (batch, seqlen, nheads) fp32.
    """
    check_tensor("out_partial", out_partial, shape=("splits", "batch", "seqlen", "nheads", "headdim"),
                 dtypes=(torch.float32,))  # fmt: skip
    check_tensor("lse_partial", lse_partial, shape=out_partial.shape[:-1], dtypes=(torch.float32,))
    lse = torch.logsumexp(lse_partial, dim=0)
    weights = torch.exp(lse_partial - lse.masked_fill(torch.isneginf(lse), 0.0))[..., None]
    merged = torch.where(weights > 0, out_partial * weights, 0.0).sum(dim=0)
    if out is None:
        return merged.to(out_dtype or torch.float32), lse
    check_tensor("out", out, shape=merged.shape)
    return out.copy_(merged), lse


def _check_hints(attention_chunk: int, num_splits: int, pack_gqa: bool | None) -> None:
    check_count("attention_chunk", attention_chunk)
    check_count("num_splits", num_splits)
    if pack_gqa is not None:
        check_type("pack_gqa", pack_gqa, bool)


def _unpacked(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_type("qkv", qkv, torch.Tensor)
    if qkv.dim() == 5:
        check_tensor("qkv", qkv, shape=("batch", "seqlen", 3, "nheads", "headdim"))
        if num_heads_q not in (None, qkv.shape[3]):
            remedy = "qkv with five axes has as many heads of each."
            raise ValueError(complaint("num_heads_q", f"None or {qkv.shape[3]}", num_heads_q, remedy))
        q, k, v = qkv.unbind(2)
        return q, k, v
    check_tensor("qkv", qkv, shape=("batch", "seqlen", "heads", "headdim"))
    if num_heads_q is None or not 0 < num_heads_q < qkv.shape[2] or (qkv.shape[2] - num_heads_q) % 2:
        expected = f"the number of query heads among {qkv.shape[2]}, an even number of others behind"
        raise ValueError(complaint("num_heads_q", expected, num_heads_q))
    others = (qkv.shape[2] - num_heads_q) // 2
    q, k, v = qkv.split([num_heads_q, others, others], dim=2)
    return q, k, v


def _descaled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: tuple[torch.Tensor | None, ...],
    boundaries: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp8 as bf16, times the scale of each sequence and K/V head; other dtypes as they are, without scales."""
    if q.dtype != torch.float8_e4m3fn:
        if any(scale is not None for scale in scales):
            raise ValueError(
                complaint("descales", "None without fp8 inputs", "a tensor", "Scale q, k, v themselves.")
            )
        return q, k, v
    found = []
    for name, x, scale, cuts in zip("qkv", (q, k, v), scales, [None] * 3 if boundaries is None else
                                    [boundaries[0], boundaries[1], boundaries[1]], strict=True):  # fmt: skip
        y = x.to(torch.bfloat16)
        if scale is not None:
            batch = x.shape[0] if cuts is None else len(cuts) - 1
            check_tensor(f"{name}_descale", scale, shape=(batch, k.shape[-2]), dtypes=(torch.float32,))
            scale = scale.repeat_interleave(x.shape[-2] // k.shape[-2], dim=1)
            if cuts is None:
                scale = scale[:, None]
            else:
                token = torch.arange(len(x), device=x.device, dtype=cuts.dtype)
                scale = scale[torch.bucketize(token, cuts[1:], right=True).clamp(max=batch - 1)]
            y = (y * scale[..., None]).to(torch.bfloat16)
        found.append(y)
    return found[0], found[1], found[2]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None,
    mask: Mask | DeviceMask,
    options: Options,
    return_attn_probs: bool,
) -> Result:
    check_type("return_attn_probs", return_attn_probs, bool)
    if qv is not None:
        check_tensor("qv", qv, shape=(*q.shape[:-1], v.shape[-1]), dtypes=(q.dtype,), device=q.device)
        q, k = torch.cat([q, qv], dim=-1), torch.cat([k, v], dim=-1)
    out, lse = forward(q, k, v, mask, options)
    return (out, lse.transpose(-1, -2).contiguous()) if return_attn_probs else out
