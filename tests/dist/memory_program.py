"""One rank of the test that nothing is as long as the sequence; run under torchrun's environment with gloo."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from magi_attention.api import calc_attn, dispatch, dist_attn_runtime_dict_mgr, magi_attn_flex_key
from magi_attention.config import BalancedDispatchAlg, DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.kernels.reference import blockwise
from magi_attention.mask import Mask
from magi_attention.utils import clearup_dist_env, setup_dist_env

LENGTH = 2048
MASK = Mask.varlen([0, 900, LENGTH], causal=True, window=(350, 0), keep_first=3)


class Longest(TorchDispatchMode):
    """The longest axis of all tensors that operations take and give; flat memory counts as what it is viewed as."""

    def __init__(self) -> None:
        super().__init__()
        self.length = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Call it and look."""
        found = func(*args, **(kwargs or {}))
        self.calls += 1
        for x in tree_leaves((args, kwargs, found)):
            if isinstance(x, torch.Tensor) and (x.dim() > 1 or not x.is_floating_point()):
                self.length = max(self.length, *x.shape, 0)
        return found


@contextmanager
def watched() -> Iterator[Longest]:
    """A mode is off within operators of our own: it is put on again in those of the CPU."""
    mode = Longest()
    originals = {name: getattr(blockwise, name) for name in ("forward", "backward")}

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            with mode:
                return function(*args, **settings)

        return call

    try:
        for name, function in originals.items():
            setattr(blockwise, name, inside(function))
        with mode:
            yield mode
    finally:
        for name, function in originals.items():
            setattr(blockwise, name, function)


def main() -> None:
    """Forward and backward in stages, in one call, and with the last keys kept."""
    *_, group, _, _ = setup_dist_env()
    for overlap in (
        OverlapConfig(degree=3, min_chunk_size=64),
        OverlapConfig(degree=0),
        OverlapConfig(degree=2, min_chunk_size=64, hide_tail=True),
    ):
        config = DistAttnConfig(DispatchConfig(alg=BalancedDispatchAlg()), overlap)
        key = magi_attn_flex_key(
            *MASK.to_slices(), LENGTH, LENGTH, cp_group_or_mesh=group, dist_attn_config=config
        )
        share = dist_attn_runtime_dict_mgr[key].share
        assert share is not None and len(share.stages) == max(overlap.degree, 1)
        q, k, v = (dispatch(torch.randn(LENGTH, heads, 8), key).requires_grad_() for heads in (2, 1, 1))
        with watched() as mode:
            out, meta = calc_attn(q, k, v, key)
            (out.sum() + meta.lse.sum()).backward()
        assert q.grad is not None and mode.calls > 50
        assert len(q) <= mode.length < LENGTH, mode.length
    with watched() as mode:
        dispatch(torch.randn(LENGTH, 2), key)
    assert mode.length == LENGTH  # it would be seen
    clearup_dist_env()
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
