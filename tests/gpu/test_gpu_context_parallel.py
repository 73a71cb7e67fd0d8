"""Context parallelism over NCCL, each rank a GPU of its own."""

from __future__ import annotations

import pytest
import torch
from launch import run
from test_quickstart import documented_example

pytestmark = [pytest.mark.multi_gpu]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_equals_the_definition(ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run("nccl_program.py", ranks, CUBLAS_WORKSPACE_CONFIG=":4096:8")


def test_a_captured_call():
    run("nccl_program.py", 2, "graph")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_documented_example(ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    documented_example(ranks, "verbatim", tmp_path)
