"""Attention benchmarks: masks x lengths x subjects, forward and backward, each checked before it is timed.

    python benchmarks/run.py --masks causal varlen_causal --tokens 16384 --subjects triton flex --json x.json
    python benchmarks/run.py --profile h200 --json benchmarks/results/h200.json
    python benchmarks/run.py --profile hopper-dense --json benchmarks/results/hopper-dense.json

Exit code 1 when a subject gives a wrong result or when one of ours raises.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# The checkout that this file lies in is what is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import ahead, decode, features, flash, hopper, launch, memory, overheads, targets
from benchmarks.bench import DTYPES, Bench, Configuration
from benchmarks.masks import FAMILIES, OTHERS
from benchmarks.peers import SUBJECTS, default_subjects, first_line
from benchmarks.report import Report, environment, print_table, ratios
from benchmarks.timing import DIRECTIONS

GRID_PROFILES = (*hopper.PROFILES, flash.PROFILE)
PROFILES = ("cpu", "h200", "plan", *GRID_PROFILES, "hopper-features", "hopper-launch", decode.PROFILE)


def grid(args: argparse.Namespace) -> list[Configuration]:
    """The configurations that the arguments name, shorter ones first."""
    return [
        Configuration(
            mask,
            tokens,
            args.heads,
            args.kv_heads,
            args.head_dim,
            args.dtype,
            tuple(args.directions),
            tuple(args.subjects),
            args.rounds,
            args.limit_seconds,
            args.seed,
        )
        for tokens in args.tokens
        for mask in args.masks
    ]


def cpu_grid(args: argparse.Namespace) -> list[Configuration]:
    """The two comparisons of the CPU preset."""
    causal = Configuration(
        "causal", 4096, 8, 8, 64, "fp32", DIRECTIONS, ("blockwise", "sdpa"), args.rounds, args.limit_seconds
    )
    window = replace(
        causal,
        mask="swa_causal_1024",
        tokens=16384,
        directions=("forward",),
        subjects=("blockwise", "sdpa-boolmask"),
    )
    return [causal, window]


def cpu_targets(report: Report) -> None:
    """Speed against SDPA, and memory that grows no faster than the length."""
    wanted = {"causal": 0.7, "swa_causal_1024": 5.0}
    for pair in ratios(report.rows):
        if pair["direction"] == "forward":
            name = f"{pair['mask']} {pair['tokens']} forward, {pair['ours']} / {pair['peer']} speed"
            report.add_target(name, pair["ratio"], wanted[pair["mask"]])
    peaks = []
    for tokens in (16384, 32768):
        try:
            peaks.append(memory.peak_bytes("causal", tokens, "blockwise"))
        except Exception as error:
            report.add_cost(f"peak memory bytes, causal {tokens}", first_line(error))
            return
        report.add_cost(f"peak memory bytes, causal {tokens}", peaks[-1])
    report.add_target(
        "peak memory from 16384 to 32768 tokens, linear / measured", 2 * peaks[0] / peaks[1], 0.8
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; what a preset fixes is filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, help="a preset; see benchmarks/README.md")
    parser.add_argument("--masks", nargs="+", choices=[*FAMILIES, *OTHERS], help="default: the seven")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 16384 65536 on a GPU, 2048 on a CPU")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), help="see benchmarks/peers.py")
    parser.add_argument("--rounds", type=int, help="timed rounds over the subjects")
    parser.add_argument("--limit-seconds", type=float, help="timing budget of a configuration")
    parser.add_argument("--total-seconds", type=float, help="no configuration begins after this many seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="recorded with the figures; default: what git says of the checkout")
    parser.add_argument("--json", type=Path, help="write everything here, after every configuration")
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        help="divide the lengths of a hopper profile, flash-attn or decode, for a dry run on a CPU",
    )
    for direction in DIRECTIONS:
        parser.add_argument(
            f"--{direction}-tile",
            nargs=2,
            type=int,
            metavar=("ROWS", "COLS"),
            help="tile for the bound of hopper-docs; default: the kernel's",
        )
    parser.add_argument("--no-ahead", action="store_true", help="do not compile in several processes first")
    args = parser.parse_args(argv)
    _fill_defaults(args)
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    args.directions = [d for d in DIRECTIONS if d in args.directions]
    return args


def _fill_defaults(args: argparse.Namespace) -> None:
    profile = args.profile or ""
    available = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = args.device or {"cpu": "cpu", "h200": "cuda"}.get(profile, available)
    on_gpu = args.device == "cuda"
    is_hopper = profile.startswith("hopper-") or profile in (flash.PROFILE, decode.PROFILE)
    args.limited = {name: getattr(args, name) for name in ("masks", "tokens") if getattr(args, name)}
    defaults = {
        "masks": list(FAMILIES),
        "tokens": [16384, 65536] if on_gpu else [2048],
        "heads": 32 if on_gpu else 8,
        "kv_heads": 8,
        "head_dim": 128 if on_gpu else 64,
        "dtype": "bf16" if on_gpu else "fp32",
        "rounds": 12 if on_gpu else 5,
        "limit_seconds": 4.0 if is_hopper else 10.0,
        "total_seconds": 420.0 if profile == "h200" else 90.0 if is_hopper and on_gpu else float("inf"),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    special = {**hopper.PROFILES, "hopper-features": ("hopper",)}
    special |= {
        "hopper-launch": ("hopper", "triton", "sdpa-cudnn"),
        flash.PROFILE: flash.DEFAULT_SUBJECTS,
        decode.PROFILE: decode.DEFAULT_SUBJECTS,
    }
    args.subjects = args.subjects or list(special.get(profile, ())) or default_subjects(args.device)


def profile_grid(args: argparse.Namespace) -> list[Configuration]:
    """The configurations of a profile; masks and lengths that the command line names, if it names any."""
    settings = (args.subjects, args.rounds, args.limit_seconds, args.dtype, args.shrink)
    if args.profile == flash.PROFILE:
        configs = flash.configurations(*settings)
    else:
        configs = hopper.configurations(args.profile, *settings)
    masks, tokens = args.limited.get("masks"), args.limited.get("tokens")
    return [c for c in configs if (not masks or c.mask in masks) and (not tokens or c.tokens in tokens)]


def hopper_targets(report: Report, args: argparse.Namespace) -> None:
    """What follows from the rows of a hopper profile."""
    ours = args.subjects[0]
    if args.profile == "hopper-dense":
        targets.dense_targets(report, ours)
    elif args.profile == "hopper-masks":
        targets.mask_targets(report, ours)
    elif args.profile == "hopper-docs":
        tiles = {d: getattr(args, f"{d}_tile") for d in DIRECTIONS}
        shares = hopper.document_bounds(report, ours, {d: tuple(t) if t else None for d, t in tiles.items()})
        targets.document_targets(report, ours, shares)


def run_grid(args: argparse.Namespace, report: Report, configs: list[Configuration], begin: float) -> None:
    """Measure ``configs`` one after the other until the time is up."""
    device = torch.device(args.device)
    bench = Bench(report, device)
    for config in configs:
        if time.perf_counter() - begin > args.total_seconds:
            bench.skip(config, "out of time")
        else:
            bench.measure(config)


def run_profile(args: argparse.Namespace, report: Report) -> bool:
    """Everything that ``args`` ask for, into ``report``; returns whether all of it could be had."""
    begin = time.perf_counter()
    device = torch.device(args.device)
    whole: dict[str, Callable[[], bool]] = {
        "plan": lambda: overheads.measure_overheads(report, device),
        "hopper-launch": lambda: launch.measure_launch(report, device, args.subjects),
    }
    if args.profile in whole:
        return whole[args.profile]()
    if args.profile == "hopper-features":
        features.measure_features(
            report, args.subjects[0], args.dtype, args.rounds, args.limit_seconds, args.shrink
        )
        return True
    if args.profile == decode.PROFILE:
        decode.measure_decode(report, args.subjects, args.dtype, args.rounds, args.limit_seconds, args.shrink)
        return True
    if args.profile in GRID_PROFILES:
        configs = profile_grid(args)
        if device.type == "cuda" and not args.no_ahead:
            report.add_cost("seconds of compilation ahead", ahead.compile_ahead(configs, args.device))
        run_grid(args, report, configs, begin)
        if args.profile == flash.PROFILE:
            return flash.conclude(report, device, args.subjects)
        hopper_targets(report, args)
        return True
    run_grid(args, report, cpu_grid(args) if args.profile == "cpu" else grid(args), begin)
    if args.profile == "cpu":
        cpu_targets(report)
    return True


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv``; returns the exit code."""
    args = parse(argv)
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = Report(environment(torch.device(args.device), args.commit), arguments, args.json)
    complete = run_profile(args, report)
    print_table(report.rows)
    report.write()
    broken = [r for r in report.rows if r.status == "wrong" or (r.status == "failed" and r.ours)]
    return 0 if complete and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
