"""The plan's side of a persistent kernel: one warp pulls tiles off the work counter and sends their runs ahead.

A tile costs an atomic, a few integer divisions and three dependent loads before its first block is known. All of that
happens here, a run or two ahead of the producer, which finds one message of 64 bytes a run.
"""

from __future__ import annotations

from magi_attention.kernels.hopper.compat import gl, gluon
from magi_attention.kernels.hopper.primitives import (
    get_word,
    get_words,
    put_words,
    raw_arrive,
    raw_init,
    raw_wait,
    retire,
    take_item,
)

RUN_SLOTS = gl.constexpr(2)
# A program that holds work while others are idle ends late: a tile of more blocks than AHEAD is followed by another only
# when NEAR_END blocks of its last run are left, time enough to find that one's first run.
AHEAD = gl.constexpr(16)
NEAR_END = gl.constexpr(6)
RUN_FULL = gl.constexpr(24)
RUN_FREE = gl.constexpr(26)
RUN_WORDS = gl.constexpr(512 + 384)


@gluon.jit
def init_runs(raw):
    for slot in gl.static_range(RUN_SLOTS):
        raw_init(raw + (RUN_FULL + slot) * 8, 1)
        raw_init(raw + (RUN_FREE + slot) * 8, 1)


@gluon.jit
def locate(item, num_tiles, num_units, wave, parts):
    """(tile, unit) of a work item, so that tiles that run together share operands in L2 and short tiles come last.

    The tiles, longest first, are taken in ``parts`` parts; within a part ``wave`` units at a time.
    """
    part_tiles = (num_tiles + parts - 1) // parts
    first_tile = item // (part_tiles * num_units) * part_tiles
    item -= first_tile * num_units
    part_tiles = gl.minimum(part_tiles, num_tiles - first_tile)
    first_unit = item // (part_tiles * wave) * wave
    within = item - first_unit * part_tiles
    here = gl.minimum(wave, num_units - first_unit)
    return first_tile + within // here, first_unit + within % here


