"""Masks made from tensors of a device, remembered by identity and version of these."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from magi_attention.common.recent import Recent
from magi_attention.mask import DeviceMask

_masks: Recent[tuple[Sequence[torch.Tensor], DeviceMask]] = Recent(256)


def remembered_mask(
    tensors: Sequence[torch.Tensor], others: Hashable, make: Callable[[], DeviceMask]
) -> DeviceMask:
    """What ``make`` returns for these tensors, which the entry keeps alive, and others; inside a capture always anew."""
    on_gpu = tensors[0].is_cuda
    key: Hashable = None
    if not (on_gpu and torch.cuda.is_current_stream_capturing()) and not any(
        t.is_inference() for t in tensors
    ):
        # Another stream might run ahead of the kernels that wrote the bands: each stream has its own.
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream if on_gpu else 0
        key = (tuple((id(t), t._version) for t in tensors), others, stream)
        found = _masks.get(key)
        if found is not None:
            return found[1]
    with torch.inference_mode(False):
        mask = make()
    if key is not None:
        _masks.put(key, (tensors, mask))
    return mask


def forget_device_masks() -> None:
    """Forget every mask made from tensors of a device."""
    _masks.clear()
