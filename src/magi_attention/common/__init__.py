"""The documented vocabulary: ranges of tokens, mask types, and what a forward returns beside the output."""

from magi_attention.common.enum import (
    AttnMaskType,
    AttnOverlapMode,
    AttnRole,
    AttnSinkLayout,
    AttnType,
    DispatchAlgType,
    DynamicAttnAlgType,
    GroupReduceOp,
    MagiAttentionKernelBackend,
    MagiAttentionPrecision,
    OverlapAlgType,
)
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.range import AttnRange, RangeError
from magi_attention.common.ranges import AttnRanges, check_valid_cu_seqlens, is_valid_cu_seqlens

__all__ = [
    "AttnForwardMeta",
    "AttnMaskType",
    "AttnOverlapMode",
    "AttnRange",
    "AttnRanges",
    "AttnRole",
    "AttnSinkLayout",
    "AttnType",
    "DispatchAlgType",
    "DynamicAttnAlgType",
    "GroupReduceOp",
    "MagiAttentionKernelBackend",
    "MagiAttentionPrecision",
    "OverlapAlgType",
    "RangeError",
    "check_valid_cu_seqlens",
    "is_valid_cu_seqlens",
]
