"""Host side of the decode kernel: one launch of as many programs as the device runs at a time, whatever the lengths."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from magi_attention.kernels.cache_problem import CacheProblem
from magi_attention.kernels.operands import num_multiprocessors, power_of_two, unit_of, units
from magi_attention.kernels.triton.counters import zeroed
from magi_attention.kernels.triton.decode import decode_kernel

_PROGRAMS_ON_CPU = 3
_FEW_ITEMS = 32
"""Up to which an item is put together from so many pieces that half of them, twice as large, are the better ones."""
MOST_PIECES = 16
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


def decode(problem: CacheProblem, tiling: Tiling | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, as ``CacheProblem.results``."""
    q, k, v = problem.q, problem.k, problem.v
    out, lse = problem.results()
    if lse.numel() == 0:
        return out, lse
    head_dim, head_dim_v = q.shape[-1], v.shape[3]
    items = problem.batch * problem.num_kv_heads
    cut = tiling or tiling_of(problem.rows, items, max(head_dim, head_dim_v), q.element_size())
    num_programs = num_programs_on(q.device, cut.programs, problem.sm_margin)
    block_dv, block_r = max(16, power_of_two(head_dim_v)), problem.live_rows(cut.rows)
    parts, stats = workspace(num_programs, cut.rows, block_dv, q.device)
    unit, unit_out = unit_of(q, k, v), unit_of(out)
    # With room for a program of the next launch on some multiprocessors only, the next one begins unevenly.
    overlaps = cut.programs == 1 and _launches_overlap(q.device)
    page_size = 0 if problem.block_table is None else k.shape[1]
    decode_kernel[(num_programs,)](
        q, *units(q, unit), k, *units(k, unit), v, *units(v, unit),
        out, q.shape[-2] * head_dim_v // unit_out, head_dim_v // unit_out, lse, *problem.numbers(),
        parts, stats, zeroed(problem.items(cut.rows), q.device), *problem.sizes(), problem.softmax_scale, problem.softcap,
        PAGE_SIZE=0 if page_size & (page_size - 1) else page_size, HAS_KEPT=problem.has_kept, MASKED=problem.is_masked,
        SOFTCAP=problem.softcap > 0, D=head_dim, DV=head_dim_v, UNIT=unit, UNIT_O=unit_out,
        BLOCK_B=power_of_two(problem.batch), BLOCK_M=cut.rows, BLOCK_R=block_r, BLOCK_N=cut.cols,
        BLOCK_D=max(16, power_of_two(head_dim)), BLOCK_DV=block_dv,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        AT_A_TIME=merged_at_a_time(block_r, block_dv, cut.warps), MOST_PIECES=MOST_PIECES,
        DEPENDENT=overlaps, num_warps=cut.warps, num_stages=cut.stages, launch_pdl=overlaps,
    )  # fmt: skip
    return out, lse


def workspace(
    programs: int, block_rows: int, block_dims: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the pieces of items that programs share: two a program, of sums and of their maxima and totals."""
    parts = torch.empty(programs, 2, block_rows, block_dims, dtype=torch.float32, device=device)
    return parts, parts.new_empty(programs, 2, 2, block_rows)


def merged_at_a_time(block_rows: int, block_dims: int, warps: int) -> int:
    """How many pieces to wait for together."""
    return max(1, min(_MOST_AT_A_TIME, _MERGED_ELEMENTS * warps // (block_rows * block_dims)))


@functools.cache
def _launches_overlap(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launches."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_programs_on(device: torch.device, times: int, sm_margin: int) -> int:
    """As many as the device runs at a time."""
    if device.type != "cuda":
        return _PROGRAMS_ON_CPU
    return times * max(num_multiprocessors(device) - sm_margin, 1)
