"""Peak memory of our CPU path, each length in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.check import Inputs, judge, leaves_of, outcome, row_oracle
from benchmarks.masks import workload
from benchmarks.peers import SUBJECTS, Subject

HEADS = (2, 2)
HEAD_DIM = 64


def peak_bytes(mask: str, tokens: int, subject: str) -> int:
    """Bytes by which one forward and backward raise the resident memory, in a fresh process.

    Raises:
        RuntimeError: the child failed, or its result failed its check.
    """
    done = subprocess.run(
        [sys.executable, __file__, mask, str(tokens), subject],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return int(json.loads(done.stdout)["bytes"])


def _high_water() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water() -> None:
    """Forget what imports and the creation of inputs needed, where the system allows."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # 5 resets the high-water mark


def _rise(subject: Subject, mask: str, tokens: int) -> int:
    device = torch.device("cpu")
    work = workload(mask, tokens)
    inputs = Inputs.random(tokens, HEADS, HEAD_DIM, torch.float32, device, seed=0)
    run = subject.prepare(work, device)
    leaves = leaves_of(subject, inputs, gradients=True)
    few = Inputs.random(256, HEADS, HEAD_DIM, torch.float32, device, seed=0)
    outcome(
        subject.prepare(workload(mask, 256), device), leaves_of(subject, few, gradients=True), backward=True
    )
    _reset_high_water()
    before = _high_water()
    got = outcome(run, leaves, backward=True)
    after = _high_water()
    verdict = judge(subject, got, row_oracle(work, inputs, seed=0))
    if not verdict.ok:
        raise RuntimeError(f"WRONG {verdict.reason}")
    return after - before


if __name__ == "__main__":
    print(json.dumps({"bytes": _rise(SUBJECTS[sys.argv[3]], sys.argv[1], int(sys.argv[2]))}))
