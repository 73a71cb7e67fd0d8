"""Attention over gloo processes equals attention on one device: rows, log-sum-exp and every gradient."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_equal_one_device(ranks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name("runtime_program.py"))]
    processes = [
        subprocess.Popen(program, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    texts = [process.communicate(timeout=120)[1] for process in processes]
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 0 and "done" in text, text[-3000:]
