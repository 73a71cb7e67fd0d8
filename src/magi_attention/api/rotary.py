"""Rotary position embeddings under the names of ``flash_attn.layers.rotary`` and ``flash_attn.ops.triton.rotary``.

A token at position p turns pair j of its first ``rotary_dim`` channels by the angle that row p, column j of the
tables gives (Su et al. 2021, "RoFormer"). The pairs are (0, 1), (2, 3), ... when interleaved, and otherwise
(0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ... Angles are applied in float32 (float64 for float64 tensors) and the
result is rounded to the dtype of x. Nothing here waits for a device.

In place means that x holds the result and is what is returned. A leaf that requires a gradient cannot get a history:
it holds the result as well, but go on with what is returned, a copy that has one. What ``unbind`` and ``split`` return
under autograd torch refuses to write; rotate such tensors out of place or the packed tensor in place.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import torch

from magi_attention.errors import check_count, check_number, check_tensor, check_type, complaint

__all__ = [
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]

Index: TypeAlias = tuple[int | slice, ...]
Rows: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_ALL = slice(None)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Turn the first ``rotary_dim`` channels of x by the angles of its positions; the other channels stay.

    Args:
        x: (b, s, h, d), or with ``cu_seqlens`` (total, h, d); float32, bfloat16, float16 or float64.
        cos, sin: (s_rotary, rotary_dim / 2), rotary_dim <= d, of any of these dtypes, on x's device. Out of place
            they are differentiable too.
        seqlen_offsets: position of the first token of every sequence, an int or (b,) int32 or int64 on x's device.
        cu_seqlens: (b + 1,) int32 on x's device; sequence i is x[cu_seqlens[i]:cu_seqlens[i + 1]]. Tokens
            after the last sequence stay as they are.
        max_seqlen: with ``cu_seqlens``, no sequence is longer. Results do not depend on it.
        interleaved: which channels make a pair.
        inplace: write the result into x.
        conjugate: turn the other way round.

    Returns:
        Shape and dtype of x. A token that lies beyond the tables (which only the device may know) stays as it is.

    Raises:
        TypeError: not tensors, or not of these dtypes.
        ValueError: wrong shapes or devices, tables too short or too wide, ``cu_seqlens`` without ``max_seqlen`` or
            the reverse, tables that require a gradient in place; on the CPU, also illegal ``cu_seqlens`` or
            offsets.
    """
    for name, value in (("interleaved", interleaved), ("inplace", inplace), ("conjugate", conjugate)):
        check_type(name, value, bool)
    cos_rows, sin_rows = _rows("x", x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if conjugate:
        sin_rows = -sin_rows
    if inplace:
        return _turn_in_place(x, ((...,),), (cos_rows, sin_rows), interleaved)
    return _turn(x, cos_rows, sin_rows, interleaved)


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """``apply_rotary`` with its arguments in another order. Shapes, dtypes and errors are the same."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """``apply_rotary`` with tables that have one row per token instead of one per position.

    Args:
        x: (..., s, h, d), float32, bfloat16, float16 or float64.
        cos, sin: (s, rotary_dim / 2) or (..., s, rotary_dim / 2), rotary_dim <= d, any of these dtypes.
        interleaved: which channels make a pair.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError, ValueError: not tensors of these shapes, dtypes and devices.
    """
    check_type("interleaved", interleaved, bool)
    check_tensor("x", x, dtypes=_FLOATS)
    if x.dim() < 3:
        raise ValueError(complaint("x shape", "(..., seqlen, num_heads, head_dim)", tuple(x.shape)))
    check_type("cos", cos, torch.Tensor)
    tokens = x.shape[-3:-2] if cos.dim() == 2 else x.shape[:-2]
    _check_tables(x, cos, sin, (*tokens, "rotary_dim / 2"))
    return _turn(x, *_beside_heads(x, cos, sin), interleaved)


def rotate_half(x: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Every pair (a, b) of channels becomes (-b, a): a quarter turn.

    Args:
        x: (..., d), d even, any dtype with a sign.
        interleaved: which channels make a pair.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError, ValueError: not a tensor, or an odd number of channels.
    """
    check_type("interleaved", interleaved, bool)
    check_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(complaint("x shape", "(..., d) with an even d", tuple(x.shape)))
    first, second = _pairs(x, interleaved)
    return _join(-second, first, interleaved)


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """``apply_rotary`` in place on the queries and keys of a packed tensor.

    Args:
        qkv: (b, s, 3, h, d), or (b, s, num_heads_q + 2 * num_heads_k, d) with ``num_heads_q``.
        cos, sin: (s_rotary, rotary_dim / 2), for the queries and, without ``cos_k`` and ``sin_k``, for the keys.
        cos_k, sin_k: tables of the keys, both or neither.
        interleaved, seqlen_offsets: as in ``apply_rotary``.
        num_heads_q: number of query heads, needed with four axes.

    Returns:
        qkv.

    Raises:
        TypeError, ValueError: as ``apply_rotary``; heads that do not add up, one table of the keys alone.
    """
    check_type("interleaved", interleaved, bool)
    parts = _queries_and_keys(qkv, num_heads_q)
    rows: tuple[torch.Tensor, ...] = _rows("q", qkv[parts[0]], cos, sin, seqlen_offsets)
    if (cos_k is None) != (sin_k is None):
        raise ValueError(complaint("cos_k and sin_k", "both or neither", "one of them"))
    if cos_k is not None and sin_k is not None:
        rows = (*rows, *_rows("k", qkv[parts[1]], cos_k, sin_k, seqlen_offsets))
    return _turn_in_place(qkv, parts, rows, interleaved)


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
) -> torch.Tensor:
    """``apply_rotary`` in place on the keys of a packed tensor.

    Args:
        kv: (b, s, 2, h, d).
        cos, sin: (s_rotary, rotary_dim / 2).
        interleaved, seqlen_offsets: as in ``apply_rotary``.

    Returns:
        kv.

    Raises:
        TypeError, ValueError: as ``apply_rotary``.
    """
    check_type("interleaved", interleaved, bool)
    check_tensor("kv", kv, shape=("batch", "seqlen", 2, "num_heads_k", "head_dim"), dtypes=_FLOATS)
    keys: Index = (_ALL, _ALL, 0)
    return _turn_in_place(kv, (keys,), _rows("k", kv[keys], cos, sin, seqlen_offsets), interleaved)


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with tables that are made when a longer sequence comes, and kept.

    Pair j turns by p / base^(2 j / dim) at position p. With ``scale_base`` the queries are also multiplied by
    ((2 j / dim + 0.4) / 1.4)^((p - m) / scale_base) and the keys divided by it, m being the middle of the tables
    (XPos, Sun et al. 2022). m cancels between queries and keys of the same tables, so give all steps of a
    generation that keeps its keys the same ``max_seqlen``.

    Args:
        dim: rotary_dim, even.
        base: of the angles, positive.
        interleaved: which channels make a pair.
        scale_base: None, or positive; 512 is usual.
        device: of the buffers.

    Raises:
        TypeError, ValueError: not such numbers.
    """

    inv_freq: torch.Tensor
    scale: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        if dim == 0 or dim % 2:
            raise ValueError(complaint("dim", "a positive even number", dim, "Channels turn in pairs."))
        for name, value in (("base", base), ("scale_base", 1.0 if scale_base is None else scale_base)):
            check_number(name, value)
            if value <= 0:
                raise ValueError(complaint(name, "a positive number", value))
        check_type("interleaved", interleaved, bool)
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        scale = None if scale_base is None else self._decays(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: torch.Tensor | None = None
        self._sin_cached: torch.Tensor | None = None
        self._cos_k_cached: torch.Tensor | None = None
        self._sin_k_cached: torch.Tensor | None = None

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: int | torch.Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Turn queries and keys in place.

        Args:
            qkv: (b, s, 3, h, d), or (b, s, num_heads_q + 2 * num_heads_k, d) with ``num_heads_q``; with ``kv``
                the queries (b, s, h, d).
            kv: None, or (b, s_k, 2, num_heads_k, d) like qkv.
            seqlen_offset: position of the first token, an int or (b,) int32 or int64 on the device of qkv.
            max_seqlen: tables have at least so many positions; needed when ``seqlen_offset`` is a tensor.
            num_heads_q: number of query heads in a qkv of four axes.

        Returns:
            qkv, or with ``kv`` the pair of both.

        Raises:
            TypeError, ValueError: as ``apply_rotary_emb_qkv_``; a tensor ``seqlen_offset`` without
                ``max_seqlen``, ``num_heads_q`` with ``kv``.
        """
        num_positions = self._num_positions(qkv, kv, seqlen_offset, max_seqlen, num_heads_q)
        tables, tables_k = self.tables(num_positions, qkv.device, qkv.dtype)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, *tables, *tables_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, *tables, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, *tables_k, self.interleaved, seqlen_offset)

    def tables(
        self, num_positions: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """(cos, sin) of the queries and of the keys, each (at least num_positions, dim / 2)."""
        self._update_cos_sin_cache(num_positions, device, dtype)
        assert self._cos_cached is not None and self._sin_cached is not None
        tables = self._cos_cached, self._sin_cached
        if self._cos_k_cached is None or self._sin_k_cached is None:
            return tables, tables
        return tables, (self._cos_k_cached, self._sin_k_cached)

    @staticmethod
    def _num_positions(
        qkv: torch.Tensor,
        kv: torch.Tensor | None,
        seqlen_offset: int | torch.Tensor,
        max_seqlen: int | None,
        num_heads_q: int | None,
    ) -> int:
        """Length of the tables, after the checks that must come before the first of two tensors is written."""
        check_tensor("qkv" if kv is None else "q", qkv, dtypes=_FLOATS)
        if qkv.dim() not in ((4, 5) if kv is None else (4,)):
            expected = "four or five axes" if kv is None else "(batch, seqlen, num_heads, head_dim)"
            raise ValueError(complaint("qkv" if kv is None else "q", expected, tuple(qkv.shape)))
        if kv is not None:
            shape = (qkv.shape[0], "seqlen_k", 2, "num_heads_k", qkv.shape[-1])
            check_tensor("kv", kv, shape=shape, dtypes=(qkv.dtype,), device=qkv.device)
            if num_heads_q is not None:
                raise ValueError(complaint("num_heads_q", "None with kv", num_heads_q))
        if max_seqlen is not None:
            check_count("max_seqlen", max_seqlen)
        if not isinstance(seqlen_offset, torch.Tensor):
            check_count("seqlen_offset", seqlen_offset)
            longest = max(qkv.shape[1], 0 if kv is None else kv.shape[1])
            return max(longest + seqlen_offset, max_seqlen or 0)
        if max_seqlen is None:
            remedy = "Pass the end of the longest sequence: reading offsets would wait for the device."
            raise ValueError(complaint("max_seqlen with a tensor seqlen_offset", "an integer", None, remedy))
        return max_seqlen

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Tables of at least ``seqlen`` rows; embeddings derived from this one elsewhere call it by this name."""
        device = self.inv_freq.device if device is None else torch.device(device)
        dtype = dtype or torch.float32
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and (cached.device, cached.dtype) == (device, dtype)
            and (torch.compiler.is_compiling() or not _is_lost_to_autograd(cached))
        ):
            return
        # A module that was cast to half precision has no frequencies left that are exact enough for angles.
        exact = self.inv_freq.dtype == torch.float32
        frequencies = self.inv_freq.to(device) if exact else self._frequencies(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        self._seq_len_cached = seqlen
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        decays = self.scale.to(device) if self.scale.dtype == torch.float32 else self._decays(device)
        growth = decays ** ((positions - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * growth).to(dtype), (sin * growth).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / growth).to(dtype), (sin / growth).to(dtype)

    def _frequencies(self, device: torch.device | str | None) -> torch.Tensor:
        return 1.0 / self.base ** (self._even_channels(device) / self.dim)

    def _decays(self, device: torch.device | str | None) -> torch.Tensor:
        return (self._even_channels(device) / self.dim + 0.4) / 1.4

    def _even_channels(self, device: torch.device | str | None) -> torch.Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)


class _TurnInPlace(torch.autograd.Function):
    """Turn parts of x in its own memory; the gradient is turned back in a copy."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, parts: tuple[Index, ...], interleaved: bool, *rows: torch.Tensor
    ) -> torch.Tensor:
        ctx.parts, ctx.interleaved = parts, interleaved
        ctx.save_for_backward(*rows)
        ctx.mark_dirty(x)
        _write_turned(x, parts, rows, interleaved)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows = [-row if place % 2 else row for place, row in enumerate(ctx.saved_tensors)]
        grad = grad.clone()
        _write_turned(grad, ctx.parts, rows, ctx.interleaved)
        return (grad, *[None] * (2 + len(rows)))


