"""Two hops bring what one does: every receiver's keys in their order, and each key to each other node once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_exchange import check as check_shares
from test_exchange import dealt, positions

from magi_attention.common.intervals import total_size
from magi_attention.config import GreedyOverlapAlg, OverlapConfig, UniformOverlapAlg
from magi_attention.dist import exchange as exchange_module
from magi_attention.dist.exchange import Exchange, Share
from magi_attention.dist.relay import column_of, node_of
from magi_attention.mask import Mask
from magi_attention.testing.strategies import masks


def lanes_of(exchange: Exchange, nodes: np.ndarray, shares: list[Share], number: int) -> list[np.ndarray]:
    """The keys that each lane holds after the first hop."""
    lanes = []
    for rank in range(nodes.size):
        relay, column = shares[rank].stages[number].relay, column_of(nodes, rank).tolist()
        place = column.index(rank)
        held = [positions(exchange.keys[rank])[positions(relay.own)]]
        for owner, size in zip(column, relay.arrive_sizes, strict=True):
            sent = shares[owner].stages[number].relay.send[place]
            held.append(positions(exchange.keys[owner])[positions(sent)])
            assert len(held[-1]) == size and (size == 0 or owner != rank)
        lanes.append(np.concatenate(held))
    return lanes


def check(exchange: Exchange) -> int:
    """Keys that cross between nodes."""
    nodes = exchange.nodes
    shares = [exchange.share(rank) for rank in range(nodes.size)]
    crossed = [[] for _ in nodes]
    for number in range(exchange.num_stages):
        lanes = lanes_of(exchange, nodes, shares, number)
        for node, found in zip(nodes, crossed, strict=True):
            stages = [shares[rank].stages[number] for rank in node]
            own = [total_size(stage.relay.own) for stage in stages]
            arrived = np.concatenate([lanes[rank][begin:] for rank, begin in zip(node, own, strict=True)])
            needed = np.concatenate([positions(part) for stage in stages for part in stage.receive])
            held = np.concatenate([positions(exchange.keys[rank]) for rank in node])
            assert np.array_equal(np.sort(arrived), np.setdiff1d(needed, held))  # none twice
            found.extend(arrived.tolist())
        for rank in range(nodes.size):
            stage, mates = shares[rank].stages[number], node_of(nodes, rank).tolist()
            hands = [shares[mate].stages[number].relay.hand[mates.index(rank)] for mate in mates]
            passed = [lanes[mate][positions(hand)] for mate, hand in zip(mates, hands, strict=True)]
            assert [len(part) for part in passed] == stage.relay.receive_sizes
            sizes = [stage.receive_sizes[owner] for owner in stage.relay.order]
            parts = np.split(np.concatenate(passed), np.cumsum(sizes)[:-1])
            for owner, part in zip(stage.relay.order, parts, strict=True):
                assert np.array_equal(part, positions(stage.receive[owner]))
    assert all(len(set(found)) == len(found) for found in crossed)  # nor in another stage
    return sum(map(len, crossed))


@given(
    masks(max_size=40, max_bands=5), st.sampled_from([(2, 2), (2, 1), (1, 2), (2, 3), (3, 2), (1, 1)]), st.integers(1, 9),
    st.integers(0, 3), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_deal_on_any_grid(mask, shape, size, degree, shuffled, seed):
    rng = np.random.default_rng(seed)
    ranks = shape[0] * shape[1]
    algs = UniformOverlapAlg(), UniformOverlapAlg(random_costs=True, random_seed=seed), GreedyOverlapAlg()
    overlap = OverlapConfig(min_chunk_size=2, alg=algs[seed % 3])
    nodes = (rng.permutation(ranks) if shuffled else np.arange(ranks)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_module, "UNIT", 3)
        queries, keys = (dealt(n, ranks, size, rng) for n in (mask.num_rows, mask.num_cols))
        exchange = Exchange(mask.bands, queries, keys, degree, overlap, nodes)
        check_shares(exchange, mask.num_rows, mask.num_cols)
        check(exchange)


def test_what_crosses_is_what_traffic_says():
    mask = Mask.varlen([0, 130, 131, 900, 1000, 2500, 3000], causal=True, window=(700, 0), keep_first=5)
    parts = dealt(3000, 6, 100, np.random.default_rng(0))
    for shape, degree in (((2, 3), 1), ((3, 2), 1), ((2, 3), 4)):
        overlap, nodes = OverlapConfig(min_chunk_size=32), np.arange(6).reshape(shape)
        exchange = Exchange(mask.bands, parts, parts, degree, overlap, nodes)
        moved = exchange.traffic(shape[0])
        assert exchange.num_stages == degree
        assert check(exchange) == moved.once.sum() < moved.between.sum()
