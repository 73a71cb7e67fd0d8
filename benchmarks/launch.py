"""What a call costs beside the device's work: host time when everything is cached, and the first call of a process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.check import Inputs, judge, leaves_of, outcome, row_oracle
from benchmarks.masks import workload
from benchmarks.peers import SUBJECTS, first_line
from benchmarks.report import ROOT, Report

CALLS = 200
REPEATS = 5
MASK, TOKENS, HEADS, HEAD_DIM = "causal", 128, (8, 8), 128
COLD_LIMIT_SECONDS = 120.0

_COLD_SCRIPT = """
import json, sys, time
root, backend, device = sys.argv[1:]
sys.path[:0] = [root + "/src", root]
import torch
from magi_attention import attention
from magi_attention.mask import Mask
dtype = torch.bfloat16 if device == "cuda" else torch.float32
q, k, v = (torch.randn(1024, 8, 128, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
mask = Mask.causal(1024)
marks = []
def lap(call):
    wait()
    begin = time.perf_counter()
    result = call()
    wait()
    marks.append(time.perf_counter() - begin)
    return result
out = lap(lambda: attention(q, k, v, mask, backend=backend)[0])
lap(lambda: torch.autograd.grad(out.sum(), (q, k, v)))
lap(lambda: attention(q, k, v, mask, backend=backend)[0])
print(json.dumps(marks))
"""


def _queued_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Host seconds of one of ``CALLS`` calls queued in a row; the median of a few series."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    series = []
    for _ in range(REPEATS + 1):  # the first is warm-up
        wait()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        series.append((time.perf_counter() - begin) / CALLS)
        wait()
    return statistics.median(series[1:])


def host_microseconds(name: str, device: torch.device) -> dict[str, float]:
    """Host time of a subject's forward (inference and training) and of its backward, on a tiny checked problem.

    Raises:
        RuntimeError: the subject cannot run here, or is wrong.
    """
    subject = SUBJECTS[name]
    missing = subject.missing(device.type)
    if missing:
        raise RuntimeError(missing)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work = workload(MASK, TOKENS)
    inputs = Inputs.random(TOKENS, HEADS, HEAD_DIM, dtype, device, seed=0)
    run = subject.prepare(work, device)
    leaves = leaves_of(subject, inputs, gradients=True)
    verdict = judge(subject, outcome(run, leaves, backward=True), row_oracle(work, inputs, seed=0))
    if not verdict.ok:
        raise RuntimeError(f"WRONG {verdict.reason}")
    q, k, v, dout = leaves
    out = run(q, k, v)
    with torch.no_grad():
        inference = _queued_seconds(lambda: run(q, k, v), device)
    training = _queued_seconds(lambda: run(q, k, v), device)
    backward = _queued_seconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), device)
    figures = {"forward without gradients": inference, "forward": training, "backward": backward}
    return {name: round(seconds * 1e6, 2) for name, seconds in figures.items()}


def cold_start_seconds(backend: str, device: torch.device) -> dict[str, dict[str, float]]:
    """First forward, first backward and a further forward of fresh processes: kernel cache empty, then full.

    The import of the libraries and the start of the device are not in it.
    """
    readings = {}
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty cache", "warm cache"):
            done = subprocess.run(
                [sys.executable, "-c", _COLD_SCRIPT, str(ROOT), backend, device.type],
                capture_output=True,
                text=True,
                timeout=COLD_LIMIT_SECONDS,
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                check=False,
            )
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
            names = ("first forward", "first backward", "second forward")
            marks = json.loads(done.stdout.strip().splitlines()[-1])
            readings[state] = dict(zip(names, marks, strict=True))
    return readings


def measure_host(
    report: Report, device: torch.device, subjects: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Record host times by subject, or why they could not be had. Returns those that were had."""
    figures = {}
    for name in subjects:
        label = f"host microseconds a call, {name}"
        try:
            figures[name] = host_microseconds(name, device)
            report.add_cost(label, figures[name])
        except Exception as error:
            report.add_cost(label, first_line(error))
    return figures


def measure_launch(report: Report, device: torch.device, subjects: list[str]) -> bool:
    """Record host and cold-start times, or why they could not be had. Returns whether ours were had."""
    ours = [name for name in subjects if SUBJECTS[name].ours]
    complete = measure_host(report, device, subjects).keys() >= set(ours)
    for name in ours[:1]:
        label = f"cold start seconds, {name}"
        try:
            report.add_cost(label, cold_start_seconds(name, device))
        except Exception as error:
            complete = False
            report.add_cost(label, first_line(error))
    return complete
