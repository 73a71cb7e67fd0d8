"""A program: tiny transformers models with flash_attention_2 on the drop-in, against eager attention in fp32.

    python hugging_face.py cpu

Prints nothing and exits with 0, or fails with an AssertionError. On a CPU, transformers is told that there is a GPU: it
would not ask for flash_attn otherwise.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.utils import import_utils

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral, window": transformers.MistralConfig(**SIZES, sliding_window=6),
    "qwen2": transformers.Qwen2Config(**SIZES),
}
LENGTHS = (17, 12)


def model(config: Any, attention: str, dtype: torch.dtype, device: str) -> Any:
    """The same weights for every kind of attention, and a config of its own: it is what names the attention."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
    )
    assert made.config._attn_implementation == attention
    return made.to(device=device, dtype=dtype)


def padded(device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two sequences, the shorter one padded on the left, and which labels count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (2, LENGTHS[0]), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : LENGTHS[0] - LENGTHS[1]] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, LENGTHS[0] - LENGTHS[1]] = -100  # its prediction comes from a padding token
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: x.to(device) for name, x in inputs.items()}, mask.bool().to(device)


def run(made: Any, device: str) -> Iterator[torch.Tensor]:
    """Logits of real tokens and every gradient."""
    inputs, real = padded(device)
    found = made(**inputs, use_cache=False)
    found.loss.backward()
    yield found.logits[real].float()
    for parameter in made.parameters():
        yield parameter.grad.float()


def packed(made: Any, device: str, together: bool) -> torch.Tensor:
    """Logits of both sequences without padding, in one row or one after the other."""
    inputs, real = padded(device)
    rows = [ids[keep] for ids, keep in zip(inputs["input_ids"], real, strict=True)]
    with torch.no_grad():
        if not together:
            return torch.cat([made(row[None], use_cache=False).logits[0] for row in rows]).float()
        positions = torch.cat([torch.arange(len(row), device=device) for row in rows])[None]
        return made(torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0].float()


def check(name: str, found: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """Twice as far from fp32 as eager attention in bf16, and not further."""
    ours, theirs = ((x - truth).norm().item() for x in (found, eager))
    assert ours <= 2 * theirs + 1e-4 * truth.norm().item(), (name, ours, theirs)


def main(device: str) -> None:
    if device == "cpu":
        import_utils.is_torch_cuda_available = lambda: True
        import_utils.is_flash_attn_2_available.cache_clear()
    assert import_utils.is_flash_attn_2_available()
    import flash_attn

    assert flash_attn.flash_attn_func.__module__.startswith("magi_attention")
    for name, config in MODELS.items():
        kinds = (("flash_attention_2", torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float32))
        models = [model(config, *kind, device) for kind in kinds]
        for tensors in zip(*(run(made, device) for made in models), strict=True):
            check(name, *tensors)
        check(
            f"{name}, packed",
            packed(models[0], device, True),
            *(packed(m, device, False) for m in models[1:]),
        )


if __name__ == "__main__":
    main(sys.argv[1])
