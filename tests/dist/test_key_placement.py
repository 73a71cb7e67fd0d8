"""Keys of another source: every rank keeps its number of keys, each key lies somewhere, and fewer travel."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_exchange import dealt, positions

from magi_attention.dist.chunks import cuts_of
from magi_attention.dist.exchange import Exchange
from magi_attention.dist.key_placement import place_keys
from magi_attention.mask import Mask
from magi_attention.testing.strategies import masks


def contiguous(length: int, ranks: int) -> list[np.ndarray]:
    pieces = cuts_of(length, max(-(-length // ranks), 1))
    return [pieces[rank : rank + 1] for rank in range(ranks)]


def placed(mask: Mask, queries: list[np.ndarray], size: int) -> tuple[Exchange, Exchange]:
    """Keys as they come, and where they are seen."""
    pieces = contiguous(mask.num_cols, len(queries))
    one = Exchange(mask.bands, queries, pieces)
    return one, Exchange(mask.bands, queries, place_keys(one.seen, one.stride, pieces, size))


@given(masks(max_size=60, max_bands=5), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_never_more_travel(mask, ranks, size, seed):
    queries = dealt(mask.num_rows, ranks, 4, np.random.default_rng(seed))
    before, after = placed(mask, queries, size)
    assert np.array_equal(
        np.sort(np.concatenate([positions(part) for part in after.keys])), np.arange(mask.num_cols)
    )
    assert [len(positions(part)) for part in after.keys] == [len(positions(part)) for part in before.keys]
    assert all((part[1:, 0] > part[:-1, 1]).all() for part in after.keys)
    assert after.received.sum() <= before.received.sum()


def test_keys_follow_queries_that_were_shuffled():
    """Documents of 100 queries and 60 keys on ranks of their own: in the end nothing travels."""
    order = np.random.default_rng(0).permutation(8)
    bands = [[100 * n, 100 * n + 100, 60 * n, 60 * n + 60, -1000, 1000] for n in range(8)]
    queries = [np.array([[100 * n, 100 * n + 100]]) for n in order]
    before, after = placed(Mask(bands, 800, 480), queries, 20)
    assert before.received.sum() > 0 == after.received.sum()
    assert [part.tolist() for part in after.keys] == [[[60 * n, 60 * n + 60]] for n in order]


def test_what_is_seen_alike_stays():
    mask = Mask.full(80)
    queries = contiguous(80, 4)
    before, after = placed(mask, queries, 7)
    assert all(map(np.array_equal, before.keys, after.keys))
