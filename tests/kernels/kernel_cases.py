"""Masks and inputs that the tests of every backend share."""

from __future__ import annotations

from dataclasses import replace

import torch

from magi_attention.kernels.reference.dense import multiplicity
from magi_attention.mask import INF, Mask
from magi_attention.testing import Case

MASKS = {
    "full": Mask.full(57, 70),
    "causal": Mask.causal(131),
    "causal, few queries": Mask.causal(9, 131),
    "causal, few keys": Mask.causal(131, 40),
    "window": Mask.sliding_window(131, window=(20, 3)),
    "documents": Mask.varlen([0, 1, 8, 64, 65, 131], causal=True),
    "window with first keys": Mask.varlen([0, 60, 131], window=(9, 0), keep_first=3),
    "prefix tree": Mask.prefix_tree([40, 21, 30, 11], [-1, 0, 0, 1]),
    "covered twice": Mask([[0, 131, 0, 131, -INF, 0]] * 2 + [[30, 90, 10, 50, -40, 5]], 131, 131),
    "rows and keys in no band": Mask([[17, 51, 40, 77, -INF, INF], [60, 90, 5, 33, -80, -30]], 131, 99),
    "one pair": Mask.full(1),
    "nothing": Mask([[4, 4, 0, 9, -INF, INF]], 9, 9),
}


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
