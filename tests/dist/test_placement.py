"""Chunks and their placement on ranks: documented results, optima by brute force, laws on random masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention import config
from magi_attention.dist import balance
from magi_attention.dist import chunks as chunk_module
from magi_attention.dist.chunks import Chunks, cut, joint
from magi_attention.dist.placement import _by_heap, bound, place
from magi_attention.kernels.reference.dense import multiplicity
from magi_attention.mask import Mask
from magi_attention.testing.strategies import masks

PLACING = [
    config.MinHeapDispatchAlg(),
    config.ToppHeapDispatchAlg(0.6),
    config.BatchToppHeapDispatchAlg(1.0, 3),
    config.RandomSelectDispatchAlg(),
    config.SequentialDispatchAlg(),
    config.ZigzagDispatchAlg(),
    config.SortedSequentialSelectAlg(),
    config.SortedSequentialSelectAlg(0.5),
    config.BalancedDispatchAlg(),
    config.BTPDispatchAlg(),
    config.BSDispatchAlg(),
]
DOCUMENTS = Mask.varlen([0, 30, 31, 200, 230, 800, 1000, 1024], causal=True)


def chunked(mask: Mask, size: int) -> Chunks:
    return cut(mask.bands, mask.num_rows, mask.num_cols, size)


@given(masks(max_size=60, max_bands=5), st.integers(1, 9))
def test_chunks_say_what_the_mask_says(mask, size):
    found, seen = chunked(mask, size), multiplicity(mask.table, mask.num_rows, mask.num_cols).numpy()
    edges, needed, held = found.cells()
    for n, (begin, end) in enumerate(found.rows):
        assert found.areas[n] == seen[begin:end].sum()
        keys = np.repeat(needed[n], np.diff(edges))
        assert np.array_equal(keys, (seen[begin:end] > 0).any(axis=0))
        own = np.repeat(held[n], np.diff(edges))
        assert np.array_equal(own, (np.arange(mask.num_cols) >= begin) & (np.arange(mask.num_cols) < end))


@given(masks(max_size=60, max_bands=4))
def test_work_is_that_of_whole_tiles(mask):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_module, "TILE_ROWS", 4)
        patch.setattr(chunk_module, "TILE_COLS", 8)
        found = chunked(mask, 8)
        expected = np.zeros(len(found), dtype=np.int64)
        for band in mask.bands:
            seen = Mask(band[None], mask.num_rows, mask.num_cols).to_dense()
            for row in range(0, mask.num_rows, 4):
                cols = np.flatnonzero(seen[row : row + 4].any(axis=0))
                if len(cols):
                    expected[row // 8] += -(-(cols[-1] + 1 - cols[0]) // 8) * 32
        assert np.array_equal(found.work, expected)


@pytest.mark.parametrize(
    ("weights", "ranks", "expected"),
    [
        (range(1, 9), 4, [[0, 7], [1, 6], [2, 5], [3, 4]]),
        ([7, 6, 5, 4, 3, 2, 1], 3, [[0, 5, 6], [1, 4], [2, 3]]),
        ([1] * 8, 4, [[3, 7], [2, 6], [1, 5], [0, 4]]),
        ([8, 7, 6, 5, 4, 2, 2, 2], 2, [[0, 3, 4, 5], [1, 2, 6, 7]]),
    ],
)
def test_documented_results_of_the_heap(weights, ranks, expected):
    assert [sorted(part) for part in _by_heap(np.array(weights), ranks)] == expected


@given(masks(max_size=48, max_bands=5), st.integers(1, 4), st.sampled_from(PLACING))
def test_every_chunk_is_placed_once(mask, ranks, alg):
    found = chunked(mask, 4)
    if len(found) < ranks:
        with pytest.raises(ValueError, match="chunks: expected at least"):
            place(alg, found, ranks)
        return
    parts = place(alg, found, ranks)
    assert len(parts) == ranks and sorted(itertools.chain(*parts)) == list(range(len(found)))
    assert all(part == sorted(part) for part in parts)
    if alg.has_equal_counts and len(found) % ranks == 0 and not isinstance(alg, config.ZigzagDispatchAlg):
        assert {len(part) for part in parts} == {len(found) // ranks}
    assert place(alg, found, ranks) == parts


@given(masks(max_size=28, max_bands=4), st.integers(2, 3))
def test_optima(mask, ranks):
    found = chunked(mask, 4)
    if len(found) < ranks:
        return
    n = len(found)
    best, equal = [], []
    for choice in itertools.product(range(ranks), repeat=n):
        loads = np.bincount(choice, found.areas, ranks).max()
        best.append(loads)
        if np.bincount(choice, minlength=ranks).max() <= -(-n // ranks):
            equal.append(loads)

    def largest(alg):
        return max(found.areas[part].sum() for part in place(alg, found, ranks))

    assert largest(config.BSDispatchAlg()) == min(best) == bound(config.DPDispatchAlg(), found, ranks)
    assert largest(config.BTPDispatchAlg()) == min(equal)
    assert bound(config.LBDispatchAlg(), found, ranks) <= min(best)


def received(found: Chunks, parts: list[list[int]]) -> list[int]:
    edges, needed, held = found.cells()
    return [int((needed[part].any(axis=0) & ~held[part].any(axis=0)) @ np.diff(edges)) for part in parts]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_balanced_receives_less_than_the_heap_within_its_slack(ranks):
    cuts = np.cumsum(np.random.default_rng(3).integers(10, 6000, 40))
    mask = Mask.varlen([0, *cuts[cuts < 32768], 32768], causal=True)
    found = chunked(mask, 512)
    alg = config.BalancedDispatchAlg(slack=0.05)
    ours, heap = place(alg, found, ranks), place(config.MinHeapDispatchAlg(), found, ranks)
    loads = np.array([found.work[part].sum() for part in ours])
    assert loads.max() <= 1.05 * loads.mean()
    assert max(received(found, ours)) < 0.6 * max(received(found, heap))


def documents(seed: int, tokens: int, longest: int) -> Mask:
    cuts = np.cumsum(np.random.default_rng(seed).integers(10, longest, tokens // 10))
    return Mask.varlen([0, *cuts[cuts < tokens], tokens], causal=True)


def test_documents_of_a_pack_are_balanced_with_few_keys_to_receive():
    """The longest documents are a quarter of the pack."""
    cuts = np.append(
        np.arange(5) * 16384 // 2, 32768 + np.cumsum([9000, 700, 100, 4000, 300, 3000, 5000, 9000])
    )
    found = chunked(Mask.varlen([*cuts, 65536], causal=True), 1024)
    parts = place(config.BalancedDispatchAlg(slack=0.05), found, 8)
    loads = np.array([found.work[part].sum() for part in parts])
    assert loads.max() <= 1.05 * loads.mean()
    assert (
        max(received(found, parts))
        < 13000
        < max(received(found, place(config.MinHeapDispatchAlg(), found, 8)))
    )


@given(masks(max_size=64, max_bands=5), st.integers(2, 6), st.integers(0, 99))
def test_swaps_count_what_they_change(mask, bins, seed):
    found = chunked(mask, 2)
    if len(found) < bins:
        return
    n = len(found)
    items = balance.Items.of(found, np.arange(n), np.arange(n), found.work[:, None])
    start = np.random.default_rng(seed).permutation(np.arange(n) % bins)
    swaps = balance.Swaps(items, start, np.full((bins, 1), int(1.04 * found.work.sum()) // bins))
    before, best = swaps.received.copy(), swaps.improved(8)
    each = np.arange(bins)
    parts, first, end = ([np.flatnonzero(of == x).tolist() for x in each] for of in (swaps.bin, start, best))
    assert swaps.received.tolist() == received(found, parts) and before.tolist() == received(found, first)
    loads = swaps.loads[:, 0] + swaps.limit[:, 0]
    assert loads.tolist() == [found.work[part].sum() for part in parts]
    assert np.array_equal(np.bincount(best, minlength=bins), np.bincount(start, minlength=bins))
    over = [
        np.maximum(np.array([found.work[p].sum() for p in x]) - swaps.limit[:, 0], 0).sum()
        for x in (end, first)
    ]
    assert over[0] <= over[1] or max(received(found, end)) < before.max()


def test_swaps_weigh_every_pair():
    found = chunked(DOCUMENTS, 64)
    n = len(found)
    items = balance.Items.of(found, np.arange(n), np.arange(n), found.work[:, None])
    bins = np.arange(n) % 4
    swaps = balance.Swaps(items, bins, np.full((4, 1), 1 << 40))
    swaps._weigh(np.arange(n))
    for one, other in itertools.combinations(range(n), 2):
        if bins[one] == bins[other]:
            continue
        after = bins.copy()
        after[[one, other]] = after[[other, one]]
        cost = [
            sum(x**3 for x in received(found, [np.flatnonzero(of == r) for r in range(4)]))
            for of in (bins, after)
        ]
        assert swaps.change[one, other] + swaps.change[other, one] == cost[1] - cost[0]


@pytest.mark.parametrize(("ranks", "nodes"), [(40, 1), (34, 2), (64, 8), (37, 1)])
def test_many_ranks_are_filled_in_groups(ranks, nodes):
    found = chunked(documents(1, 512 * 5 * ranks, 9000), 512)
    alg = config.BalancedDispatchAlg()
    parts = place(alg, found, ranks, nodes)
    assert sorted(itertools.chain(*parts)) == list(range(len(found))) and {len(part) for part in parts} == {5}
    loads = np.array([found.work[part].sum() for part in parts])
    assert loads.max() <= 1.06 * loads.mean()
    heap = place(config.MinHeapDispatchAlg(), found, ranks)
    assert sum(received(found, parts)) < 0.75 * sum(received(found, heap))
    assert place(alg, found, ranks, nodes) == parts


def test_nodes_receive_less_when_they_are_filled_first():
    found = chunked(documents(2, 131072, 20000), 1024)

    def once(parts):
        return sum(received(found, [list(itertools.chain(*parts[n : n + 4])) for n in range(0, 16, 4)]))

    alg = config.BalancedDispatchAlg()
    assert (
        once(place(alg, found, 16, 4))
        < once(place(alg, found, 16))
        < once(place(config.MinHeapDispatchAlg(), found, 16))
    )


def test_joint_masks_are_balanced_together():
    documents_, window = documents(3, 16384, 6000), Mask.sliding_window(16384, window=(2047, 0), causal=True)
    each = [chunked(mask, 256) for mask in (documents_, window, window)]
    both = joint(each)
    assert np.array_equal(both.work, sum(one.work for one in each)) and np.array_equal(
        both.areas, sum(x.areas for x in each)
    )
    parts = place(config.BalancedDispatchAlg(), both, 4)
    loads = np.array([both.work[part].sum() for part in parts])
    assert loads.max() <= 1.05 * loads.mean()
    assert received(both, parts) == [
        sum(x) for x in zip(*(received(one, parts) for one in each), strict=True)
    ]
    assert np.array_equal(joint([joint(each[:2]), each[2]]).pieces, both.pieces)
    assert set(both.sample) <= set(range(-1, len(documents_.bands) + 2 * len(window.bands)))


def test_sorted_sequential_keeps_documents_together():
    parts = place(config.SortedSequentialSelectAlg(), chunked(DOCUMENTS, 64), 4)
    long_one = set(range(230 // 64 + 1, 800 // 64))
    assert sum(bool(long_one & set(part)) for part in parts) <= 3


def test_refusals():
    found = chunked(DOCUMENTS, 8)
    with pytest.raises(ValueError, match="chunks: expected at most 24, got 128"):
        place(config.BTPDispatchAlg(), found, 4)
    with pytest.raises(ValueError, match="alg: expected one that places chunks, got LBDispatchAlg"):
        place(config.LBDispatchAlg(), found, 4)
    with pytest.raises(ValueError, match="alg: expected LBDispatchAlg or DPDispatchAlg"):
        bound(config.MinHeapDispatchAlg(), found, 4)
    with pytest.raises(ValueError, match="num_nodes: expected 1 with MinHeapDispatchAlg, got 2"):
        place(config.MinHeapDispatchAlg(), found, 4, 2)
    with pytest.raises(ValueError, match="num_nodes: expected a divisor of the 4 ranks, got 3"):
        place(config.BalancedDispatchAlg(), found, 4, 3)
    with pytest.raises(ValueError, match="masks: expected at least one"):
        joint([])
    with pytest.raises(ValueError, match="masks: expected one size of chunks"):
        joint([found, chunked(DOCUMENTS, 16)])
