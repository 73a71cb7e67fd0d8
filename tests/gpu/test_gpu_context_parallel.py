"""Context parallelism over NCCL, each rank a GPU of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_quickstart import documented_example

pytestmark = [pytest.mark.multi_gpu]
PROGRAM = Path(__file__).parents[1] / "dist" / "nccl_program.py"


def needs(ranks: int) -> None:
    """Skip where there are fewer GPUs."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, this machine has {torch.cuda.device_count()}")


def run(ranks: int, *arguments: str) -> None:
    """The program under torchrun; it must end well."""
    needs(ranks)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(PROGRAM)
    ]  # fmt: skip
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_equals_the_definition(ranks):
    run(ranks)


def test_a_captured_call():
    run(2, "graph")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_documented_example(ranks, tmp_path):
    needs(ranks)
    documented_example(ranks, "verbatim", tmp_path)
