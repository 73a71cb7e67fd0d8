"""The flash_attn functions on a GPU: a large sampled grid by the tolerance rule, and what only a GPU can get wrong."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from magi_attention import dropin
from magi_attention.api import flash_attn_3 as fa3
from magi_attention.api import flash_attn_interface as fa
from magi_attention.api.flash_attn_core import from_softmax_lse
from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache
from magi_attention.api.flash_attn_sink import fa2_func_with_sink
from magi_attention.common import AttnForwardMeta
from magi_attention.mask import Mask
from magi_attention.testing import compare, random_case

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HEADS_KV = {"mha": 4, "mqa": 1, "gqa": 2}

GRID = list(
    itertools.product(
        [torch.float16, torch.bfloat16],
        ["mha", "mqa", "gqa"],
        [32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256],
        [
            (1, 239),
            (113, 203),
            (128, 217),
            (113, 211),
            (108, 256),
            (256, 512),
            (512, 256),
            (1023, 1024),
            (2048, 2048),
        ],
        ["full", "causal", "window"],
        [0.0, 50.0],
        [0.0, 0.17],
        [False, True],
    )
)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(
    "case", random.Random(0).sample(GRID, 120), ids=lambda case: "-".join(map(str, case))
)
def test_sampled_grid(case):
    dtype, heads, dim, (sq, sk), shape, softcap, dropout_p, with_slopes = case
    window, causal = (sk // 5, 3) if shape == "window" else (-1, -1), shape == "causal"

    def through_the_door(q, k, v, mask, **settings):
        torch.manual_seed(1)
        out, lse, _ = fa.flash_attn_func(
            q,
            k,
            v,
            dropout_p,
            None,
            causal,
            window,
            softcap,
            settings.get("alibi_slopes"),
            return_attn_probs=True,
        )
        return out, AttnForwardMeta(from_softmax_lse(lse), None)

    made = random_case(
        Mask.sliding_window(sq, sk, window, causal),
        heads=(4, HEADS_KV[heads]), head_dim=dim, dtype=dtype, device=DEVICE, batch=2, softcap=softcap,
    )  # fmt: skip
    if with_slopes:
        made = replace(made, alibi_slopes=torch.rand(2, 4, device=DEVICE) * 0.3)
    if dropout_p:
        torch.manual_seed(1)
        state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=DEVICE)
        made = replace(made, dropout_p=dropout_p, rng_state=state)
    with mock.patch("magi_attention.testing.oracle.attention", through_the_door):
        result = compare(made, max_logits=False)
    assert result.ok, result


CUTS = [0, 100, 100, 357, 700, 1024]


def packed_inputs(dim: int = 128):
    cuts = torch.tensor(CUTS, dtype=torch.int32, device=DEVICE)
    return [draw(1024, h, dim, seed=h) for h in (8, 2, 2)], cuts


@pytest.mark.parametrize("dim", [64, 111, 128, 256])
@pytest.mark.parametrize("window", [(-1, -1), (60, 0)])
def test_packed_equals_one_by_one(dim, window):
    (q, k, v), cuts = packed_inputs(dim)
    out = fa.flash_attn_varlen_func(q, k, v, cuts, cuts, 343, 343, causal=True, window_size=window)
    parts = [
        fa.flash_attn_func(*(x[None, a:b] for x in (q, k, v)), causal=True, window_size=window)[0]
        for a, b in itertools.pairwise(CUTS)
        if a < b
    ]
    torch.testing.assert_close(out, torch.cat(parts), rtol=2e-2, atol=2e-2)


def test_the_host_does_not_wait():
    (q, k, v), cuts = packed_inputs()
    slopes = torch.rand(8, device=DEVICE)
    longest, window = torch.tensor(343, device=DEVICE), torch.tensor(60, device=DEVICE)

    def step():
        out = fa.flash_attn_varlen_func(
            q,
            k,
            v,
            cuts,
            cuts,
            longest,
            longest,
            0.1,
            causal=True,
            window_size=(window, 0),
            alibi_slopes=slopes,
        )
        fa3.flash_attn_varlen_func(
            q, k, v, cuts, cuts, 343, 343, causal=True, attention_chunk=64
        ).sum().backward()
        out.sum().backward()
        fa.flash_attn_func(q[None], k[None], v[None], window_size=(window, 0))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph():
    (q, k, v), cuts = packed_inputs()

    def call():
        return fa.flash_attn_varlen_func(q, k, v, cuts, cuts, 343, 343, causal=True)

    with torch.no_grad():
        for _ in range(2):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        # A replay follows the boundaries.
        for new in (CUTS, [0, 10, 500, 600, 601, 1024]):
            cuts.copy_(torch.tensor(new, dtype=torch.int32))
            graph.replay()
            assert torch.equal(out, call())


def test_the_same_bits():
    q, k, v = (draw(2, 777, h, 128, seed=h) for h in (8, 2, 2))
    dout = draw(2, 777, 8, 128, seed=9).detach()
    torch.manual_seed(0)
    first = None
    for _ in range(50):
        torch.manual_seed(0)
        out = fa.flash_attn_func(q, k, v, 0.1, causal=True, deterministic=True)
        found = [out, *torch.autograd.grad(out, (q, k, v), dout)]
        first = first or found
        assert all(map(torch.equal, found, first))


def test_no_race():
    q, k, v = (draw(4, 600, h, 64, seed=h) for h in (8, 2, 2))
    dout = draw(4, 600, 8, 64, seed=9).detach()
    first = None
    for _ in range(250):
        out = fa.flash_attn_func(q, k, v, causal=True)
        dq, *found = [*torch.autograd.grad(out, (q, k, v), dout)]
        first = first or [out, *found, dq]
        assert all(map(torch.equal, [out, *found], first[:3]))
        torch.testing.assert_close(dq, first[3], rtol=1e-2, atol=1e-2)


def test_large_scores_do_not_overflow():
    q, k, v = (draw(1, 5, 1, 64, seed=n).detach().mul(100).requires_grad_() for n in range(3))
    out = fa.flash_attn_func(q, k, v)
    out.sum().backward()
    assert all(torch.isfinite(x).all() for x in (out, q.grad, k.grad, v.grad))


def test_gradients_of_transposed_tensors():
    q, k, v = (draw(2, 4, 300, 64, seed=n) for n in range(3))
    out = fa.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    own = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(fa.flash_attn_func(*own, causal=True).sum(), own)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.transpose(1, 2), rtol=2e-2, atol=2e-2)


def test_sinks_and_caches():
    q, k, v = (draw(2, 300, h, 128, seed=h) for h in (8, 2, 2))
    sink = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    fa2_func_with_sink(q, k, v, sink, causal=True).sum().backward()
    assert torch.isfinite(sink.grad).all() and sink.grad.abs().sum() > 0
    with torch.no_grad():
        whole = fa.flash_attn_func(q, k, v, causal=True)
        caches = [torch.full((2, 512, 2, 128), torch.nan, device=DEVICE, dtype=q.dtype) for _ in range(2)]
        for start in (0, 200, 299):
            stop = {0: 200, 200: 299, 299: 300}[start]
            new = (x[:, start:stop] for x in (k, v))
            out = flash_attn_with_kvcache(q[:, start:stop], *caches, *new, cache_seqlens=start, causal=True)
            torch.testing.assert_close(out, whole[:, start:stop], rtol=2e-2, atol=2e-2)


def test_the_document():
    """The examples of the document on sinks, as they are."""
    text = (Path(__file__).parents[1] / "documents" / "extensions_with_sink.md").read_text()
    dropin.install("extensions", replace=True)
    try:
        for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            names: dict = {}
            exec(code, names)
            assert torch.isfinite(names["out"]).all() and names["dsink"].abs().sum() > 0
    finally:
        dropin.uninstall()
