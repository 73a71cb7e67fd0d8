"""The profiles that hold the Hopper kernels against their peers: their configurations, and what follows a run.

| profile | what runs |
|---|---|
| hopper-dense | full and causal, 16k tokens in batches of 2k, 8k and 16k; d 128 (16/4, 16/16 heads), 64, 256; cuDNN |
| hopper-masks | the seven masks at 16k and 64k, 32/8 heads, d 128; triton, FlexAttention |
| hopper-docs | packed causal documents of 100 to 500 tokens, 16k in all, 32/8 heads; triton, FlexAttention |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.bench import Configuration
from benchmarks.masks import FAMILIES, workload
from benchmarks.peers import first_line
from benchmarks.report import Report, Row
from benchmarks.timing import DIRECTIONS
from magi_attention.mask.bands import Bands, transpose
from magi_attention.plan import tiling
from magi_attention.plan.tiles import build_plan, run_geometry

TOTAL = 16384
DENSE_LENGTHS = (2048, 8192, 16384)
DENSE_SHAPES = (((16, 4), 128), ((16, 16), 128), ((16, 16), 64), ((8, 8), 256))
MASK_LENGTHS = (16384, 65536)
MASK_HEADS = (32, 8)
DOCUMENTS = "short_documents"

PROFILES: dict[str, tuple[str, ...]] = {
    "hopper-dense": ("hopper", "sdpa-cudnn"),
    "hopper-masks": ("hopper", "triton", "flex"),
    "hopper-docs": ("hopper", "triton", "flex"),
}
"""The subjects of each profile unless the command line names others; the first is the one that is judged."""


def configurations(
    profile: str, subjects: Sequence[str], rounds: int, limit_seconds: float, dtype: str, shrink: int = 1
) -> list[Configuration]:
    """What ``profile`` measures.

    Args:
        subjects: names; the first is ours.
        rounds, limit_seconds: per configuration.
        shrink: every length is divided by it, for a dry run on a CPU.
    """

    def one(
        mask: str, tokens: int, heads: tuple[int, int], head_dim: int, names: Sequence[str], batch: int = 1
    ) -> Configuration:
        return Configuration(
            mask, tokens // shrink, *heads, head_dim, dtype, DIRECTIONS, tuple(names), rounds, limit_seconds,
            batch=batch, bursts=True,
        )  # fmt: skip

    if profile == "hopper-dense":
        return [
            one(mask, tokens, heads, head_dim, subjects, TOTAL // tokens)
            for heads, head_dim in DENSE_SHAPES
            for mask in ("full", "causal")
            for tokens in DENSE_LENGTHS
        ]
    if profile == "hopper-masks":
        return [one(mask, tokens, MASK_HEADS, 128, subjects) for tokens in MASK_LENGTHS for mask in FAMILIES]
    # The dense rate comes first: the bound of the documents is made of it.
    return [
        one("full", TOTAL, MASK_HEADS, 128, subjects[:1]),
        one(DOCUMENTS, TOTAL, MASK_HEADS, 128, subjects),
    ]


def rounded_area(bands: Bands, num_rows: int, block_rows: int, block_cols: int) -> int:
    """Pairs that a kernel computes: a tile counts ``block_rows`` rows, a block of a run ``block_cols`` columns."""
    plan = build_plan(bands, num_rows, block_rows, block_cols)
    tiles = plan.tiles.numpy().astype(np.int64)
    counts = tiles[:, 3]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    band = plan.band_list.numpy()[np.repeat(tiles[:, 2], counts) + within]
    tight = plan.bands.numpy().astype(np.int64)[band]
    runs = run_geometry(np.repeat(tiles[:, 0], counts), np.repeat(tiles[:, 1], counts), tight, block_cols)
    return int(runs.num_blocks.sum()) * block_rows * block_cols


def efficiency(mask: str, tokens: int, direction: str, block_rows: int, block_cols: int) -> float:
    """Visible pairs over computed pairs: what rounding to whole tiles leaves of the dense rate."""
    work = workload(mask, tokens)
    bands = work.mask.bands if direction == "forward" else transpose(work.mask.bands)
    return work.area / rounded_area(bands, tokens, block_rows, block_cols)


def document_bounds(report: Report, ours: str, tiles: dict[str, tuple[int, int] | None]) -> dict[str, float]:
    """Speed of the documents over the bound that tile rounding sets, by direction; recorded as costs.

    bound = rate of the full mask in the same run * area / rounded area.

    Args:
        ours: the judged subject.
        tiles: direction to (block_rows, block_cols), or None for the kernels' own.
    """
    shares = {}
    for direction in DIRECTIONS:
        name = f"bound of {DOCUMENTS} {direction}"
        rows = [r for r in report.rows if (r.subject, r.direction, r.status) == (ours, direction, "ok")]
        dense: Row | None = next((row for row in rows if row.mask == "full"), None)
        row = next((row for row in rows if row.mask == DOCUMENTS), None)
        if dense is None or row is None or not (dense.tflops and row.tflops):
            report.add_cost(name, "no figure: a row is missing")
            continue
        try:
            group = row.heads // row.kv_heads
            tile = tiles.get(direction) or tiling.hopper_blocks(
                direction, row.head_dim, group, short_runs=True, alibi=False
            )
            kept = efficiency(row.mask, row.tokens, direction, *tile)
        except Exception as error:  # the figures of the run are worth more than this one
            report.add_cost(name, first_line(error))
            continue
        bound = dense.tflops * kept
        shares[direction] = row.tflops / bound
        figures = {
            "tile": list(tile),
            "area / rounded area": kept,
            "TFLOP/s": bound,
            "ours / bound": shares[direction],
        }
        report.add_cost(name, figures)
    return shares
