"""Calls whose Hopper kernels are compiled ahead of time, by the library's own tables, and edits that must be noticed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from magi_attention.plan import tiling

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


@dataclass(frozen=True)
class Variant:
    """One call of the library; ``group`` query heads read a K/V head; ``short``: the mask is one of short documents."""

    kernel: str
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    group: int = 1
    softcap: bool = False
    sink: bool = False
    max_logits: bool = False
    short: bool = False
    accumulate: bool = False
    dropout: bool = False
    alibi: bool = False

    def __str__(self) -> str:
        names = ("softcap", "sink", "max_logits", "short", "accumulate", "dropout", "alibi")
        flags = [flag for flag in names if getattr(self, flag)]
        return " ".join([self.kernel, str(self.head_dim), ELEMENTS[self.dtype], f"pack{self.group}", *flags])


def variants() -> list[Variant]:
    """Every tile of the tables with every feature somewhere, and a head dimension that is padded."""
    fp16 = torch.float16
    found = []
    for dim in tiling._HOPPER_FORWARD:
        found += [
            Variant("forward", dim),
            Variant("forward", dim, fp16, 4, softcap=True, sink=True),
            Variant("forward", dim, group=16, max_logits=True),
            Variant("forward", dim, group=4, short=True),
        ]
    for dim in tiling._HOPPER_BACKWARD:
        found += [
            Variant("backward", dim),
            Variant("backward", dim, fp16, 4, softcap=True, short=True),
            Variant("backward", dim, group=16, short=True),
        ]
    return [
        *found,
        Variant("forward", 96),
        Variant("forward", 128, softcap=True),
        Variant("forward", 128, sink=True),
        Variant("forward", 128, group=4, accumulate=True),
        Variant("forward", 256, fp16, sink=True, accumulate=True),
        Variant("forward", 64, fp16, dropout=True, alibi=True),
        Variant("forward", 128, group=4, dropout=True),
        Variant("forward", 128, group=4, alibi=True),
        Variant("forward", 128, short=True, dropout=True, alibi=True),
        Variant("backward", 96),
        Variant("backward", 64, fp16, dropout=True, alibi=True),
        Variant("backward", 128, group=4, short=True, dropout=True),
        Variant("backward", 128, alibi=True),
    ]


@dataclass(frozen=True)
class Edit:
    """A textual edit of a kernel's module that spoils the compiled ``variant`` without any message."""

    variant: Variant
    pattern: str
    replacement: str


SABOTAGE = {
    # Without a spin loop in front of it, ptxas moves the wait for P V above the exponentials.
    "no border": Edit(
        Variant("forward", 64, max_logits=True),
        r"\n +mbarrier\.wait\(k_full\.index\(\(it \+ 2\)[^\n]*",
        "",
    ),
    # Warps that do not take the branch never arrive.
    "barrier in a branch": Edit(
        Variant("forward", 64),
        r"\n( +)(p, sums, fade, pivot = reweigh\()",
        r"\n\1named_sync(15, 128)\n\1\2",
    ),
}
