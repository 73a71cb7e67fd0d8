"""Configurations, and the bench that checks and then times every subject of one."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch

from benchmarks.check import Inputs, Oracle, Verdict, full_oracle, judge, leaves_of, outcome, row_oracle
from benchmarks.masks import Workload, workload
from benchmarks.peers import SUBJECTS, Run, Subject, Unsupported, first_line
from benchmarks.replay import repeated
from benchmarks.report import Report, Row, machine_state
from benchmarks.timing import Entrant, race, stopwatch, summary

SMALL_TOKENS = {"cpu": 512, "cuda": 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Configuration:
    """One mask at one length and shape, and who runs it.

    ``batch`` sequences share the mask; with 1 the tensors have no batch axis. With ``bursts`` a sample is several
    calls in a row, see ``replay``; without, it is one forward and its backward. Without ``capture`` a burst is never a
    graph: for subjects that do in every captured call what they do once otherwise.
    """

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
    batch: int = 1
    bursts: bool = False
    capture: bool = True

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
        return Row(*shape, direction, name, SUBJECTS[name].ours, area, batch=config.batch)

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
        if config.bursts:
            entrants = [
                repeated(entrant, config.directions, self.watch, config.capture) for entrant in entrants
            ]
        # On the CPU the check has warmed everything, and a burst was called before it was captured.
        warmup = 0 if self.device.type == "cpu" else 1 if config.bursts else 2
        race(entrants, self.watch, config.directions, config.rounds, config.limit_seconds, warmup)
        state = machine_state(self.device)
        self.report.states.append({"mask": config.mask, "tokens": config.tokens, **state})
        for entrant in entrants:
            for direction in config.directions:
                row = rows[entrant.name, direction]
                if entrant.failure:
                    row.status, row.reason = "failed", entrant.failure
                else:
                    row.timed = entrant.timed.get(direction, self.watch.how)
                    row.fill(summary(entrant.seconds[direction]))

    def _inputs(self, config: Configuration) -> Inputs:
        heads = (config.heads, config.kv_heads)
        dtype = DTYPES[config.dtype]
        batch = None if config.batch == 1 else config.batch
        return Inputs.random(config.tokens, heads, config.head_dim, dtype, self.device, config.seed, batch)

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
        batch = min(config.batch, 2)
        small = replace(config, tokens=tokens, subjects=(), rounds=0, limit_seconds=0.0, batch=batch)
        if (subject.name, small) not in self._small:
            if small not in self._small_oracles:
                work, inputs = workload(small.mask, tokens), self._inputs(small)
                self._small_oracles[small] = work, inputs, full_oracle(work, inputs)
            work, inputs, oracle = self._small_oracles[small]
            run: Run = subject.prepare(work, self.device)
            got = outcome(run, leaves_of(subject, inputs, config.backward), config.backward)
            self._small[subject.name, small] = judge(subject, got, oracle)
        return self._small[subject.name, small]
