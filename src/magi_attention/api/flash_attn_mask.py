"""The masks of the flash_attn functions: windows aligned at the bottom-right corner of each sequence."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from magi_attention.api.device_masks import remembered_mask
from magi_attention.errors import check_count, check_tensor, complaint
from magi_attention.mask import DeviceMask, Mask
from magi_attention.mask.arguments import reach
from magi_attention.mask.bands import INF
from magi_attention.mask.lowering import lower_windows

Side = int | torch.Tensor
Window = Sequence[Side]


def mask_of_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    window_size: Window,
    causal: bool,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    chunk: int = 0,
) -> Mask | DeviceMask:
    """The mask that all entries of a batch of q, k (b, s, h, d) share."""
    _check_axes("q", q, "batch", "seqlen_q", "nheads", "headdim")
    _check_axes("k", k, "batch", "seqlen_k", "nheads_k", "headdim")
    check_count("keep_first", keep_first)
    left, right = window_of(window_size, causal, k.shape[1])
    if not (isinstance(left, int) and isinstance(right, int)) or torch.compiler.is_compiling():
        return _computed_mask(q.shape[1], k.shape[1], (left, right), keep_first, force_fa_decode, chunk)
    if chunk:
        return chunked_mask(q.shape[1], k.shape[1], left, right, chunk)
    return fixed_mask(q.shape[1], k.shape[1], left, right, keep_first, force_fa_decode)


def with_pages_together(
    k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """k and v (tokens, h, d), the pages of each sequence one behind the other, and how many tokens those of one hold.

    Without a block table k and v themselves, and None.
    """
    if block_table is None:
        return k, v, None
    check_tensor("k", k, shape=("num_blocks", "page_size", "nheads_k", "headdim"))
    check_tensor("v", v, shape=(*k.shape[:3], "headdim"))
    check_tensor(
        "block_table", block_table, shape=("batch", "blocks"), dtypes=(torch.int32,), device=k.device
    )
    # Entries behind a sequence's last page may be anything.
    pages = block_table.flatten().clamp(0, max(len(k) - 1, 0))
    k, v = (x.index_select(0, pages).flatten(0, 1) for x in (k, v))
    return k, v, len(k) // max(len(block_table), 1)


def mask_of_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: Side,
    max_seqlen_k: Side,
    window_size: Window,
    causal: bool,
    **others: Any,
) -> DeviceMask:
    """The mask of packed sequences in q, k (tokens, h, d); ``others`` as in ``varlen_mask``."""
    _check_axes("q", q, "total_q", "nheads", "headdim")
    _check_axes("k", k, "total_k", "nheads_k", "headdim")
    check_count("keep_first", others.get("keep_first", 0))
    _read("max_seqlen_q", max_seqlen_q)
    window = window_of(window_size, causal, max_seqlen_k)
    return varlen_mask(cu_seqlens_q, cu_seqlens_k, len(q), len(k), window, **others)


def _check_axes(name: str, x: torch.Tensor, *axes: str) -> None:
    # Asked in every call: a fraction of the time that finding out what is wrong takes.
    if not (isinstance(x, torch.Tensor) and x.dim() == len(axes)):
        check_tensor(name, x, shape=axes)


def window_of(window_size: Window, causal: bool, max_cols: Side) -> tuple[Side, Side]:
    """(left, right) of a window, -1 where it is unlimited: also where it is not shorter than the longest sequence.

    Sides and ``max_cols`` may be 0-d tensors. Those on the CPU are read; with one on a GPU, sides stay tensors there.
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        remedy = "Give (left, right); -1 is unlimited."
        raise ValueError(complaint("window_size", "a pair", window_size, remedy)) from None
    left, right, max_cols = (
        _read("window_size", left),
        _read("window_size", right),
        _read("max_seqlen_k", max_cols),
    )
    return _limited(left, max_cols), 0 if causal else _limited(right, max_cols)


def _read(name: str, value: object) -> Side:
    if isinstance(value, torch.Tensor):
        if value.dim() or value.dtype not in (torch.int32, torch.int64):
            got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise TypeError(complaint(name, "integers or 0-d int32 or int64 tensors", got))
        return value if value.is_cuda else int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(complaint(name, "integers or 0-d int32 or int64 tensors", type(value).__name__))
    return value


def _limited(side: Side, max_cols: Side) -> Side:
    if isinstance(side, torch.Tensor) or isinstance(max_cols, torch.Tensor):
        if isinstance(side, int) and side < 0:
            return -1
        device = side.device if isinstance(side, torch.Tensor) else max_cols.device  # type: ignore[union-attr]
        side = _on(side, device)
        return torch.where((side < 0) | (side >= max_cols), -1, side)
    return -1 if side < 0 or side >= max_cols else side