@gluon.jit
def run_of(BANDS, n, row_begin, row_end, BLOCK: gl.constexpr, ALIGNED: gl.constexpr):
    """The tile's run in band ``n``, as plan.tiles.run_geometry has it.

    Returns (first, last, num_blocks, all_from, all_to, lo, hi); columns all_from <= j < all_to are visible to every row.
    ALIGNED blocks begin at multiples of BLOCK, the first one at or before ``first``.
    """
    band = BANDS + 6 * n
    q0, q1 = gl.load(band), gl.load(band + 1)
    k0, k1 = gl.load(band + 2), gl.load(band + 3)
    lo, hi = gl.load(band + 4), gl.load(band + 5)
    first = gl.maximum(k0, row_begin + lo)
    last = gl.where((q0 <= row_begin) & (row_begin < q1), gl.minimum(k1, row_end + hi), first)
    before = 0
    if ALIGNED:
        before = first % BLOCK
    num_blocks = gl.where(last > first, (last - first + before + BLOCK - 1) // BLOCK, 0)
    all_from = gl.maximum(k0, row_end - 1 + lo)
    all_to = gl.minimum(k1, row_begin + hi + 1)
    return first, last, num_blocks, all_from, all_to, lo, hi


@gluon.jit
def count_blocks(
    BAND_LIST, BANDS, list_begin, list_count, row_begin, row_end, BLOCK: gl.constexpr, ALIGNED: gl.constexpr
):
    """Blocks of all runs of a tile."""
    total = 0
    for at in range(list_begin, list_begin + list_count):
        total += run_of(BANDS, gl.load(BAND_LIST + at), row_begin, row_end, BLOCK, ALIGNED)[2]
    return total


@gluon.jit
def scheduler(
    raw, TILES, BAND_LIST, BANDS, COUNTER, num_tiles, num_owners, owners_per_batch, units_per_kv, wave, parts,
    BLOCK: gl.constexpr, OWNS_KEYS: gl.constexpr,
):  # fmt: skip
    """Send every run of every tile that this program takes, then the end.

    The owner of a tile is a unit of query heads, or with OWNS_KEYS a K/V head, whose tiles walk the runs once for each
    of its ``units_per_kv`` units, in aligned blocks. ``total`` of a tile's first run counts all its blocks and is 1 at
    least; it is 0 in later runs. A tile without blocks sends one run of none.
    """
    sent = 0
    item = gl.program_id(0)
    while item < num_tiles * num_owners:
        tile, owner = locate(item, num_tiles, num_owners, wave, parts)
        row_begin, row_end = gl.load(TILES + 4 * tile), gl.load(TILES + 4 * tile + 1)
        list_begin, list_count = gl.load(TILES + 4 * tile + 2), gl.load(TILES + 4 * tile + 3)
        long = 0
        if row_begin < row_end:
            batch = owner // owners_per_batch
            owner = owner % owners_per_batch
            num_blocks = count_blocks(
                BAND_LIST, BANDS, list_begin, list_count, row_begin, row_end, BLOCK, OWNS_KEYS
            )
            if OWNS_KEYS:
                kv_head = owner
                first_unit = owner * units_per_kv
                num_walks = units_per_kv
            else:
                kv_head = owner // units_per_kv
                first_unit = owner
                num_walks = 1
            total = gl.maximum(num_blocks * num_walks, 1)
            long = (total > AHEAD).to(gl.int32)
            if num_blocks == 0:
                # Seen as a band that shows nothing: one walk, one run without blocks.
                num_walks = 1
                list_count = 1
            for unit in range(first_unit, first_unit + num_walks):
                for at in range(list_begin, list_begin + list_count):
                    first, last, run_blocks, all_from, all_to, lo, hi = 0, 0, 0, 0, 0, 0, 0
                    band = 0
                    if num_blocks > 0:
                        band = gl.load(BAND_LIST + at)
                        first, last, run_blocks, all_from, all_to, lo, hi = run_of(
                            BANDS, band, row_begin, row_end, BLOCK, OWNS_KEYS
                        )
                    if (run_blocks > 0) | (num_blocks == 0):
                        slot = sent % RUN_SLOTS
                        words = raw + RUN_WORDS + slot * 64
                        raw_wait(raw + (RUN_FREE + slot) * 8, ((sent // RUN_SLOTS) & 1) ^ 1)
                        put_words(words, first, last, all_from, all_to)
                        put_words(words + 16, lo, hi, run_blocks, total)
                        put_words(words + 32, row_begin, row_end, batch, kv_head)
                        put_words(words + 48, unit, band, 0, 0)
                        raw_arrive(raw + (RUN_FULL + slot) * 8)
                        sent += 1
                        total = 0
        if long != 0:
            last = sent - 1
            raw_wait(raw + (RUN_FREE + last % RUN_SLOTS) * 8, (last // RUN_SLOTS) & 1)
        item = take_item(COUNTER) + gl.num_programs(0)
    slot = sent % RUN_SLOTS
    raw_wait(raw + (RUN_FREE + slot) * 8, ((sent // RUN_SLOTS) & 1) ^ 1)
    put_words(raw + RUN_WORDS + slot * 64 + 16, 0, 0, -1, 0)
    raw_arrive(raw + (RUN_FULL + slot) * 8)
    retire(COUNTER, gl.num_programs(0))


@gluon.jit
def await_run(raw, received):
    """Wait for the next run: its number of blocks, -1 at the end."""
    slot = received % RUN_SLOTS
    raw_wait(raw + (RUN_FULL + slot) * 8, (received // RUN_SLOTS) & 1)
    return get_word(raw + RUN_WORDS + slot * 64 + 24)


@gluon.jit
def take_run(raw, received):
    """The run that ``await_run`` announced: (first, last, all_from, all_to, lo, hi, total, row_begin, row_end, batch,
    kv_head, unit, band)."""
    words = raw + RUN_WORDS + received % RUN_SLOTS * 64
    first, last, all_from, all_to = get_words(words)
    lo, hi, _, total = get_words(words + 16)
    row_begin, row_end, batch, kv_head = get_words(words + 32)
    unit, band, _, _ = get_words(words + 48)
    return first, last, all_from, all_to, lo, hi, total, row_begin, row_end, batch, kv_head, unit, band


@gluon.jit
def release_run(raw, received):
    """Free the message; due when NEAR_END blocks of the run are left."""
    raw_arrive(raw + (RUN_FREE + received % RUN_SLOTS) * 8)
