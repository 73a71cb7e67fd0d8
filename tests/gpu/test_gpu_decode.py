"""``flash_attn_with_kvcache`` on a GPU: sampled calls by the tolerance rule, and what only a GPU can get wrong."""

from __future__ import annotations

import pytest
import torch
from cache_cases import cache_case

from magi_attention.api import flash_attn_3_kvcache as fa3
from magi_attention.api import flash_attn_cache
from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache
from magi_attention.kernels.triton import counters

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def caches(rows: int, positions: int, heads: int = 2, dim: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (rows, positions, heads, dim)
    return tuple(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in "kv")  # type: ignore[return-value]


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("seed", range(1000, 1110))
def test_whatever_goes_together(seed):
    dtype = (torch.bfloat16, torch.float16)[seed % 2]
    case = cache_case(
        seed, device=DEVICE, dtype=dtype, most=700, head_dims=((64, 128), (128, 96), (256, 13))[seed % 3]
    )
    figures = case.figures()
    assert all(figure.ok for figure in figures), figures
    case.check_caches()
    left = [reserve.counters for reserve in counters._reserves.values()]
    assert not any(x.any() for x in left)


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("queries", [1, 4, 16, 64, 128])
def test_kernels_equal_the_mask(page, queries, monkeypatch):
    batch, capacity, lengths = 5, 9008, integers(9008, 1, 4097, 8000, 2500)
    k, v = caches(batch, capacity, heads=1)
    extra = {}
    if page:
        order = torch.randperm(batch * capacity // page, device=DEVICE).to(torch.int32).view(batch, -1)
        k, v, extra = k.view(-1, page, 1, 128), v.view(-1, page, 1, 128), {"block_table": order}
    q = torch.randn(batch, queries, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    call = {"cache_seqlens": lengths, "causal": True, "return_softmax_lse": True, **extra}
    out, lse = flash_attn_with_kvcache(q, k, v, **call)
    monkeypatch.setattr(flash_attn_cache, "MOST_ROWS", 0)
    expected, other = flash_attn_with_kvcache(q, k, v, **call)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, other, rtol=1e-4, atol=1e-4)


def test_a_graph_follows_lengths_tables_and_queries():
    k, v = (x.view(-1, 16, 2, 128) for x in caches(4, 2048))
    q, new = (
        torch.randn(4, 1, 8, 128, device=DEVICE).bfloat16(),
        torch.randn(4, 1, 2, 128, device=DEVICE).bfloat16(),
    )
    table = torch.randperm(4 * 128, device=DEVICE).to(torch.int32).view(4, -1)
    lengths, angles = integers(5, 100, 1500, 2000), torch.randn(2, 2100, 64, device=DEVICE).bfloat16()

    def step():
        return flash_attn_with_kvcache(
            q,
            k,
            v,
            new,
            new,
            *angles,
            cache_seqlens=lengths,
            block_table=table,
            causal=True,
            rotary_interleaved=False,
        )

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for turn in range(3):
        q.normal_()
        new.normal_()
        lengths.copy_(integers(2000, 1 + turn, 700, 0))
        table.copy_(table[:, torch.randperm(128, device=DEVICE)])
        graph.replay()
        found, held = out.clone(), k.clone()
        assert torch.equal(found, step()) and torch.equal(held, k)


def test_the_host_does_not_wait():
    k, v = caches(3, 500)
    q, lengths, cuts = (
        torch.randn(3, 1, 2, 128, device=DEVICE).bfloat16(),
        integers(3, 400, 0),
        integers(0, 1, 2, 3),
    )
    flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, window_size=(50, 0), keep_first=4)
        flash_attn_with_kvcache(q, k, v, q[:, :, :2], q[:, :, :2], cache_seqlens=lengths)
        packed = fa3.flash_attn_with_kvcache(q[:, 0], k, v, cache_seqlens=lengths, cu_seqlens_q=cuts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(packed, flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)[:, 0])


def test_streams_have_their_own_counters():
    k, v = caches(1, 30000)
    q = torch.randn(1, 1, 8, 128, device=DEVICE).bfloat16()
    expected = flash_attn_with_kvcache(q, k, v)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(flash_attn_with_kvcache(q, k, v))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in found)


def test_long_caches_need_64_bits():
    # 2 x 1.2M positions x 8 heads x 128: more elements than 32 bits count.
    k = torch.zeros(2, 1_200_000, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    q = torch.randn(2, 1, 8, 128, device=DEVICE).bfloat16()
    k[1, 1_199_999] = 30 * q[1, 0]
    v[1, 1_199_999] = 1
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=integers(1_200_000, 1_200_000))
    assert not out[0].any() and (out[1] > 0.9).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    k, v = caches(2, 300)
    lengths = integers(40, 200)

    def step(q, new):
        return flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths, causal=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for count in (1, 3):
        q, new = (torch.randn(2, count, h, 128, device=DEVICE).bfloat16() for h in (4, 2))
        found, held = compiled(q, new), k.clone()
        torch.testing.assert_close(found, step(q, new))
        assert torch.equal(held, k) and torch.equal(k[0, 40 : 40 + count], new[0])
