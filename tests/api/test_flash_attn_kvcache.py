"""``flash_attn_with_kvcache``, of FlashAttention 2 and 3, against the formula on what the cache holds."""

from __future__ import annotations

import inspect

import pytest
import torch
from cache_cases import PAGE_SIZES, cache_case
from flash_reference import reference, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.api import flash_attn_3_internals as fa3_internals
from magi_attention.api import flash_attn_3_kvcache as fa3
from magi_attention.api import flash_attn_internals as fa2_internals
from magi_attention.api.flash_attn_interface import flash_attn_func
from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache

CAPACITY = 24


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 1 << 20))
@settings(max_examples=150)
def test_whatever_goes_together(seed):
    case = cache_case(seed)
    out, lse = case.call()
    expected = case.formula(torch.float64)
    torch.testing.assert_close(out, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected[1], rtol=1e-9, atol=1e-9)
    case.check_caches()


@given(st.integers(0, 1 << 20), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=25)
def test_other_dtypes_keep_the_tolerance_rule(seed, dtype):
    case = cache_case(seed, dtype=dtype)
    assert all(figure.ok for figure in case.figures())
    case.check_caches()


def test_cases_hold_what_they_are_for():
    cases = [cache_case(seed) for seed in range(300)]
    names = {name for case in cases for name in case.settings}
    assert names >= {
        *(
            "k",
            "rotary_cos",
            "rotary_seqlens",
            "cu_seqlens_q",
            "cu_seqlens_k_new",
            "cache_leftpad",
            "cache_batch_idx",
        ),
        *("block_table", "page_table", "alibi_slopes", "s_aux", "keep_first", "attention_chunk"),
    }
    pages = {case.caches[0].shape[1] for case in cases if "page_table" in case.settings}
    assert pages == set(PAGE_SIZES)
    together = [case.settings.keys() for case in cases]
    assert any({"page_table", "cache_leftpad", "cache_batch_idx", "k"} <= given for given in together)
    assert any(len(keys) == 0 for case in cases for keys in case.keys)
    assert any(case.caches[0].shape[3] != case.caches[1].shape[3] for case in cases)


def test_lengths_as_a_number_or_the_whole_cache():
    q, cache = draw(2, 1, 2, 16), draw(2, CAPACITY, 1, 16)
    whole = flash_attn_with_kvcache(q, cache, cache)
    assert torch.equal(whole, flash_attn_with_kvcache(q, cache, cache, cache_seqlens=CAPACITY))
    part = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5)
    cut = cache[:, :5]
    assert torch.allclose(part, flash_attn_with_kvcache(q, cut, cut))


