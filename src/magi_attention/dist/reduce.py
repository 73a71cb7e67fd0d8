"""Gradients of parameters that every rank has, summed over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def with_reduced_gradient(x: torch.Tensor, op: str, group: dist.ProcessGroup) -> torch.Tensor:
    """``x``, whose gradient becomes the sum ("sum") or mean ("avg") of those of all ranks; "none" leaves it alone."""
    return x if op == "none" else _Reduced.apply(x, op, group)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: str, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        ctx.op, ctx.group = op, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        found = gradient.clone()
        dist.all_reduce(found, group=ctx.group)
        return found / dist.get_world_size(ctx.group) if ctx.op == "avg" else found, None, None
