"""Over gloo processes: attention equals that of one device, and what is dealt to ranks comes back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["runtime_program.py", "shard_program.py"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_over_processes(ranks, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name(name))]
    processes = [
        subprocess.Popen(program, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    texts = [process.communicate(timeout=120)[1] for process in processes]
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 0 and "done" in text, text[-3000:]