@pytest.mark.parametrize("window", [(-1, -1), (6, 0)])
@pytest.mark.parametrize("keep_first", [0, 3])
@pytest.mark.parametrize("page", [0, 1, 3])
def test_decoding_is_prefill_row_by_row(window, keep_first, page):
    q, k, v = (draw(2, CAPACITY, heads, 16, seed=n) for n, heads in enumerate((4, 2, 2)))
    prefill = flash_attn_func(q, k, v, causal=True, window_size=window, keep_first=keep_first)
    extra = {"window_size": window, "keep_first": keep_first}
    caches = [torch.full_like(x, torch.nan) for x in (k, v)]
    if page:
        order = torch.randperm(2 * CAPACITY // page, generator=torch.Generator().manual_seed(0))
        caches = [x.view(-1, page, 2, 16) for x in caches]
        extra["block_table"] = order.to(torch.int32).view(2, -1)
    for at in range(CAPACITY):
        new = [x[:, at : at + 1] for x in (q, k, v)]
        row = flash_attn_with_kvcache(new[0], *caches, *new[1:], cache_seqlens=at, causal=True, **extra)
        torch.testing.assert_close(row, prefill[:, at : at + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [1, 2, 7, 64, 65, 130])
@pytest.mark.parametrize("force", [False, True])
def test_small_windows_beside_first_keys(window, force):
    capacity, keep = 200, 10
    caches = [draw(3, capacity, 1, 16, seed=n) for n in (1, 2)]
    pages = [x.view(-1, 8, 1, 16) for x in caches]
    table = torch.arange(75, dtype=torch.int32).view(3, 25)
    lengths = torch.tensor([200, 9, 131], dtype=torch.int32)
    for sq in (1, 2):
        q = draw(3, sq, 2, 16, seed=sq)
        out = flash_attn_with_kvcache(
            q, *pages, cache_seqlens=lengths, block_table=table, causal=True, window_size=(window, window),
            keep_first=keep, force_fa_decode=force,
        )  # fmt: skip
        for b, length in enumerate(lengths.tolist()):
            seen = visible(sq, length, True, (window, window), capacity, keep, force)
            expected, _ = reference(q[b], *(x[b, :length] for x in caches), seen)
            torch.testing.assert_close(out[b], expected, rtol=1e-9, atol=1e-9)


def test_absorbed_queries():
    q, qv = draw(2, 3, 4, 16, seed=1), draw(2, 3, 4, 32, seed=2)
    k, v = draw(2, CAPACITY, 1, 16, seed=3), draw(2, CAPACITY, 1, 32, seed=4)
    out = fa3.flash_attn_with_kvcache(q, k, v, qv=qv, cache_seqlens=20, causal=True)
    for b in range(2):
        wide = torch.cat([q[b], qv[b]], dim=-1), torch.cat([k[b, :20], v[b, :20]], dim=-1)
        expected, _ = reference(*wide, v[b, :20], visible(3, 20, causal=True))
        torch.testing.assert_close(out[b], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
def test_fp8_is_scaled_and_computed_in_bf16(packed):
    fp8 = torch.float8_e4m3fn
    q, k, v = (draw(2, n, h, 16, seed=n).to(fp8) for n, h in ((3, 4), (CAPACITY, 2), (CAPACITY, 2)))
    scales = [torch.rand(2, 2, generator=torch.Generator().manual_seed(n)) + 0.5 for n in range(3)]
    names = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
    cuts = {"cu_seqlens_q": torch.tensor([0, 3, 6], dtype=torch.int32)} if packed else {}
    given_q = q.flatten(0, 1) if packed else q
    new = {name: draw(2, 1, 2, 16, seed=9).to(fp8) for name in "kv"}
    out = fa3.flash_attn_with_kvcache(given_q, k, v, cache_seqlens=20, **names, **cuts, **new)
    assert out.dtype == torch.bfloat16 and torch.equal(k[:, 20].float(), new["k"][:, 0].float())
    for b in range(2):
        of_heads = [scale[b].double()[:, None] for scale in scales]
        wide_q = q[b].double() * of_heads[0].repeat_interleave(2, dim=0)
        keys, values = (x[b, :21].double() * scale for x, scale in zip((k, v), of_heads[1:], strict=True))
        expected, _ = reference(wide_q, keys, values, visible(3, 21))
        found = out.view(2, 3, 4, 16)[b].double()
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_sanity_check(monkeypatch):
    cache, table = torch.zeros(6, 4, 1, 16), torch.tensor([[0, 1, 99], [3, 4, -5]], dtype=torch.int32)
    lengths = torch.tensor([8, 7], dtype=torch.int32)
    call = {"cache_seqlens": lengths, "block_table": table}
    assert flash_attn_with_kvcache(Q, cache, cache, **call).isfinite().all()
    monkeypatch.setenv("MAGI_ATTENTION_SANITY_CHECK", "1")
    assert flash_attn_with_kvcache(Q, cache, cache, **call).isfinite().all()
    for entry, message in (
        (9, r"block_table: .* got 99"),
        (13, "at most 12, got 13 for sequence 0"),
        (-1, "at least 0"),
    ):
        call["cache_seqlens"] = torch.tensor([entry, 7], dtype=torch.int32)
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(Q, cache, cache, **call)
    rows = torch.tensor([1, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_batch_idx: .* got 7"):
        flash_attn_with_kvcache(Q, CACHE, CACHE, cache_seqlens=3, cache_batch_idx=rows)


def test_internals_of_version_3_take_a_cache():
    q, new = draw(2, 3, 4, 16), draw(2, 3, 2, 16, seed=1)
    pages, table = (
        [draw(12, 4, 2, 16, seed=n) for n in (2, 3)],
        torch.arange(12, dtype=torch.int32).view(2, 6),
    )
    copies, lengths = [x.clone() for x in pages], torch.tensor([4, 19], dtype=torch.int32)
    out, lse, *rest = fa3_internals._flash_attn_forward(
        q, *pages, new, new, seqused_k=lengths, page_table=table, causal=True, window_size_left=5
    )
    expected = fa3.flash_attn_with_kvcache(
        q, *copies, new, new, cache_seqlens=lengths, page_table=table, causal=True, window_size=(5, 0),
        return_softmax_lse=True,
    )  # fmt: skip
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and rest == [None, None]
    assert all(map(torch.equal, pages, copies))


def test_packed_queries_of_pages_with_left_padding():
    k, v = (draw(12, 4, 2, 16, seed=n) for n in (2, 3))
    cuts, table = torch.tensor([0, 2, 5], dtype=torch.int32), torch.arange(12, dtype=torch.int32).view(2, 6)
    lengths, pads = torch.tensor([9, 24], dtype=torch.int32), torch.tensor([2, 7], dtype=torch.int32)
    q = draw(5, 4, 16)
    out, lse, *_ = fa2_internals._flash_attn_varlen_forward(
        q, k, v, cuts, cuts, 3, 24, 0.0, None, True, block_table=table, leftpad_k=pads, seqused_k=lengths
    )
    for b in range(2):
        own = slice(int(cuts[b]), int(cuts[b + 1]))
        keys, values = (x[table[b].long()].flatten(0, 1)[pads[b] : lengths[b]] for x in (k, v))
        expected, other = reference(q[own], keys, values, visible(len(q[own]), len(keys), causal=True))
        torch.testing.assert_close(out[own], expected)
        torch.testing.assert_close(lse[:, own], other)


def test_signatures():
    def names(function):
        parameters = inspect.signature(function).parameters.values()
        return " ".join(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)

    assert names(flash_attn_with_kvcache) == (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
        "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    )
    assert names(fa3.flash_attn_with_kvcache) == (
        "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table "
        "cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale softmax_scale causal "
        "window_size attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin "
        "return_softmax_lse"
    )


def test_scheduler_metadata_is_empty():
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    metadata = fa3.get_scheduler_metadata(2, 1, 9, 4, 2, 16, cache_seqlens=lengths, causal=True)
    assert metadata.dtype == torch.int32 and not len(metadata)
    cache = CACHE.clone()
    fa3.flash_attn_with_kvcache(Q, cache, cache, cache_seqlens=lengths, scheduler_metadata=metadata)


Q, CACHE, NEW = torch.zeros(2, 1, 2, 16), torch.zeros(2, CAPACITY, 1, 16), torch.zeros(2, 1, 1, 16)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
FEW = torch.zeros(3, dtype=torch.int32)
ANGLES = torch.zeros(40, 8)
BAD = {
    "one_of_two": (lambda f: f(Q, CACHE, CACHE, NEW), ValueError, "expected both of a pair"),
    "no_lengths": (lambda f: f(Q, CACHE, CACHE, NEW, NEW), ValueError, "cache_seqlens: expected"),
    "rotary_alone": (
        lambda f: f(Q, CACHE, CACHE, rotary_cos=ANGLES, rotary_sin=ANGLES),
        ValueError,
        "rotary_cos: expected None",
    ),
    "rotary_dim": (
        lambda f: f(Q, CACHE, CACHE, NEW, NEW, rotary_cos=NEW[0, 0].expand(9, 16), rotary_sin=NEW[0, 0].expand(9, 16),
                    cache_seqlens=1),
        ValueError,
        "rotary_dim: expected at most headdim 16, got 32",
    ),
    "lengths": (lambda f: f(Q, CACHE, CACHE, cache_seqlens=FEW), ValueError, "cache_seqlens shape: expected"),
    "lengths_dtype": (
        lambda f: f(Q, CACHE, CACHE, cache_seqlens=FEW[:2].float()),
        TypeError,
        "cache_seqlens dtype",
    ),
    "rows": (lambda f: f(Q, CACHE[:1], CACHE[:1]), ValueError, "k_cache rows: expected at least 2, got 1"),
    "heads": (
        lambda f: f(Q, CACHE.expand(-1, -1, 3, -1), CACHE.expand(-1, -1, 3, -1)),
        ValueError,
        "nheads of q: expected a multiple of 3, got 2",
    ),
    "dtype": (lambda f: f(Q.half(), CACHE, CACHE), TypeError, "k_cache dtype: expected"),
    "stride": (
        lambda f: f(Q, CACHE.transpose(1, 3).contiguous().transpose(1, 3), CACHE),
        ValueError,
        "k_cache last stride: expected 1",
    ),
    "full": (
        lambda f: f(Q, CACHE.clone(), CACHE.clone(), NEW, NEW, cache_seqlens=CAPACITY),
        ValueError,
        "at most 24, got 25 for sequence 0",
    ),
    "new": (
        lambda f: f(Q, CACHE, CACHE, NEW[:1], NEW[:1], cache_seqlens=1),
        ValueError,
        "k shape: expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("door", [flash_attn_with_kvcache, fa3.flash_attn_with_kvcache])
@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name, door):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(door)


BAD_OF_ONE = {
    "table": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, block_table=TABLE.long()),
        TypeError,
        "block_table dtype: expected",
    ),
    "slopes_and_first_keys": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, alibi_slopes=torch.ones(2), keep_first=1),
        NotImplementedError,
        "alibi_slopes, keep_first",
    ),
    "boundaries": (
        lambda: fa3.flash_attn_with_kvcache(Q[0], CACHE, CACHE, cu_seqlens_q=FEW.long()),
        TypeError,
        "cu_seqlens_q dtype",
    ),
    "descale": (
        lambda: fa3.flash_attn_with_kvcache(Q, CACHE, CACHE, q_descale=torch.ones(2, 1)),
        ValueError,
        "descales: expected None",
    ),
    "qv": (
        lambda: fa3.flash_attn_with_kvcache(Q, CACHE, CACHE, qv=Q[..., :8]),
        ValueError,
        "qv shape: expected",
    ),
}


@pytest.mark.parametrize("name", BAD_OF_ONE)
def test_bad_inputs_of_one(name):
    call, error, message = BAD_OF_ONE[name]
    with pytest.raises(error, match=message):
        call()
