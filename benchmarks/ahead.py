"""Compilation ahead of a run, in several processes at once: what they leave in the disk caches, the run finds there.

Device time is dear and compilation takes most of it when one process does it piece by piece. Nothing depends on
success here: what a process could not compile is compiled, or reported, by the run itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.bench import DTYPES, SMALL_TOKENS, Configuration
from benchmarks.check import Inputs, leaves_of, outcome
from benchmarks.masks import workload
from benchmarks.peers import SUBJECTS, Subject, first_line

LIMIT_SECONDS = 60.0


def groups(configs: Sequence[Configuration]) -> list[list[Configuration]]:
    """Configurations by what is compiled for them; one process compiles a group."""
    found: dict[tuple[object, ...], list[Configuration]] = {}
    for config in configs:
        per_shape = any(SUBJECTS[name].per_shape for name in config.subjects)
        shape = (config.heads, config.kv_heads, config.head_dim, config.dtype)
        found.setdefault((*shape, config.mask if per_shape else None), []).append(config)
    return list(found.values())


def compile_ahead(configs: Sequence[Configuration], device_type: str) -> float:
    """Compile for ``configs``; returns the seconds it took."""
    return together(
        [__file__, device_type, json.dumps([asdict(config) for config in group])] for group in groups(configs)
    )


def together(scripts: Iterable[Sequence[str]]) -> float:
    """Run Python scripts with their arguments side by side, for ``LIMIT_SECONDS`` at most; returns the seconds taken.

    Prints their lines that begin with "ahead:", and all of a script that failed.
    """
    begin = time.perf_counter()
    # One thread each: the processes themselves fill the machine.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, *script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for script in scripts
    ]
    for worker in workers:
        left = max(1.0, LIMIT_SECONDS - (time.perf_counter() - begin))
        try:
            text, _ = worker.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            worker.kill()
            text, _ = worker.communicate()
            text += "\nahead: out of time"
        for line in (text or "").splitlines():
            if line.startswith("ahead:") or worker.returncode > 0:
                print(line, flush=True)
    return time.perf_counter() - begin


def _compile(configs: list[Configuration], device: torch.device) -> None:
    done: set[str] = set()
    for config in configs:
        small = min(config.tokens, SMALL_TOKENS[device.type])
        for tokens in (small, config.tokens):
            for name in config.subjects:
                subject = SUBJECTS[name]
                once = name in done and not subject.per_shape
                if once or not (subject.ours or subject.per_shape) or subject.missing(device.type):
                    continue
                done.add(name)
                try:
                    _run(subject, replace(config, tokens=tokens), device)
                except Exception as error:
                    print(f"ahead: {name} {config.mask} {tokens}: {first_line(error)}", flush=True)


def _run(subject: Subject, config: Configuration, device: torch.device) -> None:
    work = workload(config.mask, config.tokens)
    batch = None if config.batch == 1 else min(config.batch, 2)
    heads = (config.heads, config.kv_heads)
    inputs = Inputs.random(config.tokens, heads, config.head_dim, DTYPES[config.dtype], device, 0, batch)
    outcome(
        subject.prepare(work, device), leaves_of(subject, inputs, config.backward), backward=config.backward
    )


def _configuration(entry: dict) -> Configuration:
    values = {f.name: entry[f.name] for f in fields(Configuration)}
    return Configuration(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )


if __name__ == "__main__":
    _compile([_configuration(entry) for entry in json.loads(sys.argv[2])], torch.device(sys.argv[1]))
