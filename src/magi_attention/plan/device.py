"""The device builder: the plan of ``tiles.build_plan`` from bands that live on a GPU.

A few small Triton kernels, no host synchronisation, every allocation sized by the number of rows and bands alone: it can
be captured in a CUDA graph, and replays follow the bands' current content.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from magi_attention.mask.bands import INF as _INF
from magi_attention.plan.tiles import TilePlan, max_num_tiles

INF = tl.constexpr(_INF)

# A band list longer than this many entries is not worth its memory: tiles that do not fit walk all bands instead.
_MAX_LIST = 1 << 22
# Counting ranks is quadratic: beyond this many keys a sort wins.
_MAX_COUNTED = 1 << 14
_CHUNK = 1024


def build_device_plan(
    table: torch.Tensor,
    num_rows: int,
    num_cols: int,
    block_rows: int,
    block_cols: int,
    *,
    transposed: bool = False,
) -> TilePlan:
    """Tile plan of device bands, without looking at them from the host.

    Args:
        table: int32 (n, 6) on the device. Bands may reach outside the rectangle: they are clipped.
        num_rows, num_cols: the mask's rectangle (of the table as given, also when ``transposed``).
        block_rows, block_cols: tile height and block width.
        transposed: plan the transposed mask: tiles own keys and walk queries.
    """
    if transposed:
        num_rows, num_cols = num_cols, num_rows
    table = table.contiguous()
    num_bands, device = table.shape[0], table.device
    num_tiles = max_num_tiles(num_rows, num_bands, block_rows)
    capacity = min(num_tiles * num_bands, max(_MAX_LIST, 2 * num_tiles))
    bands = torch.empty_like(table)
    # The same numbers band after band for the attention kernels, column after column for the kernels here.
    columns = torch.empty(6, num_bands, dtype=torch.int32, device=device)
    tiles = torch.empty(num_tiles, 4, dtype=torch.int32, device=device)
    band_list = torch.empty(num_bands + capacity, dtype=torch.int32, device=device)
    if num_tiles == 0:
        return TilePlan(tiles, band_list, bands, block_rows, block_cols)

    num_cuts = 2 * num_bands + 2
    # One allocation each: all begin aligned, so that Triton compiles every kernel once.
    cuts, ordered, first_tile = (torch.empty(num_cuts, dtype=torch.int32, device=device) for _ in range(3))
    _tighten_kernel[(triton.cdiv(max(num_bands, 1), 128),)](
        table, bands, columns, cuts, num_bands, num_rows, num_cols, TRANSPOSED=transposed, BLOCK=128
    )
    _sort_ascending(cuts, ordered)
    _count_tiles_kernel[(1,)](ordered, first_tile, num_cuts, block_rows, BLOCK=4 * _CHUNK, num_warps=8)
    extent, spans = (torch.empty(num_tiles, 2, dtype=torch.int32, device=device) for _ in range(2))
    cost, rank = (torch.empty(num_tiles, dtype=torch.int32, device=device) for _ in range(2))
    _measure_tiles_kernel[(num_tiles,)](
        ordered,
        first_tile,
        columns,
        extent,
        spans,
        cost,
        num_cuts,
        num_bands,
        block_rows,
        block_cols,
        BLOCK=_CHUNK,
    )
    _place_lists_kernel[(1,)](spans, num_tiles, num_bands, capacity, BLOCK=4 * _CHUNK, num_warps=8)
    _rank_descending(cost, rank)
    _write_tiles_kernel[(num_tiles,)](extent, spans, rank, columns, tiles, band_list, num_bands, BLOCK=_CHUNK)
    return TilePlan(tiles, band_list, bands, block_rows, block_cols)


def _sort_ascending(keys: torch.Tensor, out: torch.Tensor) -> None:
    if keys.shape[0] > _MAX_COUNTED:
        torch.sort(keys, out=(out, torch.empty_like(out, dtype=torch.int64)))
    else:
        _rank_kernel[(triton.cdiv(keys.shape[0], 16),)](
            keys, out, keys.shape[0], SCATTER=True, BLOCK=16, CHUNK=_CHUNK
        )


def _rank_descending(cost: torch.Tensor, rank: torch.Tensor) -> None:
    """Position of each tile when ordered by falling cost, ties by tile number."""
    num = cost.shape[0]
    if num > _MAX_COUNTED:
        order = torch.argsort(cost, descending=True, stable=True)
        rank[order] = torch.arange(num, dtype=torch.int32, device=cost.device)
    else:
        _rank_kernel[(triton.cdiv(num, 16),)](cost, rank, num, SCATTER=False, BLOCK=16, CHUNK=_CHUNK)


@triton.jit
def _store_band(at, step, q0, q1, k0, k1, lo, hi, live):
    tl.store(at, q0, mask=live)
    tl.store(at + step, q1, mask=live)
    tl.store(at + 2 * step, k0, mask=live)
    tl.store(at + 3 * step, k1, mask=live)
    tl.store(at + 4 * step, lo, mask=live)
    tl.store(at + 5 * step, hi, mask=live)


@triton.jit
def _load_band(at, step, live):
    q0 = tl.load(at, mask=live, other=0)
    q1 = tl.load(at + step, mask=live, other=0)
    k0 = tl.load(at + 2 * step, mask=live, other=0)
    k1 = tl.load(at + 3 * step, mask=live, other=0)
    lo = tl.load(at + 4 * step, mask=live, other=0)
    hi = tl.load(at + 5 * step, mask=live, other=0)
    return q0, q1, k0, k1, lo, hi


@triton.jit(do_not_specialize=["num_bands", "num_rows", "num_cols"])
def _tighten_kernel(
    TABLE, BANDS, COLUMNS, CUTS, num_bands, num_rows, num_cols, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr
):
    """Clip and shrink each band to what it uses; its first and last row become cuts, beside 0 and num_rows."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < num_bands
    q0, q1, k0, k1, lo, hi = _load_band(TABLE + 6 * n, 1, live)
    lo = tl.minimum(tl.maximum(lo, -INF), INF)
    hi = tl.minimum(tl.maximum(hi, -INF), INF)
    if TRANSPOSED:
        q0, q1, k0, k1 = k0, k1, q0, q1
        lo, hi = -hi, -lo
    q0, q1 = tl.maximum(q0, 0), tl.minimum(q1, num_rows)
    k0, k1 = tl.maximum(k0, 0), tl.minimum(k1, num_cols)
    q0, q1 = tl.maximum(q0, k0 - hi), tl.minimum(q1, k1 - lo)
    k0, k1 = tl.maximum(k0, q0 + lo), tl.minimum(k1, q1 + hi)
    empty = (q0 >= q1) | (k0 >= k1) | (lo > hi)
    q0, q1 = tl.where(empty, 0, q0), tl.where(empty, 0, q1)
    k0, k1 = tl.where(empty, 0, k0), tl.where(empty, 0, k1)
    lo, hi = tl.where(empty, -INF, lo), tl.where(empty, INF, hi)
    _store_band(BANDS + 6 * n, 1, q0, q1, k0, k1, lo, hi, live)
    _store_band(COLUMNS + n, num_bands, q0, q1, k0, k1, lo, hi, live)
    tl.store(CUTS + n, q0, mask=live)
    tl.store(CUTS + num_bands + n, q1, mask=live)
    if tl.program_id(0) == 0:
        tl.store(CUTS + 2 * num_bands, 0)
        tl.store(CUTS + 2 * num_bands + 1, num_rows)


