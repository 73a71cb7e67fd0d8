"""The documented example of context parallelism, word for word but for sizes and dtype; run by torchrun.

Arguments: the dtype, or "verbatim" for the sizes and dtype of the document, and a folder for what each rank finds.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from magi_attention import Mask, attention

DOCUMENT = Path(__file__).parents[1] / "documents" / "quickstart.md"
SECTION = "Basic Usage for MagiAttention"
SMALLER = {
    "32 * 1024": "512",
    "num_heads_q = 48": "num_heads_q = 6",
    "num_heads_kv = 8": "num_heads_kv = 2",
    "head_dim = 128": "head_dim = 16",
    "chunk_size = 512": "chunk_size = 8",
    "embed_dim = 4096": "embed_dim = 32",
}


VERBATIM = "verbatim"


def example(dtype: str) -> str:
    """The code, with ranges and sizes of few tokens unless it is wanted as it is."""
    section = DOCUMENT.read_text().split(f"## {SECTION}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    if dtype == VERBATIM:
        return code
    for old, new in {**SMALLER, "torch.bfloat16": f"torch.{dtype}"}.items():
        assert old in code, old
        code = code.replace(old, new)
    return re.sub(r"\b(\d{4,5})(?=[,\]])", lambda number: str(int(number[1]) // 64), code)


def on_one_device(names: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same without ranks."""
    x = names["x"].detach().to(dtype).requires_grad_()
    layers = [names[name].to(dtype) for name in ("q_proj", "k_proj", "v_proj")]
    for layer in layers:
        layer.weight.grad = None
    heads = names["num_heads_q"], names["num_heads_kv"], names["num_heads_kv"]
    q, k, v = (layer(x).view(len(x), h, -1) for layer, h in zip(layers, heads, strict=True))
    sink = names["global_sink"].detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    mask = Mask.from_ranges(names["q_ranges"], names["k_ranges"], "full", len(x), len(x))
    out, _ = attention(q, k, v, mask, sink=sink)
    out.sum().backward()
    return {"out": out.detach(), "dx": x.grad, "dq_proj": layers[0].weight.grad, "dsink": sink.grad}


def main() -> None:
    """Run it; keep what was found and what should be."""
    dtype, folder = sys.argv[1:]
    torch.manual_seed(0)  # the same tensors on every rank
    names: dict = {}
    exec(example(dtype), names)
    found = {
        "out": names["total_out"].detach(),
        "dx": names["dx"],
        "dq_proj": names["dq_proj"].clone(),
        "dsink": names["dsink"],
    }
    truth = torch.bfloat16 if dtype == VERBATIM else torch.float64
    assert names["local_lse"].dtype == (torch.float64 if dtype == "float64" else torch.float32)
    rank = names["rank"]
    torch.save({"found": found, "truth": on_one_device(names, truth)}, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main()
