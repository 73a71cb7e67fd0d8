"""Compile kernels for sm_90 without a GPU, and read what ptxas and the disassembler say of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 232448
"""Bytes of shared memory that a block may use on sm_90."""


def compile_for_hopper(source: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said, with the flags that Triton gives it. Never from Triton's cache."""
    import triton
    from triton.backends.compiler import GPUTarget

    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "registers" in log.getvalue(), "ptxas reported nothing"
    return compiled, log.getvalue()


def spilled_bytes(log: str) -> int:
    """Bytes that ptxas stores in local memory for want of registers."""
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))


def disassemble(compiled: Any) -> str:
    """SASS with labels."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run([tool, "-c", cubin.name], capture_output=True, text=True, check=True).stdout


def run_program(name: str) -> Any:
    """What a program beside this file prints as JSON, from a process without the interpreter and with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]),
        }
        program = [sys.executable, str(Path(__file__).with_name(name))]
        result = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
