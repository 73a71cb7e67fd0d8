"""Names, values and numbers of the enumerations, and the forward's meta data."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from magi_attention.common import AttnForwardMeta, enum
from magi_attention.common.enum import AttnMaskType, MagiAttentionPrecision
from magi_attention.common.forward_meta import AttnForwardMeta as MetaByModule

VALUES = {
    "AttnMaskType": ["full", "causal", "bi_causal", "inv_causal"],
    "AttnType": ["self_attn", "cross_attn"],
    "AttnRole": ["query", "key", "value"],
    "AttnOverlapMode": ["static", "dynamic"],
    "DispatchAlgType": [
        "lower_bound",
        "dynamic_programming",
        "binary_search",
        "min_heap",
        "topp_heap",
        "backtracing_pruning",
        "random_select",
        "sequential_select",
        "batch_topp_heap",
        "sorted_sequential_select",
    ],
    "OverlapAlgType": ["uniform", "greedy"],
    "DynamicAttnAlgType": [
        "non_communication_qo",
        "greedy_random_grid",
        "simplex_network_flow",
        "fast_simplex_network_flow",
        "binary_greedy",
        "binary_greedy_parallel",
    ],
    "MagiAttentionKernelBackend": ["ffa", "sdpa", "sdpa_ol", "fa4"],
    "MagiAttentionPrecision": ["bf16", "fp16", "fp32", "fp64"],
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    assert [member.value for member in getattr(enum, name)] == VALUES[name]


def test_literals():
    assert get_args(enum.GroupReduceOp) == ("sum", "avg", "lse")
    assert get_args(enum.AttnSinkLayout) == ("sh", "shd", "ssh")


@pytest.mark.parametrize(("name", "number"), [("FULL", 0), ("CAUSAL", 1), ("INVCAUSAL", 2), ("BICAUSAL", 3)])
def test_mask_type_numbers(name, number):
    assert AttnMaskType[name].to_int_type() == number
    assert AttnMaskType.from_int_type(number) is AttnMaskType[name]


@pytest.mark.parametrize("number", [-1, 4])
def test_unknown_mask_type_number(number):
    with pytest.raises(ValueError, match="0 \\(full\\), 1 \\(causal\\)"):
        AttnMaskType.from_int_type(number)


def test_mask_type_from_value_or_itself():
    assert AttnMaskType("inv_causal") is AttnMaskType.INVCAUSAL
    assert AttnMaskType(AttnMaskType.FULL) is AttnMaskType.FULL
    with pytest.raises(ValueError, match="diagonal"):
        AttnMaskType("diagonal")


def test_precision_dtypes():
    dtypes = [precision.to_torch_dtype() for precision in MagiAttentionPrecision]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def test_forward_meta_fields():
    assert MetaByModule is AttnForwardMeta
    assert [f.name for f in dataclasses.fields(AttnForwardMeta)] == ["lse", "max_logits"]
    meta = AttnForwardMeta()
    assert meta.lse is None and meta.max_logits is None
    meta.lse = torch.zeros(2, 3)
    assert meta.lse.shape == (2, 3)
