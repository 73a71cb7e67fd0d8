"""The documented front door: names resolve on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magi_attention.api.flex_flash_attn import flex_flash_attn_func
    from magi_attention.api.flex_mask import GeneralAttnMaskType
    from magi_attention.api.functools import (
        apply_padding,
        compute_pad_size,
        infer_attn_mask_from_cu_seqlens,
        infer_attn_mask_from_sliding_window,
        infer_varlen_mask_from_batch,
        pad_at_dim,
        squash_batch_dim,
        unpad_at_dim,
    )
    from magi_attention.api.magi_attn_interface import (
        calc_attn,
        clear_cache,
        dispatch,
        get_most_recent_key,
        get_position_ids,
        magi_attn_flex_dispatch,
        magi_attn_flex_key,
        magi_attn_varlen_dispatch,
        magi_attn_varlen_key,
        make_flex_key_for_new_mask_after_dispatch,
        make_varlen_key_for_new_mask_after_dispatch,
        roll,
        roll_simple,
        undispatch,
    )
    from magi_attention.common import (
        AttnForwardMeta,
        AttnMaskType,
        AttnOverlapMode,
        AttnRange,
        AttnRanges,
        OverlapAlgType,
    )
    from magi_attention.config import (
        BalancedDispatchAlg,
        BatchToppHeapDispatchAlg,
        BSDispatchAlg,
        BTPDispatchAlg,
        DispatchAlg,
        DispatchConfig,
        DistAttnConfig,
        DPDispatchAlg,
        GreedyOverlapAlg,
        GrpCollConfig,
        LBDispatchAlg,
        MinHeapDispatchAlg,
        OverlapAlg,
        OverlapConfig,
        RandomSelectDispatchAlg,
        SequentialDispatchAlg,
        SortedSequentialSelectAlg,
        ToppHeapDispatchAlg,
        UniformOverlapAlg,
        ZigzagDispatchAlg,
    )
    from magi_attention.dist.key import DistAttnRuntimeKey
    from magi_attention.dist.manager import (
        DistAttnRuntimeDictManager,
        DistAttnRuntimeMgr,
        dist_attn_runtime_dict_mgr,
    )

_HOMES = {
    "AttnForwardMeta": "magi_attention.common",
    "AttnMaskType": "magi_attention.common",
    "AttnOverlapMode": "magi_attention.common",
    "AttnRange": "magi_attention.common",
    "AttnRanges": "magi_attention.common",
    "BSDispatchAlg": "magi_attention.config",
    "BTPDispatchAlg": "magi_attention.config",
    "BalancedDispatchAlg": "magi_attention.config",
    "BatchToppHeapDispatchAlg": "magi_attention.config",
    "DPDispatchAlg": "magi_attention.config",
    "DispatchAlg": "magi_attention.config",
    "DispatchConfig": "magi_attention.config",
    "DistAttnConfig": "magi_attention.config",
    "DistAttnRuntimeDictManager": "magi_attention.dist.manager",
    "DistAttnRuntimeKey": "magi_attention.dist.key",
    "DistAttnRuntimeMgr": "magi_attention.dist.manager",
    "GeneralAttnMaskType": "magi_attention.api.flex_mask",
    "GreedyOverlapAlg": "magi_attention.config",
    "GrpCollConfig": "magi_attention.config",
    "LBDispatchAlg": "magi_attention.config",
    "MinHeapDispatchAlg": "magi_attention.config",
    "OverlapAlg": "magi_attention.config",
    "OverlapAlgType": "magi_attention.common",
    "OverlapConfig": "magi_attention.config",
    "RandomSelectDispatchAlg": "magi_attention.config",
    "SequentialDispatchAlg": "magi_attention.config",
    "SortedSequentialSelectAlg": "magi_attention.config",
    "ToppHeapDispatchAlg": "magi_attention.config",
    "UniformOverlapAlg": "magi_attention.config",
    "ZigzagDispatchAlg": "magi_attention.config",
    "apply_padding": "magi_attention.api.functools",
    "calc_attn": "magi_attention.api.magi_attn_interface",
    "clear_cache": "magi_attention.api.magi_attn_interface",
    "compute_pad_size": "magi_attention.api.functools",
    "dispatch": "magi_attention.api.magi_attn_interface",
    "dist_attn_runtime_dict_mgr": "magi_attention.dist.manager",
    "flex_flash_attn_func": "magi_attention.api.flex_flash_attn",
    "get_most_recent_key": "magi_attention.api.magi_attn_interface",
    "get_position_ids": "magi_attention.api.magi_attn_interface",
    "infer_attn_mask_from_cu_seqlens": "magi_attention.api.functools",
    "infer_attn_mask_from_sliding_window": "magi_attention.api.functools",
    "infer_varlen_mask_from_batch": "magi_attention.api.functools",
    "magi_attn_flex_dispatch": "magi_attention.api.magi_attn_interface",
    "magi_attn_flex_key": "magi_attention.api.magi_attn_interface",
    "magi_attn_varlen_dispatch": "magi_attention.api.magi_attn_interface",
    "magi_attn_varlen_key": "magi_attention.api.magi_attn_interface",
    "make_flex_key_for_new_mask_after_dispatch": "magi_attention.api.magi_attn_interface",
    "make_varlen_key_for_new_mask_after_dispatch": "magi_attention.api.magi_attn_interface",
    "pad_at_dim": "magi_attention.api.functools",
    "roll": "magi_attention.api.magi_attn_interface",
    "roll_simple": "magi_attention.api.magi_attn_interface",
    "squash_batch_dim": "magi_attention.api.functools",
    "undispatch": "magi_attention.api.magi_attn_interface",
    "unpad_at_dim": "magi_attention.api.functools",
}

__all__ = [
    "AttnForwardMeta",
    "AttnMaskType",
    "AttnOverlapMode",
    "AttnRange",
    "AttnRanges",
    "BSDispatchAlg",
    "BTPDispatchAlg",
    "BalancedDispatchAlg",
    "BatchToppHeapDispatchAlg",
    "DPDispatchAlg",
    "DispatchAlg",
    "DispatchConfig",
    "DistAttnConfig",
    "DistAttnRuntimeDictManager",
    "DistAttnRuntimeKey",
    "DistAttnRuntimeMgr",
    "GeneralAttnMaskType",
    "GreedyOverlapAlg",
    "GrpCollConfig",
    "LBDispatchAlg",
    "MinHeapDispatchAlg",
    "OverlapAlg",
    "OverlapAlgType",
    "OverlapConfig",
    "RandomSelectDispatchAlg",
    "SequentialDispatchAlg",
    "SortedSequentialSelectAlg",
    "ToppHeapDispatchAlg",
    "UniformOverlapAlg",
    "ZigzagDispatchAlg",
    "apply_padding",
    "calc_attn",
    "clear_cache",
    "compute_pad_size",
    "dispatch",
    "dist_attn_runtime_dict_mgr",
    "flex_flash_attn_func",
    "get_most_recent_key",
    "get_position_ids",
    "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window",
    "infer_varlen_mask_from_batch",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "pad_at_dim",
    "roll",
    "roll_simple",
    "squash_batch_dim",
    "undispatch",
    "unpad_at_dim",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'magi_attention.api' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
