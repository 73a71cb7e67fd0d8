"""How GPU kernels take tensors: strides they can read in place, optional statistics, heads that share L2."""

from __future__ import annotations

import torch

ALIGN = 8
"""Elements in the unit that strides are passed in: 16 bytes of a 2-byte type."""

# K and V of the heads that run together should stay in L2 (60 MB on an H200, shared with everything else).
_L2_BYTES = 40 << 20


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` if the kernels can read it in place (last stride 1, the others whole 16-byte steps), else a copy."""
    in_place = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    in_place = in_place and all(
        s % ALIGN == 0 for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1
    )
    return x if in_place else x.contiguous()


def strides(x: torch.Tensor) -> list[int]:
    """Batch, token and head strides in units of 8 elements; that of an axis of length one is arbitrary: 0."""
    return [s // ALIGN if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape, strict=False)]


def optional(x: torch.Tensor | None, stand_in: torch.Tensor) -> tuple:
    """Pointer and strides of an optional fp32 (B, T, H) tensor; ``stand_in`` is passed and never read when absent."""
    return (stand_in, 0, 0, 0) if x is None else (x, *x.stride())


def wave(x: torch.Tensor, y: torch.Tensor, num_heads: int) -> int:
    """How many heads to run side by side, so that what they all read (``x`` and ``y``, per head) fits in L2."""
    shared_heads = x.shape[2]
    per_head = x.shape[1] * (x.shape[3] + y.shape[3]) * x.element_size()
    fitting = max(1, _L2_BYTES // max(per_head, 1))
    while shared_heads % fitting:
        fitting -= 1
    return max(1, min(fitting, shared_heads) * num_heads // shared_heads)
