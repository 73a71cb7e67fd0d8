"""FlashAttention 2's functions against the formula: every argument, every form, the internals below them."""

from __future__ import annotations

import inspect

import pytest
import torch
from flash_reference import gradients, leaves, reference, same, visible
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.api import flash_attn_interface as fa
from magi_attention.api import flash_attn_internals as internals
from magi_attention.api.flash_attn_mask import varlen_mask

WINDOWS = [(-1, -1), (0, 0), (3, -1), (-1, 2), (4, 1), (50, 0), (2, 60)]


@given(
    st.integers(1, 20), st.integers(0, 20), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.booleans(),
    st.sampled_from(WINDOWS), st.sampled_from([0.0, 2.0]), st.sampled_from(["none", "head", "batch"]), st.booleans(),
)  # fmt: skip
def test_batches(sq, sk, heads, causal, window, softcap, alibi, with_sink):
    q, k, v, sink = leaves((2, sq, heads[0], 7), (2, sk, heads[1], 7), (2, sk, heads[1], 7), (heads[0],))
    shape = {"none": None, "head": (heads[0],), "batch": (2, heads[0])}[alibi]
    slopes = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(1))
    out, lse, pattern = fa.flash_attn_func(
        q, k, v, 0.0, None, causal, window, softcap, slopes, False, True, s_aux=sink if with_sink else None
    )
    seen = visible(sq, sk, causal, window)
    parts = [
        reference(
            q[b], k[b], v[b], seen, None, softcap, slopes if slopes is None or slopes.dim() == 1 else slopes[b],
            sink[None] if with_sink else None,
        )
        for b in range(2)
    ]  # fmt: skip
    expected = torch.stack([part[0] for part in parts])
    same(
        [out, lse],
        [
            expected,
            torch.stack([p[1] for p in parts]).masked_fill(
                ~seen.any(1) & ~torch.tensor(with_sink), torch.inf
            ),
        ],
    )
    assert pattern.shape == (0,)
    inputs = [q, k, v, *([sink] if with_sink else [])]
    same(gradients(out, inputs), gradients(expected, inputs))


CUTS = ([0, 5, 5, 6, 20], [0, 9, 12, 13, 20])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"keep_first": 3},
        {"force_fa_decode": True},
        {"alibi_slopes": torch.linspace(0.1, 0.8, 8).view(4, 2)},
    ],
    ids=lambda extra: "".join(extra) or "plain",
)
def test_packed_sequences(window, causal, extra):
    q, k, v = leaves((20, 2, 8), (20, 1, 8), (20, 1, 8))
    cuts = [torch.tensor(c, dtype=torch.int32) for c in CUTS]
    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, v, *cuts, 14, 9, causal=causal, window_size=window, return_attn_probs=True, **extra
    )
    rest = dict(extra)
    slopes = rest.pop("alibi_slopes", None)
    parts = []
    for n in range(4):
        (q0, q1), (k0, k1) = (c[n : n + 2] for c in CUTS)
        seen = visible(q1 - q0, k1 - k0, causal, window, 9, **rest)
        own = None if slopes is None else slopes[n]
        parts.append(reference(q[q0:q1], k[k0:k1], v[k0:k1], seen, slopes=own))
    expected, lses = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], dim=1)
    same([out, lse], [expected, lses.masked_fill(lses == -torch.inf, torch.inf)])
    same(gradients(out, [q, k, v]), gradients(expected, [q, k, v]))


def test_forms_agree():
    (qkv,) = leaves((2, 11, 3, 4, 8))
    plain = fa.flash_attn_func(*qkv.unbind(2), causal=True)
    expected = [plain, *gradients(plain, [qkv])]
    for out in (
        fa.flash_attn_qkvpacked_func(qkv, causal=True),
        fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True),
    ):
        same([out, *gradients(out, [qkv])], expected)
    cuts, packed = torch.tensor([0, 11, 22], dtype=torch.int32), qkv.flatten(0, 1)
    for out in (
        fa.flash_attn_varlen_func(*packed.unbind(1), cuts, cuts, 11, 11, causal=True),
        fa.flash_attn_varlen_qkvpacked_func(packed, cuts, 11, causal=True),
        fa.flash_attn_varlen_kvpacked_func(packed[:, 0], packed[:, 1:], cuts, cuts, 11, 11, causal=True),
    ):
        same([out.view_as(plain), *gradients(out.view_as(plain), [qkv])], expected)


