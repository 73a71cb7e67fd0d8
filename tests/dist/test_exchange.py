"""What ranks receive and compute: every visible pair once, every remote key once, senders and receivers agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.config import BalancedDispatchAlg, MinHeapDispatchAlg
from magi_attention.dist import exchange as exchange_module
from magi_attention.dist.chunks import cut
from magi_attention.dist.exchange import Exchange
from magi_attention.dist.placement import place
from magi_attention.kernels.reference.dense import multiplicity
from magi_attention.mask import Mask
from magi_attention.testing.strategies import masks


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
    return [np.array([(b, min(b + size, length)) for b in begins[of == r]]).reshape(-1, 2) for r in range(ranks)]


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
    assert np.array_equal(seen, counts(exchange.bands, num_rows, num_cols))


@given(masks(max_size=40, max_bands=5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_any_deal_of_queries_and_keys(mask, ranks, size, degree, seed):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_module, "UNIT", 3)
        queries, keys = (dealt(n, ranks, size, rng) for n in (mask.num_rows, mask.num_cols))
        check(Exchange(mask.bands, queries, keys, degree), mask.num_rows, mask.num_cols)


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("alg", [MinHeapDispatchAlg(), BalancedDispatchAlg()])
def test_placements_of_documents(alg, degree):
    mask = Mask.varlen([0, 130, 131, 900, 1000, 2500, 3000], causal=True, window=(700, 0), keep_first=5)
    found = cut(mask.bands, 3000, 3000, 128)
    parts = [found.rows[part] for part in place(alg, found, 4)]
    exchange = Exchange(mask.bands, parts, parts, max(degree, 1))
    assert exchange.num_stages <= max(degree, 1)
    check(exchange, 3000, 3000)


def test_stages_are_alike():
    mask = Mask.full(4096)
    parts = [np.array([[1024 * rank, 1024 * rank + 1024]]) for rank in range(4)]
    share = Exchange(mask.bands, parts, parts, 3).share(1)
    assert [stage.receive_sizes for stage in share.stages] == [[256, 0, 256, 256], [384, 0, 384, 384], [384, 0, 384, 384]]


def test_nothing_remote_is_no_stage():
    mask = Mask.varlen([0, 100, 200], causal=True)
    parts = [np.array([[0, 100]]), np.array([[100, 200]])]
    assert Exchange(mask.bands, parts, parts, 2).share(0).stages == ()
