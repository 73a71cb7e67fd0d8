"""Programs on several processes that talk over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run(program: str, ranks: int, *arguments: str, **variables: str) -> list[str]:
    """What each rank of ``program``, a file beside this one, wrote to its error output; all must have ended well."""
    results = outcomes(program, ranks, *arguments, **variables)
    for code, text in results:
        assert code == 0 and "done" in text, text[-3000:]
    return [text for _, text in results]


def outcomes(program: str, ranks: int, *arguments: str, **variables: str) -> list[tuple[int, str]]:
    """Exit status and error output of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **places, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        texts = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]
