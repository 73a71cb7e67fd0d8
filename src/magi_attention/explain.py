"""Why a call runs as it does: what every backend says, which one is chosen, how a mask is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from magi_attention import env
from magi_attention.errors import check_type
from magi_attention.kernels.select import (
    MAX_HEAD_DIM,
    Request,
    choose_backend,
    describe,
    modifiers_of,
    request_of,
)
from magi_attention.mask import DeviceMask, Mask
from magi_attention.mask.bands import transpose
from magi_attention.plan.tiles import build_plan, max_num_tiles, run_geometry
from magi_attention.plan.tiling import (
    choose_tiles,
    has_short_runs,
    hopper_blocks,
)


class KernelTile(NamedTuple):
    """Tile of one kernel: owned rows and columns a step, in tokens, and whether it owns keys instead of queries."""

    kernel: str
    block_rows: int
    block_cols: int
    owns_keys: bool


@dataclass(frozen=True)
class KernelWork:
    """What one tiled kernel has to do for a mask, per head and batch entry.

    Attributes:
        kernel: "forward", and "backward" or "backward_dq" and "backward_dkdv".
        tile: its block sizes, in tokens.
        num_tiles: tiles with something to do; for a device mask the number of programs, an upper bound.
        num_runs, full_blocks, partial_blocks: runs of consecutive blocks over all tiles, blocks that every
            row of the tile sees, blocks that need the band test. None for a device mask.
        efficiency: visible pairs over computed pairs, 0 to 1; None for a device mask or an empty one.
    """

    kernel: str
    tile: KernelTile
    num_tiles: int
    num_runs: int | None = None
    full_blocks: int | None = None
    partial_blocks: int | None = None
    efficiency: float | None = None

    def __str__(self) -> str:
        text = f"{self.kernel:<13} tiles of {self.tile.block_rows} x {self.tile.block_cols}: "
        if self.num_runs is None:
            return f"{text}at most {self.num_tiles}, decided on the device"
        blocks = f"{self.full_blocks} full + {self.partial_blocks} partial blocks"
        text = f"{text}{self.num_tiles}, {self.num_runs} runs, {blocks}"
        return text if self.efficiency is None else f"{text}, {self.efficiency:.1%} of computed pairs visible"


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; ``str()`` gives it as text.

    Attributes:
        backend: name of the backend that runs the call.
        reason: why it is that one.
        backends: one line per backend, yes or why not.
        num_rows, num_cols, num_bands: size of the mask.
        area: visible pairs, one counted once per band that covers it; None for a device mask.
        work: one entry per kernel of the backend, or per Triton kernel when the backend has no tiles; empty beyond
            their head dimensions.
    """

    backend: str
    reason: str
    backends: str
    num_rows: int
    num_cols: int
    num_bands: int
    area: int | None
    work: tuple[KernelWork, ...]

    @property
    def density(self) -> float | None:
        """Area over the full rectangle; above 1 when pairs are covered more than once."""
        return None if self.area is None else self.area / max(self.num_rows * self.num_cols, 1)

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.reason}", self.backends]
        seen = "area known to the device only"
        if self.area is not None:
            seen = f"{self.area} visible pairs, {self.density:.1%} of the rectangle"
        lines.append(f"mask: {self.num_rows} x {self.num_cols}, {self.num_bands} bands, {seen}")
        if self.work:
            lines.append("kernels, per head, tiles in tokens, those with the most blocks first:")
            lines += [f"  {work}" for work in self.work]
        return "\n".join(lines)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask | DeviceMask,
    *,
    dropout_p: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    backend: str | None = None,
) -> Explanation:
    """How ``attention`` of these arguments would run, without running it.

    Args:
        q: (T, H, D) or (B, T, H, D). k: (S, HK, D), v: (S, HK, DV), or with the batch axis. Only device,
            dtype, heads and head dimensions matter.
        mask: over T rows and S columns. A mask on a device is not waited for: its counts are upper bounds
            or None.
        dropout_p, alibi_slopes, backend: as in ``attention``.

    Raises:
        TypeError: not a mask. ValueError, NotImplementedError: a named backend that does not exist or
            refuses.
    """
    check_type("mask", mask, (Mask, DeviceMask), "Build one with Mask.causal, ...")
    request = request_of(q, v, modifiers_of(dropout_p > 0, alibi_slopes is not None))
    name = choose_backend(request, backend)
    tiles = kernel_tiles(name, request, q.shape[-2] // k.shape[-2], mask.num_rows, mask.table.shape[0])
    work = tuple(_work(tile, mask) for tile in tiles)
    area = mask.area if isinstance(mask, Mask) else None
    size = (mask.num_rows, mask.num_cols, mask.table.shape[0])
    return Explanation(name, _reason(name, backend, request), describe(request), *size, area, work)


def _reason(name: str, asked: str | None, request: Request) -> str:
    if asked is not None:
        return "asked for by name"
    if env.backend_override() is not None:
        return "named by MAGI_ATTENTION_BACKEND"
    where = f"{str(request.dtype).removeprefix('torch.')} tensors on {request.device_type}"
    return f"the first automatic choice that accepts {where}"


def kernel_tiles(
    backend: str, request: Request, group: int, num_rows: int, num_bands: int
) -> tuple[KernelTile, ...]:
    """Tiles of the kernels that run a call.

    Args:
        backend: its name; those without tiles are described by the Triton kernels.
        group: query heads that share a K/V head. num_rows, num_bands: size of the mask.
    """
    dim = max(request.head_dim, request.head_dim_v)
    if dim > MAX_HEAD_DIM:
        return ()
    if backend == "hopper":
        short, alibi = has_short_runs(num_rows, num_bands), "ALiBi" in request.modifiers
        return tuple(
            KernelTile(kernel, *hopper_blocks(kernel, dim, group, short, alibi), kernel == "backward")
            for kernel in ("forward", "backward")
        )
    found = []
    for kernel in ("forward", "backward_dq", "backward_dkdv"):
        tile = choose_tiles(kernel, dim, request.dtype.itemsize)
        found.append(KernelTile(kernel, tile.block_rows, tile.block_cols, kernel == "backward_dkdv"))
    return tuple(found)


def _work(tile: KernelTile, mask: Mask | DeviceMask) -> KernelWork:
    kernel, owns_keys = tile.kernel, tile.owns_keys
    num_rows = mask.num_cols if owns_keys else mask.num_rows
    if not isinstance(mask, Mask):
        return KernelWork(kernel, tile, max_num_tiles(num_rows, mask.table.shape[0], tile.block_rows))
    plan = build_plan(
        transpose(mask.bands) if owns_keys else mask.bands, num_rows, tile.block_rows, tile.block_cols
    )
    begin, end, first, count = plan.tiles.numpy().astype(np.int64).T
    owner = np.repeat(np.arange(len(count)), count)
    entry = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + first[owner]
    bands = plan.bands.numpy().astype(np.int64)[plan.band_list.numpy()[entry]]
    runs = run_geometry(begin[owner], end[owner], bands, tile.block_cols)
    blocks, full = int(runs.num_blocks.sum()), int((runs.full_end - runs.full_begin).sum())
    computed = blocks * tile.block_rows * tile.block_cols
    return KernelWork(
        kernel,
        tile,
        num_tiles=int((count > 0).sum()),
        num_runs=int((runs.num_blocks > 0).sum()),
        full_blocks=full,
        partial_blocks=blocks - full,
        efficiency=mask.area / computed if computed else None,
    )
