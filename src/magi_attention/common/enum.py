"""The documented names of mask types, modes, algorithms and precisions."""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeAlias

import torch

from magi_attention.errors import complaint

GroupReduceOp: TypeAlias = Literal["sum", "avg", "lse"]
"""How partial results from several ranks become one: added, averaged, or merged by log-sum-exp."""

AttnSinkLayout: TypeAlias = Literal["sh", "shd", "ssh"]
"""A sink's axes: "sh" (s_sink, heads), "shd" (s_sink, heads, head_dim), "ssh" (tokens, s_sink, heads)."""


class AttnMaskType(Enum):
    """What a slice of the mask lets through, of sq query rows i by sk key columns j.

    ==========  ====  ==========================================
    member      int   row i sees column j iff
    ==========  ====  ==========================================
    FULL        0     always
    CAUSAL      1     j <= i + sk - sq (bottom-right aligned)
    INVCAUSAL   2     j >= i (top-left aligned)
    BICAUSAL    3     i <= j <= i + sk - sq
    ==========  ====  ==========================================
    """

    FULL = "full"
    CAUSAL = "causal"
    BICAUSAL = "bi_causal"
    INVCAUSAL = "inv_causal"

    def to_int_type(self) -> int:
        """The number that stands for this type in ``attn_type_map`` tensors."""
        return _MASK_TYPES_BY_INT.index(self)

    @classmethod
    def from_int_type(cls, int_type: int) -> AttnMaskType:
        """The type that a number in ``attn_type_map`` stands for.

        Raises:
            ValueError: a number other than 0, 1, 2, 3.
        """
        if not 0 <= int_type < len(_MASK_TYPES_BY_INT):
            meanings = ", ".join(f"{i} ({t.value})" for i, t in enumerate(_MASK_TYPES_BY_INT))
            raise ValueError(complaint("int_type", meanings, int_type))
        return _MASK_TYPES_BY_INT[int_type]


_MASK_TYPES_BY_INT = (AttnMaskType.FULL, AttnMaskType.CAUSAL, AttnMaskType.INVCAUSAL, AttnMaskType.BICAUSAL)


class AttnType(Enum):
    """Whether queries and keys are the same tokens."""

    SELF_ATTN = "self_attn"
    CROSS_ATTN = "cross_attn"


class AttnRole(Enum):
    """What a tensor is to the attention."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"


class AttnOverlapMode(Enum):
    """Who decides the number of communication stages: the caller (STATIC) or the planner (DYNAMIC)."""

    STATIC = "static"
    DYNAMIC = "dynamic"


class DispatchAlgType(Enum):
    """Ways to deal the chunks of a sequence to the ranks."""

    LOWER_BOUND = "lower_bound"
    DYNAMIC_PROGRAMMING = "dynamic_programming"
    BINARY_SEARCH = "binary_search"
    MIN_HEAP = "min_heap"
    TOPP_HEAP = "topp_heap"
    # The value is the documented spelling.
    BACKTRACKING_PRUNING = "backtracing_pruning"
    RANDOM_SELECT = "random_select"
    SEQUENTIAL_SELECT = "sequential_select"
    BATCH_TOPP_HEAP = "batch_topp_heap"
    SORTED_SEQUENTIAL_SELECT = "sorted_sequential_select"


class OverlapAlgType(Enum):
    """Ways to group remote chunks into communication stages."""

    UNIFORM = "uniform"
    GREEDY = "greedy"


class DynamicAttnAlgType(Enum):
    """Ways to assign pieces of the mask to ranks when queries may travel, too."""

    NON_COMMUNICATION_QO = "non_communication_qo"
    GREEDY_RANDOM_GRID = "greedy_random_grid"
    SIMPLEX_NETWORK_FLOW = "simplex_network_flow"
    FAST_SIMPLEX_NETWORK_FLOW = "fast_simplex_network_flow"
    BINARY_GREEDY = "binary_greedy"
    BINARY_GREEDY_PARALLEL = "binary_greedy_parallel"


class MagiAttentionKernelBackend(Enum):
    """Documented names of attention kernels."""

    FFA = "ffa"
    SDPA = "sdpa"
    SDPA_OL = "sdpa_ol"
    FA4 = "fa4"


class MagiAttentionPrecision(Enum):
    """Documented names of floating point precisions."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP64 = "fp64"

    def to_torch_dtype(self) -> torch.dtype:
        """The torch dtype of this precision."""
        return _DTYPES[self]


_DTYPES = {
    MagiAttentionPrecision.BF16: torch.bfloat16,
    MagiAttentionPrecision.FP16: torch.float16,
    MagiAttentionPrecision.FP32: torch.float32,
    MagiAttentionPrecision.FP64: torch.float64,
}
