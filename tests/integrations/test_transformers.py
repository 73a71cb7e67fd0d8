"""transformers models on this library's attention give eager attention's logits and gradients, and refuse the rest."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import tiny_models
import transformers
from tiny_models import KINDS, model, tokens

import magi_attention.integrations.transformers as integration

NAME = integration.NAME
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SOURCE = Path(__file__).parents[2] / "src"


def padding(side: str, batch: int, length: int) -> torch.Tensor | None:
    """A mask with rows of different padding, and one without any."""
    if side == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : 4 * row - 1] = 0
    return mask if side == "left" else mask.flip(1)


def check(found: torch.Tensor, eager: torch.Tensor, name: str = "logits", tolerance: float = 1e-4) -> None:
    error = (found.float() - eager.float()).norm().item()
    assert error <= tolerance * max(eager.float().norm().item(), 1e-3), (name, error)


def logits_and_gradients(made: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    real = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    labels = ids.masked_fill(real == 0, -100)
    labels[:, 1:].masked_fill_(real[:, :-1] == 0, -100)  # predictions that come from padding
    found = made(ids, attention_mask=None if mask is None else real, labels=labels, use_cache=False)
    made.zero_grad()
    found.loss.backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {"logits": found.logits[real.bool()], **gradients}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_eager_attention(kind: str, side: str) -> None:
    ids, mask = tokens(3, 19), padding(side, 3, 19)
    ours, eager = (logits_and_gradients(model(kind, name), ids, mask) for name in (NAME, "eager"))
    assert ours.keys() == eager.keys()
    for name in ours:
        check(ours[name], eager[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt-oss", "gemma2"])
def test_errors_in_bf16_are_twice_those_of_eager_attention_at_most(kind: str, side: str) -> None:
    ids, mask = tokens(3, 150, "cuda"), padding(side, 3, 150)
    kinds = ((NAME, torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float32))
    ours, eager, truth = (logits_and_gradients(model(kind, *each, "cuda"), ids, mask) for each in kinds)
    for name in truth:
        errors = [(x[name].float() - truth[name]).norm().item() for x in (ours, eager)]
        assert errors[0] <= 2 * errors[1] + 1e-3 * truth[name].norm().item(), (name, errors)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("way", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("kind", ["llama", "gpt-oss"])
def test_packed_sequences_do_not_see_each_other(kind: str, way: str, use_cache: bool) -> None:
    ids, lengths = tokens(1, 30), [11, 1, 18]
    made = model(kind, NAME)
    alone = torch.cat([made(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packing: dict[str, Any] = {}
    if way == "cu_seq_lens":
        cuts = torch.tensor([0, 11, 12, 30], dtype=torch.int32)
        packing = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 18, "max_length_k": 18}
    found = made(ids, position_ids=positions, use_cache=use_cache, **packing).logits
    check(found, alone)
    together = made(ids, use_cache=use_cache).logits
    assert (together - alone)[:, 11:].norm() > 0.1 * alone.norm()


def test_packed_rows_of_a_batch_differ_and_train() -> None:
    ids = tokens(2, 20)
    positions = torch.stack([torch.cat([torch.arange(7), torch.arange(13)]), torch.arange(20)])
    gradients = []
    for name in (NAME, "eager"):
        made = model("qwen3", name)
        made(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in made.parameters()])
    for ours, eager in zip(*gradients, strict=True):
        check(ours, eager)


def test_attention_without_causality() -> None:
    ids, mask = tokens(3, 19), padding("left", 3, 19)
    ours, eager = (
        model("llama", name)(ids, attention_mask=mask, is_causal=False).logits for name in (NAME, "eager")
    )
    check(ours[mask.bool()], eager[mask.bool()])
    causal = model("llama", NAME)(ids, attention_mask=mask).logits
    assert (ours - causal)[mask.bool()].norm() > 0.1 * eager.norm()


def test_encoders_and_cross_attention() -> None:
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64, "init_std": 0.3}
    ids, mask = tokens(3, 19), padding("right", 3, 19)
    found = []
    for name in (NAME, "eager"):
        torch.manual_seed(0)
        made = transformers.BartModel._from_config(
            transformers.BartConfig(**sizes, **heads), attn_implementation=name
        ).eval()
        found.append(made(ids, attention_mask=mask, decoder_input_ids=tokens(3, 7)).last_hidden_state)
    check(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("device", DEVICES)
def test_generation_is_that_of_eager_attention(kind: str, cache: str | None, device: str) -> None:
    if device == "cuda" and cache == "static":
        pytest.skip("transformers compiles the model then")
    ids, mask = tokens(3, 13, device), padding("left", 3, 13).to(device)
    options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache}
    ours, eager = (
        model(kind, name, device=device).generate(ids, attention_mask=mask, **options)
        for name in (NAME, "eager")
    )
    assert ours.tolist() == eager.tolist()


def test_dropout_acts_in_training_alone_and_repeats() -> None:
    ids = tokens(2, 19)
    made = model("llama", NAME, attention_dropout=0.5)
    quiet = made(ids).logits
    check(quiet, model("llama", "eager")(ids).logits)
    made.train()
    torch.manual_seed(3)
    first, second = made(ids).logits, made(ids).logits
    torch.manual_seed(3)
    assert torch.equal(made(ids).logits, first)
    assert (first - second).norm() > 0.01 * quiet.norm()
    assert (first - quiet).norm() > 0.01 * quiet.norm()


def test_a_layer_that_does_not_train_drops_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    layer = torch.nn.Module().eval()
    found = [integration.attention_forward(layer, q, k, v, dropout=p)[0] for p in (0.0, 0.5)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], integration.attention_forward(layer.train(), q, k, v, dropout=0.5)[0])


def test_packed_sequences_are_numbered_for_layers_that_get_no_positions() -> None:
    from transformers.masking_utils import create_causal_mask

    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    found = create_causal_mask(model("llama", NAME).config, torch.zeros(2, 5, 4), None, None, positions)
    assert found.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]]


def test_autocast_decides_the_precision() -> None:
    ids = tokens(2, 19)
    made = model("qwen3", NAME)
    exact = made(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, eager = made(ids).logits, model("qwen3", "eager")(ids).logits
    assert (found - exact).norm() <= 2 * (eager - exact).norm()
    assert (found - exact).norm() > 1e-3 * exact.norm()


def test_inference_mode_and_checkpointing() -> None:
    ids, mask = tokens(3, 19), padding("left", 3, 19)
    made = model("gemma2", NAME)
    plain = logits_and_gradients(made, ids, mask)
    with torch.inference_mode():
        check(made(ids.clone(), attention_mask=mask.clone()).logits[mask.bool()], plain["logits"])
    made.gradient_checkpointing_enable()
    made.train()
    for name, gradient in logits_and_gradients(made, ids, mask).items():
        check(gradient, plain[name], name)


def custom_overlay(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key % 2 == 0


def test_masks_that_cannot_be_expressed_are_refused() -> None:
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    made, ids = model("llama", NAME), tokens(2, 6)
    with pytest.raises(
        NotImplementedError, match=r"attention_mask: expected \(batch, keys\), or None, got shape"
    ):
        made(ids, attention_mask=torch.zeros(2, 1, 6, 6))
    inputs = {"inputs_embeds": torch.zeros(2, 6, 4), "attention_mask": None, "past_key_values": None}
    with pytest.raises(NotImplementedError, match=r"got .*custom_overlay"):
        create_causal_mask(made.config, **inputs, and_mask_function=custom_overlay)
    with pytest.raises(NotImplementedError, match=r"the model's mask: expected .*or_mask"):
        create_causal_mask(made.config, **inputs, or_mask_function=custom_overlay)
    with pytest.raises(NotImplementedError, match=r"the model's mask: expected .*or_mask"):
        create_causal_mask(made.config, **inputs, block_sequence_ids=torch.zeros(2, 6))
    made.config.attention_chunk_size = 2
    with pytest.raises(NotImplementedError, match=r"got .*chunked_overlay"):
        create_chunked_causal_mask(made.config, **inputs)


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_models_that_would_take_the_mask_alone_are_refused(kind: str) -> None:
    sizes = {"hidden_size": 32, "n_layer": 1, "num_hidden_layers": 1, "n_head": 2, "num_attention_heads": 2}
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.CONFIG_MAPPING[kind](**sizes, vocab_size=8), attn_implementation=NAME
    )
    with pytest.raises(
        NotImplementedError, match="model: expected layers that use transformers' AttentionInterface"
    ):
        made(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"output_attentions": True},
            NotImplementedError,
            "output_attentions: expected None or False, got bool",
        ),
        ({"head_mask": torch.ones(2)}, NotImplementedError, "head_mask: expected None or False, got Tensor"),
        ({"position_bias": torch.ones(2)}, NotImplementedError, "position_bias: expected None or False"),
        (
            {"attention_mask": torch.ones(1, 4)},
            TypeError,
            "attention_mask dtype: expected integers or booleans",
        ),
        (
            {"attention_mask": torch.ones(3, 4, dtype=torch.int32)},
            ValueError,
            r"attention_mask shape: expected \(1",
        ),
        (
            {"attention_mask": torch.ones(1, 9, dtype=torch.int32)},
            ValueError,
            "keys in the cache: expected 9 .*SWAA",
        ),
        (
            {"attention_mask": torch.ones(1, 2, dtype=torch.int32)},
            ValueError,
            "attention_mask: expected at least 4",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4])},
            ValueError,
            "cu_seq_lens_q, cu_seq_lens_k: expected both, got one",
        ),
        ({"sliding_window": 0}, ValueError, "sliding_window: expected at least 1, or None, got 0"),
        ({"softcap": -1.0}, ValueError, "softcap: expected at least 0, or None, got -1.0"),
        ({"s_aux": torch.zeros(3)}, ValueError, "sink"),
    ],
)
def test_wrong_calls_are_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    q, k, v = (torch.zeros(1, 2, 4, 16) for _ in range(3))
    with pytest.raises(error, match=message):
        integration.attention_forward(torch.nn.Module(), q, k, v, **arguments)


def test_registering_again_does_no_harm() -> None:
    integration.register()
    integration.register()
    assert NAME in transformers.AttentionInterface()
    assert "flash" not in NAME


def test_models_keep_their_attention_when_copied() -> None:
    made = copy.deepcopy(model("llama", NAME))
    assert made.config._attn_implementation == NAME


def test_missing_transformers_are_named_with_a_remedy() -> None:
    code = "import sys; sys.modules['transformers'] = None; import magi_attention.integrations.transformers"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'pip install "magi_attention[transformers]"' in done.stderr


def test_reference_masks_are_causal_and_windowed() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    found = tiny_models.visible(mask, 5, 2, keep_first=1)[0].int().tolist()
    assert found == [[0] * 5, [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 1]]