def test_sides_and_lengths_may_be_tensors():
    q, k, v = leaves((20, 2, 8), (20, 1, 8), (20, 1, 8))
    cuts = [torch.tensor(c, dtype=torch.int32) for c in CUTS]
    plain = fa.flash_attn_varlen_func(q, k, v, *cuts, 14, 9, window_size=(4, 10))
    of_tensors = fa.flash_attn_varlen_func(
        q, k, v, *cuts, torch.tensor(14), torch.tensor(9), window_size=torch.tensor([4, 10])
    )
    assert torch.equal(plain, of_tensors)


@pytest.mark.parametrize("window", [(-1, -1), (4, -1), (-1, 2), (0, 7)])
@pytest.mark.parametrize("chunk", [0, 3])
def test_windows_that_the_host_does_not_know(window, chunk):
    cuts = [torch.tensor(c, dtype=torch.int32) for c in CUTS]
    sides = tuple(torch.tensor(side) for side in window)
    known, unknown = (
        varlen_mask(*cuts, 20, 20, one, chunk=chunk, num_chunks=3).table for one in (window, sides)
    )
    assert torch.equal(known, unknown)
    with pytest.raises(NotImplementedError, match="keep_first, force_fa_decode: expected 0, False"):
        varlen_mask(*cuts, 20, 20, sides, keep_first=1)


def test_pages():
    q, k, v = leaves((9, 2, 8), (20, 1, 8), (20, 1, 8))
    cuts_q, lengths = torch.tensor([0, 4, 9], dtype=torch.int32), [7, 13]
    cuts_k = torch.tensor([0, 7, 20], dtype=torch.int32)
    plain = fa.flash_attn_varlen_func(q, k, v, cuts_q, cuts_k, 5, 13, causal=True)
    pages = (
        torch.full((9, 4, 1, 8), torch.nan, dtype=torch.float64),
        torch.full((9, 4, 1, 8), torch.nan, dtype=torch.float64),
    )
    table = torch.tensor([[3, 8, -7, 999], [5, 0, 2, 7]], dtype=torch.int32)
    for sequence, (begin, length) in enumerate(zip([0, 7], lengths, strict=True)):
        for token in range(length):
            for page, x in zip(pages, (k, v), strict=True):
                page[table[sequence, token // 4], token % 4] = x[begin + token].detach()
    pages = [page.requires_grad_() for page in pages]
    out = fa.flash_attn_varlen_func(q, *pages, cuts_q, cuts_k, 5, 13, causal=True, block_table=table)
    same([out], [plain])
    dk = gradients(out, pages)[0]
    expected = gradients(plain, [k])[0]
    same([dk[3, 2], dk[7, 0]], [expected[2], expected[19]])
    assert dk[1].eq(0).all() and dk[8, 3].eq(0).all()


def dropped(q, k, v, **settings):
    torch.manual_seed(4)
    return fa.flash_attn_func(q, k, v, 0.3, return_attn_probs=True, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"causal": True}, {"window_size": (4, 2), "alibi_slopes": torch.tensor([0.1, 0.3])}],
    ids=["plain", "causal", "window and slopes"],
)
def test_dropout_pattern(settings):
    q, k, v = leaves((2, 130, 2, 8), (2, 140, 1, 8), (2, 140, 1, 8))
    out, lse, pattern = dropped(q, k, v, **settings)
    assert pattern.shape == (2, 2, 256, 256) and pattern.dtype == q.dtype
    assert torch.equal(dropped(q, k, v, **settings)[0], out)
    _, plain, _ = fa.flash_attn_func(q, k, v, return_attn_probs=True, **settings)
    assert torch.equal(plain, lse)  # dropout does not change it
    pattern = pattern[:, :, :130, :140]
    assert pattern[:, :, 130:].eq(0).all()
    weights = pattern.abs() / pattern.abs().sum(-1, keepdim=True)
    kept = torch.where(pattern.signbit(), 0.0, weights / 0.7)
    torch.testing.assert_close(out, torch.einsum("bhij,bjgd->bihd", kept, v), rtol=1e-4, atol=1e-4)
    share = pattern.signbit()[pattern != 0].double().mean().item()
    assert abs(share - 0.3) < 0.02


