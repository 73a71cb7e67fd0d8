"""How GPU kernels take tensors: strides they can read in place, optional statistics, heads that share L2."""

from __future__ import annotations

import functools

import torch

ALIGN = 8
"""Elements in the unit that strides are passed in: 16 bytes of a 2-byte type."""

# K and V of the heads that run together should stay in L2 (60 MB on an H200, shared with everything else).
_L2_BYTES = 40 << 20


def aligned(x: torch.Tensor, repeats: bool = True) -> torch.Tensor:
    """``x`` if the kernels can read it in place (last stride 1, the others whole 16-byte steps), else a copy.

    Args:
        repeats: whether an axis may be repeated by stride 0.
    """
    if x.data_ptr() % 16 == 0 and in_place(x.shape, x.stride(), repeats):
        return x
    # Not contiguous(): that leaves misaligned memory where it is.
    return x.clone(memory_format=torch.contiguous_format)


def strides(x: torch.Tensor) -> tuple[int, ...]:
    """Batch, token and head strides in units of 8 elements; that of an axis of length one is arbitrary: 0."""
    return steps(x.shape, x.stride())


# Asked in every call, for few shapes: looking an answer up is a tenth of finding it.
@functools.lru_cache(maxsize=4096)
def in_place(shape: tuple[int, ...], stride: tuple[int, ...], repeats: bool) -> bool:
    """Whether kernels can read aligned memory of this shape and these strides where it is; see ``aligned``."""
    used = [s for s, n in zip(stride[:3], shape, strict=False) if n > 1]
    return stride[3] == 1 and all(s % ALIGN == 0 and (repeats or s != 0) for s in used)


@functools.lru_cache(maxsize=4096)
def steps(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """``strides`` of a tensor of this shape and these strides."""
    return tuple(s // ALIGN if n > 1 else 0 for s, n in zip(stride[:3], shape, strict=False))


def engine_strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """Strides in elements as the copy engine wants them: in whole 16-byte steps, also that of an axis of length one."""
    return [*(s if n > 1 else ALIGN for s, n in zip(stride[:-1], shape, strict=False)), 1]


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``, which is at least 1; Triton's own takes several microseconds."""
    return 1 << (n - 1).bit_length()


def unit_of(*tensors: torch.Tensor) -> int:
    """Elements that all strides are multiples of: ALIGN, where rows begin at whole 16 bytes too, or 1."""
    return ALIGN if all(_in_units(x) for x in tensors) else 1


def _in_units(x: torch.Tensor) -> bool:
    strides = zip(x.stride()[:-1], x.shape, strict=False)
    return x.data_ptr() % 16 == 0 and all(s % ALIGN == 0 for s, n in strides if n > 1)


def units(x: torch.Tensor, unit: int) -> tuple[int, ...]:
    """Strides of (B, T, H) in ``unit``, of packed tensors (T, H) with 0 for the first; the last axis has none."""
    found = tuple(s // unit if n > 1 else 0 for s, n in zip(x.stride()[:-1], x.shape, strict=False))
    return found if x.dim() == 4 else (0, *found)


def optional(x: torch.Tensor | None) -> tuple:
    """Pointer and strides of an optional fp32 (B, T, H) tensor."""
    return (None, 0, 0, 0) if x is None else (x, *x.stride())


def wave(x: torch.Tensor, y: torch.Tensor, num_heads: int) -> int:
    """How many heads to run side by side, so that what they all read (``x`` and ``y``, per head) fits in L2."""
    per_head = x.shape[1] * (x.shape[3] + y.shape[3]) * x.element_size()
    return heads_in_cache(x.shape[2], per_head, num_heads)


@functools.lru_cache(maxsize=4096)
def heads_in_cache(shared_heads: int, bytes_per_head: int, num_heads: int) -> int:
    """``wave`` of ``num_heads`` heads over ``shared_heads``, each of which reads ``bytes_per_head``."""
    fitting = max(1, _L2_BYTES // max(bytes_per_head, 1))
    while shared_heads % fitting:
        fitting -= 1
    return max(1, min(fitting, shared_heads) * num_heads // shared_heads)
