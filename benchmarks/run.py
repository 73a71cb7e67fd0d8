"""Attention benchmarks: masks x lengths x subjects, forward and backward, each checked before it is timed.

    python benchmarks/run.py --masks causal varlen_causal --tokens 16384 --subjects triton flex --json x.json
    python benchmarks/run.py --profile h200 --json benchmarks/results/h200.json

Exit code 1 when a subject gives a wrong result or when one of ours raises.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

# The checkout that this file lies in is what is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import memory, overheads
from benchmarks.check import Inputs, Oracle, Verdict, full_oracle, judge, leaves_of, outcome, row_oracle
from benchmarks.masks import FAMILIES, Workload, workload
from benchmarks.peers import SUBJECTS, Run, Subject, Unsupported, default_subjects, first_line
from benchmarks.report import Report, Row, environment, machine_state, print_table, ratios
from benchmarks.timing import DIRECTIONS, Entrant, race, stopwatch, summary

SMALL_TOKENS = {"cpu": 512, "cuda": 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Configuration:
    """One mask at one length and shape, and who runs it."""

    mask: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    directions: tuple[str, ...]
    subjects: tuple[str, ...]
    rounds: int
    limit_seconds: float
    seed: int = 0

    @property
    def backward(self) -> bool:
        return "backward" in self.directions


class Refused(Exception):
    """The subject gets no number; ``status`` and the message go into its rows."""

    def __init__(self, status: str, reason: str, verdict: Verdict | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.verdict = verdict or Verdict()


class Bench:
    """Measures configurations into a report."""

    def __init__(self, report: Report, device: torch.device) -> None:
        self.report = report
        self.device = device
        self.watch = stopwatch(device)
        self._small: dict[tuple[str, Configuration], Verdict] = {}
        self._small_oracles: dict[Configuration, tuple[Workload, Inputs, Oracle]] = {}

    def measure(self, config: Configuration) -> None:
        """Check every subject, time those that pass, report all."""
        rows = {(name, d): self._row(config, name, d) for name in config.subjects for d in config.directions}
        try:
            self._fill(config, rows)
        except Exception as error:
            for row in rows.values():
                if row.seconds is None and row.status == "ok":
                    row.status, row.reason = "failed", f"harness: {first_line(error)}"
        self.report.add(rows.values())
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def skip(self, config: Configuration, reason: str) -> None:
        """Record that a configuration was not run."""
        rows = [self._row(config, name, d) for name in config.subjects for d in config.directions]
        self.report.add(replace(row, status="skipped", reason=reason) for row in rows)

    def _row(self, config: Configuration, name: str, direction: str) -> Row:
        shape = (config.mask, config.tokens, config.heads, config.kv_heads, config.head_dim, config.dtype)
        area = workload(config.mask, config.tokens).area
        return Row(*shape, direction, name, SUBJECTS[name].ours, area)

    def _fill(self, config: Configuration, rows: dict[tuple[str, str], Row]) -> None:
        work = workload(config.mask, config.tokens)
        inputs = self._inputs(config)
        oracle = row_oracle(work, inputs, config.seed)
        entrants = []
        for name in config.subjects:
            try:
                entrant, verdict = self._admit(SUBJECTS[name], config, work, inputs, oracle)
                entrants.append(entrant)
                status, reason = "ok", ""
            except Refused as refusal:
                status, reason, verdict = refusal.status, str(refusal), refusal.verdict
            for direction in config.directions:
                row = rows[name, direction]
                row.status, row.reason, row.check = status, reason, verdict.figures
        del oracle, inputs
        warmup = 2 if self.device.type == "cuda" else 0  # on the CPU the check has warmed everything
        race(entrants, self.watch, config.directions, config.rounds, config.limit_seconds, warmup)
        state = machine_state(self.device)
        self.report.states.append({"mask": config.mask, "tokens": config.tokens, **state})
        for entrant in entrants:
            for direction in config.directions:
                row = rows[entrant.name, direction]
                if entrant.failure:
                    row.status, row.reason = "failed", entrant.failure
                else:
                    row.fill(summary(entrant.seconds[direction]))

    def _inputs(self, config: Configuration) -> Inputs:
        heads = (config.heads, config.kv_heads)
        dtype = DTYPES[config.dtype]
        return Inputs.random(config.tokens, heads, config.head_dim, dtype, self.device, config.seed)

    def _admit(
        self, subject: Subject, config: Configuration, work: Workload, inputs: Inputs, oracle: Oracle
    ) -> tuple[Entrant, Verdict]:
        """A checked entrant and its errors. Raises Refused."""
        missing = subject.missing(self.device.type)
        if missing:
            raise Refused("unsupported", missing)
        try:
            verdict = self._small_verdict(subject, config)
            if verdict.ok:
                run = subject.prepare(work, self.device)
                leaves = leaves_of(subject, inputs, config.backward)
                rows = judge(subject, outcome(run, leaves, config.backward), oracle)
                verdict = Verdict(verdict.figures | rows.figures)
        except (Unsupported, NotImplementedError) as error:
            raise Refused("unsupported", first_line(error)) from None
        except Exception as error:
            raise Refused("failed", first_line(error)) from None
        if not verdict.ok:
            raise Refused("wrong", verdict.reason, verdict)
        return Entrant(subject.name, run, leaves), verdict

    def _small_verdict(self, subject: Subject, config: Configuration) -> Verdict:
        """Everything compared on a small instance of the family; remembered for further lengths of it."""
        tokens = min(config.tokens, SMALL_TOKENS[self.device.type])
        small = replace(config, tokens=tokens, subjects=(), rounds=0, limit_seconds=0.0)
        if (subject.name, small) not in self._small:
            if small not in self._small_oracles:
                work, inputs = workload(small.mask, tokens), self._inputs(small)
                self._small_oracles[small] = work, inputs, full_oracle(work, inputs)
            work, inputs, oracle = self._small_oracles[small]
            run: Run = subject.prepare(work, self.device)
            got = outcome(run, leaves_of(subject, inputs, config.backward), config.backward)
            self._small[subject.name, small] = judge(subject, got, oracle)
        return self._small[subject.name, small]


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
    parser.add_argument(
        "--profile", choices=("cpu", "h200", "plan"), help="a preset; see benchmarks/README.md"
    )
    parser.add_argument("--masks", nargs="+", choices=list(FAMILIES), help="default: all seven")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 16384 65536 on a GPU, 2048 on a CPU")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), help="see benchmarks/peers.py")
    parser.add_argument("--rounds", type=int, help="timed rounds over the subjects")
    parser.add_argument("--limit-seconds", type=float, default=10.0, help="timing budget of a configuration")
    parser.add_argument("--total-seconds", type=float, help="no configuration begins after this many seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="recorded with the figures; default: what git says of the checkout")
    parser.add_argument("--json", type=Path, help="write everything here, after every configuration")
    args = parser.parse_args(argv)
    args.device = args.device or {"cpu": "cpu", "h200": "cuda"}.get(
        args.profile, "cuda" if torch.cuda.is_available() else "cpu"
    )
    on_gpu = args.device == "cuda"
    defaults = {
        "masks": list(FAMILIES),
        "tokens": [16384, 65536] if on_gpu else [2048],
        "heads": 32 if on_gpu else 8,
        "kv_heads": 8,
        "head_dim": 128 if on_gpu else 64,
        "dtype": "bf16" if on_gpu else "fp32",
        "rounds": 12 if on_gpu else 5,
        "total_seconds": 420.0 if args.profile == "h200" else float("inf"),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.subjects = args.subjects or default_subjects(args.device)
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    args.directions = [d for d in DIRECTIONS if d in args.directions]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv``; returns the exit code."""
    args = parse(argv)
    begin = time.perf_counter()
    device = torch.device(args.device)
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = Report(environment(device, args.commit), arguments, args.json)
    complete = True
    if args.profile == "plan":
        complete = overheads.measure_overheads(report, device)
    else:
        bench = Bench(report, device)
        for config in cpu_grid(args) if args.profile == "cpu" else grid(args):
            if time.perf_counter() - begin > args.total_seconds:
                bench.skip(config, "out of time")
            else:
                bench.measure(config)
        if args.profile == "cpu":
            cpu_targets(report)
    print_table(report.rows)
    report.write()
    broken = [r for r in report.rows if r.status == "wrong" or (r.status == "failed" and r.ours)]
    return 0 if complete and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