def test_dropout_pattern_of_packed_sequences():
    q, k, v = leaves((20, 2, 8), (20, 1, 8), (20, 1, 8))
    cuts = [torch.tensor(c, dtype=torch.int32) for c in CUTS]
    out, _, pattern = fa.flash_attn_varlen_func(
        q, k, v, *cuts, 14, 9, 0.4, causal=True, return_attn_probs=True
    )
    assert pattern.shape == (4, 2, 128, 128)
    for n in range(4):
        (q0, q1), (k0, k1) = (c[n : n + 2] for c in CUTS)
        own = pattern[n, :, : q1 - q0, : k1 - k0]
        weights = own.abs() / own.abs().sum(-1, keepdim=True).clamp(min=1e-30)
        kept = torch.where(own.signbit(), 0.0, weights / 0.6)
        expected = torch.einsum("hij,jgd->ihd", kept, v[k0:k1])
        torch.testing.assert_close(out[q0:q1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_internals_give_what_autograd_gives(dropout_p):
    q, k, v = leaves((2, 9, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8))
    torch.manual_seed(3)
    out = fa.flash_attn_func(q, k, v, dropout_p, causal=True, window_size=(6, 0))
    expected = gradients(out, [q, k, v])
    torch.manual_seed(3)
    found = internals._flash_attn_forward(q, k, v, dropout_p, 8**-0.5, True, 6, 0, 0.0, None, False)
    again, lse, _, state = found
    same([again], [out])
    assert not again.requires_grad
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    into = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    delta = internals._flash_attn_backward(
        dout, q, k, v, again, lse, *into, dropout_p, 8**-0.5, True, 6, 0, 0.0, None, False, rng_state=state
    )
    same(into, expected)
    torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(1, 2).float(), rtol=1e-4, atol=1e-4)


def test_packed_internals_and_seqused():
    q, k, v = leaves((20, 2, 8), (20, 1, 8), (20, 1, 8))
    cuts = [torch.tensor(c, dtype=torch.int32) for c in CUTS]
    used = torch.tensor([4, 0, 1, 7], dtype=torch.int32)
    out, lse, _, _ = internals._flash_attn_varlen_forward(
        q, k, v, *cuts, 14, 9, 0.0, 0.3, True, seqused_k=used
    )
    for n in range(4):
        (q0, q1), k0 = CUTS[0][n : n + 2], CUTS[1][n]
        k1 = k0 + int(used[n])
        expected, own = reference(q[q0:q1], k[k0:k1], v[k0:k1], visible(q1 - q0, k1 - k0, True), 0.3)
        same([out[q0:q1], lse[:, q0:q1]], [expected, own.masked_fill(own == -torch.inf, torch.inf)])
    plain, lse, _, _ = internals._flash_attn_varlen_forward(q, k, v, *cuts, 14, 9, 0.0, 0.3, True)
    dout = torch.ones_like(plain)
    into = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    internals._flash_attn_varlen_backward(
        dout, q, k, v, plain, lse, *into, *cuts, 14, 9, 0.0, 0.3, True, -1, -1, 0.0, None, False
    )
    expected = fa.flash_attn_varlen_func(q, k, v, *cuts, 14, 9, softmax_scale=0.3, causal=True)
    same(into, list(torch.autograd.grad(expected, [q, k, v], dout)))


def test_ring_attention():
    """Keys in three parts, merged by lse, and each part's gradients from the final out and lse, as on a ring."""
    q, k, v = leaves((1, 12, 2, 8), (1, 12, 2, 8), (1, 12, 2, 8))
    whole = fa.flash_attn_func(q, k, v)
    out = lse = None
    parts = [(k[:, n : n + 4], v[:, n : n + 4]) for n in (0, 4, 8)]
    for part in parts:
        block, block_lse, _, _ = internals._flash_attn_forward(
            q, *part, 0.0, 8**-0.5, False, -1, -1, 0.0, None, False
        )
        weight = block_lse.transpose(1, 2)[..., None]
        if out is None:
            out, lse = block, weight
        else:
            out = out - torch.sigmoid(weight - lse) * (out - block)
            lse = lse - torch.nn.functional.logsigmoid(lse - weight)
    same([out], [whole])
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    dq, dk = torch.zeros_like(q), []
    for part in parts:
        into = [torch.empty_like(x) for x in (q, *part)]
        final = lse.squeeze(-1).transpose(1, 2).contiguous()
        internals._flash_attn_backward(
            dout, q, *part, out, final, *into, 0.0, 8**-0.5, False, -1, -1, 0.0, None, False
        )
        dq += into[0]
        dk.append(into[1])
    expected = gradients(whole, [q, k])
    same([dq, torch.cat(dk, dim=1)], expected)


SIGNATURES = {
    "flash_attn_func": "q, k, v",
    "flash_attn_kvpacked_func": "q, kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv, cu_seqlens, max_seqlen",
}
TAIL = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    tail = dict(TAIL, **({"block_table": None} if name == "flash_attn_varlen_func" else {}))
    assert [p.name for p in positional] == [*SIGNATURES[name].split(", "), *tail]
    assert {p.name: p.default for p in positional if p.default is not p.empty} == tail
    assert "Returns:" in getattr(fa, name).__doc__


FORWARD = "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes return_softmax"
VARLEN_BACKWARD = (
    "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale "
    "causal window_size_left window_size_right softcap alibi_slopes deterministic rng_state zero_tensors"
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("_flash_attn_forward", FORWARD), ("_flash_attn_varlen_backward", VARLEN_BACKWARD)],
)
def test_signatures_of_internals(name, expected):
    parameters = inspect.signature(getattr(internals, name)).parameters
    assert " ".join(parameters) == f"{expected} keep_first force_fa_decode"
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(parameters)[-2:])


