"""Slopes of linear biases: powers of two by formula, the others as the paper fills them up."""

from __future__ import annotations

import pytest

from magi_attention.api.alibi import get_alibi_slopes


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_slopes_of_the_paper(num_heads: int, exponents: list[float]) -> None:
    assert get_alibi_slopes(num_heads) == pytest.approx([2.0**-exponent for exponent in exponents])


@pytest.mark.parametrize("num_heads", range(1, 70))
def test_one_distinct_slope_per_head(num_heads: int) -> None:
    slopes = get_alibi_slopes(num_heads)
    assert len(set(slopes)) == num_heads and all(0 < slope < 1 for slope in slopes)


@pytest.mark.parametrize(
    ("num_heads", "error", "message"),
    [
        (0, ValueError, "nheads: expected at least 1, got 0"),
        (-1, ValueError, "nheads: expected at least 0, got -1"),
        (8.0, TypeError, "nheads: expected an integer, got float"),
        (True, TypeError, "nheads: expected an integer, got bool"),
    ],
)
def test_bad_number_of_heads(num_heads: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_alibi_slopes(num_heads)  # type: ignore[arg-type]
