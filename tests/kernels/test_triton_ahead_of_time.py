"""Every kernel compiles for sm_90 with its tile of the table, uses the tensor cores and fits the machine."""

from __future__ import annotations

import pytest
from ahead_of_time import SHARED_MEMORY, run_program

pytest.importorskip("triton")

# Bytes that ptxas spilled when the tiles were chosen by timing, and a quarter more. The fastest tiles are those that
# fill the registers; they may spill a little outside the inner loop. Dropout and ALiBi share the tiles of the plain call.
MOST_SPILLS = {
    "forward 64": 0,
    "forward 128": 40,
    "backward_dq 64": 60,
    "backward_dq 128": 0,
    "backward_dkdv 64": 120,
    "backward_dkdv 128": 410,
    "delta 64": 0,
    "delta 128": 0,
    "forward 64 DROPOUT": 20,
    "forward 64 ALIBI": 20,
    "forward 128 DROPOUT": 80,
    "forward 128 ALIBI": 0,
    "backward_dq 64 DROPOUT": 360,
    "backward_dq 64 ALIBI": 180,
    "backward_dq 128 DROPOUT": 70,
    "backward_dq 128 ALIBI": 0,
    "backward_dkdv 64 DROPOUT": 560,
    "backward_dkdv 64 ALIBI": 230,
    "backward_dkdv 128 DROPOUT": 1670,
    "backward_dkdv 128 ALIBI": 1040,
}
MATRIX_KERNELS = [name for name in MOST_SPILLS if not name.startswith("delta")]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    """Figures of each kernel, from a process without the interpreter."""
    return run_program("aot_compile.py")


@pytest.mark.parametrize("name", MATRIX_KERNELS)
def test_products_run_on_the_tensor_cores(compiled, name):
    assert compiled[name]["wgmma"] > 0


@pytest.mark.parametrize("name", MOST_SPILLS)
def test_shared_memory_fits(compiled, name):
    assert compiled[name]["shared"] <= SHARED_MEMORY


@pytest.mark.parametrize("name", MOST_SPILLS)
def test_spills_stay_as_measured(compiled, name):
    assert compiled[name]["spills"] <= MOST_SPILLS[name], compiled[name]
