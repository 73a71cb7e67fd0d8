"""From range arguments to a mask: checked and remembered on the host, lowered without waiting on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention import env
from magi_attention.api.device_masks import forget_device_masks, remembered_mask
from magi_attention.common import AttnMaskType, AttnRanges
from magi_attention.common.recent import Recent
from magi_attention.errors import complaint
from magi_attention.mask import DeviceMask, Mask
from magi_attention.mask.arguments import regular
from magi_attention.mask.lowering import lower_ranges

GeneralAttnMaskType: TypeAlias = str | AttnMaskType | Sequence[str | AttnMaskType]
"""One mask type for all slices or one per slice, as names or members."""

Ranges: TypeAlias = torch.Tensor | AttnRanges | Sequence[Sequence[int]] | NDArray[Any]
"""(n, 2) half-open ranges."""

Types: TypeAlias = torch.Tensor | GeneralAttnMaskType | Sequence[int] | NDArray[Any] | None
"""Mask types of n slices; None is full."""

_MAX_ENTRIES = 64


_host_masks: Recent[Any] = Recent(_MAX_ENTRIES)


def clear_mask_cache() -> None:
    """Forget every mask made from ranges."""
    _host_masks.clear()
    forget_device_masks()


def mask_of_ranges(
    q_ranges: Ranges, k_ranges: Ranges, types: Types, num_rows: int, num_cols: int, device: torch.device
) -> Mask | DeviceMask:
    """The mask of slices over ``num_rows`` queries and ``num_cols`` keys that live on ``device``.

    Ranges on the host are checked in full and remembered by content. Ranges on a device are lowered there:
    what is invalid shows nothing, unless ``MAGI_ATTENTION_SANITY_CHECK=1`` asks for a check on the host.
    While torch.compile traces, all ranges are lowered by tensor operations and nothing is remembered.

    Raises:
        ValueError: ranges that are no ranges within the tensors (host), or that lie on different devices.
        TypeError: not integers, or a list where a tensor is needed.
    """
    if isinstance(types, int):
        remedy = "A type for all slices is a name or an AttnMaskType."
        raise TypeError(complaint("attn_type_map", "one type per slice", types, remedy))
    if torch.compiler.is_compiling():
        q_table, k_table = (torch.as_tensor(_naive(r)) for r in (q_ranges, k_ranges))
        return DeviceMask(
            lower_ranges(q_table, k_table, _types_beside(q_table, types), num_rows, num_cols),
            num_rows,
            num_cols,
        )
    home = _device_of(q_ranges)
    for name, value in (("k_ranges", k_ranges), ("attn_type_map", types)):
        if (
            value is not None
            and _device_of(value) != home
            and not (name == "attn_type_map" and _is_single(value))
        ):
            remedy = "Keep ranges and types on one device."
            raise ValueError(complaint(f"{name} device", f"{home} like q_ranges", _device_of(value), remedy))
    if home.type == "cpu":
        return _host_mask(q_ranges, k_ranges, types, num_rows, num_cols)
    if home != device:
        raise ValueError(complaint("q_ranges device", f"cpu or {device} like q", home))
    return _device_mask(q_ranges, k_ranges, types, num_rows, num_cols)  # type: ignore[arg-type]


def _device_of(value: object) -> torch.device:
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")


def _is_single(types: object) -> bool:
    return isinstance(types, (str, AttnMaskType))


def _naive(ranges: Ranges) -> Any:
    return ranges.to_naive_ranges() if isinstance(ranges, AttnRanges) else ranges


def _host_mask(q_ranges: Ranges, k_ranges: Ranges, types: Types, num_rows: int, num_cols: int) -> Mask:
    """Remembered by content: tensors may share memory with arrays whose edits no version counts."""
    tables = [regular("q_ranges", _naive(q_ranges)), regular("k_ranges", _naive(k_ranges))]
    codes: Any = types if types is None or _is_single(types) else regular("attn_type_map", types)
    key = (*map(_content, (*tables, codes)), num_rows, num_cols)
    mask = _host_masks.get(key)
    if mask is None:
        mask = Mask.from_ranges(tables[0], tables[1], codes, num_rows, num_cols)
        _host_masks.put(key, mask)
    return mask


def _content(value: object) -> Hashable:
    if not isinstance(value, np.ndarray):
        return value  # type: ignore[return-value]
    if value.dtype == object:
        return tuple(map(str, value.ravel()))
    return value.shape, value.dtype.str, hashlib.blake2b(value.tobytes(), digest_size=16).digest()


def _device_mask(
    q_ranges: torch.Tensor, k_ranges: torch.Tensor, types: Types, num_rows: int, num_cols: int
) -> DeviceMask:
    """Remembered by identity and version of the tensors, which the entry keeps alive."""
    tensors = [t for t in (q_ranges, k_ranges, types) if isinstance(t, torch.Tensor)]
    capturing = q_ranges.is_cuda and torch.cuda.is_current_stream_capturing()
    if env.sanity_check() and not capturing:
        on_host = types.cpu() if isinstance(types, torch.Tensor) else types
        Mask.from_ranges(q_ranges.cpu(), k_ranges.cpu(), on_host, num_rows, num_cols)

    def make() -> DeviceMask:
        codes = _types_beside(q_ranges, types)
        return DeviceMask(lower_ranges(q_ranges, k_ranges, codes, num_rows, num_cols), num_rows, num_cols)

    return remembered_mask(tensors, (types if _is_single(types) else None, num_rows, num_cols), make)


def _types_beside(q_ranges: torch.Tensor, types: Types) -> torch.Tensor | None:
    """Type integers on the device of the ranges, without a copy from the host."""
    if types is None or isinstance(types, torch.Tensor):
        return types
    if isinstance(types, (str, AttnMaskType)):
        return q_ranges.new_full((q_ranges.shape[0],), AttnMaskType(types).to_int_type())
    if q_ranges.device.type == "cpu":
        return torch.as_tensor([t if isinstance(t, int) else AttnMaskType(t).to_int_type() for t in types])
    raise TypeError(
        complaint("attn_type_map", f"a tensor on {q_ranges.device} or one type for all", type(types).__name__)
    )
