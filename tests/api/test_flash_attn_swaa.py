"""First keys beside a window, and single queries without one: the rule of SWAA pair by pair, in every form of a call."""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise

import pytest
import torch
from flash_reference import gradients, leaves, reference, same
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention import dropin
from magi_attention.api import flash_attn_2_cuda as extension
from magi_attention.api import flash_attn_interface as fa
from magi_attention.api import flash_attn_internals as internals
from magi_attention.api import flash_attn_kvcache as kvcache
from magi_attention.api import flash_attn_swaa as swaa

WINDOWS = st.tuples(st.integers(-1, 130), st.integers(-1, 130) | st.just(0))
LENGTHS = st.integers(1, 140) | st.just(1)
FIRST = st.integers(0, 9) | st.just(300)


def sees(i: int, j: int, sq: int, sk: int, max_sk: int, causal, window, keep_first, force_fa_decode) -> bool:
    """Whether query i of sq sees key j of sk, where the call's longest sequence of keys has ``max_sk``."""
    left, right = window
    here = i + sk - sq
    if causal:
        right = 0
    elif not 0 <= right < max_sk:
        right = sk + sq
    if not 0 <= left < max_sk or (force_fa_decode and sq == 1):
        left = sk + sq
    return j <= here + right and (j >= here - left or j < keep_first)


def by_pairs(sq: int, sk: int, max_sk: int, *rule) -> torch.Tensor:
    return torch.tensor(
        [[sees(i, j, sq, sk, max_sk, *rule) for j in range(sk)] for i in range(sq)], dtype=torch.bool
    ).view(sq, sk)


def with_infinity(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@settings(max_examples=150)
@given(LENGTHS, LENGTHS, st.booleans(), WINDOWS, FIRST, st.booleans())
def test_batches(sq, sk, causal, window, keep_first, force):
    q, k, v = leaves((1, sq, 2, 8), (1, sk, 1, 8), (1, sk, 1, 8))
    out, lse, _ = swaa.flash_attn_func(
        q, k, v, 0.0, None, causal, window, 0.0, keep_first, force, None, False, True
    )
    expected, rows = reference(q[0], k[0], v[0], by_pairs(sq, sk, sk, causal, window, keep_first, force))
    same([out[0], lse[0]], [expected, with_infinity(rows)])
    same(gradients(out, [q, k, v]), gradients(expected[None], [q, k, v]))


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 70) | st.just(1), st.integers(0, 140)), min_size=1, max_size=4),
    st.booleans(), WINDOWS, FIRST, st.booleans(),
)  # fmt: skip
def test_packed_sequences(pairs, causal, window, keep_first, force):
    ends = [[0, *(sum(p[side] for p in pairs[: n + 1]) for n in range(len(pairs)))] for side in (0, 1)]
    longest = [max(p[side] for p in pairs) for side in (0, 1)]
    q, k, v = leaves((ends[0][-1], 2, 8), (ends[1][-1], 1, 8), (ends[1][-1], 1, 8))
    out, lse, _ = swaa.flash_attn_varlen_func(
        q,
        k,
        v,
        *map(int32, ends),
        *longest,
        0.0,
        None,
        causal,
        window,
        0.0,
        keep_first,
        force,
        None,
        False,
        True,
    )
    parts = []
    for n, (sq, sk) in enumerate(pairs):
        (q0, q1), (k0, k1) = (cuts[n : n + 2] for cuts in ends)
        seen = by_pairs(sq, sk, longest[1], causal, window, keep_first, force)
        parts.append(reference(q[q0:q1], k[k0:k1], v[k0:k1], seen))
    expected = torch.cat([part[0] for part in parts])
    same([out, lse], [expected, with_infinity(torch.cat([part[1] for part in parts], dim=1))])
    same(gradients(out, [q, k, v]), gradients(expected, [q, k, v]))


# Beside sequences of one query: fewer queries than keys, more, as many, and none.
CUTS = ([0, 1, 2, 42, 92, 112, 112], [0, 60, 61, 161, 191, 211, 221])
RULES = {
    "both": (True, (7, 7), 4, True),
    "first keys": (True, (1, 0), 5, False),
    "single queries": (True, (0, 0), 0, True),
    "right side": (False, (9, 3), 2, True),
    "wide": (False, (64, 40), 11, False),
    "neither": (True, (20, 0), 0, False),
}
# dropout_p, softmax_scale, softcap
SETTINGS = [(0.0, 0.3, 0.0), (0.25, 0.3, 0.0), (0.0, 0.5, 1.5)]


EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
EVERY_CALL = [
    EVERY_RULE,
    pytest.mark.parametrize("others", SETTINGS, ids=["plain", "dropout", "softcap"]),
    pytest.mark.parametrize("rows", [30, 1, 0], ids=["batches", "single queries", "packed"]),
]


def every_call(test):
    for mark in EVERY_CALL:
        test = mark(test)
    return test


class Call:
    """One call of the public function in SWAA's order, its gradients, and the arguments of the functions below it."""

    def __init__(self, rule, others, rows: int) -> None:
        causal, window, self.keep_first, self.force = rule
        dropout_p, scale, softcap = others
        self.packed = rows == 0
        if self.packed:
            self.inputs, self.cuts = leaves((112, 2, 8), (221, 1, 8), (221, 1, 8)), tuple(map(int32, CUTS))
            self.longest, door = (50, 100), swaa.flash_attn_varlen_func
        else:
            self.inputs, self.cuts = leaves((2, rows, 2, 8), (2, 70, 1, 8), (2, 70, 1, 8)), ()
            self.longest, door = (), swaa.flash_attn_func
        self.options = (dropout_p, scale, causal, *window, softcap)
        torch.manual_seed(5)
        own = (self.keep_first, self.force)
        self.out = door(
            *self.inputs, *self.cuts, *self.longest, dropout_p, scale, causal, window, softcap, *own
        )
        self.gradients = gradients(self.out, self.inputs)
        self.dout = torch.randn(
            self.out.shape, generator=torch.Generator().manual_seed(9), dtype=self.out.dtype
        )

    def internal(self, home, direction: str):
        torch.manual_seed(5)
        return getattr(home, f"_flash_attn_{'varlen_' if self.packed else ''}{direction}")

    def nothing(self) -> list[torch.Tensor]:
        return [torch.full_like(x, torch.nan) for x in self.inputs]


@every_call
def test_internals_give_what_autograd_gives(rule, others, rows):
    call = Call(rule, others, rows)
    named = {"keep_first": call.keep_first, "force_fa_decode": call.force}
    head = (*call.inputs, *call.cuts, *call.longest, *call.options)
    out, lse, _, state = call.internal(internals, "forward")(*head, None, False, **named)
    same([out], [call.out])
    found = call.internal(swaa, "forward")(*head, *named.values(), None, False)
    same([found[0], found[1], found[3]], [out, lse, state])

    results = []
    for home, behind, keywords in ((internals, (), named), (swaa, named.values(), {})):
        into = call.nothing()
        head = (call.dout, *call.inputs, out, lse, *into, *call.cuts, *call.longest, *call.options)
        delta = call.internal(home, "backward")(*head, *behind, None, False, state, **keywords)
        same(into, call.gradients)
        results.append(delta)
    assert torch.equal(*results)


@every_call
def test_the_extension_gives_what_autograd_gives(rule, others, rows):
    call = Call(rule, others, rows)
    dropout_p, scale, *mask_and_cap = call.options
    torch.manual_seed(5)
    own = (call.keep_first, call.force, False, None)
    if call.packed:
        middle = (*call.longest, dropout_p, scale, False, *mask_and_cap)
        found = extension.varlen_fwd(*call.inputs, None, *call.cuts, *[None] * 4, *middle, *own)
    else:
        found = extension.fwd(*call.inputs, None, None, *call.options, *own)
    out, lse, _, state = found
    same([out], [call.out])
    head = (call.dout, *call.inputs, out, lse, None, None, None)
    if call.packed:
        found = extension.varlen_bwd(*head, *call.cuts, None, *middle, *own, state)
    else:
        found = extension.bwd(*head, None, *call.options, *own, state)
    same(found[:3], call.gradients)


