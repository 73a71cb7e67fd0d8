"""What a call costs beside its kernels: planning, the host's part, the import."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.check import Inputs
from benchmarks.peers import SUBJECTS, first_line
from benchmarks.report import ROOT, Report
from benchmarks.timing import CudaStopwatch
from magi_attention.mask import Mask

TOKENS = 65536
RANGES = 1000
BLOCK_ROWS, BLOCK_COLS = 128, 128
REPEATS = 30
IMPORTS = 3

_IMPORT_SCRIPT = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
begin = time.perf_counter()
import torch
middle = time.perf_counter()
import magi_attention
named = time.perf_counter()
magi_attention.attention
used = time.perf_counter()
print(json.dumps([middle - begin, named - middle, used - named]))
"""


def many_ranges() -> Mask:
    """65536 tokens in 1000 causal documents of unequal length."""
    cuts = np.sort(np.random.default_rng(0).permutation(TOKENS - 1)[: RANGES - 1] + 1)
    return Mask.varlen(np.concatenate([[0], cuts, [TOKENS]]), causal=True)


def device_plan_seconds(device: torch.device) -> float:
    """Median device time of one plan build from device bands; checked against the host's plan first.

    Raises:
        RuntimeError: the two builders disagree.
    """
    from magi_attention.plan.device import build_device_plan
    from magi_attention.plan.tiles import build_plan

    mask = many_ranges()
    table = mask.table.to(device)

    def build() -> object:
        return build_device_plan(table, TOKENS, TOKENS, BLOCK_ROWS, BLOCK_COLS)

    expected = build_plan(mask.bands, TOKENS, BLOCK_ROWS, BLOCK_COLS)
    got = build()
    used = expected.num_tiles
    same = torch.equal(got.tiles[:used].cpu(), expected.tiles) and not bool(got.tiles[used:].any())
    if not same:
        raise RuntimeError("WRONG: the device plan differs from the host plan")
    watch = CudaStopwatch(device)
    return statistics.median(watch(build)[1]() for _ in range(REPEATS))


def cached_plan_seconds(device: torch.device) -> float:
    """Median host time of asking for a plan that is already there."""
    from magi_attention.plan.cache import PlanKey, plan_cache

    table = many_ranges().table
    key = PlanKey(TOKENS, TOKENS, BLOCK_ROWS, BLOCK_COLS, False, device)
    plan_cache.plan_for(table, key)
    return _host_seconds(lambda: plan_cache.plan_for(table, key))


def first_plan_seconds() -> float:
    """Median host time of building the plan on the host."""
    from magi_attention.plan.tiles import build_plan

    mask = many_ranges()
    return _host_seconds(lambda: build_plan(mask.bands, TOKENS, BLOCK_ROWS, BLOCK_COLS))


def cached_call_seconds(device: torch.device) -> float:
    """Median host time of a forward call whose plan is cached; on a GPU it ends before the device does."""
    from magi_attention import attention

    backend = "triton" if device.type == "cuda" else "blockwise"
    missing = SUBJECTS[backend].missing(device.type)
    if missing:
        raise RuntimeError(missing)
    tokens = 64
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = Inputs.random(tokens, (8, 8), 64, dtype, device, seed=0)
    mask = Mask.causal(tokens)
    return _host_seconds(lambda: attention(inputs.q, inputs.k, inputs.v, mask, backend=backend))


def _host_seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    samples = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def import_seconds() -> dict[str, float]:
    """Median seconds of importing torch, then this package, then of first touching ``attention``."""
    readings = []
    for _ in range(IMPORTS):
        command = [sys.executable, "-c", _IMPORT_SCRIPT, str(ROOT / "src")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        readings.append(json.loads(done.stdout))
    names = ("torch", "package", "first use of attention")
    return {
        name: statistics.median(values)
        for name, values in zip(names, zip(*readings, strict=True), strict=True)
    }


def measure_overheads(report: Report, device: torch.device) -> bool:
    """Record every figure, or why it could not be had. Returns whether all were had."""
    tasks: dict[str, Callable[[], object]] = {
        "import seconds": import_seconds,
        "host plan build seconds (64k tokens, 1000 ranges)": first_plan_seconds,
        "cached plan host seconds (64k tokens, 1000 ranges)": lambda: cached_plan_seconds(device),
        "cached call host seconds": lambda: cached_call_seconds(device),
    }
    if device.type == "cuda":
        tasks["device plan build seconds (64k tokens, 1000 ranges)"] = lambda: device_plan_seconds(device)
    complete = True
    for name, task in tasks.items():
        try:
            report.add_cost(name, task())
        except Exception as error:
            complete = False
            report.add_cost(name, first_line(error))
    return complete
