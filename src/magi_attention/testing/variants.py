"""The same call in a harder shape: garbage that must not matter, and memory layouts that users have."""

from __future__ import annotations

from dataclasses import replace

import torch

from magi_attention.kernels.reference.dense import multiplicity
from magi_attention.testing.oracle import Case


def poisoned(case: Case) -> Case:
    """NaN in every key that nobody sees and in every query, and gradient of one, that sees nothing."""
    count = multiplicity(case.mask.table, case.mask.num_rows, case.mask.num_cols)
    blind, unseen = (count == 0).all(dim=1), (count == 0).all(dim=0)

    def spoil(x: torch.Tensor | None, where: torch.Tensor, trailing: int) -> torch.Tensor | None:
        return None if x is None else x.masked_fill(where.view(-1, *[1] * trailing).to(x.device), torch.nan)

    q, k, v = spoil(case.q, blind, 2), spoil(case.k, unseen, 2), spoil(case.v, unseen, 2)
    dlse = spoil(case.dlse, blind, 1) if case.sink is None else case.dlse
    assert q is not None and k is not None and v is not None
    return replace(case, q=q, k=k, v=v, dout=spoil(case.dout, blind, 2), dlse=dlse)


def packed_views(case: Case) -> Case:
    """The same q, k, v as slices of one packed tensor (tokens, H + 2 HK, D); for as many keys as queries."""
    packed = torch.cat([case.q, case.k, case.v], dim=-2)
    heads = [case.q.shape[-2], case.k.shape[-2], case.v.shape[-2]]
    q, k, v = packed.split(heads, dim=-2)
    return replace(case, q=q, k=k, v=v)


def head_major_views(case: Case) -> Case:
    """The same q, k, v, dout as transposed views of (B, H, T, D) tensors."""

    def view(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)

    dout = None if case.dout is None else view(case.dout)
    return replace(case, q=view(case.q), k=view(case.k), v=view(case.v), dout=dout)


def spaced_views(case: Case) -> Case:
    """The same q, k, v, dout, every second token and head of a larger tensor of NaN."""

    def view(x: torch.Tensor) -> torch.Tensor:
        *lead, tokens, heads, dim = x.shape
        large = torch.full((*lead, 2 * tokens, 2 * heads, dim), torch.nan, dtype=x.dtype, device=x.device)
        small = large[..., ::2, 1::2, :]
        small.copy_(x)
        return small

    dout = None if case.dout is None else view(case.dout)
    return replace(case, q=view(case.q), k=view(case.k), v=view(case.v), dout=dout)
