"""Programs on several processes that talk over gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


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
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HERE / "forked.py", folder, str(ranks), HERE / program, *arguments]
        parent = subprocess.Popen(command, env={**os.environ, **places, **variables}, start_new_session=True)
        try:
            assert parent.wait(timeout=120) == 0
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)
                parent.wait()
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        return [
            (int(file.with_suffix(".code").read_text()), file.with_suffix(".txt").read_text())
            for file in files
        ]
