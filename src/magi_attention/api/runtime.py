"""Keys and what stands behind them, under names of their own."""

from __future__ import annotations

from typing import Any

from magi_attention.api.magi_attn_interface import magi_attn_flex_key
from magi_attention.dist.key import DistAttnRuntimeKey
from magi_attention.dist.manager import DistAttnRuntimeMgr, dist_attn_runtime_dict_mgr


def init_dist_attn_runtime_key(*args: Any, **kwargs: Any) -> DistAttnRuntimeKey:
    """``magi_attn_flex_key``."""
    return magi_attn_flex_key(*args, **kwargs)


def init_dist_attn_runtime_mgr(*args: Any, **kwargs: Any) -> DistAttnRuntimeMgr:
    """The placement and plan of the key that ``magi_attn_flex_key`` gives for the same arguments."""
    return dist_attn_runtime_dict_mgr[magi_attn_flex_key(*args, **kwargs)]
