"""What tests of attention need: the fp64 oracle, the tolerance rule, random inputs and random masks.

``magi_attention.testing.strategies`` needs hypothesis and is therefore imported by name only.
"""

from magi_attention.testing.oracle import (
    Case,
    assert_matches_oracle,
    compare,
    compare_parts,
    random_case,
    results,
)
from magi_attention.testing.tolerance import Comparison, Figure

__all__ = [
    "Case",
    "Comparison",
    "Figure",
    "assert_matches_oracle",
    "compare",
    "compare_parts",
    "random_case",
    "results",
]
