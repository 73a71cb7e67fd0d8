"""The documented front door: names resolve on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magi_attention.api.flex_flash_attn import flex_flash_attn_func
    from magi_attention.api.flex_mask import GeneralAttnMaskType
    from magi_attention.common import AttnForwardMeta, AttnMaskType, AttnOverlapMode, AttnRange, AttnRanges

_HOMES = {
    "AttnForwardMeta": "magi_attention.common",
    "AttnMaskType": "magi_attention.common",
    "AttnOverlapMode": "magi_attention.common",
    "AttnRange": "magi_attention.common",
    "AttnRanges": "magi_attention.common",
    "GeneralAttnMaskType": "magi_attention.api.flex_mask",
    "flex_flash_attn_func": "magi_attention.api.flex_flash_attn",
}

__all__ = [
    "AttnForwardMeta",
    "AttnMaskType",
    "AttnOverlapMode",
    "AttnRange",
    "AttnRanges",
    "GeneralAttnMaskType",
    "flex_flash_attn_func",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'magi_attention.api' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
