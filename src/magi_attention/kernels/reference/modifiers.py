"""Dropout and ALiBi of the torch kernels: the definitions that the other kernels must match bit by bit.

Dropout is a pure function of (seed, offset, batch entry, head, row, column), whatever the tiling. Rows and columns have
random 32-bit keys,

    (a, b, _, _) = Philox4x32-10(counter (row, batch * H + head, offset), key seed)
    (c, _, _, _) = Philox4x32-10(counter (column, 2^32 - 1, offset), key seed),

and a weight is kept where ``(a | 1) * c + b`` modulo 2^32, as a signed number, is below ``kept_below(p)``. The values of
a row are independent of each other, for they have their own c, and so are those of a column, by b: one multiplication a
weight, because kernels spend a seventh of that on the weight itself.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011); Carter and Wegman, Universal classes of hash
    functions (1979); Press et al., Train short, test long (2021).
"""

from __future__ import annotations

import torch

from magi_attention.kernels.problem import Alibi

Keys = tuple[torch.Tensor, torch.Tensor]
"""The two keys of rows, int32, (..., rows)."""

COLUMNS = 0xFFFFFFFF
"""In place of a batch entry's head, for the keys of columns."""

_LOW = 0xFFFFFFFF


def kept_below(dropout_p: float) -> int:
    """The least signed 32-bit value that drops a weight."""
    return min(round((1.0 - dropout_p) * 2**32), 2**32 - 1) - 2**31


def row_keys(rng_state: torch.Tensor, batch: int, num_heads: int, rows: torch.Tensor) -> Keys:
    """The two keys of every head and row of one batch entry: int32 (H, rows)."""
    heads = torch.arange(num_heads, device=rows.device) + batch * num_heads
    first, second = _philox(rng_state, rows, heads[:, None])
    return first | 1, second


def column_keys(rng_state: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """The key of each column: int32 (cols,)."""
    return _philox(rng_state, cols, torch.full_like(cols, COLUMNS))[0]


def _philox(rng_state: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Keys:
    """Two of Philox' four words for counters (first, second, offset); int64 tensors that broadcast."""
    seed, offset = (int(x) for x in rng_state.tolist())
    zero = torch.zeros_like(first + second)
    counter = [first + zero, second + zero, zero + (offset & _LOW), zero + (offset >> 32 & _LOW)]
    key = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        product_0, product_2 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (product_2 >> 32 & _LOW) ^ counter[1] ^ key[0],
            product_2 & _LOW,
            (product_0 >> 32 & _LOW) ^ counter[3] ^ key[1],
            product_0 & _LOW,
        ]
        key = [key[0] + 0x9E3779B9 & _LOW, key[1] + 0xBB67AE85 & _LOW]
    return _wrapped(counter[0]), _wrapped(counter[1])


def _wrapped(x: torch.Tensor) -> torch.Tensor:
    """The lower 32 bits as int32."""
    return ((x & _LOW) ^ 0x80000000).sub_(0x80000000).to(torch.int32)


def kept(rows: Keys, cols: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Which weights dropout keeps: bool (..., rows, cols) of keys (..., rows) and (cols,)."""
    multiplier, offset = (x[..., None] for x in rows)
    return multiplier * cols + offset < kept_below(dropout_p)


def alibi_bias(
    alibi: Alibi, batch: int, band: int, rows: torch.Tensor, cols: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``-slope * |column - row - diagonal|`` of a band, (H, rows, cols)."""
    distance = (cols[None, :] - rows[:, None] - alibi.diagonals[band].to(rows)).abs().to(dtype)
    return -alibi.slopes[batch, band].to(dtype)[:, None, None] * distance
