"""Long prompts through a transformers model: full attention against recipes of sliding window attention adaptation.

    python examples/generate_swaa.py
    python examples/generate_swaa.py --window 256 --keep-first 16 --prompt 8192
    python examples/generate_swaa.py --device cuda --layers 16 --prompt 65536 --window 2048 --new-tokens 256

The model is a small Qwen3 with random weights, made here: nothing is downloaded. Each recipe reads the same prompt and
then the tokens that full attention generates, so that logits can be compared. First, every recipe's logits are held
against eager attention under a mask written down pair by pair, on a short prompt, read in two pieces and then token by
token from the cache; the exit code is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when PyTorch loads: threads that spin while they wait slow down everything else on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from report import print_columns, print_table
from transformers.cache_utils import Cache, DynamicCache

from magi_attention.integrations.transformers import SWAACache, SWAAConfig, disable_swaa, enable_swaa

VOCABULARY = 512
SHORT = 60
"""Tokens of the comparison with eager attention; the first half of them comes in two pieces."""
LOWEST = {"layers": 1, "prompt": 2, "new_tokens": 2, "window": 1, "keep_first": 0, "seed": 0}


@dataclass(frozen=True)
class Measured:
    """One recipe's run. ``bytes`` are those of stored keys and values; errors are relative to full attention's logits."""

    recipe: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    bytes: int
    logits_error: float
    same_token: float


def parse_arguments() -> argparse.Namespace:
    """The command line, checked: a wrong argument ends the program with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add = parser.add_argument
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU when there is one)")
    add("--layers", type=int, default=4, help="layers of the model (4)")
    add("--prompt", type=int, default=4096, help="tokens of the prompt (4096)")
    add("--new-tokens", type=int, default=64, help="tokens to generate (64)")
    add(
        "--window",
        type=int,
        default=512,
        help="keys that a sliding layer sees, the query's own among them (512)",
    )
    add("--keep-first", type=int, default=8, help="first keys that stay visible (8)")
    add("--seed", type=int, default=0, help="of weights and prompt (0)")
    add("--json", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    for name, lowest in LOWEST.items():
        if (got := getattr(arguments, name)) < lowest:
            parser.error(f"argument --{name.replace('_', '-')}: expected at least {lowest}, got {got}")
    try:
        arguments.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {str(error).partition(chr(10))[0]}")
    return arguments


def recipes_for(window: int, keep_first: int, layers: int) -> list[SWAAConfig]:
    """A window alone, and what helps it: first keys, decoding in full, every second layer in full."""
    every_second = list(range(0, layers, 2))
    return [
        SWAAConfig(window),
        SWAAConfig(window, keep_first),
        SWAAConfig(window, keep_first, force_fa_decode=True),
        SWAAConfig(window, keep_first, non_sliding_layers=every_second),
    ]


def make_model(arguments: argparse.Namespace) -> Any:
    """bf16 on a GPU, fp32 on a CPU. Weights are large enough for attention to prefer some keys to others."""
    torch.manual_seed(arguments.seed)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=arguments.layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, initializer_range=0.06,
        max_position_embeddings=max(SHORT, arguments.prompt + arguments.new_tokens),
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    return model.to(arguments.device, torch.bfloat16 if arguments.device.type == "cuda" else torch.float32)


@contextlib.contextmanager
def adapted(model: Any, recipe: SWAAConfig) -> Iterator[None]:
    enable_swaa(model, recipe)
    try:
        yield
    finally:
        disable_swaa(model)


@contextlib.contextmanager
def masked_by_hand(model: Any, recipe: SWAAConfig) -> Iterator[None]:
    """Within, each layer of a model with eager attention shows what the recipe says, pair by pair."""

    def hook(layer: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sq, past = (
            keywords["hidden_states"].shape[1],
            keywords["past_key_values"].get_seq_length(layer.layer_idx),
        )
        row = torch.arange(past, past + sq, device=model.device)[:, None]
        col = torch.arange(past + sq, device=model.device)[None, :]
        near = (row - col < recipe.sliding_window_size) | (col < recipe.keep_first)
        if not recipe.slides(layer.layer_idx) or (sq == 1 and recipe.decodes_in_full(layer.layer_idx)):
            near = torch.ones_like(near)
        mask = torch.where(near & (col <= row), 0.0, -torch.inf).to(model.dtype)
        return arguments, {**keywords, "attention_mask": mask[None, None]}

    handles = [x.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for x in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits_in_pieces(model: Any, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    half = ids.shape[1] // 2
    pieces = ids.split([half - 5, 5, *[1] * (ids.shape[1] - half)], dim=1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1).double()


def check(model: Any, recipes: list[SWAAConfig], ids: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Largest errors of the recipes, and of eager attention at the same precision, against float64."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    truth = copy.deepcopy(eager).double()
    found = {}
    for recipe in recipes:
        with masked_by_hand(truth, recipe), masked_by_hand(eager, recipe):
            exact, plain = (logits_in_pieces(x, ids, DynamicCache()) for x in (truth, eager))
        with adapted(model, recipe):
            ours = logits_in_pieces(model, ids, SWAACache(model.config))
        found[recipe.mark] = tuple((x - exact).abs().max().item() for x in (ours, plain))
    return found


@torch.no_grad()
def run(
    model: Any, prompt: torch.Tensor, given: torch.Tensor | None, steps: int, cache: Cache
) -> tuple[Any, ...]:
    """Logits of the steps and their tokens, greedy ones unless given; seconds of the prompt, and of the median step."""
    seconds, logits, token = [], [], prompt
    chosen = []
    for step in range(steps + 1):
        begin = now(prompt.device)
        last = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        seconds.append(now(prompt.device) - begin)
        logits.append(last.float())
        token = last.argmax(-1, keepdim=True) if given is None else given[:, step : step + 1]
        chosen.append(token)
    return torch.cat(logits), torch.cat(chosen, dim=1), seconds


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stored_bytes(cache: Cache) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def measure(model: Any, recipes: list[SWAAConfig], prompt: torch.Tensor, steps: int) -> list[Measured]:
    """Full attention first, through this library, too: a recipe without a window."""
    rows: list[Measured] = []
    expected = tokens = None
    for recipe in (SWAAConfig(), *recipes):
        with adapted(model, recipe):
            # The prompt is read three times; the first time warms up, too.
            reading = [run(model, prompt, None, 0, SWAACache(model.config))[2][0] for _ in range(2)]
            cache = SWAACache(model.config)
            logits, chosen, seconds = run(model, prompt, tokens, steps, cache)
        if expected is None or tokens is None:
            expected, tokens = logits, chosen
        error = ((logits - expected).norm() / expected.norm()).item()
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
        speeds = (
            prompt.shape[1] / statistics.median([*reading, seconds[0]]),
            1 / statistics.median(seconds[1:]),
        )
        rows.append(Measured(recipe.mark, *speeds, stored_bytes(cache), error, same))
    return rows


def show(errors: dict[str, tuple[float, float]], rows: list[Measured], arguments: argparse.Namespace) -> None:
    checked = [
        (name, f"{ours:.1e}; {plain:.1e}: {verdict(ours, plain)}") for name, (ours, plain) in errors.items()
    ]
    print_table("Largest error of logits, against float64; of eager attention", checked)
    header = ("recipe", "prompt tokens/s", "new tokens/s", "KV memory", "logits differ by", "same token")
    table = [
        (
            row.recipe,
            f"{row.prefill_tokens_per_second:,.0f}",
            f"{row.decode_tokens_per_second:,.1f}",
            f"{row.bytes / 2**20:,.2f} MiB",
            f"{row.logits_error:.1%}",
            f"{row.same_token:.0%}",
        )
        for row in rows
    ]
    device = arguments.device.type
    title = f"{arguments.prompt:,} + {arguments.new_tokens} tokens, {arguments.layers} layers, {device}, against full"
    print_columns(title, header, table)
    print(
        "Weights are random: how logits differ says what the windows hide, not how a trained model would fare."
    )


def verdict(ours: float, plain: float) -> str:
    return "fine" if is_fine(ours, plain) else "TOO MUCH"


def is_fine(ours: float, plain: float) -> bool:
    """The library's rule: twice the error of plain PyTorch, and a tiny absolute term."""
    return ours <= 2 * plain + 1e-5


def main() -> int:
    """0 when every recipe's logits agree with their definition, else 1."""
    arguments = parse_arguments()
    model = make_model(arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    size = (1, max(SHORT, arguments.prompt))
    ids = torch.randint(VOCABULARY, size, generator=generator).to(arguments.device)
    short = recipes_for(min(arguments.window, 12), min(arguments.keep_first, 4), arguments.layers)
    errors = check(model, short, ids[:, :SHORT])
    recipes = recipes_for(arguments.window, arguments.keep_first, arguments.layers)
    rows = measure(model, recipes, ids[:, : arguments.prompt], arguments.new_tokens)
    show(errors, rows, arguments)
    if arguments.json:
        summary = {"errors": errors, "rows": [vars(row) for row in rows]}
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if all(is_fine(*error) for error in errors.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
