"""Host side of the decode kernel: one launch of as many programs as the device runs at a time, whatever the lengths."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from magi_attention.kernels.operands import num_multiprocessors, power_of_two, unit_of, units
from magi_attention.kernels.triton.counters import zeroed
from magi_attention.kernels.triton.decode import decode_kernel

_PROGRAMS_ON_CPU = 3
_FEW_ITEMS = 32
"""Up to which an item is put together from so many pieces that half of them, twice as large, are the better ones."""
_MOST_PIECES = 16
_MOST_AT_A_TIME = 16
_MERGED_ELEMENTS = 2048
"""Of pieces that a warp holds while it waits for them: 64 registers of each thread."""


@dataclass(frozen=True)
class Tiling:
    """What a launch is cut into: rows and keys a block, warps and blocks of keys on their way of a program, and how many
    programs a multiprocessor runs."""

    rows: int
    cols: int
    warps: int
    stages: int
    programs: int


def tiling_of(rows: int, items: int, head_dim: int, itemsize: int) -> Tiling:
    """For ``rows`` (queries times heads that share a key head) of a sequence, in ``items`` sequences and key heads."""
    cols = 64 if head_dim * itemsize <= 256 else 32 if head_dim * itemsize <= 512 else 16
    if rows <= 16 and items <= _FEW_ITEMS:
        return Tiling(16, 2 * cols, 8, 3, 1)
    if rows <= 32:
        return Tiling(16 if rows <= 16 else 32, cols, 4, 3, 2)
    return Tiling(64, cols, 4, 3, 2) if rows <= 64 else Tiling(128, cols, 8, 3, 1)


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    used: torch.Tensor | int,
    *,
    num_new: int = 0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_new: torch.Tensor | None = None,
    softmax_scale: float,
    softcap: float = 0.0,
    window: tuple[int, int] = (-1, -1),
    keep_first: int = 0,
    full_when_one: bool = False,
    leftpad: torch.Tensor | None = None,
    cache_rows: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sm_margin: int = 0,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, of q's shape but for v's head dimension and in its dtype, and lse without that axis, fp32.

    Args:
        q: (B, T, H, D), or (tokens, H, D) with ``cu_seqlens_q``.
        k, v: (rows, positions, HK, D or DV), or pages of as many positions with ``block_table``; any strides but the last
            one's, which is 1.
        used: (B,) int32 or int64, keys of each sequence before the new ones, or a number.
        num_new: new keys of each, in the cache already; or their (B + 1,) int32 boundaries, ``cu_seqlens_new``.
        window: (left, right), -1 without a limit. keep_first: keys from the first one on that are seen in any window.
        full_when_one: a sequence with one query has no limit on the left.
        leftpad: (B,) int32, first position in use. cache_rows: (B,) int32, row of the cache of each sequence.
        block_table: (B, blocks) int32, pages of each sequence. sink: (H,). alibi_slopes: (B, H) fp32, contiguous.
        sm_margin: multiprocessors left to others.
    """
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    num_queries = q.shape[1] if cu_seqlens_q is None else 0
    num_heads, head_dim = q.shape[-2:]
    page_size, num_kv_heads, head_dim_v = v.shape[1:]
    group, tokens = num_heads // num_kv_heads, q.shape[:-2].numel()
    out, lse = q.new_empty(*q.shape[:-1], head_dim_v), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    rows, widest = -(-tokens // batch) * group, max(head_dim, head_dim_v)
    cut = tiling or tiling_of(rows, batch * num_kv_heads, widest, q.element_size())
    num_programs = _num_programs(q.device, cut.programs, sm_margin)
    block_dv = max(16, power_of_two(head_dim_v))
    # Rows of a tile that may be in use.
    block_r = cut.rows if num_queries == 0 else min(cut.rows, power_of_two(num_queries * group))
    parts = lse.new_empty(num_programs, 2, cut.rows, block_dv)
    stats = lse.new_empty(num_programs, 2, 2, cut.rows)
    # A sequence's last tile may be a short one.
    counters = zeroed(num_kv_heads * (tokens * group // cut.rows + batch), q.device)
    unit, unit_out = unit_of(q, k, v), unit_of(out)
    # With room for a program of the next launch on some multiprocessors only, the next one begins unevenly.
    overlaps = cut.programs == 1 and _launches_overlap(q.device)
    is_number, is_paged = isinstance(used, int), block_table is not None
    decode_kernel[(num_programs,)](
        q, *units(q, unit), k, *units(k, unit), v, *units(v, unit),
        out, num_heads * head_dim_v // unit_out, head_dim_v // unit_out, lse,
        None if is_number else used, leftpad, cache_rows, cu_seqlens_q, cu_seqlens_new,
        block_table, block_table.stride(0) if block_table is not None else 0, sink, alibi_slopes,
        parts, stats, counters, batch, num_queries, num_heads, group, page_size, len(k),
        page_size * (block_table.shape[1] if block_table is not None else 1), used if is_number else 0, num_new, *window,
        keep_first, int(full_when_one), softmax_scale, softcap,
        PAGE_SIZE=page_size if is_paged and page_size & (page_size - 1) == 0 else 0,
        HAS_KEPT=keep_first > 0 and window[0] >= 0, MASKED=num_queries != 1 and max(window) >= 0, SOFTCAP=softcap > 0,
        D=head_dim, DV=head_dim_v, UNIT=unit, UNIT_O=unit_out, BLOCK_B=power_of_two(batch),
        BLOCK_M=cut.rows, BLOCK_R=block_r, BLOCK_N=cut.cols, BLOCK_D=max(16, power_of_two(head_dim)),
        BLOCK_DV=block_dv, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        AT_A_TIME=max(1, min(_MOST_AT_A_TIME, _MERGED_ELEMENTS * cut.warps // (block_r * block_dv))),
        MOST_PIECES=_MOST_PIECES, DEPENDENT=overlaps, num_warps=cut.warps, num_stages=cut.stages, launch_pdl=overlaps,
    )  # fmt: skip
    return out, lse


@functools.cache
def _launches_overlap(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launches."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _num_programs(device: torch.device, times: int, sm_margin: int) -> int:
    """As many as the device runs at a time."""
    if device.type != "cuda":
        return _PROGRAMS_ON_CPU
    return times * max(num_multiprocessors(device) - sm_margin, 1)
