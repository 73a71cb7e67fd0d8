"""Train a small decoder on documents of very different lengths, packed into one sequence per step.

    python examples/train_packed_documents.py
    python examples/train_packed_documents.py --mask window --window 512 --keep-first 4
    python examples/train_packed_documents.py --mask block-causal --block 64 --device cuda --tokens 65536
    python examples/train_packed_documents.py --cp 2
    torchrun --nproc-per-node 8 examples/train_packed_documents.py --tokens 262144 --checkpoint

The documents are the source files of Python's own standard library, read as bytes. No step is padded, and no
document sees another one: the mask says so, and attention does no work for what it hides. At the end the
attention of the trained model is compared with the definition in float64, forward and backward.

With --cp, or under torchrun, every step's sequence is dealt to several processes, with a GPU each or on the
CPU, and so are the weights. The losses are those of one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

# Both are read when PyTorch loads. cuBLAS repeats its results bit by bit only with a fixed workspace; threads
# that spin while they wait make every step many times slower when other programs use the same cores.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from model import Decoder, Shape
from oracle import compare_with_oracle
from packing import IGNORED, MASKS, VOCABULARY, Packed, mask_for, packed_steps, read_documents, with_blanks
from parallel import Ranks, is_first_launched, join, launch, num_here, num_launched
from report import print_table, progress_bar, save_pictures

from magi_attention import Mask
from magi_attention.kernels.select import BACKENDS, Request, choose_backend, refusal
from magi_attention.testing import Figure
from magi_attention.utils import clearup_dist_env

LEARNING_RATE = 4e-3
CLIP_NORM = 1.0
BLANK_FRACTION = 0.2
SAMPLE_TOKENS = 1024
"""Tokens of the comparison with the definition, which needs memory for their square."""
OF_ONE_MASK = {"window": ("window", 256), "keep_first": ("window", 4), "block": ("block-causal", 64)}
"""The options that belong to one mask: which one, and the default."""
LOWEST = {"tokens": 64, "steps": 1, "window": 1, "keep_first": 0, "block": 1, "seed": 0, "cp": 1}


@dataclass(frozen=True)
class Step:
    """What one training step left behind: loss in nats per predicted token, wall time in seconds."""

    loss: float
    seconds: float
    documents: int
    density: float


def parse_arguments() -> argparse.Namespace:
    """The command line, checked: a wrong argument ends the program with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda message: parser.exit(
        2, f"{parser.prog}: error: {message}\n" if is_first_launched() else None
    )
    add = parser.add_argument
    add("--mask", choices=MASKS, default="varlen", help="what a token sees of its own document (varlen)")
    add("--window", type=int, help="with --mask window: how many tokens before its own a token sees (256)")
    add("--keep-first", type=int, help="with --mask window: tokens of every beginning that stay visible (4)")
    add("--block", type=int, help="with --mask block-causal: tokens per block (64)")
    add("--steps", type=int, help="training steps (200 on a CPU, 400 on a GPU)")
    add("--tokens", type=int, help="tokens per step (2560 on a CPU, 32768 on a GPU)")
    add("--seed", type=int, default=0, help="the same seed on the same machine is the same run (0)")
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU when there is one)")
    add("--cp", type=int, help="processes that share each step's tokens, and the weights (1, or torchrun's)")
    add("--checkpoint", action="store_true", help="compute layers again in the backward, to save memory")
    add("--backend", choices=BACKENDS, help="attention backend (the library chooses)")
    add("--out", type=Path, default=Path("out"), help="folder for loss.png and mask.png (out)")
    add("--json", type=Path, help="write the summary to this file, too")
    arguments = parser.parse_args()
    try:
        check(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other arguments; ValueError with one line for what cannot work."""
    arguments.device = available_device(arguments.device)
    arguments.attention_dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
    for name, on_cpu, on_gpu in (("steps", 200, 400), ("tokens", 2560, 32768)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, on_gpu if arguments.device.type == "cuda" else on_cpu)
    for name, (mask, default) in OF_ONE_MASK.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif arguments.mask != mask:
            raise ValueError(f"argument {flag(name)}: works with --mask {mask}, not with {arguments.mask}")
    arguments.cp = (num_launched() or 1) if arguments.cp is None else arguments.cp
    for name, lowest in LOWEST.items():
        if getattr(arguments, name) < lowest:
            raise ValueError(
                f"argument {flag(name)}: expected at least {lowest}, got {getattr(arguments, name)}"
            )
    check_processes(arguments)
    request = Request(arguments.device.type, arguments.attention_dtype, Shape.head_dim, Shape.head_dim)
    if arguments.backend and (reason := refusal(arguments.backend, request)):
        raise ValueError(f"argument --backend: {arguments.backend} cannot run here: {reason}")
    arguments.backend = choose_backend(request, arguments.backend)
    for name, folder in (("out", arguments.out), ("json", arguments.json and arguments.json.parent)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"argument --{name}: cannot write into {folder}: {error.strerror}") from None


def check_processes(arguments: argparse.Namespace) -> None:
    """ValueError with one line for a number of processes that cannot be, or with what does not go with several."""
    launched = num_launched()
    if launched not in (None, arguments.cp):
        raise ValueError(f"argument --cp: expected {launched}, as torchrun started, got {arguments.cp}")
    if arguments.cp == 1:
        return
    if arguments.backend:
        raise ValueError("argument --backend: works with --cp 1 only, several processes choose by themselves")
    if arguments.device.type == "cuda":
        here, found = num_here() if launched else arguments.cp, torch.cuda.device_count()
        if here > found:
            raise ValueError(f"argument --cp: {here} processes here, but PyTorch finds {found} GPUs")
        if arguments.device.index is not None:
            raise ValueError(f"argument --device: expected cuda with --cp, got {arguments.device}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def available_device(name: str | None) -> torch.device:
    """The device called ``name``, or the best there is; ValueError when this machine lacks it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"argument --device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"argument --device: no {name} here, PyTorch finds {torch.cuda.device_count()} GPUs")
    return device


def make_model(arguments: argparse.Namespace, device: torch.device) -> Decoder:
    """A decoder with seeded fp32 weights."""
    torch.manual_seed(arguments.seed)
    shape = Shape(VOCABULARY, arguments.attention_dtype, arguments.backend, arguments.checkpoint)
    return Decoder(shape).to(device)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then half a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    return LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(
    model: Decoder, documents: list[bytes], arguments: argparse.Namespace, ranks: Ranks
) -> tuple[list[Step], Mask]:
    """Train for ``--steps`` steps; returns what each one left behind, and the last one's mask."""
    rng = np.random.default_rng(arguments.seed)
    batches = packed_steps(documents, arguments.tokens, rng)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    history: list[Step] = []
    with progress_bar(arguments.steps) if ranks.is_first else nullcontext(lambda *_: None) as show:
        for number, packed in zip(range(arguments.steps), batches, strict=False):
            begin = time.perf_counter()
            # One mask per step: it is planned once, and every layer works from that plan.
            mask = mask_for(arguments.mask, packed, arguments.window, arguments.keep_first, arguments.block)
            if arguments.mask == "block-causal":
                packed = with_blanks(packed, BLANK_FRACTION, rng)
            optimizer.param_groups[0]["lr"] = learning_rate(number, arguments.steps)
            optimizer.zero_grad()
            loss = loss_of(model, packed, mask, ranks)
            # FSDP2 takes the mean of the ranks' gradients, of which we want the sum.
            (loss * ranks.size).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            value, seconds = ranks.total(loss), time.perf_counter() - begin
            history.append(Step(value, seconds, packed.num_documents, mask.area / arguments.tokens**2))
            show(number + 1, value, arguments.tokens / seconds)
    return history, mask


def loss_of(model: Decoder, packed: Packed, mask: Mask, ranks: Ranks) -> torch.Tensor:
    """This rank's part of the mean cross entropy in nats over all positions that predict something."""
    inputs, targets, positions, sight = ranks.deal(packed, mask)
    logits = model(inputs, positions, sight)
    predicted = int((packed.targets != IGNORED).sum())
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / predicted


def check_attention(model: Decoder, documents: list[bytes], arguments: argparse.Namespace) -> list[Figure]:
    """Compare the trained model's attention with the definition, on a small step of its own."""
    tokens = min(arguments.tokens, SAMPLE_TOKENS)
    short = [text for text in documents if len(text) < tokens // 2]
    packed = next(packed_steps(short or documents, tokens, np.random.default_rng(arguments.seed)))
    mask = mask_for(arguments.mask, packed, arguments.window, arguments.keep_first, arguments.block)
    return compare_with_oracle(model, packed, mask)


def summarize(history: list[Step], errors: list[Figure], arguments: argparse.Namespace) -> dict:
    """The numbers of the run; "first" and "last" are means over a twentieth of the steps."""
    losses, edge = [step.loss for step in history], max(1, len(history) // 20)
    return {
        "mask": arguments.mask,
        "device": str(arguments.device),
        "processes": arguments.cp,
        "backend": arguments.backend,
        "steps": len(history),
        "tokens_per_step": arguments.tokens,
        "documents": sum(step.documents for step in history),
        "mask_density": float(np.mean([step.density for step in history])),
        "loss_first": float(np.mean(losses[:edge])),
        "loss_last": float(np.mean(losses[-edge:])),
        "losses": losses,
        "tokens_per_second": arguments.tokens / float(np.median([step.seconds for step in history])),
        "seconds": sum(step.seconds for step in history),
        "errors": {e.name: {"ours": e.error[0], "plain": e.plain[0], "within_rule": e.ok} for e in errors},
        "attention_is_exact": all(e.ok for e in errors),
    }


def print_summary(summary: dict) -> None:
    first, last = summary["loss_first"], summary["loss_last"]
    square, density = summary["tokens_per_step"] ** 2, summary["mask_density"]
    rows = [
        ("mask; backend; device", f"{summary['mask']}; {summary['backend']}; {summary['device']}"),
        ("loss in nats, first -> last", f"{first:.3f} -> {last:.3f}"),
        ("bits per byte, first -> last", f"{first / math.log(2):.3f} -> {last / math.log(2):.3f}"),
        ("tokens per second, median", f"{summary['tokens_per_second']:,.0f}"),
        ("documents", f"{summary['documents']:,}, {summary['documents'] / summary['steps']:.1f} per step"),
        ("mask area, mean", f"{density * square:,.0f} pairs, {density:.1%} of the square"),
    ]
    for name, error in summary["errors"].items():
        verdict = "fine" if error["within_rule"] else "TOO MUCH"
        rows.append(
            (
                f"largest error of {name}; of plain PyTorch",
                f"{error['ours']:.1e}; {error['plain']:.1e}: {verdict}",
            )
        )
    title = f"{summary['steps']} steps of {summary['tokens_per_step']:,} tokens in {summary['seconds']:.1f} s"
    on = f" on {summary['processes']} processes" if summary["processes"] > 1 else ""
    print_table(title + on, rows)


def main() -> int:
    """0 when the trained model's attention agrees with its definition, else 1."""
    arguments = parse_arguments()
    if arguments.cp > 1 and not num_launched():
        launch(arguments.cp)
        return 0
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # It costs time and changes no result.
    ranks = join(arguments.cp, arguments.device)
    try:
        return run(arguments, ranks)
    finally:
        clearup_dist_env()


def run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Train, and on the first rank compare, print and write."""
    documents = read_documents(longest=arguments.tokens // 2)
    model = make_model(arguments, ranks.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if ranks.is_first:
        size = sum(map(len, documents))
        print(f"{len(documents):,} documents, {size:,} bytes; {parameters:,} parameters", flush=True)
    ranks.shard(model)
    history, mask = train(model, documents, arguments, ranks)
    whole = ranks.gather(model, make_model(arguments, ranks.device))
    if not ranks.is_first:
        return 0
    summary = summarize(history, check_attention(whole, documents, arguments), arguments)
    print_summary(summary)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")
    save_pictures([step.loss for step in history], mask, arguments.out)
    return 0 if summary["attention_is_exact"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
