"""The attention layers of ``flash_attn.modules.mha``: projections around the attention modules, on one or more ranks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from magi_attention.api.alibi import get_alibi_slopes
from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache
from magi_attention.api.flash_attn_mask import Side, Window
from magi_attention.api.mha import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention
from magi_attention.api.rotary import RotaryEmbedding, apply_rotary_emb
from magi_attention.api.tensor_parallel import ColumnParallelLinear, RowParallelLinear, local_share
from magi_attention.errors import check_count, complaint

_UNLIMITED: Window = (-1, -1)


class InferenceParams(Protocol):
    """Where a generation stands, as FlashAttention's ``utils.generation`` has it.

    Attributes:
        max_seqlen: positions that the caches have. seqlen_offset: positions in use.
        batch_size_offset: first row of the caches that this batch has.
        key_value_memory_dict: caches by layer, from ``allocate_inference_cache``, or made by the first call.
        lengths_per_sample: None, or (batch,) int32, positions in use of each entry instead of ``seqlen_offset``.
    """

    max_seqlen: int
    seqlen_offset: int
    batch_size_offset: int
    key_value_memory_dict: dict[Any, torch.Tensor]
    lengths_per_sample: torch.Tensor | None


class _Layer(nn.Module):
    """What both layers have between their projections; arguments as in ``MHA``."""

    rotary_emb: RotaryEmbedding
    out_proj: nn.Linear

    def __init__(
        self,
        heads: tuple[int, int],
        head_dim: int,
        causal: bool,
        dropout: float,
        softmax_scale: float | None,
        layer_idx: int | None,
        rotary: tuple[int, float, float | None, bool],
        slopes: torch.Tensor | None,
        window_size: Window,
        use_flash_attn: bool,
        checkpointing: bool,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        if not use_flash_attn and (window_size != _UNLIMITED or slopes is not None):
            remedy = "The modules in torch operations have neither windows nor ALiBi."
            raise ValueError(
                complaint("use_flash_attn", "True with window_size or use_alibi", use_flash_attn, remedy)
            )
        self.num_heads, self.num_heads_kv = heads
        self.head_dim, self.causal, self.softmax_scale = head_dim, causal, softmax_scale
        self.layer_idx, self.window_size = layer_idx, window_size
        self.use_flash_attn, self.checkpointing = use_flash_attn, checkpointing
        self.rotary_emb_dim, base, scale_base, interleaved = rotary
        if self.rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(self.rotary_emb_dim, base, interleaved, scale_base, device)
        settings: dict[str, Any] = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
        }
        if use_flash_attn:
            settings |= {"window_size": window_size, "alibi_slopes": slopes}
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**settings)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**settings)

    def _attend_packed(self, qkv: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Self-attention of ``qkv`` (..., 3, heads, head_dim)."""
        if self.rotary_emb_dim > 0:
            if settings.get("cu_seqlens") is not None:  # turning parts them anyway
                return self._attend(qkv[:, 0], qkv[:, 1:], **settings)
            qkv = self.rotary_emb(qkv)
        return self._run(self.inner_attn, qkv, **settings)

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Attention of ``q`` (..., heads, head_dim) to ``kv`` (..., 2, heads_kv, head_dim)."""
        cu_seqlens, longest = settings.get("cu_seqlens"), settings.get("max_seqlen")
        if cu_seqlens is not None:
            settings = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": longest, **settings}
        if self.rotary_emb_dim > 0:
            if cu_seqlens is None:
                q, kv = self.rotary_emb(q, kv)
            else:
                q, kv = self._turned_sequences(q, kv, cu_seqlens, longest)
        return self._run(self.inner_cross_attn, q, kv, **settings)

    def _heads(self, q: torch.Tensor) -> torch.Tensor:
        return q.unflatten(-1, (self.num_heads, self.head_dim))

    def _pairs(self, kv: torch.Tensor) -> torch.Tensor:
        return kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))

    def _run(self, inner: nn.Module, *tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
        if self.checkpointing:
            return checkpoint(inner, *tensors, use_reentrant=False, **settings)
        return inner(*tensors, **settings)

    def _turned_sequences(
        self, q: torch.Tensor, kv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of packed sequences, turned by their positions within these."""
        longest = int(max_seqlen)
        (cos, sin), (cos_k, sin_k) = self.rotary_emb.tables(longest, q.device, q.dtype)
        settings = (self.rotary_emb.interleaved, False, 0, cu_seqlens, longest)
        k = apply_rotary_emb(kv[:, 0], cos_k, sin_k, *settings)
        return apply_rotary_emb(q, cos, sin, *settings), torch.stack([k, kv[:, 1]], dim=1)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """An uninitialised cache (batch_size, max_seqlen, 2, heads_kv, head_dim), in the dtype of the projection."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=weight.dtype if dtype is None else dtype, device=weight.device)

    @torch.no_grad()
    def _attend_cached(self, q: torch.Tensor, kv: torch.Tensor, params: InferenceParams) -> torch.Tensor:
        """Attention to the keys in the layer's cache and to new ones, which are written behind them."""
        if self.layer_idx is None:
            raise ValueError(
                complaint("layer_idx", "the layer's key in key_value_memory_dict", None, "Number the layers.")
            )
        if self.training and self.inner_attn.drop.p > 0:
            raise ValueError(complaint("inference_params", "a layer in eval mode", "dropout while training"))
        cache = params.key_value_memory_dict.get(self.layer_idx)
        if cache is None:
            size = params.batch_size_offset + len(q)
            cache = self.allocate_inference_cache(size, params.max_seqlen, kv.dtype)
            params.key_value_memory_dict[self.layer_idx] = cache
        rows = slice(params.batch_size_offset, params.batch_size_offset + len(q))
        used: int | torch.Tensor = params.seqlen_offset
        if params.lengths_per_sample is not None:
            used = params.lengths_per_sample[rows].to(torch.int32)
        if self.rotary_emb_dim > 0:
            q, kv = self.rotary_emb(q, kv, used, params.max_seqlen)
        return flash_attn_with_kvcache(  # type: ignore[return-value]
            q,
            cache[rows, :, 0],
            cache[rows, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=used,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_size=self.window_size,
            alibi_slopes=getattr(self.inner_attn, "alibi_slopes", None),
        )


def _check_heads(embed_dim: int, num_heads: int, num_heads_kv: int) -> None:
    for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_heads_kv", num_heads_kv)):
        check_count(name, value)
    if num_heads == 0 or embed_dim % num_heads:
        raise ValueError(complaint("embed_dim", f"a multiple of num_heads {num_heads}", embed_dim))
    if num_heads_kv == 0 or num_heads % num_heads_kv:
        raise ValueError(complaint("num_heads", f"a multiple of num_heads_kv {num_heads_kv}", num_heads))


class MHA(_Layer):
    """Multi-head attention with its projections.

    Args:
        embed_dim: of the input, a multiple of ``num_heads``.
        num_heads, num_heads_kv: of the queries, and of keys and values (as many when None).
        cross_attn: queries from one input, keys and values from another: ``Wq`` and ``Wkv`` instead of ``Wqkv``.
        qkv_proj_bias, out_proj_bias: whether the projections have biases.
        dropout: of weights, while training. softmax_scale: head_dim ** -0.5 when None.
        causal: aligned at the bottom-right corner.
        layer_idx: key of the layer's cache, for generation.
        dwconv: convolve each projected channel with its two predecessors in time.
        rotary_emb_dim: channels of a head that rotary embedding turns; 0 is off. The other rotary arguments: as in
            ``RotaryEmbedding``.
        use_alibi: linear biases by ``get_alibi_slopes``. window_size: as in ``flash_attn_func``.
        fused_bias_fc: accepted, a matter of speed there.
        use_flash_attn: attend by kernels, which take packed sequences, or in torch operations, which take padding masks.
        return_residual: return the input, too.
        checkpointing: compute the attention again in the backward instead of keeping what it needs.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: sizes that do not fit; what the chosen attention does not have.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = _UNLIMITED,
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        _check_heads(embed_dim, num_heads, heads_kv)
        if cross_attn and rotary_emb_dim > 0:
            raise ValueError(complaint("rotary_emb_dim", "0 with cross_attn", rotary_emb_dim))
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        rotary = (rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved)
        super().__init__(
            (num_heads, heads_kv), embed_dim // num_heads, causal, dropout, softmax_scale, layer_idx, rotary, slopes,
            window_size, use_flash_attn, checkpointing, device,
        )  # fmt: skip
        self.embed_dim, self.cross_attn = embed_dim, cross_attn
        self.dwconv, self.return_residual = dwconv, return_residual
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.head_dim * heads_kv
        parts = {"q": embed_dim, "kv": kv_dim} if cross_attn else {"qkv": embed_dim + kv_dim}
        for name, size in parts.items():
            self.add_module("W" + name, nn.Linear(embed_dim, size, bias=qkv_proj_bias, **made))
            if dwconv:
                convolution = nn.Conv1d(size, size, kernel_size=3, padding=2, groups=size, **made)
                self.add_module("dwconv_" + name, convolution)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **made)

    def forward(
        self,
        x: torch.Tensor,
        x_kv: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: Side | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The attention's output, shaped as the queries' input; with return_residual also that input.

        Args:
            x: (batch, seqlen, embed_dim), or with cu_seqlens packed (total, embed_dim).
            x_kv: with cross_attn, where keys and values come from; x itself when None.
            key_padding_mask: (batch, seqlen_k) bool, True where a key may be seen; without use_flash_attn.
            cu_seqlens, max_seqlen: (batch + 1,) int32 boundaries and the longest sequence; with use_flash_attn.
            mixer_subset: with cross_attn, an index of the positions whose output is wanted.
            inference_params: generation: keys go to and come from the layer's cache. Without gradients.
            kwargs: for the attention module, such as cu_seqlens_k.

        Raises:
            ValueError: arguments that do not go together.
        """
        self._check_call(x_kv, key_padding_mask, cu_seqlens, mixer_subset, inference_params)
        settings = kwargs
        if self.use_flash_attn and cu_seqlens is not None:
            settings = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        elif not self.use_flash_attn:
            settings = {"key_padding_mask": key_padding_mask, **kwargs}
        if self.cross_attn:
            asking = x if mixer_subset is None else x[:, mixer_subset]
            q, kv = self._projected("q", asking), self._projected("kv", x if x_kv is None else x_kv)
        else:
            qkv = self._projected("qkv", x)
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        if inference_params is not None:
            context = self._attend_cached(self._heads(q), self._pairs(kv), inference_params)
        elif not self.cross_attn and self.num_heads == self.num_heads_kv:
            context = self._attend_packed(qkv.unflatten(-1, (3, self.num_heads, self.head_dim)), **settings)
        else:
            context = self._attend(self._heads(q), self._pairs(kv), **settings)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _projected(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = getattr(self, "W" + name)(x)
        if not self.dwconv:
            return y
        return getattr(self, "dwconv_" + name)(y.transpose(1, 2))[..., :-2].transpose(1, 2)

    def _check_call(
        self, x_kv: Any, key_padding_mask: Any, cu_seqlens: Any, mixer_subset: Any, inference_params: Any
    ) -> None:
        given = {
            "x_kv": x_kv is not None and not self.cross_attn,
            "mixer_subset": mixer_subset is not None and not self.cross_attn,
            "key_padding_mask": key_padding_mask is not None
            and (self.use_flash_attn or inference_params is not None),
            "cu_seqlens": cu_seqlens is not None
            and (not self.use_flash_attn or self.dwconv or inference_params is not None),
            "inference_params": inference_params is not None and (self.dwconv or self.cross_attn),
        }
        for name, is_wrong in given.items():
            if is_wrong:
                setting = f"cross_attn={self.cross_attn}, use_flash_attn={self.use_flash_attn}, dwconv={self.dwconv}"
                remedy = "MHA.forward says what goes together."
                raise ValueError(complaint(name, f"None with {setting}", "a value", remedy))


class ParallelMHA(_Layer):
    """``MHA`` with its heads shared out over the ranks of a process group (tensor parallelism).

    Rank r has the rows of ``Wqkv`` and the columns of ``out_proj`` that belong to its heads; the bias of ``out_proj`` is
    rank 0's.

    Args:
        process_group: the ranks; its backend must match the device.
        sequence_parallel: input and output are this rank's part of the tokens, else all of them on every rank.
        The others: as in ``MHA``.

    Raises:
        TypeError, ValueError: as ``MHA``; fewer key heads than ranks.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: dist.ProcessGroup,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = _UNLIMITED,
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        all_kv = num_heads if num_heads_kv is None else num_heads_kv
        _check_heads(embed_dim, num_heads, all_kv)
        world, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        if all_kv < world:
            raise ValueError(complaint("num_heads_kv", f"at least one for each of {world} ranks", all_kv))
        group, head_dim = num_heads // all_kv, embed_dim // num_heads
        begin, heads_kv = local_share(all_kv, world, rank)
        slopes = None
        if use_alibi:
            own = slice(begin * group, (begin + heads_kv) * group)
            slopes = torch.tensor(get_alibi_slopes(num_heads)[own], device=device)
        rotary = (rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved)
        super().__init__(
            (heads_kv * group, heads_kv), head_dim, causal, dropout, softmax_scale, layer_idx, rotary, slopes,
            window_size, use_flash_attn, checkpointing, device,
        )  # fmt: skip
        self.embed_dim, self.process_group = embed_dim, process_group
        parallel: dict[str, Any] = {
            "process_group": process_group,
            "sequence_parallel": sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        local = heads_kv * group * head_dim
        self.Wqkv = ColumnParallelLinear(
            embed_dim, local + 2 * heads_kv * head_dim, bias=qkv_proj_bias, **parallel
        )
        self.out_proj = RowParallelLinear(local, embed_dim, bias=out_proj_bias and rank == 0, **parallel)

    def forward(
        self,
        x: torch.Tensor,
        seqlen: int | None = None,
        inference_params: InferenceParams | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: Side | None = None,
    ) -> torch.Tensor:
        """The output of all heads, shaped as x.

        Args:
            x: (batch, seqlen, embed_dim), or (tokens, embed_dim): batch * seqlen of them with ``seqlen``, packed ones
                with cu_seqlens. With sequence_parallel the rank's part of the first axis, in the order of the ranks.
            cu_seqlens, max_seqlen: of all tokens. inference_params: as in ``MHA``.

        Raises:
            ValueError: arguments that do not go together.
        """
        if cu_seqlens is not None and (not self.use_flash_attn or inference_params is not None):
            raise ValueError(
                complaint("cu_seqlens", "None, or use_flash_attn without inference_params", "a value")
            )
        qkv = self.Wqkv(x)
        if seqlen is not None:
            qkv = qkv.unflatten(0, (-1, seqlen))
        own = self.num_heads * self.head_dim
        q, kv = self._heads(qkv[..., :own]), self._pairs(qkv[..., own:])
        if inference_params is not None:
            context = self._attend_cached(q, kv, inference_params)
        else:
            settings = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            context = self._attend(q, kv, **settings)
        if seqlen is not None:
            context = context.flatten(0, 1)
        return self.out_proj(context.flatten(-2))