def _turn_in_place(
    x: torch.Tensor, parts: tuple[Any, ...], rows: tuple[torch.Tensor, ...], interleaved: bool
) -> torch.Tensor:
    """x with its ``parts`` turned by ``rows``: cosines and sines of each part in turn, or one pair for all."""
    if torch.is_grad_enabled() and any(row.requires_grad for row in rows):
        remedy = "Detach them, or use apply_rotary_emb with inplace=False, which gives them gradients."
        raise ValueError(complaint("cos and sin in place", "tensors without gradient", "a gradient", remedy))
    if not (torch.is_grad_enabled() and x.requires_grad):
        _write_turned(x, parts, rows, interleaved)
        return x
    if not (x if x._base is None else x._base).is_leaf:
        return _TurnInPlace.apply(x, parts, interleaved, *rows)
    out = _TurnInPlace.apply(x.clone(), parts, interleaved, *rows)
    x.detach().copy_(out.detach())
    return out


def _write_turned(x: torch.Tensor, parts: Any, rows: Any, interleaved: bool) -> None:
    pairs = itertools.cycle(zip(rows[::2], rows[1::2], strict=True))
    for part, (cos, sin) in zip(parts, pairs, strict=False):
        heads = x[part]
        heads[..., : 2 * cos.shape[-1]].copy_(_turned(heads, cos, sin, interleaved))


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    turned = _turned(x, cos, sin, interleaved).to(x.dtype)
    return torch.cat((turned, x[..., turned.shape[-1] :]), dim=-1)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The first ``rotary_dim`` channels of x (..., d), turned, in the dtype of the tables."""
    first, second = _pairs(x[..., : 2 * cos.shape[-1]].to(cos.dtype), interleaved)
    return _join(first * cos - second * sin, first * sin + second * cos, interleaved)


def _pairs(x: torch.Tensor, interleaved: bool) -> Rows:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _join(first: torch.Tensor, second: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def _beside_heads(x: torch.Tensor, *tables: torch.Tensor) -> Rows:
    """Tables (..., s, rotary_dim / 2) as (..., s, 1, rotary_dim / 2), in the dtype to compute in."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(dtype).unsqueeze(-2) for table in tables)
    return cos, sin


