"""Dropout and ALiBi of the torch kernels: the definitions that the other kernels must match bit by bit.

Dropout is a pure function of (seed, offset, batch entry, head, row, column), whatever the tiling. Each row has two keys,

    (a, b, _, _) = Philox4x32-10(counter (row, batch * H + head, offset), key seed),

and a pair of neighbouring columns has 32 bits, murmur3's finalizer of ``(column // 2) * 0x9E3779B1 + a``, with b mixed in
half way: the lower half is the even column's. A weight is kept where its 16 bits are below ``kept_below(p)``.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011); Press et al., Train short, test long (2021).
"""

from __future__ import annotations

import torch

from magi_attention.kernels.problem import Alibi

Keys = tuple[torch.Tensor, torch.Tensor]
"""The two keys of rows, int32, (..., rows)."""

_LOW = 0xFFFFFFFF


def kept_below(dropout_p: float) -> int:
    """Of 65536 values, how many keep a weight."""
    return round((1.0 - dropout_p) * 65536)


def row_keys(rng_state: torch.Tensor, batch: int, num_heads: int, rows: torch.Tensor) -> Keys:
    """The two keys of every head and row of one batch entry: int32 (H, rows)."""
    seed, offset = (int(x) for x in rng_state.tolist())
    heads = torch.arange(num_heads, device=rows.device) + batch * num_heads
    zero = torch.zeros(num_heads, len(rows), dtype=torch.int64, device=rows.device)
    counter = [rows + zero, heads[:, None] + zero, zero + (offset & _LOW), zero + (offset >> 32 & _LOW)]
    key = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32 & _LOW) ^ counter[1] ^ key[0],
            second & _LOW,
            (first >> 32 & _LOW) ^ counter[3] ^ key[1],
            first & _LOW,
        ]
        key = [key[0] + 0x9E3779B9 & _LOW, key[1] + 0xBB67AE85 & _LOW]
    return _wrapped(counter[0]), _wrapped(counter[1])


def _wrapped(x: torch.Tensor) -> torch.Tensor:
    """The lower 32 bits as int32."""
    return ((x & _LOW) ^ 0x80000000).sub_(0x80000000).to(torch.int32)


def kept(keys: Keys, cols: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Which weights of rows with these ``keys`` (..., rows) dropout keeps: bool (..., rows, cols)."""
    first, second = (x[..., None] for x in keys)
    x = _wrapped((cols >> 1) * 0x9E3779B1) + first
    x = (x ^ (x >> 16 & 0xFFFF)) * -0x7A143595
    x = (x ^ second ^ (x >> 13 & 0x7FFFF)) * -0x3D4D51CB
    x = x ^ (x >> 16 & 0xFFFF)
    return (torch.where((cols & 1) == 0, x, x >> 16) & 0xFFFF) < kept_below(dropout_p)


def alibi_bias(
    alibi: Alibi, batch: int, band: int, rows: torch.Tensor, cols: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``-slope * |column - row - diagonal|`` of a band, (H, rows, cols)."""
    distance = (cols[None, :] - rows[:, None] - alibi.diagonals[band].to(rows)).abs().to(dtype)
    return -alibi.slopes[batch, band].to(dtype)[:, None, None] * distance
