"""Masks that the tests of every backend share."""

from __future__ import annotations

from magi_attention.mask import INF, Mask

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
