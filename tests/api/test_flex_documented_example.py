"""The documented example of flex_flash_attn_func runs as printed, and says what the definition says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from magi_attention.kernels.reference.dense import dense_attention
from magi_attention.mask import INF
from magi_attention.testing.tolerance import figure

DOCUMENT = Path(__file__).parents[1] / "documents" / "quickstart.md"
SECTION = "Basic Usage for Flex-Flash-Attention"

# The mask that the example draws: rows 0 to 1023 see 0 to 1023, rows 1024 to 2047 see up to themselves.
BANDS = torch.tensor([[0, 1024, 0, 1024, -INF, INF], [1024, 2048, 0, 2048, -INF, 0]], dtype=torch.int32)


def example() -> str:
    section = DOCUMENT.read_text().split(f"## {SECTION}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return code


def run(device: str, has_sink: bool) -> dict:
    code = example()
    for old, new in (
        ('device = "cuda"', f'device = "{device}"'),
        ("has_sink = True ", f"has_sink = {has_sink} "),
    ):
        assert old in code
        code = code.replace(old, new)
    names: dict = {}
    exec(code, names)
    return names


def results_by_formula(names: dict, heads: slice, kv_heads: slice, dtype: torch.dtype | None) -> dict:
    parts = {"dq": names["q"][:, heads], "dk": names["k"][:, kv_heads], "dv": names["v"][:, kv_heads]}
    if names["sink"] is not None:
        parts["dsink"] = names["sink"][:, heads]
    leaves = {name: part.detach().to(dtype or part.dtype).requires_grad_() for name, part in parts.items()}
    table = BANDS.to(names["q"].device)
    out, lse, _ = dense_attention(
        leaves["dq"], leaves["dk"], leaves["dv"], table, leaves.get("dsink"), dtype=dtype
    )
    out.backward(names["do"][:, heads].to(out.dtype))
    return {"out": out.detach(), "lse": lse.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def check(names: dict) -> None:
    """The heads of the first key/value head; the others go the same way."""
    group = names["num_heads_q"] // names["num_heads_kv"]
    heads, kv_heads = slice(0, group), slice(0, 1)
    exact = results_by_formula(names, heads, kv_heads, torch.float64)
    plain = results_by_formula(names, heads, kv_heads, None)
    for name, truth in exact.items():
        ours = names[name].detach()
        ours = ours[:, kv_heads if name in ("dk", "dv") else heads]
        found = figure(name, ours, truth, plain[name], unit=truth.abs().max().item())
        assert found.ok, found


@pytest.mark.parametrize("has_sink", [True, False], ids=("sink", "no-sink"))
def test_documented_example_on_cpu(has_sink: bool) -> None:
    names = run("cpu", has_sink)
    assert names["out"].shape == (2048, 8, 128) and names["out"].dtype == torch.bfloat16
    assert names["lse"].shape == (2048, 8) and names["lse"].dtype == torch.float32
    assert (names["dsink"] is not None) == has_sink
    check(names)


@pytest.mark.gpu
@pytest.mark.parametrize("has_sink", [True, False], ids=("sink", "no-sink"))
def test_documented_example_on_cuda(has_sink: bool) -> None:
    check(run("cuda", has_sink))
