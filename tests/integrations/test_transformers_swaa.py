"""Sliding window attention adaptation of transformers models: masks against a definition, and a cache that drops keys."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tiny_models import masked_by_hand, model, tokens, visible
from transformers.cache_utils import DynamicCache

import magi_attention.integrations.transformers as integration
from magi_attention.integrations.transformers import SWAACache, SWAAConfig, disable_swaa, enable_swaa

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTH = 131


def sliding(kind: str, recipe: SWAAConfig, **others: Any) -> Any:
    made = model(kind, "eager", **others)
    enable_swaa(made, recipe)
    return made


def by_hand(recipe: SWAAConfig, mask: torch.Tensor, num_queries: int, num_layers: int) -> list[torch.Tensor]:
    """What each layer of a model of full attention shows under a recipe, pair by pair."""
    decode = recipe.force_fa_decode
    masks = []
    for layer in range(num_layers):
        window = None if layer in recipe.non_sliding_layers else recipe.sliding_window_size
        full_decode = decode if isinstance(decode, bool) else layer in decode
        masks.append(visible(mask, num_queries, window, recipe.keep_first, full_decode))
    return masks


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = (found.float() - expected.float()).norm().item()
    assert error <= tolerance * max(expected.float().norm().item(), 1e-3), error


def left_padded(batch: int, length: int, step: int = 5) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : step * row] = 0
    return mask


WINDOWS = (1, 2, 3, 7, 16, 33, 64, 65, 100, 128, 129, 130, 131, 500)


@pytest.mark.parametrize("keep_first", [0, 1, 5, 64])
@pytest.mark.parametrize("window", WINDOWS)
def test_logits_are_those_of_the_definition(window: int, keep_first: int) -> None:
    recipe = SWAAConfig(window, keep_first, force_fa_decode=True)
    mask = left_padded(1, LENGTH) if window % 2 else left_padded(2, LENGTH)
    ids, kind = tokens(len(mask), LENGTH), ("llama", "qwen3")[keep_first % 2]
    eager = model(kind, "eager")
    with torch.no_grad():
        with masked_by_hand(eager, by_hand(recipe, mask, LENGTH, 2)):
            expected = eager(ids, attention_mask=mask).logits
        close(sliding(kind, recipe)(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


RECIPES = [
    SWAAConfig(6, 0),
    SWAAConfig(6, 3),
    SWAAConfig(9, 2, True, [1]),
    SWAAConfig(5, 4, [2], [0]),
    SWAAConfig(None, 4, [0]),
]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.mark)
def test_gradients_are_those_of_the_definition(recipe: SWAAConfig, side: str) -> None:
    mask = torch.ones(3, 24, dtype=torch.long) if side == "none" else left_padded(3, 24)
    mask = mask.flip(1) if side == "right" else mask
    ids = tokens(3, 24)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    eager, ours = model("qwen3", "eager", num_hidden_layers=3), sliding("qwen3", recipe, num_hidden_layers=3)
    with masked_by_hand(eager, by_hand(recipe, mask, 24, 3)):
        eager(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    ours(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for found, expected in zip(ours.parameters(), eager.parameters(), strict=True):
        close(found.grad, expected.grad)


def test_packed_sequences_keep_their_own_first_keys() -> None:
    made, ids, lengths = sliding("llama", SWAAConfig(4, 2, True)), tokens(1, 30), [16, 1, 13]
    alone = torch.cat([made(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    cuts = torch.tensor([0, 16, 17, 30], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packing = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 16, "max_length_k": 16}
    for others in ({}, packing):
        close(made(ids, position_ids=positions, **others).logits, alone)


@pytest.mark.parametrize("new_cache", [DynamicCache, SWAACache])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.mark)
def test_chunks_and_steps_show_what_the_definition_shows(
    recipe: SWAAConfig, padded: bool, new_cache: Any
) -> None:
    total, sizes = 40, (13, 1, 2, 11, 1, 1, 1, 4, 6)
    assert sum(sizes) == total
    mask = left_padded(3, total) if padded else torch.ones(3, total, dtype=torch.long)
    ids = tokens(3, total)
    ours, eager = sliding("llama", recipe, num_hidden_layers=3), model("llama", "eager", num_hidden_layers=3)
    cache = SWAACache(ours.config, mask) if new_cache is SWAACache else DynamicCache(config=ours.config)
    theirs, past = DynamicCache(config=eager.config), 0
    for size in sizes:
        now = past + size
        chunk = {"input_ids": ids[:, past:now], "attention_mask": mask[:, :now]}
        chunk["position_ids"] = (mask[:, :now].cumsum(1) - 1).clamp(min=0)[:, past:]
        with torch.no_grad(), masked_by_hand(eager, by_hand(recipe, mask[:, :now], size, 3)):
            expected = eager(**chunk, past_key_values=theirs).logits
        with torch.no_grad():
            found = ours(**chunk, past_key_values=cache).logits
        real = mask[:, past:now].bool()
        close(found[real], expected[real])
        past = now
        assert cache.get_seq_length() == cache.get_seq_length(2) == now
        assert cache.get_mask_sizes(7, 0) == (now + 7, 0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt-oss", "gemma2"])
def test_steps_through_the_cache_function_are_the_same(
    kind: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ids = sliding(kind, SWAAConfig(9, 2, [1])), tokens(2, 30)
    mask = left_padded(2, 30, 3) if padded else torch.ones(2, 30, dtype=torch.long)
    options = {"max_new_tokens": 9, "do_sample": False, "prefill_chunk_size": 13, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": mask}

    def cache() -> Any:
        return DynamicCache(config=made.config) if padded else SWAACache(made.config)

    expected = made.generate(ids, past_key_values=cache(), **options)
    calls: list[int] = []
    pads: list[bool] = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments[0].shape[1])
        pads.append(keywords["cache_leftpad"] is not None)
        return with_cache(*arguments, **keywords)

    # As on a GPU.
    with_cache = integration.flash_attn_with_kvcache
    few = property(lambda call: call.q.shape[1] <= 16 and call.q.shape[1] < call.k.shape[1])
    monkeypatch.setattr(integration._Call, "is_decoding", few)
    monkeypatch.setattr(integration, "flash_attn_with_kvcache", counted)
    found = made.generate(ids, past_key_values=cache(), **options)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        close(ours, theirs)
    assert calls == [13] * 2 + [4] * 2 + [1] * 2 * 8
    # Layers with windows of their own see none of the padding after a while.
    assert any(pads) == padded


def stored(cache: Any) -> list[int]:
    for layer in cache.layers:
        assert layer.keys.shape[:3] == layer.values.shape[:3]
    return [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 7, 16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("device", DEVICES)
def test_generation_with_the_cache_is_generation_without(
    kind: str, chunk: int | None, padded: bool, device: str
) -> None:
    made = sliding(kind, SWAAConfig(8, 3), device=device)
    mask = (left_padded(3, 37) if padded else torch.ones(3, 37, dtype=torch.long)).to(device)
    ids = tokens(3, 37, device)
    options = {
        "max_new_tokens": 14,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    without = made.generate(ids, attention_mask=mask, use_cache=False, **options)
    cache = SWAACache(made.config, mask)
    found = made.generate(
        ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, **options
    )
    assert found.sequences.tolist() == without.sequences.tolist()
    for ours, expected in zip(found.logits, without.logits, strict=True):
        close(ours, expected, 1e-3)
    # Every second layer of the last two has a window of its own, 7 or 6.
    mine = 3 + 8 - 1 + (10 if padded else 0)
    assert stored(cache) == {"gemma2": [6, mine], "gpt-oss": [5, mine]}.get(kind, [mine, mine])


def steps(
    made: Any, ids: torch.Tensor, cache: Any, windows: list[tuple[int, int, bool]] | None
) -> torch.Tensor:
    """Logits of a prompt and then token by token; layers see windows, kept keys and decode in full as said, or as is."""
    found, past = [], 0
    for now in range(180, ids.shape[1] + 1):
        everything = torch.ones(len(ids), now, dtype=torch.long)
        hand = [visible(everything, now - past, *layer) for layer in windows or ()]
        with torch.no_grad(), masked_by_hand(made, hand) if windows else contextlib.nullcontext():
            found.append(made(ids[:, past:now], past_key_values=cache).logits.float())
        past = now
    return torch.cat(found, dim=1)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(("kind", "own"), [("llama", None), ("gemma2", 7), ("gpt-oss", 6)])
def test_steps_in_bf16_are_as_near_as_those_of_eager_attention(
    kind: str, own: int | None, decode: bool
) -> None:
    ids = tokens(2, 200, "cuda")
    windows = [(own, 0, False) if own else (64, 4, decode), (64, 4, decode)]
    kinds = (torch.bfloat16, torch.float32)
    eager, truth = (
        steps(model(kind, "eager", dtype, "cuda"), ids, DynamicCache(), windows) for dtype in kinds
    )
    made = sliding(kind, SWAAConfig(64, 4, decode), dtype=torch.bfloat16, device="cuda")
    ours = steps(made, ids, SWAACache(made.config), None)
    errors = [(x - truth).norm().item() for x in (ours, eager)]
    assert errors[0] <= 2 * errors[1] + 1e-3 * truth.norm().item(), errors


def test_the_cache_holds_no_more_than_it_says() -> None:
    made = sliding("llama", SWAAConfig(16, 4, [1], [2]), num_hidden_layers=4)
    cache, full = SWAACache(made.config), DynamicCache(config=made.config)
    ids = tokens(1, 220)
    with torch.no_grad():
        for part in ids.split([100, 50, 30, *[1] * 40], dim=1):
            ours = made(part, past_key_values=cache).logits
            close(ours, made(part, past_key_values=full).logits)
            assert max(stored(cache)[0], stored(cache)[3]) <= 4 + 16 - 1
    assert stored(cache) == [19, 220, 220, 19]
    assert stored(full) == [220] * 4
    one_token = made.config.num_key_value_heads * made.config.head_dim * 4
    for layer, kept in zip(cache.layers, stored(cache), strict=True):
        assert layer.keys.untyped_storage().nbytes() == kept * one_token


def test_beams_are_reordered() -> None:
    made, ids, mask = sliding("llama", SWAAConfig(6, 2)), tokens(2, 23), left_padded(2, 23)
    options = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, "attention_mask": mask}
    found = made.generate(ids, past_key_values=SWAACache(made.config, mask), **options)
    assert found.tolist() == made.generate(ids, use_cache=False, **options).tolist()


def test_the_cache_is_cropped_until_it_has_dropped_something() -> None:
    made, ids = sliding("llama", SWAAConfig(8, 2)), tokens(1, 12)
    cache, expected = SWAACache(made.config), made(ids).logits
    made(ids[:, :8], past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    close(made(ids[:, 5:], past_key_values=cache).logits, expected[:, 5:])
    cache.crop(0)
    with pytest.raises(
        NotImplementedError, match="crop: expected a cache that has dropped nothing, got one that has"
    ):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    close(made(ids, past_key_values=cache).logits, expected)


def test_layers_with_windows_of_their_own_keep_them() -> None:
    ids = tokens(1, 30)
    plain, adapted = model("gemma2", "eager"), sliding("gemma2", SWAAConfig(9, 1))
    mask = torch.ones(1, 30, dtype=torch.long)
    with masked_by_hand(plain, [visible(mask, 30, 7), visible(mask, 30, 9, 1)]):
        close(adapted(ids).logits, plain(ids).logits)


def test_enabling_again_changes_the_recipe_and_disabling_undoes_it() -> None:
    ids, made = tokens(1, 30), model("llama", "eager")
    full = made(ids).logits
    found = []
    for recipe in (SWAAConfig(4), SWAAConfig(4, 2)):
        enable_swaa(made, recipe)
        found.append(made(ids).logits)
    for one, other in itertools.combinations([full, *found], 2):
        assert (one - other).norm() > 0.05 * full.norm()
    again = copy.deepcopy(made)
    assert torch.equal(again(ids).logits, found[1])
    for each in (made, again):
        disable_swaa(each)
        assert each.config._attn_implementation == "eager"
        assert torch.equal(each(ids).logits, full)
    disable_swaa(made)


def test_a_recipe_is_saved_with_the_model(tmp_path: Any) -> None:
    ids, made = tokens(1, 30), sliding("llama", SWAAConfig(4, 2, [1]))
    made.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=integration.NAME)
    assert SWAAConfig(**loaded.config.swaa_config) == SWAAConfig(4, 2, [1])
    assert torch.equal(loaded(ids).logits, made(ids).logits)


def test_wrong_models_and_recipes_are_refused() -> None:
    made = model("llama", "eager")
    with pytest.raises(TypeError, match="model: expected PreTrainedModel, got Linear"):
        enable_swaa(torch.nn.Linear(1, 1), SWAAConfig(4))
    with pytest.raises(TypeError, match="config: expected SWAAConfig, got dict"):
        enable_swaa(made, {"sliding_window_size": 4})
    with pytest.raises(ValueError, match=r"non_sliding_layers: expected layers below 2, got \[2, 7\]"):
        enable_swaa(made, SWAAConfig(4, non_sliding_layers=[0, 2, 7]))
    with pytest.raises(ValueError, match=r"force_fa_decode: expected layers below 2, got \[2\]"):
        enable_swaa(made, SWAAConfig(4, force_fa_decode=[2]))
    with pytest.raises(
        ValueError, match="model: expected a layer with full attention, got its own windows in all"
    ):
        enable_swaa(model("mistral", "eager"), SWAAConfig(4))
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=8)
    with pytest.raises(NotImplementedError, match="model: expected a decoder, got an encoder-decoder"):
        enable_swaa(transformers.T5ForConditionalGeneration(t5), SWAAConfig(4))
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=8)
    )
    with pytest.raises(
        NotImplementedError, match="model: expected attention that can be set, got BloomForCausalLM"
    ):
        enable_swaa(bloom, SWAAConfig(4))
    for refused in (made, bloom):
        assert refused.config._attn_implementation == "eager"
        assert not hasattr(refused.config, "swaa_config")
    with pytest.raises(TypeError, match="model: expected PreTrainedModel, got str"):
        disable_swaa("llama")


def test_wrong_caches_are_refused() -> None:
    made = model("llama", "eager")
    with pytest.raises(
        ValueError, match=r"config: expected one with SWAA, got none. Call enable_swaa\(model, ...\)"
    ):
        SWAACache(made.config)
    with pytest.raises(TypeError, match="config: expected PreTrainedConfig, got LlamaForCausalLM"):
        SWAACache(made)
    enable_swaa(made, SWAAConfig(4, 2))
    with pytest.raises(ValueError, match=r"attention_mask shape: expected \(batch, prompt\), got \(5,\)"):
        SWAACache(made.config, torch.ones(5))
    ids, mask = tokens(2, 23), left_padded(2, 23)
    with pytest.raises(
        ValueError, match=r"keys in the cache: expected 24 .* Tell a SWAACache the padding on the left"
    ):
        made.generate(ids, attention_mask=mask, past_key_values=SWAACache(made.config), max_new_tokens=3)
