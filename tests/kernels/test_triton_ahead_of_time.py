"""Every kernel compiles for sm_90 with its tile of the table, uses the tensor cores and fits the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 232448
# Bytes that ptxas spilled when the tiles were chosen by timing, and a quarter more. The fastest tiles are those that
# fill the registers; they may spill a little outside the inner loop.
MOST_SPILLS = {
    "forward 64": 0,
    "forward 128": 40,
    "backward_dq 64": 60,
    "backward_dq 128": 0,
    "backward_dkdv 64": 120,
    "backward_dkdv 128": 410,
    "delta 64": 0,
    "delta 128": 0,
}
MATRIX_KERNELS = [name for name in MOST_SPILLS if not name.startswith("delta")]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    """Figures of each kernel, from a process without the interpreter."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]),
    }
    program = [sys.executable, str(Path(__file__).with_name("aot_compile.py"))]
    result = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", MATRIX_KERNELS)
def test_products_run_on_the_tensor_cores(compiled, name):
    assert compiled[name]["wgmma"] > 0


@pytest.mark.parametrize("name", MOST_SPILLS)
def test_shared_memory_fits(compiled, name):
    assert compiled[name]["shared"] <= SHARED_MEMORY


@pytest.mark.parametrize("name", MOST_SPILLS)
def test_spills_stay_as_measured(compiled, name):
    assert compiled[name]["spills"] <= MOST_SPILLS[name], compiled[name]
