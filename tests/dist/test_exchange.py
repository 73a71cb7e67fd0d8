"""What ranks receive and compute: every visible pair once, every remote key once, senders and receivers agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import (
    BalancedDispatchAlg,
    GreedyOverlapAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    UniformOverlapAlg,
)
from magi_attention.dist.chunks import cut
from magi_attention.dist.cost import Heads, Link, Machine
from magi_attention.dist.exchange import Exchange, fused
from magi_attention.dist.placement import place
from magi_attention.kernels.reference.dense import multiplicity
from magi_attention.mask import Mask
from magi_attention.mask.bands import INF, clip, compact
from magi_attention.testing.strategies import masks

HEADS = Heads(8, 2, 128)


def positions(ranges: np.ndarray) -> np.ndarray:
    """Every position of ranges, in their order."""
    return np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in np.asarray(ranges).reshape(-1, 2))])


def counts(bands: np.ndarray, num_rows: int, num_cols: int) -> np.ndarray:
    mask = Mask(bands, num_rows, num_cols)
    return multiplicity(mask.table, num_rows, num_cols).numpy()


def dealt(length: int, ranks: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Ranges of up to ``size`` positions, dealt at random, in any order."""
    begins = rng.permutation(np.arange(0, length, size))
    of = rng.integers(0, ranks, len(begins))
    return [
        np.array([(b, min(b + size, length)) for b in begins[of == r]]).reshape(-1, 2) for r in range(ranks)
    ]


def check(exchange: Exchange, num_rows: int, num_cols: int) -> None:
    seen = np.zeros((num_rows, num_cols), dtype=np.int64)
    shares = [exchange.share(rank) for rank in range(exchange.num_ranks)]
    assert {len(share.stages) for share in shares} == {exchange.num_stages}
    for share in shares:
        rows, own = positions(exchange.queries[share.rank]), positions(exchange.keys[share.rank])
        assert (share.num_rows, share.num_cols) == (len(rows), len(own))
        seen[np.ix_(rows, own)] += counts(share.bands, len(rows), len(own))
        arrived = own
        for number, stage in enumerate(share.stages):
            cols = np.concatenate([positions(part) for part in stage.receive])
            assert not np.isin(cols, arrived).any() and len(np.unique(cols)) == len(cols)
            arrived = np.concatenate([arrived, cols])
            found = counts(stage.bands, len(rows), len(cols))
            seen[np.ix_(rows, cols)] += found
            assert found.any(axis=0).all() or not len(cols)  # nothing comes that nobody sees
            assert stage.receive_sizes[share.rank] == 0
            for sender, part in zip(shares, stage.receive, strict=True):
                local = positions(sender.stages[number].send[share.rank])
                theirs = positions(exchange.keys[sender.rank])[local]
                assert np.array_equal(theirs, positions(part))
                assert sender.stages[number].send_sizes[share.rank] == len(theirs)
        whole = counts(exchange.bands, num_rows, num_cols)[rows]
        assert len(arrived) == len(own) + exchange.received[share.rank]
        if share.joined is not None:
            places = np.concatenate(share.joined.places)
            assert np.array_equal(arrived[np.argsort(places)], np.sort(arrived))
            joined = counts(share.joined.bands, len(rows), len(arrived))
            assert np.array_equal(joined[:, places], whole[:, arrived])
    assert np.array_equal(seen, counts(exchange.bands, num_rows, num_cols))


ALGS = [UniformOverlapAlg(), UniformOverlapAlg(random_costs=True, random_seed=3), GreedyOverlapAlg()]


@given(
    masks(max_size=40, max_bands=5),
    st.integers(1, 16),
    st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(1, 9), st.integers(4, 9)),
    st.sampled_from(ALGS),
    st.integers(0, 99),
)
def test_any_deal_of_queries_and_keys(mask, ranks, sizes, alg, seed):
    rng = np.random.default_rng(seed)
    size, degree, least, most = sizes
    queries, keys = (dealt(n, ranks, size, rng) for n in (mask.num_rows, mask.num_cols))
    overlap = OverlapConfig(degree=degree, min_chunk_size=least, max_num_chunks=most, alg=alg)
    exchange = Exchange.of(mask.bands, queries, keys, overlap, HEADS)
    check(exchange, mask.num_rows, mask.num_cols)
    assert exchange.num_stages <= max(degree, 1)
    assert (exchange.share(0).joined is not None) == (degree == 0)


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("alg", [MinHeapDispatchAlg(), BalancedDispatchAlg()])
def test_placements_of_documents(alg, degree):
    mask = Mask.varlen([0, 50, 51, 350, 400, 1000, 1200], causal=True, window=(300, 0), keep_first=5)
    found = cut(mask.bands, 1200, 1200, 64)
    parts = [found.rows[part] for part in place(alg, found, 4)]
    exchange = Exchange(mask.bands, parts, parts, degree, OverlapConfig(min_chunk_size=100))
    assert exchange.num_stages == max(degree, 1)
    check(exchange, 1200, 1200)


