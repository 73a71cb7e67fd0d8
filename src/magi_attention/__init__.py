"""Exact attention for any mask that is a union of bands.

    from magi_attention import Mask, attention
    out, meta = attention(q, k, v, Mask.causal(4096))

Names are resolved on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magi_attention.api.runtime import init_dist_attn_runtime_key, init_dist_attn_runtime_mgr
    from magi_attention.attention import accumulate, attention, attention_backward
    from magi_attention.common.forward_meta import AttnForwardMeta
    from magi_attention.explain import explain
    from magi_attention.kernels.select import capabilities
    from magi_attention.mask import DeviceMask, Mask

__version__ = "0.1.0"

_MODULES = ("api", "comm", "common", "config", "env", "functional", "utils")
"""Also found without an import of their own, as documented examples use them."""

_HOMES = {
    "AttnForwardMeta": "magi_attention.common.forward_meta",
    "DeviceMask": "magi_attention.mask",
    "Mask": "magi_attention.mask",
    "accumulate": "magi_attention.attention",
    "attention": "magi_attention.attention",
    "attention_backward": "magi_attention.attention",
    "capabilities": "magi_attention.kernels.select",
    "explain": "magi_attention.explain",
    "init_dist_attn_runtime_key": "magi_attention.api.runtime",
    "init_dist_attn_runtime_mgr": "magi_attention.api.runtime",
}

__all__ = [
    "AttnForwardMeta",
    "DeviceMask",
    "Mask",
    "__version__",
    "accumulate",
    "attention",
    "attention_backward",
    "capabilities",
    "explain",
    "init_dist_attn_runtime_key",
    "init_dist_attn_runtime_mgr",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"magi_attention.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'magi_attention' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """A package whose functions ``attention`` and ``explain`` are not hidden by the modules they live in.

    The import system binds a submodule in its package once it is imported, by whichever import comes first.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
