"""Thousands of random masks, forward and backward, against the fp64 definition; a seed stands for a case for good.

    python benchmarks/soak.py --cases 10000 --processes 8              # eight shards side by side on one GPU
    python benchmarks/soak.py --cases 10000 --shard 3/8                # one of them
    python benchmarks/soak.py --seed 4711                              # one case again, with its figures
    python benchmarks/soak.py --repeat --cases 30                      # 100 runs of each case, equal bit by bit

A seed fixes the mask, the shapes, the features and the memory layout. What kernels are compiled for (head dimension,
heads in a group, dtype, softcap, sink, dropout, ALiBi) follows from the seed modulo ``len(SPECIALISATIONS)``, and a
shard holds whole classes of it, so that a process compiles little.

The rule sets one rounding error against another, and among thousands of cases, many of a few numbers only, the plain
formula is lucky now and then: an error a little above its bound (``--near``) is listed and is no failure. Gradients of
scores and sinks that are further off are held against the CPU kernels: delta comes from the rounded out there too,
which the plain formula does not see. It shows where nothing else is left: a row that sees one key, with dropout, has
gradients of exactly zero. What is still off, but by less than MOST_LUCK, is drawn again, with other numbers in the same
mask, shapes and features: a kernel that is wrong stays wrong, luck does not.

Exit code 1: a case broke the rule; 2: a case hung (its seed and all stacks are on stderr); 3: no case ran.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.opinion import disagreements, same_bits
from benchmarks.peers import first_line
from magi_attention.mask import INF, DeviceMask, Mask
from magi_attention.testing import Case, Figure, compare, compare_parts, random_case, results
from magi_attention.testing.variants import head_major_views, packed_views, poisoned, spaced_views

HUNG, BROKEN, IDLE = 2, 1, 3
POISON_BYTES = 64 << 20
MOST_LUCK = 3.0
OTHER_DRAWS = 4
FROM_DELTA = ("dq", "dk", "dsink")


@dataclass(frozen=True)
class Specialisation:
    """What kernels are compiled for."""

    head_dim: int
    group: int
    dtype: torch.dtype
    softcap: bool
    sink: bool
    dropout: bool
    alibi: bool


def _specialisations() -> tuple[Specialisation, ...]:
    """Every head dimension with every group; the others go through their values beside them."""
    halves = (torch.bfloat16, torch.float16)
    pairs = [(dim, group) for dim in (128, 64, 96, 192, 256) for group in (1, 4, 2, 8, 3, 6)]
    return tuple(
        Specialisation(
            dim,
            group,
            halves[n % 7 % 2],
            softcap=n % 4 == 3,
            sink=n % 3 == 1,
            dropout=dim <= 128 and n % 5 in (1, 4),
            alibi=dim <= 128 and n % 5 in (3, 4),
        )
        for n, (dim, group) in enumerate(pairs)
    )


SPECIALISATIONS = _specialisations()


@dataclass
class Tally:
    """What became of the cases of a shard."""

    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[int] = field(default_factory=list)
    near: list[int] = field(default_factory=list)
    worst: float = 0.0


class Watchdog:
    """Ends the process when a case takes longer than ``seconds``, and says which.

    The thread needs the interpreter; a call that never gives it back is left to faulthandler, a little later.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._seed = -1
        self._until = float("inf")
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def over(self, seed: int) -> Iterator[None]:
        """Watch one case."""
        self._seed, self._until = seed, time.monotonic() + self.seconds
        faulthandler.dump_traceback_later(self.seconds + 20, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            self._until = float("inf")
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            time.sleep(0.2)
            if time.monotonic() > self._until:
                print(f"HANG seed {self._seed}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                os._exit(HUNG)


def random_mask(rng: np.random.Generator, most: int) -> Mask:
    """Any union of bands, or a family with a name; up to ``most`` rows and columns, short and odd lengths often."""
    num_rows, num_cols = (_length(rng, most) for _ in range(2))
    kind = rng.integers(8)
    if kind == 0:
        return Mask.causal(num_rows, num_cols)
    if kind == 1:
        return Mask.sliding_window(num_rows, num_cols, window=tuple(map(int, rng.integers(0, 200, size=2))))
    if kind == 2:
        cuts = np.concatenate(
            [[0], np.cumsum(rng.integers(1, 1 + num_rows // 3 + 1, size=rng.integers(1, 9)))]
        )
        cuts = np.minimum(cuts, num_rows)
        return Mask.varlen(cuts, causal=bool(rng.integers(2)))
    num_bands = int(rng.integers(0, 7))
    table = [_random_band(rng, num_rows, num_cols) for _ in range(num_bands)]
    if table and rng.random() < 0.2:
        table.append(table[int(rng.integers(len(table)))])
    return Mask(np.array(table, dtype=np.int64).reshape(-1, 6), num_rows, num_cols)


def _length(rng: np.random.Generator, most: int) -> int:
    """Any length, a very short one, or one beside a multiple of 64."""
    kind = rng.integers(4)
    if kind == 0:
        return int(rng.integers(1, min(most, 40) + 1))
    if kind == 1:
        return int(np.clip(64 * rng.integers(1, most // 64 + 2) + rng.integers(-1, 2), 1, most))
    return int(rng.integers(1, most + 1))


def _random_band(rng: np.random.Generator, num_rows: int, num_cols: int) -> list[int]:
    ends = []
    for size in (num_rows, num_cols):
        whole = rng.random() < 0.35
        ends += [0, size] if whole else np.sort(rng.integers(0, size + 1, size=2)).tolist()
    diagonals = rng.integers(-num_rows - 2, num_cols + 3, size=2)
    if rng.random() < 0.8:  # else they may cross, and the band is empty
        diagonals = np.sort(diagonals)
    low = -INF if rng.random() < 0.4 else int(diagonals[0])
    high = INF if rng.random() < 0.4 else int(diagonals[1])
    return [*map(int, ends), low, high]


def case_of(seed: int, device: torch.device, most: int, draw: int = 0) -> Case:
    """The case that ``seed`` stands for; other numbers in the same case for each further ``draw``."""
    spec = SPECIALISATIONS[seed % len(SPECIALISATIONS)]
    rng = np.random.default_rng(seed)
    mask: Mask | DeviceMask = random_mask(rng, most)
    if rng.random() < 0.25:
        mask = DeviceMask(mask.table.to(device), mask.num_rows, mask.num_cols)
    num_kv_heads = int(rng.integers(1, 3 if spec.group > 3 else 4))
    heads = (spec.group * num_kv_heads, num_kv_heads)
    batch = (None, 1, 2)[rng.integers(3)]
    sink = None
    if spec.sink:
        shape = (int(rng.integers(1, 4)), heads[0])
        shape = (mask.num_rows, *shape) if rng.random() < 0.3 else shape
        sink = torch.from_numpy(2 * rng.standard_normal(shape, dtype=np.float32)).to(device)
    case = random_case(
        mask,
        heads=heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        device=device,
        batch=batch,
        seed=seed + 1_000_003 * draw,
        sink=sink,
        softmax_scale=float(rng.uniform(-0.3, 0.3)) if rng.random() < 0.15 else None,
        softcap=float(rng.uniform(1, 40)) if spec.softcap else 0.0,
    )
    case = replace(case, dlse=case.dlse if rng.random() < 0.3 else None)
    if spec.dropout:
        state = torch.from_numpy(rng.integers(-(1 << 62), 1 << 62, size=2)).to(device)
        case = replace(case, dropout_p=float(rng.uniform(0.01, 0.5)), rng_state=state)
    if spec.alibi:
        rows = () if rng.random() < 0.5 else (len(mask.table) if batch is None else batch,)
        slopes = torch.from_numpy(rng.uniform(-0.02, 0.2, size=(*rows, heads[0])).astype(np.float32)).to(
            device
        )
        case = replace(case, alibi_slopes=slopes)
    case = _in_layout(case, int(rng.integers(5)))
    return poisoned(case) if rng.random() < 0.7 else case


def _in_layout(case: Case, layout: int) -> Case:
    """One of the memory layouts that users have; two of five cases stay contiguous."""
    if layout == 0:
        return spaced_views(case)
    if layout == 1:
        return head_major_views(case)
    if layout == 2 and case.q.shape[-3] == case.k.shape[-3]:
        return packed_views(case)
    return case


def poison_free_memory(device: torch.device) -> None:
    """Leave NaN in memory that the next allocations get."""
    if device.type == "cuda":
        # Small requests come from blocks of their own, of 2 MiB.
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in (1 << 19,) * 8]
        blocks.append(torch.full((POISON_BYTES,), 0xFF, dtype=torch.uint8, device=device))
        del blocks


def fault_of(case: Case, backend: str, seed: int, near: float) -> tuple[str, float]:
    """What is wrong with the case, or "", and the largest error over its bound, which may be ``near``."""
    poison_free_memory(case.q.device)
    # Each costs compilations: a third of the specialisations for maximum logits, for columns in parts, and for gradients
    # that promise their bits.
    extra = ("max logits", "parts", "deterministic")[seed % len(SPECIALISATIONS) // 3 % 3]
    if extra == "parts" and case.modifiers.keys() - {"softcap"}:
        extra = ""
    comparison = compare(case, backend=backend, max_logits=extra == "max logits")
    compared = {"": comparison}
    if extra == "parts":
        cuts = np.sort(np.random.default_rng(seed).integers(0, case.mask.num_cols + 1, 2)).tolist()
        compared[f"in parts {cuts}:\n"] = compare_parts(case, cuts, backend=backend)
    ratio = max(figure.ratio for each in compared.values() for figure in each.figures)
    for label, each in compared.items():
        wrong = [figure for figure in each.figures if figure.ratio > near or figure.fault]
        if wrong and not (backend != "blockwise" and _shared_with_cpu_kernels(case, wrong, near)):
            return f"{label}{each}", ratio
    if extra == "deterministic":
        poison_free_memory(case.q.device)
        found = disagreements(case, comparison, backend, deterministic=True)
        return "\n".join(found), ratio
    return "", ratio


def _shared_with_cpu_kernels(case: Case, wrong: list[Figure], near: float) -> bool:
    """Whether the CPU kernels' error is as large (within ``near``) in each of the figures, all of them from delta."""
    if any(figure.fault or figure.name not in FROM_DELTA for figure in wrong):
        return False
    cpu = compare(case, backend="blockwise", max_logits=False)
    return all(
        ours <= near * theirs
        for figure in wrong
        for ours, theirs in zip(figure.error, cpu[figure.name].error, strict=True)
    )


def unequal_bits(case: Case, backend: str, times: int) -> str:
    """Which tensors differ between runs: out and lse by default, all of them with ``deterministic=True``."""
    first = results(case, backend)
    steady = results(case, backend, deterministic=True)
    for run in range(1, times):
        poison_free_memory(case.q.device)
        again = results(case, backend)
        names = [name for name in ("out", "lse") if not same_bits(first[name], again[name])]
        again = results(case, backend, deterministic=True)
        names += [f"deterministic {name}" for name in steady if not same_bits(steady[name], again[name])]
        if names:
            return f"run {run} differs in {', '.join(names)}"
    return ""


def describe(seed: int, case: Case) -> str:
    """What the seed stands for, in two lines."""
    shapes = f"q {tuple(case.q.shape)}, k {tuple(case.k.shape)}, {case.q.dtype}"
    sink = None if case.sink is None else tuple(case.sink.shape)
    settings = (
        f"scale {case.softmax_scale}, softcap {case.softcap:.3g}, sink {sink}, dlse {case.dlse is not None}"
    )
    return f"seed {seed}: {shapes}; {settings}; strides {case.q.stride()}\n  {case.mask!r}"


def seeds_of(count: int, first: int, shard: tuple[int, int]) -> list[int]:
    """The seeds of a shard ``(i, n)``: classes of specialisation i, i + n, ..., mixed as they come."""
    index, shards = shard
    seeds = np.arange(first, first + count)
    return seeds[seeds % len(SPECIALISATIONS) % shards == index].tolist()


def soak(args: argparse.Namespace) -> int:
    """Run the seeds of the shard; returns the exit code."""
    device = torch.device(args.device)
    seeds = [args.seed] if args.seed is not None else seeds_of(args.cases, args.first, args.shard)
    watchdog, tally, begin = Watchdog(args.hang_seconds), Tally(), time.monotonic()
    for count, seed in enumerate(seeds, 1):
        if time.monotonic() - begin > args.seconds:
            print(f"out of time after {count - 1} of {len(seeds)} cases", flush=True)
            break
        with watchdog.over(seed):
            _try(seed, device, args, tally)
        if count % 500 == 0:
            print(
                f"{count} of {len(seeds)}: {dict(tally.outcomes)}, {time.monotonic() - begin:.0f} s",
                flush=True,
            )
        if len(tally.broken) >= args.give_up:
            print(f"giving up after {args.give_up} broken cases", flush=True)
            break
    shard = "/".join(map(str, args.shard))
    print(
        f"shard {shard}: {dict(tally.outcomes)} in {time.monotonic() - begin:.0f} s, largest error / bound"
        f" {tally.worst:.3f}, near the bound {tally.near}, broken seeds {tally.broken}",
        flush=True,
    )
    if tally.broken:
        return BROKEN
    return 0 if tally.outcomes["ok"] or tally.near else IDLE


def _try(seed: int, device: torch.device, args: argparse.Namespace, tally: Tally) -> None:
    case = case_of(seed, device, args.max_tokens)
    try:
        if args.repeat:
            fault, ratio = unequal_bits(case, args.backend, args.repeats), 0.0
        else:
            fault, ratio = fault_of(case, args.backend, seed, args.near)
            if fault and 1 < ratio <= MOST_LUCK and _was_bad_luck(seed, device, args):
                fault = ""
    except NotImplementedError as refusal:
        tally.outcomes[f"refused: {first_line(refusal)[:80]}"] += 1
        return
    except Exception as error:
        fault, ratio = first_line(error), 0.0
    tally.worst = max(tally.worst, ratio)
    tally.outcomes["broken" if fault else "near" if ratio > 1 else "ok"] += 1
    if not fault and ratio > 1:
        tally.near.append(seed)
    if fault:
        tally.broken.append(seed)
        print(f"BROKEN {describe(seed, case)}\n{fault}", flush=True)
    elif args.seed is not None:
        print(f"{describe(seed, case)}\nok, largest error / bound {ratio:.3f}", flush=True)


def _was_bad_luck(seed: int, device: torch.device, args: argparse.Namespace) -> bool:
    """Whether the case keeps the rule with other numbers."""
    others = (case_of(seed, device, args.max_tokens, draw) for draw in range(1, OTHER_DRAWS + 1))
    return not any(fault_of(other, args.backend, seed, args.near)[0] for other in others)


def side_by_side(argv: list[str], processes: int) -> int:
    """One process per shard; returns the first exit code that is not zero, where one has it.

    Each with one thread: the masks of the definition are made on the CPU, where the threads of all would spin.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *argv, "--shard", f"{index}/{processes}", "--processes", "1"],
            env=environment,
        )
        for index in range(processes)
    ]
    codes = [worker.wait() for worker in workers]
    print(f"exit codes of the shards: {codes}", flush=True)
    return next((code for code in codes if code), 0)


def _shard(text: str) -> tuple[int, int]:
    index, _, shards = text.partition("/")
    if not (index.isdigit() and shards.isdigit() and int(index) < int(shards)):
        raise argparse.ArgumentTypeError(f"expected i/n with 0 <= i < n, got {text}")
    return int(index), int(shards)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10000, help="of all shards together")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this case")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N")
    parser.add_argument("--processes", type=int, default=1, help="start so many shards side by side")
    parser.add_argument("--backend", default="hopper")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-tokens", type=int, default=700, help="part of what a seed means")
    parser.add_argument("--repeat", action="store_true", help="hold runs against each other, bit by bit")
    parser.add_argument("--repeats", type=int, default=100, help="runs of a case with --repeat")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case begins after so long")
    parser.add_argument("--hang-seconds", type=float, default=120.0, help="a case that takes longer hangs")
    parser.add_argument(
        "--near", type=float, default=1.5, help="error / bound up to which a case only is listed"
    )
    parser.add_argument("--give-up", type=int, default=20, help="end the shard after so many broken cases")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv``; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    return side_by_side(argv, args.processes) if args.processes > 1 else soak(args)


if __name__ == "__main__":
    sys.exit(main())