@given(masks(max_size=40, max_bands=4), st.sampled_from([(1, 1), (4, 2), (6, 3), (6, 1)]), st.integers(0, 99))
def test_traffic_and_loads(mask, shape, seed):
    (ranks, nodes), rng = shape, np.random.default_rng(seed)
    queries, keys = (dealt(n, ranks, 3, rng) for n in (mask.num_rows, mask.num_cols))
    exchange = Exchange(mask.bands, queries, keys)
    found, loads = exchange.traffic(nodes), exchange.loads(nodes)
    seen = counts(mask.bands, mask.num_rows, mask.num_cols)
    needs = [set(np.flatnonzero(seen[positions(part)].any(axis=0)).tolist()) for part in queries]
    holds = [set(positions(part).tolist()) for part in keys]
    size = ranks // nodes
    for node in range(nodes):
        mine = range(node * size, node * size + size)
        near = set().union(*(holds[rank] for rank in mine))
        assert found.once[node] == len(set().union(*(needs[rank] for rank in mine)) - near)
        for rank in mine:
            assert found.received[rank] == len(needs[rank] - holds[rank])
            assert found.between[rank] == len(needs[rank] - near)
            assert loads.abroad[rank] == -(-found.once[node] // size)
    assert np.array_equal(found.received, found.within + found.between)
    own = np.array(
        [seen[np.ix_(positions(q), positions(k))].sum() for q, k in zip(queries, keys, strict=True)]
    )
    area = np.stack([own, [seen[positions(q)].sum() for q in queries] - own], axis=1)
    work = cut(mask.bands, mask.num_rows, mask.num_cols, 1 << 20).work.sum()
    expected = area * work // max(area.sum(), 1)
    assert np.abs(np.stack([loads.own, loads.remote], axis=1) - expected).max(initial=0) <= 1
    assert loads.rows.sum() == mask.num_rows


def test_stages_are_alike():
    mask = Mask.full(4096)
    parts = [np.array([[1024 * rank, 1024 * rank + 1024]]) for rank in range(4)]
    share = Exchange(mask.bands, parts, parts, 3).share(1)
    assert [stage.receive_sizes for stage in share.stages] == [
        [256, 0, 256, 256],
        [384, 0, 384, 384],
        [384, 0, 384, 384],
    ]


def test_nothing_remote_is_no_stage():
    mask = Mask.varlen([0, 100, 200], causal=True)
    parts = [np.array([[0, 100]]), np.array([[100, 200]])]
    assert Exchange(mask.bands, parts, parts, 2).share(0).stages == ()


FULL = Mask.full(8192)
QUARTERS = [np.array([[2048 * rank, 2048 * rank + 2048]]) for rank in range(4)]


@pytest.mark.parametrize(
    ("overlap", "stages"),
    [
        (OverlapConfig(degree=8), 8),
        (OverlapConfig(degree=8, min_chunk_size=1024), 6),
        (OverlapConfig(degree=2, max_num_chunks=2), 2),
        (OverlapConfig(degree=0), 1),
        (OverlapConfig(enable=False), 1),
    ],
)
def test_chunks_bound_stages(overlap, stages):
    assert Exchange.of(FULL.bands, QUARTERS, QUARTERS, overlap, HEADS).num_stages == stages


def test_random_costs_shuffle_by_their_seed():
    def received(seed):
        alg = UniformOverlapAlg(random_costs=True, random_seed=seed)
        overlap = OverlapConfig(degree=2, alg=alg)
        share = Exchange.of(FULL.bands, QUARTERS, QUARTERS, overlap, HEADS).share(1)
        return [[part.tolist() for part in stage.receive] for stage in share.stages]

    assert received(1) == received(1) != received(2)


def test_greedy_stages_have_more_even_work():
    mask = Mask.causal(8192)

    def most(alg):
        parts = [
            np.array([[1024 * r, 1024 * r + 1024], [7168 - 1024 * r, 8192 - 1024 * r]]) for r in range(4)
        ]
        exchange = Exchange.of(
            mask.bands, parts, parts, OverlapConfig(degree=3, min_chunk_size=256, alg=alg), HEADS
        )
        return sum(
            max(
                Mask(stage.bands, 2048, sum(stage.receive_sizes)).area
                for stage in exchange.share(rank).stages
            )
            for rank in range(4)
        )

    assert most(GreedyOverlapAlg()) < most(UniformOverlapAlg())


def test_a_dynamic_degree_grows_with_what_there_is_to_hide():
    def degree(machine, tokens=8192):
        parts = [np.array([[tokens // 4 * rank, tokens // 4 * (rank + 1)]]) for rank in range(4)]
        overlap = OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=None, dynamic_max_degree=5)
        return Exchange.of(Mask.full(tokens).bands, parts, parts, overlap, HEADS, machine=machine).degree

    slow, slower = (Machine(intra=Link(20.0, rate)) for rate in (20.0, 5.0))
    assert degree(Machine()) <= 1 < degree(slow) <= 5
    assert degree(Machine(), 64) == degree(slower, 64) == 0
    assert degree(slow) == degree(slow)


def test_neighbouring_bands_are_one():
    table = np.array(
        [[0, 4, 0, 3, -INF, INF], [0, 4, 3, 9, -INF, INF], [4, 8, 0, 9, -INF, INF], [0, 8, 9, 20, -9, 11]]
    )
    assert len(fused(table)) == 2
    assert np.array_equal(counts(fused(table), 8, 20), counts(table, 8, 20))


@given(masks(max_size=30, max_bands=6))
def test_joining_bands_keeps_the_mask(mask):
    pieces = np.concatenate(
        [clip(mask.bands, (0, mask.num_rows), (a, a + 5)) for a in range(0, mask.num_cols, 5)]
    )
    found = fused(compact(pieces))
    assert np.array_equal(
        counts(found, mask.num_rows, mask.num_cols), counts(mask.bands, mask.num_rows, mask.num_cols)
    )


def test_a_node_must_have_as_many_ranks():
    with pytest.raises(ValueError, match="num_nodes: expected a divisor of the 4 ranks, got 3"):
        Exchange(FULL.bands, QUARTERS, QUARTERS).traffic(3)