def pages_of(x: torch.Tensor, cuts: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences of a packed tensor as shuffled pages, NaN where no sequence is, and their block table."""
    blocks = max(-(-(b - a) // size) for a, b in pairwise(cuts))
    table = torch.randperm(blocks * (len(cuts) - 1) + 3, generator=torch.Generator().manual_seed(size))
    table = table[: blocks * (len(cuts) - 1)].view(-1, blocks)
    pages = torch.full((int(table.max()) + 1, size, *x.shape[1:]), torch.nan, dtype=x.dtype)
    for n, (a, b) in enumerate(pairwise(cuts)):
        for token in range(b - a):
            pages[table[n, token // size], token % size] = x[a + token].detach()
    return pages, table.to(torch.int32)


@EVERY_RULE
@pytest.mark.parametrize("size", [1, 3, 16, 128])
def test_pages(rule, size):
    causal, window, keep_first, force = rule
    q, k, v = (x.detach() for x in leaves((112, 2, 8), (221, 1, 8), (221, 1, 8)))
    lengths = [b - a for a, b in pairwise(CUTS[1])]
    (keys, table), (values, _) = (pages_of(x, CUTS[1], size) for x in (k, v))
    expected = []
    for (q0, q1), (k0, k1) in zip(*map(pairwise, CUTS), strict=True):
        seen = by_pairs(q1 - q0, k1 - k0, max(lengths), causal, window, keep_first, force)
        expected.append(reference(q[q0:q1], k[k0:k1], v[k0:k1], seen)[0])
    expected = torch.cat(expected)
    cuts_q, cuts_k = map(int32, CUTS)
    out = fa.flash_attn_varlen_func(
        q, keys, values, cuts_q, cuts_k, 50, max(lengths), causal=causal, window_size=window, block_table=table,
        keep_first=keep_first, force_fa_decode=force,
    )  # fmt: skip
    same([out], [expected])
    (out, *_) = extension.varlen_fwd(
        q, keys, values, None, cuts_q, torch.zeros_like(cuts_k), int32(lengths), None, table, None, 50, max(lengths),
        0.0, 8**-0.5, False, causal, *window, 0.0, keep_first, force, False, None,
    )  # fmt: skip
    same([out], [expected])


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("sq", [1, 2])
def test_a_cache_in_order(sq, force):
    q, k, v = (x.detach() for x in leaves((2, sq, 2, 8), (2, 90, 1, 8), (2, 90, 1, 8)))
    used = int32([90, 31])
    out = swaa.flash_attn_with_kvcache(
        q,
        k,
        v,
        None,
        None,
        None,
        None,
        used,
        None,
        None,
        None,
        None,
        True,
        (6, 6),
        0.0,
        3,
        force,
        True,
        None,
        0,
    )
    for b, n in enumerate(used.tolist()):
        seen = by_pairs(sq, n, 90, True, (6, 6), 3, force)
        same([out[b]], [reference(q[b], k[b, :n], v[b, :n], seen)[0]])


IN_ORDER = {
    **dict.fromkeys((name for name in vars(fa) if name.startswith("flash_attn_")), fa),
    "flash_attn_with_kvcache": kvcache,
    **dict.fromkeys((n for n in vars(internals) if n.startswith(("_flash_attn", "_wrapped_"))), internals),
}


@pytest.mark.parametrize("name", IN_ORDER)
def test_signatures(name):
    own, other = (inspect.signature(getattr(home, name)).parameters for home in (swaa, IN_ORDER[name]))
    names = list(own)
    at = names.index("softcap") + 1
    assert names[at : at + 2] == ["keep_first", "force_fa_decode"]
    first = "rotary_interleaved" if "kvcache" in name else "alibi_slopes"
    assert names[at + 2] == first
    assert {p.kind for p in list(own.values())[at : at + 2]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    defaults = [own[n].default for n in names[at : at + 2]]
    required = other[first].default is inspect.Parameter.empty
    assert defaults == ([inspect.Parameter.empty] * 2 if required else [0, False])
    rest = [n for n in other if n not in names[at : at + 2]]
    assert [n for n in names if n not in names[at : at + 2]] == rest
    assert all(own[n].default is other[n].default for n in rest)
    assert "behind softcap" in getattr(swaa, name).__doc__


def test_forms_agree():
    (qkv,) = leaves((2, 30, 3, 2, 8))
    tail = (0.0, None, True, (4, 4), 0.0, 3, True)
    plain = swaa.flash_attn_func(*qkv.unbind(2), *tail)
    named = fa.flash_attn_func(
        *qkv.unbind(2), causal=True, window_size=(4, 4), keep_first=3, force_fa_decode=True
    )
    assert torch.equal(plain, named)
    assert not torch.equal(plain, fa.flash_attn_func(*qkv.unbind(2), causal=True, window_size=(4, 4)))
    packed, cuts = qkv.flatten(0, 1), (int32([0, 30, 60]), int32([0, 30, 60]), 30, 30)
    for out in (
        swaa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], *tail),
        swaa.flash_attn_qkvpacked_func(qkv, *tail),
        swaa.flash_attn_varlen_func(*packed.unbind(1), *cuts, *tail),
        swaa.flash_attn_varlen_kvpacked_func(packed[:, 0], packed[:, 1:], *cuts, *tail),
        swaa.flash_attn_varlen_qkvpacked_func(packed, cuts[0], 30, *tail),
    ):
        same([out.view_as(plain)], [plain])


def test_compiled_without_a_break():
    def call(q, k, v):
        return swaa.flash_attn_func(q * 2, k, v, 0.0, None, True, (5, 0), 0.0, 2, True).sin()

    torch._dynamo.reset()
    inputs = leaves((2, 30, 2, 8), (2, 30, 1, 8), (2, 30, 1, 8))
    out, eager = torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs), call(*inputs)
    same([out, *gradients(out, inputs)], [eager, *gradients(eager, inputs)])


X = torch.zeros(2, 6, 2, 8)
C = torch.tensor([0, 6, 12], dtype=torch.int32)
SLOPES = torch.ones(2)
BATCH = (0.0, None, True, 2, 0, 0.0, SLOPES)
PACKED = (C, C, 6, 6, *BATCH)
BAD = {
    "forward": (
        lambda: internals._flash_attn_forward(X, X, X, *BATCH, False, keep_first=1),
        NotImplementedError,
        "alibi_slopes, keep_first: expected one of them",
    ),
    "backward": (
        lambda: internals._flash_attn_backward(*[X] * 5, X[..., 0], X, X, X, *BATCH, False, keep_first=1),
        NotImplementedError,
        "alibi_slopes, keep_first: expected one of them",
    ),
    "packed_forward": (
        lambda: internals._flash_attn_varlen_forward(*[X.flatten(0, 1)] * 3, *PACKED, keep_first=1),
        NotImplementedError,
        "alibi_slopes, keep_first: expected one of them",
    ),
    "packed_backward": (
        lambda: internals._flash_attn_varlen_backward(
            *[X.flatten(0, 1)] * 5, X[0, ..., 0], *[X.flatten(0, 1)] * 3, *PACKED, False, keep_first=1
        ),
        NotImplementedError,
        "alibi_slopes, keep_first: expected one of them",
    ),
    "negative": (lambda: swaa.flash_attn_func(X, X, X, keep_first=-1), ValueError, "keep_first: expected at least 0"),
    "order_of_flash_attention": (
        lambda: swaa.flash_attn_func(X, X, X, 0.0, None, True, (2, 0), 0.0, SLOPES),
        TypeError,
        "keep_first: expected an integer, got Tensor",
    ),
    "too_many": (
        lambda: swaa.flash_attn_func(*[X] * 14),
        TypeError,
        "flash_attn_func: expected at most 13 arguments by position, got 14",
    ),
    "extension_first": (
        lambda: extension.fwd(X, X, X, None, None, 0.0, 1.0, True, 2, 0, 0.0, False, 3, False, None),
        TypeError,
        "keep_first: expected an integer, got bool",
    ),
    "extension_decode": (
        lambda: extension.fwd(X, X, X, None, None, 0.0, 1.0, True, 2, 0, 0.0, 3, 1, False, None),
        TypeError,
        "force_fa_decode: expected bool, got int",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_under_the_names_of_flash_attn():
    before = {name for name in sys.modules if name.partition(".")[0] == "flash_attn"}
    dropin.install("flash_attn", replace=True, swaa=True)
    try:
        import flash_attn
        from flash_attn.flash_attn_interface import _flash_attn_backward, _wrapped_flash_attn_varlen_forward

        assert flash_attn.flash_attn_varlen_kvpacked_func is swaa.flash_attn_varlen_kvpacked_func
        assert flash_attn.flash_attn_with_kvcache is swaa.flash_attn_with_kvcache
        assert _flash_attn_backward is swaa._flash_attn_backward
        assert _wrapped_flash_attn_varlen_forward is swaa._flash_attn_varlen_forward
        dropin.install("flash_attn", replace=True)
        assert sys.modules["flash_attn"].flash_attn_func is fa.flash_attn_func
    finally:
        dropin.uninstall()
    assert {name for name in sys.modules if name.partition(".")[0] == "flash_attn"} <= before
    names = [name for module in dropin._IN_ORDER_OF_SWAA for name in dropin.contents(module)]
    assert {*IN_ORDER} <= {*names}
    assert dropin.contents("flash_attn_interface", swaa=True) == dropin.contents("flash_attn_interface")