@triton.jit(do_not_specialize=["num"])
def _rank_kernel(KEYS, OUT, num, SCATTER: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Stable rank of each key by counting: ascending and written to its place, or descending and stored as the rank."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(KEYS + i, mask=i < num, other=0)
    rank = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, num, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = tl.load(KEYS + j, mask=j < num, other=0)
        if SCATTER:
            before = other[None, :] < key[:, None]
        else:
            before = other[None, :] > key[:, None]
        before = before | ((other[None, :] == key[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum((before & (j < num)[None, :]).to(tl.int32), axis=1)
    if SCATTER:
        tl.store(OUT + rank, key, mask=i < num)
    else:
        tl.store(OUT + i, rank, mask=i < num)


@triton.jit(do_not_specialize=["num_cuts", "block_rows"])
def _count_tiles_kernel(CUTS, FIRST_TILE, num_cuts, block_rows, BLOCK: tl.constexpr):
    """Exclusive prefix sum of the tiles of each segment [cut s, cut s + 1)."""
    carry = 0
    for start in range(0, num_cuts, BLOCK):
        s = start + tl.arange(0, BLOCK)
        begin = tl.load(CUTS + s, mask=s < num_cuts, other=0)
        end = tl.load(CUTS + s + 1, mask=s + 1 < num_cuts, other=0)
        pieces = tl.where(s + 1 < num_cuts, (end - begin + block_rows - 1) // block_rows, 0)
        tl.store(FIRST_TILE + s, carry + tl.cumsum(pieces, axis=0) - pieces, mask=s < num_cuts)
        carry += tl.sum(pieces, axis=0)


@triton.jit(do_not_specialize=["num_cuts", "num_bands", "block_rows", "block_cols"])
def _measure_tiles_kernel(
    CUTS,
    FIRST_TILE,
    COLUMNS,
    EXTENT,
    SPANS,
    COST,
    num_cuts,
    num_bands,
    block_rows,
    block_cols,
    BLOCK: tl.constexpr,
):
    """Rows of one tile, how many bands it meets, and how many blocks they make; -1 for a tile that does not exist."""
    tile = tl.program_id(0)
    segment = -1  # the last one whose first tile is not beyond this
    for start in range(0, num_cuts, BLOCK):
        c = start + tl.arange(0, BLOCK)
        first = tl.load(FIRST_TILE + c, mask=c < num_cuts, other=0)
        segment += tl.sum(((first <= tile) & (c < num_cuts)).to(tl.int32), axis=0)
    if segment + 1 >= num_cuts:
        tl.store(EXTENT + 2 * tile, 0)
        tl.store(EXTENT + 2 * tile + 1, 0)
        tl.store(SPANS + 2 * tile + 1, 0)
        tl.store(COST + tile, -1)
        return
    row_begin = tl.load(CUTS + segment) + (tile - tl.load(FIRST_TILE + segment)) * block_rows
    row_end = tl.minimum(row_begin + block_rows, tl.load(CUTS + segment + 1))
    count, cost = 0, 0
    for start in range(0, num_bands, BLOCK):
        n = start + tl.arange(0, BLOCK)
        q0, q1, k0, k1, lo, hi = _load_band(COLUMNS + n, num_bands, n < num_bands)
        inside = (q0 <= row_begin) & (row_begin < q1)
        width = tl.minimum(k1, row_end + hi) - tl.maximum(k0, row_begin + lo)
        blocks = (width + block_cols - 1) // block_cols
        count += tl.sum(inside.to(tl.int32), axis=0)
        cost += tl.sum(tl.where(inside, tl.maximum(blocks, 0), 0), axis=0)
    tl.store(EXTENT + 2 * tile, row_begin)
    tl.store(EXTENT + 2 * tile + 1, row_end)
    tl.store(SPANS + 2 * tile + 1, count)
    tl.store(COST + tile, cost)


@triton.jit(do_not_specialize=["num_tiles", "num_bands", "capacity"])
def _place_lists_kernel(SPANS, num_tiles, num_bands, capacity, BLOCK: tl.constexpr):
    """Where each tile's list begins; one that does not fit becomes the list of all bands."""
    carry = tl.zeros([], dtype=tl.int64)
    for start in range(0, num_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count = tl.load(SPANS + 2 * tile + 1, mask=tile < num_tiles, other=0).to(tl.int64)
        begin = carry + tl.cumsum(count, axis=0) - count
        fits = begin + count <= capacity
        tl.store(SPANS + 2 * tile, tl.where(fits, num_bands + begin, 0).to(tl.int32), mask=tile < num_tiles)
        tl.store(SPANS + 2 * tile + 1, tl.where(fits, count, num_bands).to(tl.int32), mask=tile < num_tiles)
        carry += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["num_bands"])
def _write_tiles_kernel(EXTENT, SPANS, RANK, COLUMNS, TILES, LIST, num_bands, BLOCK: tl.constexpr):
    """Store each tile at its place in the order, and the bands that it meets."""
    tile = tl.program_id(0)
    row_begin, row_end = tl.load(EXTENT + 2 * tile), tl.load(EXTENT + 2 * tile + 1)
    begin, count = tl.load(SPANS + 2 * tile), tl.load(SPANS + 2 * tile + 1)
    exists = row_end > row_begin
    entry = TILES + 4 * tl.load(RANK + tile)
    tl.store(entry + 0, row_begin)
    tl.store(entry + 1, row_end)
    tl.store(entry + 2, tl.where(exists, begin, 0))
    tl.store(entry + 3, tl.where(exists, count, 0))
    if tile == 0:
        for start in range(0, num_bands, BLOCK):
            n = start + tl.arange(0, BLOCK)
            tl.store(LIST + n, n, mask=n < num_bands)
    if exists & (begin >= num_bands):
        written = begin
        for start in range(0, num_bands, BLOCK):
            n = start + tl.arange(0, BLOCK)
            q0 = tl.load(COLUMNS + n, mask=n < num_bands, other=0)
            q1 = tl.load(COLUMNS + num_bands + n, mask=n < num_bands, other=0)
            inside = ((q0 <= row_begin) & (row_begin < q1) & (n < num_bands)).to(tl.int32)
            tl.store(LIST + written + tl.cumsum(inside, axis=0) - inside, n, mask=inside > 0)
            written += tl.sum(inside, axis=0)