def _on(side: Side, device: torch.device) -> torch.Tensor:
    """A 0-d tensor; without the copy from the host, and the wait for it, that ``torch.as_tensor`` would make."""
    return side if isinstance(side, torch.Tensor) else torch.full((), side, dtype=torch.int32, device=device)


def _computed_mask(
    num_rows: int,
    num_cols: int,
    window: tuple[Side, Side],
    keep_first: int,
    force_fa_decode: bool,
    chunk: int,
) -> DeviceMask:
    """``fixed_mask`` or ``chunked_mask`` by tensor operations: sizes may be a compiler's symbols, sides on a GPU."""
    devices = [side.device for side in window if isinstance(side, torch.Tensor)]
    zero = torch.zeros(1, dtype=torch.int32, device=devices[0] if devices else "cpu")
    corners = (zero, zero + num_rows, zero, zero + num_cols)
    if chunk:
        table = _chunks(corners, window, chunk, -(-num_cols // chunk))
    else:
        table = _table(corners, (num_rows, num_cols), window, keep_first, force_fa_decode)
    return DeviceMask(table, num_rows, num_cols)


@functools.lru_cache(maxsize=1024)
def chunked_mask(num_rows: int, num_cols: int, left: int, right: int, chunk: int) -> DeviceMask:
    """The mask that all entries of a batch share, where a query sees the keys of its own chunk of positions only."""
    rows, cols = (torch.tensor([0, size], dtype=torch.int32) for size in (num_rows, num_cols))
    num_chunks = -(-num_cols // chunk)
    return varlen_mask(rows, cols, num_rows, num_cols, (left, right), chunk=chunk, num_chunks=num_chunks)


@functools.lru_cache(maxsize=1024)
def fixed_mask(
    num_rows: int, num_cols: int, left: int, right: int, keep_first: int, force_fa_decode: bool
) -> Mask:
    """The mask that all entries of a batch share."""
    cuts = [0, num_rows], [0, num_cols]
    return Mask.varlen(*cuts, False, (left, right), keep_first, force_fa_decode)


def varlen_mask(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_rows: int,
    num_cols: int,
    window: tuple[Side, Side],
    keep_first: int = 0,
    force_fa_decode: bool = False,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_cols: int | None = None,
    chunk: int = 0,
    num_chunks: int = 0,
) -> DeviceMask:
    """The mask of packed sequences, on the device of the boundaries, which the host does not read.

    Remembered by identity and version of tensors on a GPU.

    Args:
        seqused_q, seqused_k: (b,) queries and keys in use of each sequence, or None: all.
        page_cols: columns set aside for each sequence, when its keys do not begin at ``cu_seqlens_k`` but at multiples
            of this.
        chunk, num_chunks: a query sees the keys of its own chunk of ``chunk`` positions; no sequence of keys has more
            than ``num_chunks``. 0 is off.
    """
    _check_boundaries(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    tensors = [x for x in (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) if x is not None]

    def make() -> DeviceMask:
        q0, q1 = _spans(cu_seqlens_q, seqused_q)
        k0, k1 = _spans(cu_seqlens_k, seqused_k)
        if page_cols is not None:
            # With seqused_k, the boundaries of the keys say nothing.
            lengths = k1 - k0 if seqused_k is None else seqused_k.to(torch.int32)
            k0 = page_cols * torch.arange(len(q0), device=q0.device, dtype=torch.int32)
            k1 = k0 + lengths.clamp(0, page_cols)
        corners = (q0, q1, k0, k1)
        if chunk:
            table = _chunks(corners, window, chunk, num_chunks)
        else:
            table = _table(corners, (num_rows, num_cols), window, keep_first, force_fa_decode)
        return DeviceMask(table, num_rows, num_cols)

    # Boundaries on the CPU may share memory with arrays whose edits no version counts.
    if not (cu_seqlens_q.is_cuda and all(isinstance(side, int) for side in window)):
        return make()
    sizes = (num_rows, num_cols, page_cols, chunk, num_chunks, seqused_q is None, seqused_k is None)
    return remembered_mask(tensors, (sizes, *window, keep_first, force_fa_decode), make)


def cache_mask(
    queries: Sequence[int] | torch.Tensor,
    num_rows: int,
    num_cols: int,
    capacity: int,
    used: torch.Tensor,
    rows: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    window: tuple[Side, Side],
    keep_first: int,
    force_fa_decode: bool,
    chunk: int = 0,
) -> DeviceMask:
    """The mask of queries and a cache whose rows of ``capacity`` keys lie one behind the other.

    Args:
        queries: (batch, how many of each), or (batch + 1,) boundaries on the cache's device.
        num_rows: queries of all. num_cols: keys of all rows.
        used: (batch,) positions in use of each entry's row; ``leftpad`` of them, from the beginning, are not.
        rows: (batch,) which row of the cache is whose; the entry's own when None.
        chunk: as in ``varlen_mask``.
    """
    entry = torch.arange(len(used), device=used.device, dtype=torch.int32)
    if isinstance(queries, torch.Tensor):
        first, last = _spans(queries, None)
    else:
        first, last = queries[1] * entry, queries[1] * (entry + 1)
    begin = capacity * (entry if rows is None else rows.to(torch.int32))
    end = begin + used.clamp(0, capacity)
    if leftpad is not None:
        begin = torch.minimum(begin + leftpad.to(torch.int32).clamp(min=0), end)
    corners = (first, last, begin, end)
    if chunk:
        table = _chunks(corners, window, chunk, -(-capacity // chunk))
    else:
        table = _table(corners, (num_rows, num_cols), window, keep_first, force_fa_decode)
    return DeviceMask(table, num_rows, num_cols)


def _check_boundaries(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
) -> None:
    integers = (torch.int32, torch.int64)
    check_tensor("cu_seqlens_q", cu_seqlens_q, shape=("batch + 1",), dtypes=integers)
    if not len(cu_seqlens_q):
        raise ValueError(complaint("cu_seqlens_q length", "at least 1", 0))
    shape, device = cu_seqlens_q.shape, cu_seqlens_q.device
    check_tensor("cu_seqlens_k", cu_seqlens_k, shape=shape, dtypes=integers, device=device)
    for name, lengths in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if lengths is not None:
            check_tensor(name, lengths, shape=(len(cu_seqlens_q) - 1,), dtypes=integers, device=device)


def _spans(cuts: torch.Tensor, used: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Begin and end of each sequence, of as many tokens as are in use."""
    begin, end = cuts[:-1].to(torch.int32), cuts[1:].to(torch.int32)
    return begin, end if used is None else torch.minimum(begin + used.to(torch.int32).clamp(min=0), end)


def _table(
    corners: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    size: tuple[int, int],
    window: tuple[Side, Side],
    keep_first: int,
    force_fa_decode: bool,
) -> torch.Tensor:
    if all(isinstance(side, int) for side in window):
        sides = reach(window, False)  # type: ignore[arg-type]
        return lower_windows(
            *corners, *size, window=sides, keep_first=keep_first, force_fa_decode=force_fa_decode
        )
    if keep_first or force_fa_decode:
        remedy = "Give window_size as integers."
        got = "a window on the GPU"
        raise NotImplementedError(complaint("keep_first, force_fa_decode", "0, False", got, remedy))
    return _moved(lower_windows(*corners, *size), window)


def _moved(table: torch.Tensor, window: tuple[Side, Side]) -> torch.Tensor:
    """Full rectangles cut by a window whose sides the host does not know."""
    diagonal = table[:, 3] - table[:, 1]
    left, right = (_on(side, table.device) for side in window)
    lo = torch.where(left < 0, -INF, diagonal - left).to(torch.int32)
    hi = torch.where(right < 0, INF, diagonal + right).to(torch.int32)
    return torch.cat([table[:, :4], lo[:, None], hi[:, None]], dim=1)


def _chunks(
    corners: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    window: tuple[Side, Side],
    chunk: int,
    num_chunks: int,
) -> torch.Tensor:
    """One band for each chunk of each sequence; those beyond its end are empty."""
    q0, q1, k0, k1 = (x[:, None] for x in corners)
    begin = k0 + chunk * torch.arange(num_chunks, device=k0.device, dtype=torch.int32)
    diagonal = (k1 - q1).expand_as(begin)
    end = torch.minimum(begin + chunk, k1)
    # Row i stands at key i + diagonal.
    first, last = torch.maximum(begin - diagonal, q0), torch.minimum(begin + chunk - diagonal, q1)
    is_seen = (begin < k1) & (first < last)
    left, right = (_on(side, begin.device) for side in window)
    lo = torch.where(left < 0, -INF, diagonal - left)
    hi = torch.where(right < 0, INF, diagonal + right)
    table = torch.stack([first, last, begin, end, lo, hi], dim=2)
    return torch.where(is_seen[..., None], table, 0).flatten(0, 1).to(torch.int32)
