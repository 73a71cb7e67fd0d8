"""FlashAttention 3's functions, and those with sinks, against the formula."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from flash_reference import reference, visible
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.api import flash_attn_3 as fa3
from magi_attention.api import flash_attn_3_internals as internals
from magi_attention.api import flash_attn_interface as fa2
from magi_attention.api import flash_attn_sink as sinks

CUTS = ([0, 5, 5, 6, 20], [0, 9, 12, 13, 20])
DOCUMENT = Path(__file__).parents[1] / "documents" / "extensions_with_sink.md"


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(
    st.integers(1, 16), st.integers(0, 16), st.booleans(), st.sampled_from([(-1, -1), (3, 1), (0, 0)]),
    st.sampled_from([0, 1, 4, 7]), st.sampled_from([8, 12]),
)  # fmt: skip
def test_batches(sq, sk, causal, window, chunk, dim_v):
    q, k, v = leaves((2, sq, 4, 8), (2, sk, 2, 8), (2, sk, 2, dim_v))
    out, lse = fa3.flash_attn_func(
        q, k, v, causal=causal, window_size=window, attention_chunk=chunk, softcap=2.0, return_attn_probs=True
    )
    seen = visible(sq, sk, causal, window, chunk=chunk)
    parts = [reference(q[b], k[b], v[b], seen, softcap=2.0) for b in range(2)]
    expected = torch.stack([part[0] for part in parts])
    same([out, lse], [expected, torch.stack([part[1] for part in parts])])
    dout = torch.ones_like(out)
    same(
        *(
            torch.autograd.grad(x, (q, k, v), dout, allow_unused=True, materialize_grads=True)
            for x in (out, expected)
        )
    )


@pytest.mark.parametrize("chunk", [0, 3, 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (4, 2)])
def test_packed_sequences(chunk, causal, window):
    q, k, v = leaves((20, 2, 8), (20, 1, 8), (20, 1, 8))
    cuts = [torch.tensor(c, dtype=torch.int32) for c in CUTS]
    used_q, used_k = torch.tensor([3, 0, 1, 14]), torch.tensor([9, 2, 0, 6])
    out, lse = fa3.flash_attn_varlen_func(
        q, k, v, *cuts, 14, 9, used_q, used_k, causal=causal, window_size=window, attention_chunk=chunk,
        return_attn_probs=True,
    )  # fmt: skip
    for n in range(4):
        (q0, end), k0 = CUTS[0][n : n + 2], CUTS[1][n]
        q1, k1 = q0 + int(used_q[n]), k0 + int(used_k[n])
        seen = visible(q1 - q0, k1 - k0, causal, window, 9, chunk=chunk)
        same([out[q0:q1], lse[:, q0:q1]], reference(q[q0:q1], k[k0:k1], v[k0:k1], seen))
        assert out[q1:end].eq(0).all() and lse[:, q1:end].eq(-torch.inf).all()


def test_queries_of_values():
    q, k, v, qv = leaves((1, 7, 4, 8), (1, 9, 1, 8), (1, 9, 1, 32), (1, 7, 4, 32))
    out = fa3.flash_attn_func(q, k, v, causal=True, qv=qv)
    joint = torch.cat([q, qv], -1)[0], torch.cat([k, v], -1)[0]
    expected, _ = reference(*joint, v[0], visible(7, 9, True))
    same([out[0]], [expected])


def test_packed_heads():
    (qkv,) = leaves((2, 6, 8, 8))
    q, k, v = qkv.split([4, 2, 2], dim=2)
    same(
        [fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)],
        [fa3.flash_attn_func(q, k, v, causal=True)],
    )
    (qkv,) = leaves((2, 6, 3, 2, 8))
    same([fa3.flash_attn_qkvpacked_func(qkv)], [fa3.flash_attn_func(*qkv.unbind(2))])


@pytest.mark.parametrize("packed", [False, True])
def test_fp8(packed):
    q, k, v = (
        x.detach().to(torch.float8_e4m3fn) for x in leaves((2, 6, 4, 16), (2, 6, 2, 16), (2, 6, 2, 16))
    )
    scales = [torch.rand(2, 2) + 0.5 for _ in range(3)]
    wide = [
        (x.to(torch.bfloat16) * scale.repeat_interleave(x.shape[2] // 2, 1)[:, None, :, None]).to(
            torch.bfloat16
        )
        for x, scale in zip((q, k, v), scales, strict=True)
    ]
    expected = fa3.flash_attn_func(*wide, causal=True)
    names = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
    if packed:
        cuts = torch.tensor([0, 6, 12], dtype=torch.int32)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = fa3.flash_attn_varlen_func(*flat, cuts, cuts, 6, 6, causal=True, **names).view_as(expected)
    else:
        out = fa3.flash_attn_func(q, k, v, causal=True, **names)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_combine():
    q, k, v = leaves((1, 5, 2, 8), (1, 12, 2, 8), (1, 12, 2, 8), dtype=torch.float32)
    whole, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    parts = [
        fa3.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True)
        for a, b in ((0, 4), (4, 4), (4, 12))
    ]
    outs, lses = torch.stack([p[0] for p in parts]), torch.stack([p[1].transpose(1, 2) for p in parts])
    outs = outs.masked_fill(torch.isneginf(lses)[..., None], torch.nan)
    out, joint = fa3.flash_attn_combine(outs, lses)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(joint, lse.transpose(1, 2))
    into = torch.empty_like(whole, dtype=torch.bfloat16)
    assert fa3.flash_attn_combine(outs, lses, out=into)[0] is into


FUNC = (
    "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa "
    "deterministic sm_margin return_attn_probs"
)
SIGNATURES = {
    "flash_attn_func": FUNC,
    "flash_attn_varlen_func": FUNC.replace(
        "q k v ", "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k ", 1
    ),
    "flash_attn_qkvpacked_func": (
        "qkv softmax_scale causal q_descale k_descale v_descale window_size attention_chunk softcap deterministic "
        "num_heads_q sm_margin return_attn_probs"
    ),
    "flash_attn_combine": "out_partial lse_partial out out_dtype",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(fa3, name)).parameters.values()
    assert " ".join(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD) == SIGNATURES[name]


@pytest.mark.parametrize("layout", ["sh", "ssh"])
@pytest.mark.parametrize("version", [2, 3])
def test_sinks(version, layout):
    shape = (3, 4) if layout == "sh" else (2, 6, 3, 4)
    q, k, v, sink = leaves((2, 6, 4, 8), (2, 4, 2, 8), (2, 4, 2, 8), shape)
    function = sinks.fa2_func_with_sink if version == 2 else sinks.fa3_func_with_sink
    found = function(q, k, v, sink, layout, causal=True, return_attn_probs=True)
    parts = [
        reference(q[b], k[b], v[b], visible(6, 4, True), sink=sink if layout == "sh" else sink[b])
        for b in range(2)
    ]
    expected = [torch.stack([part[n] for part in parts]) for n in range(2)]
    same(found[:2], expected)
    dout = torch.ones_like(found[0])
    same(*(torch.autograd.grad(x, (q, k, v, sink), dout, retain_graph=True) for x in (found[0], expected[0])))
    only = torch.autograd.grad(
        function(q.detach(), k.detach(), v.detach(), sink, layout, causal=True), sink, dout
    )
    same(only, torch.autograd.grad(expected[0], sink, dout))


def test_sinks_of_packed_rows():
    q, k, v, sink = leaves((20, 2, 8), (20, 1, 8), (20, 1, 8), (20, 2, 2))
    cuts = [torch.tensor(c, dtype=torch.int32) for c in CUTS]
    out = sinks.fa3_varlen_func_with_sink(q, k, v, *cuts, 14, 9, sink, "ssh", causal=True)
    for n in range(4):
        (q0, q1), (k0, k1) = (c[n : n + 2] for c in CUTS)
        seen = visible(q1 - q0, k1 - k0, True)
        same([out[q0:q1]], [reference(q[q0:q1], k[k0:k1], v[k0:k1], seen, sink=sink[q0:q1])[0]])


def test_a_sink_stands_behind_the_tensors():
    for name in (
        "func",
        "kvpacked_func",
        "qkvpacked_func",
        "varlen_func",
        "varlen_kvpacked_func",
        "varlen_qkvpacked_func",
    ):
        plain = list(inspect.signature(getattr(fa2, f"flash_attn_{name}")).parameters)
        own = list(inspect.signature(getattr(sinks, f"fa2_{name}_with_sink")).parameters)
        at = plain.index("dropout_p")
        plain = [p for p in plain if p in own]
        assert own == [*plain[:at], "sink", "sink_layout", *plain[at:]]
    varlen = list(inspect.signature(sinks.fa3_varlen_func_with_sink).parameters)
    assert varlen[7:10] == ["sink", "sink_layout", "seqused_q"]


@pytest.mark.parametrize("packed", [False, True])
def test_internals_give_what_autograd_gives(packed):
    q, k, v = leaves((2, 6, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    cuts = {}
    out = fa3.flash_attn_func(q, k, v, causal=True, window_size=(4, 0))
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    if packed:
        q, k, v, out, dout = (x.flatten(0, 1) for x in (q, k, v, out, dout))
        expected = [x.flatten(0, 1) for x in expected]
        cuts = {
            "cu_seqlens_q": torch.tensor([0, 6, 12], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 9, 18], dtype=torch.int32),
        }
    room = torch.empty_like(out)
    found, lse, *rest = internals._flash_attn_forward(
        q, k, v, out_=room, causal=True, window_size_left=4, window_size_right=0, **cuts
    )
    same([found], [out])
    assert found is room and rest == [None, None] and not found.requires_grad
    for sides in ({"is_causal": True, "window_size_left": 4}, {"causal": True, "window_size": (4, 0)}):
        into = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        delta = internals._flash_attn_backward(
            dout, q, k, v, found, lse, **cuts, **dict(zip(("dq", "dk", "dv"), into, strict=True)), **sides
        )
        same(into, expected)
        torch.testing.assert_close(
            delta, (dout * out).sum(-1).transpose(-1, -2).float(), rtol=1e-4, atol=1e-4
        )


SNIPPETS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_document(number):
    """Every example as written, but for the device and shorter sequences."""
    code = SNIPPETS[number].replace("torch.cuda.current_device()", '"cpu"').replace("2048", "64")
    code = re.sub(
        r"from extensions\.fa\d_interface_with_sink", "from magi_attention.api.flash_attn_sink", code
    )
    names: dict = {}
    exec(code, names)
    assert torch.isfinite(names["out"]).all() and names["dsink"].abs().sum() > 0


X = torch.zeros(2, 6, 2, 8)
BAD = {
    "layout": (
        lambda: sinks.fa2_func_with_sink(X, X, X, torch.ones(1, 2), "hs"),
        ValueError,
        "sink_layout: expected",
    ),
    "layout_d": (
        lambda: sinks.fa2_func_with_sink(X, X, X, None, "shd"),
        NotImplementedError,
        "sink_layout: expected",
    ),
    "axes": (
        lambda: sinks.fa3_func_with_sink(X, X, X, torch.ones(1, 2), "ssh"),
        ValueError,
        "expected 4 axes",
    ),
    "descale": (
        lambda: fa3.flash_attn_func(X, X, X, q_descale=torch.ones(2, 2)),
        ValueError,
        "descales: expected None",
    ),
    "heads": (lambda: fa3.flash_attn_qkvpacked_func(X), ValueError, "num_heads_q: expected the number"),
    "cache": (
        lambda: internals._flash_attn_forward(X, X, X, k_new=X, v_new=X, cu_seqlens_k=torch.zeros(2)),
        ValueError,
        "cu_seqlens_k, seqused_q: expected None with a cache",
    ),
    "one_boundary": (
        lambda: internals._flash_attn_forward(
            X[0], X[0], X[0], cu_seqlens_q=torch.tensor([0, 6], dtype=torch.int32)
        ),
        ValueError,
        "cu_seqlens_q, cu_seqlens_k: expected both",
    ),
    "used": (
        lambda: internals._flash_attn_forward(X, X, X, seqused_k=torch.ones(2)),
        NotImplementedError,
        "seqused of batches",
    ),
    "chunk": (lambda: fa3.flash_attn_func(X, X, X, attention_chunk=-1), ValueError, "attention_chunk"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
