"""FlashAttention 2's six training functions, as ``from flash_attn import ...`` knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from magi_attention.api.flash_attn_cache import Reach, attend_pages
from magi_attention.api.flash_attn_core import (
    Options,
    Result,
    attend,
    check_together,
    needs_gradient,
    sink_of,
    to_softmax_lse,
)
from magi_attention.api.flash_attn_mask import (
    Side,
    Window,
    mask_of_batch,
    mask_of_packed,
    window_of,
    with_pages_together,
)
from magi_attention.errors import check_tensor

_Door = TypeVar("_Door", bound=Callable[..., Any])

_TEXT = """{summary}

A row sees the keys of its own sequence that the window shows, aligned at the bottom-right corner: query i of sq sees key
j of sk iff ``i + sk - sq - left <= j <= i + sk - sq + right``. A row that sees nothing has out 0 and zero gradients.

Args:
{tensors}
    dropout_p: probability with which a weight is dropped, below 1. ``torch.manual_seed`` repeats it.
    softmax_scale: headdim ** -0.5 when None.
    causal: sets the right side of the window to 0.
    window_size: (left, right), integers or 0-d integer tensors; a negative side, or one not shorter than the longest
        sequence of keys, is unlimited.
    softcap: scores become ``softcap * tanh(score / softcap)``; 0 or less is off.
    alibi_slopes: fp32 (nheads,) or (batch, nheads): adds ``-slope * |i + sk - sq - j|`` to the (capped) score.
    deterministic: the same gradient bits every time, see ``magi_attention.attention``.
    return_attn_probs: return softmax_lse and S_dmask as well.
    s_aux, learnable_sink: two names for logits in the softmax's denominator: one a head (nheads,), several (s_sink,
        nheads), or as many for each row ({rows}, s_sink, nheads). Differentiable.
    keep_first: this many first keys of each sequence stay visible although the left side of the window hides them.
    force_fa_decode: the left side is unlimited for sequences of exactly one query.

Returns:
    out {out} in q's dtype; with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse {lse} fp32, +inf for a row
    that sees nothing, and S_dmask (batch, nheads, rows, columns), both rounded up to 128, ``exp(score - the row's
    largest)``, negative where dropped; empty without dropout. S_dmask needs memory for the square: for tests.

Raises:
    TypeError, ValueError: arguments that do not fit together. NotImplementedError: a combination that no kernel has.
"""
_Q = "q: ({0}, nheads, headdim), fp16, bf16, fp32 or fp64; head dimensions of any size up to 256"
_KV = "({0}, {1}nheads_k, headdim); nheads_k divides nheads"
_CUTS = (
    "cu_seqlens{0}: (batch + 1,) int32 boundaries of the sequences{1}. On a GPU the host does not wait for them.\n"
    "max_seqlen{0}: longest of them, an integer or a 0-d tensor; {2}"
)


def documented(text: str, summary: str, lead: str, *tensors: str) -> Callable[[_Door], _Door]:
    """Give a function the docstring of its family: ``text`` with its own tensors, whose rows are ``lead``."""

    def document(function: _Door) -> _Door:
        lines = "\n".join("    " + line for text in tensors for line in text.split("\n"))
        lse = "(nheads, total_q)" if "total" in lead else "(batch, nheads, seqlen_q)"
        out = f"({lead}, nheads, headdim)"
        function.__doc__ = text.format(summary=summary, tensors=lines, rows=lead, out=out, lse=lse)
        return function

    return document


_VARLEN = (
    _CUTS.format("_q", " among the queries", "not needed here."),
    _CUTS.format("_k", " among the keys", "a side of the window that is not shorter is unlimited."),
)


@documented(
    _TEXT,
    "Attention of (batch, seqlen, nheads, headdim) tensors.",
    "batch, seqlen_q",
    _Q.format("batch, seqlen_q"),
    "k, v: " + _KV.format("batch, seqlen_k", ""),
)
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> Result:
    mask = mask_of_batch(q, k, window_size, causal, keep_first, force_fa_decode)
    check_together(alibi_slopes, keep_first)
    sink = sink_of(s_aux, learnable_sink)
    options = Options(dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, sink)
    return attend(q, k, v, mask, options, return_attn_probs)


@documented(
    _TEXT,
    "Attention of queries with packed keys and values.",
    "batch, seqlen_q",
    _Q.format("batch, seqlen_q"),
    "kv: " + _KV.format("batch, seqlen_k", "2, "),
)
def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **keywords: Any,
) -> Result:
    check_tensor("kv", kv, shape=("batch", "seqlen_k", 2, "nheads_k", "headdim"))
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, **keywords,
    )  # fmt: skip


@documented(
    _TEXT,
    "Attention of packed queries, keys and values, with as many heads of each.",
    "batch, seqlen",
    "qkv: (batch, seqlen, 3, nheads, headdim), fp16, bf16, fp32 or fp64; head dimensions of any size up to 256",
)
def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **keywords: Any,
) -> Result:
    check_tensor("qkv", qkv, shape=("batch", "seqlen", 3, "nheads", "headdim"))
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, **keywords,
    )  # fmt: skip


@documented(
    _TEXT,
    "Attention of sequences of different lengths, packed without padding.",
    "total_q",
    _Q.format("total_q"),
    "k, v: " + _KV.format("total_k", "") + "; with block_table (num_blocks, page size, nheads_k, headdim)",
    *_VARLEN,
    "block_table: (batch, blocks a sequence) int32: the pages with the keys of each sequence; they are copied together.",
)
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: Side,
    max_seqlen_k: Side,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> Result:
    sink = sink_of(s_aux, learnable_sink)
    options = Options(dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, sink)
    check_together(alibi_slopes, keep_first, block_table is not None and return_attn_probs and dropout_p > 0)
    if block_table is not None and not needs_gradient(q, k, v, sink):
        reach = Reach(window_of(window_size, causal, max_seqlen_k), keep_first, force_fa_decode)
        lengths = cu_seqlens_k.diff()
        out, lse = attend_pages(
            q, k, v, cu_seqlens_q, max_seqlen_q, lengths, block_table, None, reach, options
        )
        return (out, to_softmax_lse(lse), q.new_empty(0)) if return_attn_probs else out
    k, v, page_cols = with_pages_together(k, v, block_table)
    mask = mask_of_packed(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size, causal,
        keep_first=keep_first, force_fa_decode=force_fa_decode, page_cols=page_cols,
    )  # fmt: skip
    return attend(q, k, v, mask, options, return_attn_probs, (cu_seqlens_q, cu_seqlens_k))


@documented(
    _TEXT,
    "Attention of packed sequences of queries with packed keys and values.",
    "total_q",
    _Q.format("total_q"),
    "kv: " + _KV.format("total_k", "2, "),
    *_VARLEN,
)
def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: Side,
    max_seqlen_k: Side,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **keywords: Any,
) -> Result:
    check_tensor("kv", kv, shape=("total_k", 2, "nheads_k", "headdim"))
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, **keywords,
    )  # fmt: skip


@documented(
    _TEXT,
    "Attention of packed sequences of queries, keys and values in one tensor, with as many heads of each.",
    "total",
    "qkv: (total, 3, nheads, headdim), fp16, bf16, fp32 or fp64; head dimensions of any size up to 256",
    _CUTS.format("", "", "a side of the window that is not shorter is unlimited."),
)
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: Side,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **keywords: Any,
) -> Result:
    check_tensor("qkv", qkv, shape=("total", 3, "nheads", "headdim"))
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, **keywords,
    )  # fmt: skip
