"""The examples of flash-attention-SWAA's document run as printed, and give what the formula gives."""

from __future__ import annotations

import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from flash_reference import visible

from magi_attention import dropin

DOCUMENT = Path(__file__).parents[1] / "documents" / "flash_attention_swaa.md"
ON_CPU = ('device="cuda"', 'device="cpu"')
# The first example is long for a CPU.
SHORTER = {"flash_attn_func": [("query_length = 10000", "query_length = 1200")]}
# The second example with a window that hides keys, also from single queries, which have more keys than one.
NARROWER = [
    ("sliding_window = 4000", "sliding_window = 40"),
    ("cu_seqlens_q.clone()", "torch.tensor([0, 90, 200, 400, 700], dtype=torch.int32)"),
    ("max_seqlen_k = max(seqlens)", "max_seqlen_k = 300"),
    ("seqlens = [1, 2, 2000, 3000]", "seqlens = [1, 2, 200, 300]"),
]


def example(name: str, *changes: tuple[str, str]) -> str:
    (code,) = (
        x
        for x in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
        if f"{name}(\n" in x
    )
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return code


def run(code: str) -> tuple[dict, list]:
    """The names that the code leaves, and arguments and result of each call of a flash_attn function."""
    calls = []

    def recording(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            calls.append((args, kwargs, out))
            return out

        return call

    dropin.install("flash_attn", "flash_attn_2_cuda", replace=True)
    try:
        module = sys.modules["flash_attn"]
        for name in ("flash_attn_func", "flash_attn_varlen_func"):
            setattr(module, name, recording(getattr(module, name)))
        names: dict = {}
        with mock.patch.dict(os.environ):  # two of them choose a device there
            exec(code, names)
    finally:
        dropin.uninstall()
    return names, calls


def check(q, k, v, out, seen: torch.Tensor, scale: float, softcap: float = 0.0) -> None:
    """Sampled rows of one sequence, each by its distance from the formula in fp64: (sq, h, d), (sk, hk, d), (sq, sk)."""
    rows = torch.unique(torch.cat([torch.randint(len(q), (20,)), torch.tensor([0, len(q) - 1])])).to(q.device)
    group = q.shape[1] // k.shape[1]
    q, k, v, out = (x.detach().double() for x in (q[rows], k, v, out[rows]))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = torch.softmax(scores.masked_fill(~seen[rows.cpu()].to(q.device), -torch.inf), dim=-1)
    expected = torch.einsum("hij,jhd->ihd", weights, v)
    # What a 16 bit result loses; one key more or less among a thousand moves a row by more.
    assert ((out - expected).norm(dim=-1) <= 1e-2 * expected.norm(dim=-1)).all()


def check_batches(code: str) -> None:
    _, calls = run(code)
    assert [call[1]["window_size"][0] for call in calls] == [-1, 100, 1000, 4000, 8000]
    for (q, k, v), named, out in calls:
        assert named["causal"] and named["keep_first"] == 4 and named["force_fa_decode"]
        seen = visible(q.shape[1], k.shape[1], True, named["window_size"], None, 4, True)
        check(q[0], k[0], v[0], out[0], seen, 128**-0.5)


def check_packed(code: str) -> None:
    _, [((q, k, v, *cuts, _, longest), named, out)] = run(code)
    assert out.shape == q.shape and named["keep_first"] == 4 and named["force_fa_decode"]
    for (q0, q1), (k0, k1) in zip(*(pairwise(x.tolist()) for x in cuts), strict=True):
        seen = visible(q1 - q0, k1 - k0, True, named["window_size"], longest, 4, True)
        check(q[q0:q1], k[k0:k1], v[k0:k1], out[q0:q1], seen, 128**-0.5)


def check_pages(code: str, window: tuple[int, int] = (2000, 0)) -> None:
    names, _ = run(code)
    out, table = names["output"][0], names["block_table"]
    assert out.shape == (750, 8, 64)
    for n, (q0, q1) in enumerate(pairwise(names["cu_seqlens_q"].tolist())):
        k, v = (names[x][table[n].long()].flatten(0, 1)[: names["seqlen_k"][n]] for x in "kv")
        seen = visible(q1 - q0, len(k), True, window, names["max_seqlen_k"], 10, True)
        check(names["q"][q0:q1], k, v, out[q0:q1], seen, 8.0, 1.0)


CHECKS = {"flash_attn_func": check_batches, "flash_attn_varlen_func": check_packed, "varlen_fwd": check_pages}


@pytest.mark.parametrize("name", CHECKS)
def test_examples_on_a_cpu(name):
    CHECKS[name](example(name, ON_CPU, *SHORTER.get(name, [])))


def test_packed_example_with_fewer_queries():
    check_packed(example("flash_attn_varlen_func", ON_CPU, *NARROWER))


def test_paged_example_with_a_window():
    check_pages(example("varlen_fwd", ON_CPU, ("2000, # window size left", "50,")), (50, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_examples_as_they_are(name):
    CHECKS[name](example(name))
