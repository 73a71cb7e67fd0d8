"""Tiny transformers models with random weights, and eager attention under masks written down pair by pair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Weights as large as these make attention sharp: what a mask shows by mistake is seen in the logits.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = ("llama", "qwen3", "gpt-oss", "gemma2", "mistral")
"""Full attention; norms of queries and keys; sinks and a window in every second layer; softcap likewise; windows."""


def config(kind: str, **others: Any) -> Any:
    sizes = {**SIZES, **others}
    match kind:
        case "llama":
            return transformers.LlamaConfig(**sizes)
        case "qwen3":
            return transformers.Qwen3Config(**sizes)
        case "gpt-oss":
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": rope}
            return transformers.GptOssConfig(**sizes, **experts, sliding_window=6)
        case "gemma2":
            softcaps = {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 16}
            return transformers.Gemma2Config(**sizes, **softcaps, sliding_window=7)
        case "mistral":
            return transformers.MistralConfig(**sizes, sliding_window=5)
    raise AssertionError(kind)


def model(
    kind: str, attention: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **others: Any
) -> Any:
    """The same weights for every attention and dtype. A config of its own: models that share one share its attention."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        config(kind, **others), attn_implementation=attention, dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    assert made.config._attn_implementation == attention
    return made.to(device=device, dtype=dtype).eval()


def tokens(batch: int, length: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=generator).to(device)


def visible(
    attention_mask: torch.Tensor,
    num_queries: int,
    window: int | None,
    keep_first: int = 0,
    full_decode: bool = False,
) -> torch.Tensor:
    """(batch, queries, keys) booleans of causal attention, one pair at a time; the queries are the last tokens."""
    batch, length = attention_mask.shape
    seen = torch.zeros(batch, num_queries, length, dtype=torch.bool)
    for b in range(batch):
        real = attention_mask[b].tolist()
        first = real.index(1)
        single = full_decode and sum(real[length - num_queries :]) == 1
        for i in range(num_queries):
            at = length - num_queries + i
            for j in range(first, at + 1):
                near = window is None or single or at - j < window or j - first < keep_first
                seen[b, i, j] = bool(real[at] and real[j] and near)
    return seen


@contextlib.contextmanager
def masked_by_hand(made: Any, masks: list[torch.Tensor]) -> Iterator[None]:
    """Within, layer n of a model with eager attention uses the nth of the (batch, queries, keys) masks."""

    def hook(module: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seen = masks[module.layer_idx][:, None].to(made.device)
        lowest = torch.finfo(made.dtype).min
        return arguments, {**keywords, "attention_mask": torch.where(seen, 0.0, lowest).to(made.dtype)}

    layers = made.model.layers
    handles = [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
