"""Linear layers whose outputs or inputs are shared out over the ranks of a process group (Megatron-LM, Shoeybi et al.
2019), with the tokens either on every rank or shared out as well (Korthikanti et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from magi_attention.errors import complaint


def local_share(count: int, world: int, rank: int) -> tuple[int, int]:
    """(first, number) of what rank ``rank`` has of ``count`` things; the first ranks have what is left over."""
    each, left = divmod(count, world)
    return rank * each + min(rank, left), each + (rank < left)


class _Parallel(nn.Linear):
    """A rank's part of a linear layer.

    Args:
        in_features, out_features: of this rank.
        process_group: the ranks. sequence_parallel: tokens, the first axis, are shared out where features are not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: dist.ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group, self.sequence_parallel = process_group, sequence_parallel


class ColumnParallelLinear(_Parallel):
    """y = x A^T + b for this rank's rows of A and b; arguments as in ``_Parallel``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y (..., out_features) of all tokens, from x (..., in_features)."""
        gather = _Gathered if self.sequence_parallel else _Shared
        return super().forward(gather.apply(x, self.process_group))


class RowParallelLinear(_Parallel):
    """The sum over the ranks of x A^T, for this rank's columns of A and of x, and of the first rank's b; arguments as in
    ``_Parallel``. Give a bias to the first rank only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y (..., out_features), from x (..., in_features) of all tokens."""
        add = _Scattered if self.sequence_parallel else _Summed
        return add.apply(super().forward(x), self.process_group)


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    world = dist.get_world_size(group)
    if x.shape[0] % world:
        remedy = "Pad the tokens, or take sequence_parallel=False."
        raise ValueError(complaint("tokens", f"a multiple of the {world} ranks", x.shape[0], remedy))
    part = x.new_empty(x.shape[0] // world, *x.shape[1:])
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Collective(torch.autograd.Function):
    """A movement of tensors between ranks whose gradient is moved back by another."""

    there: Any
    back: Any

    @classmethod
    def forward(cls, ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        ctx.group = group
        return cls.there(x, group)

    @classmethod
    def backward(cls, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return cls.back(grad, ctx.group), None


def _same(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.view_as(x)


class _Gathered(_Collective):
    there, back = staticmethod(_gather), staticmethod(_scatter)


class _Scattered(_Collective):
    there, back = staticmethod(_scatter), staticmethod(_gather)


class _Shared(_Collective):
    there, back = staticmethod(_same), staticmethod(_sum)


class _Summed(_Collective):
    there, back = staticmethod(_sum), staticmethod(_same)
