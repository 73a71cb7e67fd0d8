"""The attention modules of ``flash_attn.modules.mha``: on the kernels, and in torch operations with padding masks."""

from __future__ import annotations

import torch
from torch import nn

from magi_attention.api.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from magi_attention.api.flash_attn_mask import Side, Window
from magi_attention.errors import check_tensor, complaint


class _OnKernels(nn.Module):
    """What both modules on the kernels keep.

    Args:
        causal, softmax_scale, window_size, deterministic: as in ``flash_attn_func``.
        attention_dropout: probability of dropout while training.
        alibi_slopes: fp32 (nheads,) or (batch, nheads), kept as a buffer that is not saved; or None.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale, self.window_size = causal, softmax_scale, window_size
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.deterministic = deterministic

    def _settings(self, causal: bool | None) -> dict:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_OnKernels):
    """Attention of packed queries, keys and values, of batches or of packed sequences."""

    def forward(
        self,
        qkv: torch.Tensor,
        causal: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: Side | None = None,
    ) -> torch.Tensor:
        """(batch, seqlen, nheads, headdim), or packed (total, nheads, headdim).

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim); with cu_seqlens (total, 3, nheads, headdim).
            causal: None takes that of the module.
            cu_seqlens, max_seqlen: (batch + 1,) int32 boundaries of the sequences and the longest one.
        """
        settings = self._settings(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **settings)  # type: ignore[return-value]
        longest = _with_boundaries("max_seqlen", max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, **settings)  # type: ignore[return-value]


class FlashCrossAttention(_OnKernels):
    """Attention of queries to packed keys and values, of batches or of packed sequences."""

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        causal: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: Side | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_k: Side | None = None,
    ) -> torch.Tensor:
        """(batch, seqlen_q, nheads, headdim), or packed (total_q, nheads, headdim).

        Args:
            q: (batch, seqlen_q, nheads, headdim). kv: (batch, seqlen_k, 2, nheads_k, headdim). With cu_seqlens both
                without the batch axis, packed.
            causal: None takes that of the module.
            cu_seqlens, max_seqlen: of the queries; cu_seqlens_k, max_seqlen_k: of the keys.
        """
        settings = self._settings(causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **settings)  # type: ignore[return-value]
        if cu_seqlens_k is None:
            raise ValueError(complaint("cu_seqlens_k", "boundaries beside cu_seqlens", None))
        longest = _with_boundaries("max_seqlen", max_seqlen), _with_boundaries("max_seqlen_k", max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(  # type: ignore[return-value]
            q, kv, cu_seqlens, cu_seqlens_k, *longest, **settings
        )


def _with_boundaries(name: str, length: Side | None) -> Side:
    if length is None:
        raise ValueError(complaint(name, "the longest sequence beside cu_seqlens", None))
    return length


class CrossAttention(nn.Module):
    """The definition in torch operations, quadratic in memory, for any pattern of padding.

    Args:
        causal: aligned at the bottom-right corner. softmax_scale: headdim ** -0.5 when None.
        attention_dropout: probability of dropout while training.
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        causal: bool | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, seqlen_q, nheads, headdim); 0 for a query that sees nothing.

        Args:
            q: (batch, seqlen_q, nheads, headdim). kv: (batch, seqlen_k, 2, nheads_k, headdim).
            causal: None takes that of the module.
            key_padding_mask: (batch, seqlen_k) bool, True where a key may be seen; or None.
        """
        check_tensor("q", q, shape=("batch", "seqlen_q", "nheads", "headdim"))
        check_tensor("kv", kv, shape=(q.shape[0], "seqlen_k", 2, "nheads_k", q.shape[3]))
        (sq, sk), heads = (q.shape[1], kv.shape[1]), q.shape[2]
        if kv.shape[3] == 0 or heads % kv.shape[3]:
            raise ValueError(complaint("heads of q", f"a multiple of the {kv.shape[3]} of kv", heads))
        k, v = kv.repeat_interleave(heads // kv.shape[3], dim=3).unbind(2)
        seen = torch.ones(len(q), 1, sq, sk, dtype=torch.bool, device=q.device)
        if key_padding_mask is not None:
            check_tensor("key_padding_mask", key_padding_mask, shape=(len(q), sk), dtypes=(torch.bool,))
            seen = seen & key_padding_mask[:, None, None]
        if self.causal if causal is None else causal:
            seen = seen.tril(sk - sq)
        scale = q.shape[3] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.einsum("bthd,bshd->bhts", q, k * scale).masked_fill(~seen, -torch.inf)
        blind = ~seen.any(dim=3, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1, dtype=v.dtype).masked_fill(blind, 0.0)
        return torch.einsum("bhts,bshd->bthd", self.drop(weights), v)


class SelfAttention(CrossAttention):
    """``CrossAttention`` of packed queries, keys and values."""

    def forward(  # type: ignore[override]
        self, qkv: torch.Tensor, causal: bool | None = None, key_padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(batch, seqlen, nheads, headdim) of qkv (batch, seqlen, 3, nheads, headdim); the rest as in CrossAttention."""
        check_tensor("qkv", qkv, shape=("batch", "seqlen", 3, "nheads", "headdim"))
        return super().forward(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask)