X = torch.zeros(2, 6, 2, 8)
C = torch.tensor([0, 6, 12], dtype=torch.int32)
BAD = {
    "three_axes": (lambda: fa.flash_attn_func(X[0], X[0], X[0]), ValueError, r"q shape: expected \(batch, seqlen_q"),
    "packed": (lambda: fa.flash_attn_qkvpacked_func(X), ValueError, r"qkv shape: expected \(batch, seqlen, 3"),
    "window": (lambda: fa.flash_attn_func(X, X, X, window_size=3), ValueError, "window_size: expected a pair"),
    "side": (lambda: fa.flash_attn_func(X, X, X, window_size=(1.5, 0)), TypeError, "window_size: expected integers"),
    "two_sinks": (
        lambda: fa.flash_attn_func(X, X, X, s_aux=torch.ones(2), learnable_sink=torch.ones(2)),
        ValueError,
        "s_aux, learnable_sink: expected one of them",
    ),
    "sink": (lambda: fa.flash_attn_func(X, X, X, s_aux=torch.ones(3)), ValueError, "sink shape: expected"),
    "alibi_and_first": (
        lambda: fa.flash_attn_func(X, X, X, window_size=(1, 0), alibi_slopes=torch.ones(2), keep_first=1),
        NotImplementedError,
        "alibi_slopes, keep_first: expected one of them",
    ),
    "boundaries": (
        lambda: fa.flash_attn_varlen_func(*[X.flatten(0, 1)] * 3, C.float(), C, 6, 6),
        TypeError,
        "cu_seqlens_q dtype: expected",
    ),
    "boundaries_differ": (
        lambda: fa.flash_attn_varlen_func(*[X.flatten(0, 1)] * 3, C, C[:2], 6, 6),
        ValueError,
        "cu_seqlens_k shape: expected",
    ),
    "leftpad": (
        lambda: internals._flash_attn_varlen_forward(
            *[X.flatten(0, 1)] * 3, C, C, 6, 6, 0.0, None, False, leftpad_k=C[:2]
        ),
        NotImplementedError,
        "leftpad_k: expected None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("extra", [{}, {"window_size": (5, 0), "keep_first": 2}], ids=["causal", "window"])
def test_compiled_without_a_break(extra, dynamic):
    def batches(q, k, v):
        return fa.flash_attn_func(q * 2, k, v, causal=True, **extra).sin()

    def packed(q, k, v, cuts):
        return fa.flash_attn_varlen_func(q * 2, k, v, cuts, cuts, 9, 9, causal=True, **extra).sin()

    torch._dynamo.reset()
    inputs = leaves((2, 9, 2, 8), (2, 9, 1, 8), (2, 9, 1, 8))
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in inputs]
    cuts = torch.tensor([0, 9, 18], dtype=torch.int32)
    for function, arguments in ((batches, inputs), (packed, [*flat, cuts])):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        out, eager = compiled(*arguments), function(*arguments)
        same([out, *gradients(out, arguments[:3])], [eager, *gradients(eager, arguments[:3])])


def test_compiled_dropout():
    torch._dynamo.reset()
    q, k, v = leaves((2, 9, 2, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    compiled = torch.compile(lambda *x: fa.flash_attn_func(*x, 0.5), backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    first, second = compiled(q, k, v), compiled(q, k, v)
    assert not torch.equal(first, second)
    for one in (first, second):
        assert torch.isfinite(torch.autograd.grad(one.sum(), q)[0]).all()