def _rows(
    name: str,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> Rows:
    """Rows of the tables at the positions of x's tokens, ready to multiply, after all checks."""
    tokens = ("batch", "seqlen") if cu_seqlens is None else ("total",)
    check_tensor(name, x, shape=(*tokens, "num_heads", "head_dim"), dtypes=_FLOATS, remedy=_LAYOUT)
    _check_tables(x, cos, sin, ("seqlen_rotary", "rotary_dim / 2"))
    num_positions = _check_lengths(x, seqlen_offsets, cu_seqlens, max_seqlen)
    if cos.shape[0] < num_positions:
        remedy = "Make longer tables."
        raise ValueError(complaint("rows of cos and sin", f"at least {num_positions}", cos.shape[0], remedy))
    if cu_seqlens is None and isinstance(seqlen_offsets, int):
        window = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return _beside_heads(x, cos[window], sin[window])
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    known = ((positions >= 0) & (positions < cos.shape[0]))[..., None]
    positions = positions.clamp(0, max(cos.shape[0] - 1, 0))
    return _beside_heads(x, torch.where(known, cos[positions], 1.0), torch.where(known, sin[positions], 0.0))


def _positions(
    x: torch.Tensor, seqlen_offsets: int | torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """(b, s) or (total,) int64 positions of the tokens, -1 for tokens after the last sequence."""
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device)
        return steps + seqlen_offsets[:, None]  # type: ignore[index]
    tokens = torch.arange(x.shape[0], device=x.device)
    starts = cu_seqlens.to(torch.int64)
    sequences = torch.searchsorted(starts[1:], tokens, right=True)
    inside = sequences < starts.shape[0] - 1
    sequences = sequences.clamp(max=starts.shape[0] - 2)
    offsets = seqlen_offsets[sequences] if isinstance(seqlen_offsets, torch.Tensor) else seqlen_offsets
    return torch.where(inside, tokens - starts[sequences] + offsets, -1)


_LAYOUT = "Batches have four axes; packed tokens have three and come with cu_seqlens and max_seqlen."


def _check_tables(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: tuple[int | str, ...]
) -> None:
    check_tensor("cos", cos, shape=shape, dtypes=_FLOATS, device=x.device)
    check_tensor("sin", sin, shape=tuple(cos.shape), dtypes=_FLOATS, device=x.device)
    if 2 * cos.shape[-1] > x.shape[-1]:
        expected = f"at most {x.shape[-1]}, the head dimension"
        remedy = "Tables have one column per pair of channels."
        raise ValueError(
            complaint("rotary_dim, twice the columns of cos", expected, 2 * cos.shape[-1], remedy)
        )


def _check_lengths(
    x: torch.Tensor,
    seqlen_offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> int:
    """How many positions the tables must have, as far as the host knows."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(complaint("max_seqlen", "None without cu_seqlens", max_seqlen))
        longest, batch = x.shape[1], x.shape[0]
    else:
        longest, batch = _check_cu_seqlens(x, cu_seqlens, max_seqlen), cu_seqlens.shape[0] - 1
    if not isinstance(seqlen_offsets, torch.Tensor):
        check_count("seqlen_offsets", seqlen_offsets)
        return longest + seqlen_offsets
    integers = (torch.int32, torch.int64)
    check_tensor("seqlen_offsets", seqlen_offsets, shape=(batch,), dtypes=integers, device=x.device)
    if not _is_readable(seqlen_offsets):
        return longest
    offsets = seqlen_offsets.tolist()
    if min(offsets, default=0) < 0:
        raise ValueError(complaint("seqlen_offsets", "at least 0", min(offsets)))
    lengths = [longest] * batch if cu_seqlens is None else cu_seqlens.diff().tolist()
    return max(longest, *(offset + length for offset, length in zip(offsets, lengths, strict=True)), 0)


def _check_cu_seqlens(x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None) -> int:
    """The longest length that the caller promises."""
    check_tensor("cu_seqlens", cu_seqlens, shape=("batch + 1",), dtypes=(torch.int32,), device=x.device)
    if cu_seqlens.shape[0] < 2:
        raise ValueError(
            complaint("cu_seqlens shape", "(batch + 1,) with a sequence", tuple(cu_seqlens.shape))
        )
    if max_seqlen is None:
        remedy = "Pass the longest length: reading cu_seqlens would wait for the device."
        raise ValueError(complaint("max_seqlen with cu_seqlens", "an integer", None, remedy))
    check_count("max_seqlen", max_seqlen)
    if _is_readable(cu_seqlens):
        ends, lengths = cu_seqlens.tolist(), cu_seqlens.diff().tolist()
        if ends[0] != 0 or min(lengths) < 0 or ends[-1] > x.shape[0]:
            expected = f"0, then ends that do not decrease and stay within the {x.shape[0]} tokens"
            raise ValueError(complaint("cu_seqlens", expected, ends))
        if max(lengths) > max_seqlen:
            raise ValueError(complaint("max_seqlen", f"at least {max(lengths)}, the longest", max_seqlen))
    return max_seqlen


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or stopping a compiler."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_lost_to_autograd(tensor: torch.Tensor) -> bool:
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _queries_and_keys(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[Index, Index]:
    """How to index the queries and the keys of a packed tensor."""
    check_tensor("qkv", qkv, dtypes=_FLOATS)
    if num_heads_q is not None:
        check_count("num_heads_q", num_heads_q)
    if qkv.dim() == 5:
        num_heads = "num_heads" if num_heads_q is None else num_heads_q
        check_tensor("qkv", qkv, shape=("batch", "seqlen", 3, num_heads, "head_dim"))
        return (_ALL, _ALL, 0), (_ALL, _ALL, 1)
    remedy = "Give five axes (batch, seqlen, 3, num_heads, head_dim), or four and num_heads_q."
    axes = ("batch", "seqlen", "num_heads_q + 2 * num_heads_k", "head_dim")
    check_tensor("qkv", qkv, shape=axes, remedy=remedy)
    if num_heads_q is None:
        raise ValueError(complaint("num_heads_q with four axes of qkv", "an integer", None, remedy))
    others = qkv.shape[2] - num_heads_q
    if others < 0 or others % 2:
        expected = f"the {num_heads_q} of the queries and as many of keys as of values"
        raise ValueError(complaint("heads of qkv", expected, qkv.shape[2]))
    end = num_heads_q + others // 2
    return (_ALL, _ALL, slice(0, num_heads_q)), (_ALL, _ALL, slice(num_heads_q, end))
