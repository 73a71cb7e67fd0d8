"""The configuration of context parallelism: values, defaults, documented spellings, refusals."""

from __future__ import annotations

import dataclasses

import pytest

from magi_attention.common.enum import AttnOverlapMode, OverlapAlgType
from magi_attention.config import (
    BatchToppHeapDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    GreedyOverlapAlg,
    LBDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
    UniformOverlapAlg,
)


def test_the_documented_example():
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(alg=MinHeapDispatchAlg()),
        overlap_config=OverlapConfig(
            enable=True,
            mode=AttnOverlapMode.STATIC,
            degree=2,
            min_chunk_size=512,
            max_num_chunks=64,
            alg=OverlapAlgType.UNIFORM,
        ),
    )
    assert config.overlap_config.alg == UniformOverlapAlg()
    assert config == DistAttnConfig(DispatchConfig(MinHeapDispatchAlg()), OverlapConfig(degree=2))
    assert hash(config) == hash(dataclasses.replace(config)) and config != DistAttnConfig()
    assert OverlapConfig(alg=OverlapAlgType.GREEDY).alg == GreedyOverlapAlg()


def test_without_overlap_is_one_value_however_it_is_written():
    assert OverlapConfig(enable=False) == OverlapConfig(degree=0) != OverlapConfig(degree=1)
    assert OverlapConfig(degree=0).no_overlap and not OverlapConfig().no_overlap


def test_dynamic():
    config = OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=None)
    assert config.enable and config.degree is None and config.dynamic_max_degree == 8


BAD = {
    "degree": (lambda: OverlapConfig(degree=-1), ValueError, "degree: expected at least 0, got -1"),
    "no_degree": (lambda: OverlapConfig(degree=None), TypeError, "degree: expected an integer"),
    "many": (lambda: OverlapConfig(degree=65), ValueError, "at most max_num_chunks 64, got 65"),
    "both": (lambda: OverlapConfig(mode=AttnOverlapMode.DYNAMIC), ValueError, "degree: expected None with"),
    "mode": (lambda: OverlapConfig(mode="static"), TypeError, "mode: expected AttnOverlapMode"),
    "factor": (lambda: OverlapConfig(calc_cost_factor=0), ValueError, "calc_cost_factor: expected above 0"),
    "class": (lambda: DispatchConfig(MinHeapDispatchAlg), TypeError, "alg: expected DispatchAlg"),
    "bound": (lambda: DispatchConfig(LBDispatchAlg()), ValueError, "alg: expected one that places chunks"),
    "chunk": (lambda: DispatchConfig(chunk_size=0), ValueError, "chunk_size: expected at least 1, got 0"),
    "top_p": (lambda: ToppHeapDispatchAlg(1.5), ValueError, "top_p: expected between 0 and 1, got 1.5"),
    "select": (
        lambda: BatchToppHeapDispatchAlg(0.5, 0),
        ValueError,
        "num_of_select_chunk: expected at least 1",
    ),
    "ratio": (lambda: SortedSequentialSelectAlg(0.0), ValueError, "allocation_ratio: expected above 0"),
    "part": (lambda: DistAttnConfig(OverlapConfig()), TypeError, "dispatch_config: expected DispatchConfig"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
