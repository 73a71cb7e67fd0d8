"""The profile of the functions that carry FlashAttention's names.

| part | what runs |
|---|---|
| dense | the d 128 cells of hopper-dense: ``flash_attn_func``, native ``attention``, PyTorch's built-in flash kernel |
| documents | ``varlen_causal`` at 16k, 32/8 heads: ``flash_attn_varlen_func``, native ``attention`` |
| host | microseconds of a call, as in hopper-launch: all of these and cuDNN |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks import hopper, launch, targets
from benchmarks.bench import Configuration
from benchmarks.peers import SUBJECTS
from benchmarks.report import Report

PROFILE = "flash-attn"
FIXED, PACKED = "flash_attn", "flash_attn_varlen"
PEER, HOST_ONLY = "sdpa-flash", "sdpa-cudnn"
DEFAULT_SUBJECTS = (FIXED, PACKED, "hopper", PEER, HOST_ONLY)
DOCUMENTS = "varlen_causal"
HEAD_DIM = 128


def configurations(
    subjects: Sequence[str], rounds: int, limit_seconds: float, dtype: str, shrink: int = 1
) -> list[Configuration]:
    """What is raced; arguments as in ``hopper.configurations``, in whose cells it is."""

    def cells(profile: str, names: Sequence[str]) -> list[Configuration]:
        return hopper.configurations(profile, names, rounds, limit_seconds, dtype, shrink)

    in_dense = [name for name in subjects if name not in (PACKED, HOST_ONLY)]
    in_documents = [name for name in subjects if SUBJECTS[name].ours and name != FIXED]
    dense = [c for c in cells("hopper-dense", in_dense) if c.head_dim == HEAD_DIM]
    # In a capture flash_attn_varlen_func makes its mask and the plan in every call. Training makes them once for each
    # pair of boundary tensors, and so do queued calls.
    documents = [
        replace(c, capture=False)
        for c in cells("hopper-masks", in_documents)
        if (c.mask, c.tokens) == (DOCUMENTS, hopper.TOTAL // shrink)
    ]
    return dense + documents


def conclude(report: Report, device: torch.device, subjects: Sequence[str]) -> bool:
    """Measure host times and hold everything against its targets. Returns whether our host times were had."""
    host = launch.measure_host(report, device, subjects)
    targets.mean_targets(report, "dense d128", FIXED, PEER, targets.FLASH_GAIN)
    ours = [name for name in subjects if SUBJECTS[name].ours]
    for native in ours:
        if native not in (FIXED, PACKED):
            targets.mean_targets(report, "dense d128", FIXED, native, targets.NATIVE_SHARE)
            targets.mean_targets(report, DOCUMENTS, PACKED, native, targets.NATIVE_SHARE)
    targets.host_targets(report, {name: host[name] for name in (FIXED, PACKED) if name in host})
    return host.keys() >= set(ours)
