"""Slopes for linear biases, under the name that ``flash_attn.modules.mha`` gives them."""

from __future__ import annotations

from magi_attention.errors import check_count, complaint


def get_alibi_slopes(nheads: int) -> list[float]:
    """One slope per head (Press et al. 2021, "Train Short, Test Long").

    For n heads, n a power of two, the slopes are 2^(-8/n), 2^(-16/n), ..., 2^(-8). Otherwise they are those of
    the next lower power of two m, followed by the first n - m of every second slope of 2m heads.

    Args:
        nheads: number of heads, at least 1.

    Returns:
        ``nheads`` positive floats. ``torch.tensor(..., dtype=torch.float32)`` makes the ``alibi_slopes`` of a call.

    Raises:
        TypeError, ValueError: not an integer, or less than 1.
    """
    check_count("nheads", nheads)
    if nheads == 0:
        raise ValueError(complaint("nheads", "at least 1", nheads))
    lower = 1 << (nheads.bit_length() - 1)
    return _geometric(lower) + _geometric(2 * lower)[::2][: nheads - lower]


def _geometric(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * head / num_heads) for head in range(1, num_heads + 1)]
