"""One rank of the test of a rank that ends early; run under torchrun's environment with gloo.

Argument: before which of "forward" and "backward" the last rank leaves, and what travels.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from magi_attention.api import calc_attn, dispatch, magi_attn_flex_key
from magi_attention.config import DistAttnConfig
from magi_attention.mask import Mask

LENGTH = 64


def main() -> None:
    """The others get torch's error, in time."""
    when, strategy = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    leaves = dist.get_rank() == dist.get_world_size() - 1
    key = magi_attn_flex_key(
        *Mask.full(LENGTH).to_slices(), LENGTH, LENGTH, cp_group_or_mesh=dist.group.WORLD,
        dist_attn_config=DistAttnConfig(strategy=strategy), num_heads_q=6, num_heads_kv=6, head_dim=8,
    )  # fmt: skip
    x = dispatch(torch.randn(LENGTH, 6, 8), key).requires_grad_()
    try:
        if leaves and when == "forward":
            leave()
        out, _ = calc_attn(x, x, x, key)
        if leaves:
            leave()
        out.sum().backward()
    except RuntimeError as error:
        found = str(error)
    else:
        found = "nothing"
    assert "onnection" in found or "imed out" in found, found
    assert (when == "backward") == ("out" in locals()) and x.grad is None
    leave()


def leave() -> None:
    """At once, as a process does that is killed: without a word to the others."""
    print("done", file=sys.stderr, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
