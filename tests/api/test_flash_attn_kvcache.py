"""``flash_attn_with_kvcache`` against the formula on what the cache holds."""

from __future__ import annotations

import inspect

import pytest
import torch
from flash_reference import reference, visible
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache
from magi_attention.api.rotary import apply_rotary_emb_torch

CAPACITY, PAGE = 24, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paged(cache: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a cache (b, S, h, d) as shuffled pages, and their block table."""
    batch, blocks = len(cache), CAPACITY // PAGE
    order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(seed))
    pages = torch.full((batch * blocks, PAGE, *cache.shape[2:]), torch.nan, dtype=cache.dtype)
    pages[order] = cache.reshape(batch * blocks, PAGE, *cache.shape[2:])
    return pages, order.to(torch.int32).view(batch, blocks)


@given(
    st.integers(1, 6), st.sampled_from([0, 1, 3]), st.booleans(), st.sampled_from([(-1, -1), (5, 0), (30, 2)]),
    st.sampled_from(["plain", "pages", "rows", "leftpad"]), st.sampled_from(["none", "interleaved", "halves"]),
    st.sampled_from([{}, {"keep_first": 2}, {"alibi_slopes": torch.tensor([[0.1, 0.4], [0.3, 0.2]])}]),
    st.integers(0, 99),
)  # fmt: skip
def test_caches(sq, num_new, causal, window, layout, rotary, extra, seed):
    lengths = torch.randint(
        4, CAPACITY - 4, (2,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    num_rows = 3 if layout == "rows" else 2
    rows = (
        torch.tensor([2, 0], dtype=torch.int32)
        if layout == "rows"
        else torch.tensor([0, 1], dtype=torch.int32)
    )
    pads = (
        torch.tensor([3, 1], dtype=torch.int32) if layout == "leftpad" else torch.zeros(2, dtype=torch.int32)
    )
    q = draw(2, sq, 2, 16, seed=1)
    caches = [draw(num_rows, CAPACITY, 1, 16, seed=n) for n in (2, 3)]
    new = [draw(2, num_new, 1, 16, seed=n) for n in (4, 5)]
    angles = torch.arange(CAPACITY + 8, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    turns = rotary != "none" and num_new > 0

    def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not turns:
            return x
        own = angles[positions]
        return apply_rotary_emb_torch(x[None], own.cos(), own.sin(), rotary == "interleaved")[0]

    expected, lses, held = [], [], [cache.clone() for cache in caches]
    for b in range(2):
        used = int(lengths[b])
        held[0][rows[b], used : used + num_new] = turned(new[0][b], used + torch.arange(num_new))
        held[1][rows[b], used : used + num_new] = new[1][b]
        local = causal or window[0] in range(CAPACITY) or window[1] in range(CAPACITY)
        own = turned(q[b], used + (torch.arange(sq) if local else torch.zeros(sq, dtype=torch.long)))
        keys, values = (cache[rows[b], pads[b] : used + num_new] for cache in held)
        seen = visible(sq, len(keys), causal, window, CAPACITY, extra.get("keep_first", 0))
        slopes = extra["alibi_slopes"][b] if "alibi_slopes" in extra else None
        out, lse = reference(own, keys, values, seen, slopes=slopes)
        expected.append(out)
        lses.append(lse.masked_fill(lse == -torch.inf, torch.inf))
    settings: dict = {"causal": causal, "window_size": window, "cache_seqlens": lengths, **extra}
    given_caches = caches
    if layout == "pages":
        (keys, table), (values, _) = paged(caches[0], seed), paged(caches[1], seed)
        given_caches, settings["block_table"] = [keys, values], table
    if layout == "rows":
        settings["cache_batch_idx"] = rows
    if layout == "leftpad":
        settings["cache_leftpad"] = pads
    if num_new:
        settings |= {"k": new[0], "v": new[1]}
    if turns:
        settings |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        settings["rotary_interleaved"] = rotary == "interleaved"
    found, lse = flash_attn_with_kvcache(q, *given_caches, return_softmax_lse=True, **settings)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, torch.stack(lses), rtol=1e-9, atol=1e-9)
    if layout == "pages":
        held = [paged(cache, seed)[0] for cache in held]
    for one, other in zip(given_caches, held, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert torch.equal(settings["cache_seqlens"], lengths)


def test_lengths_as_a_number_or_the_whole_cache():
    q, cache = draw(2, 1, 2, 16), draw(2, CAPACITY, 1, 16)
    whole = flash_attn_with_kvcache(q, cache, cache)
    assert torch.equal(whole, flash_attn_with_kvcache(q, cache, cache, cache_seqlens=CAPACITY))
    part = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5)
    cut = cache[:, :5]
    assert torch.allclose(part, flash_attn_with_kvcache(q, cut, cut))


def test_signature():
    parameters = inspect.signature(flash_attn_with_kvcache).parameters.values()
    assert " ".join(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD) == (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
        "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    )


Q, CACHE, NEW = torch.zeros(2, 1, 2, 16), torch.zeros(2, CAPACITY, 1, 16), torch.zeros(2, 1, 1, 16)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
BAD = {
    "one_of_two": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, NEW),
        ValueError,
        "expected both of a pair",
    ),
    "no_lengths": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW),
        ValueError,
        "cache_seqlens: expected",
    ),
    "rotary_alone": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, rotary_cos=NEW, rotary_sin=NEW),
        ValueError,
        "rotary_cos: expected None",
    ),
    "pages_and_rows": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, block_table=TABLE, cache_batch_idx=TABLE[:, 0]),
        NotImplementedError,
        "with block_table: expected neither",
    ),
    "table": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, block_table=TABLE.long()),
        TypeError,
        "block_table dtype: expected",
    ),
    "full": (
        lambda: flash_attn_with_kvcache(Q, CACHE.clone(), CACHE.clone(), NEW, NEW, cache_seqlens=CAPACITY),
        IndexError,
        "out of bounds",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
