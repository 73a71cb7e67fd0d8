"""Two hops bring what one does: every receiver's keys in their order, and each key to each other node once a stage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_exchange import dealt, positions

from magi_attention.common.intervals import total_size
from magi_attention.config import OverlapConfig, UniformOverlapAlg
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


def check(exchange: Exchange, nodes: np.ndarray) -> int:
    """Keys that cross between nodes."""
    shares = [exchange.share(rank, nodes) for rank in range(nodes.size)]
    crossed = 0
    for number in range(exchange.num_stages):
        lanes = lanes_of(exchange, nodes, shares, number)
        for node in nodes:
            relays = {rank: shares[rank].stages[number].relay for rank in node.tolist()}
            arrived = np.concatenate([lanes[rank][total_size(relay.own) :] for rank, relay in relays.items()])
            assert len(np.unique(arrived)) == len(arrived)
            needed = np.concatenate(
                [positions(part) for rank in node for part in shares[rank].stages[number].receive]
            )
            held = np.concatenate([positions(exchange.keys[rank]) for rank in node])
            assert np.array_equal(np.sort(arrived), np.setdiff1d(needed, held))
            crossed += len(arrived)
        for rank in range(nodes.size):
            stage, mates = shares[rank].stages[number], node_of(nodes, rank).tolist()
            passed = [
                lanes[mate][positions(shares[mate].stages[number].relay.hand[mates.index(rank)])]
                for mate in mates
            ]
            assert [len(part) for part in passed] == stage.relay.receive_sizes
            sizes = [stage.receive_sizes[owner] for owner in stage.relay.order]
            parts = np.split(np.concatenate(passed), np.cumsum(sizes)[:-1])
            for owner, part in zip(stage.relay.order, parts, strict=True):
                assert np.array_equal(part, positions(stage.receive[owner]))
    return crossed


@given(
    masks(max_size=40, max_bands=5), st.sampled_from([(2, 2), (2, 1), (1, 2), (2, 3), (3, 2), (1, 1)]), st.integers(1, 9),
    st.integers(0, 3), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_deal_on_any_grid(mask, shape, size, degree, shuffled, seed):
    rng = np.random.default_rng(seed)
    ranks = shape[0] * shape[1]
    overlap = OverlapConfig(
        min_chunk_size=2, alg=UniformOverlapAlg(random_costs=bool(seed % 2), random_seed=seed)
    )
    nodes = (rng.permutation(ranks) if shuffled else np.arange(ranks)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_module, "UNIT", 3)
        queries, keys = (dealt(n, ranks, size, rng) for n in (mask.num_rows, mask.num_cols))
        check(Exchange(mask.bands, queries, keys, degree, overlap), nodes)


def test_what_crosses_is_what_traffic_says():
    mask = Mask.varlen([0, 130, 131, 900, 1000, 2500, 3000], causal=True, window=(700, 0), keep_first=5)
    parts = dealt(3000, 6, 100, np.random.default_rng(0))
    for shape in ((2, 3), (3, 2)):
        exchange = Exchange(mask.bands, parts, parts)
        moved = exchange.traffic(shape[0])
        assert check(exchange, np.arange(6).reshape(shape)) == moved.once.sum() < moved.between.sum()
