"""Over gloo processes: attention equals that of one device, and what is dealt to ranks comes back."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launch import run


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_over_processes(ranks):
    run("runtime_program.py", ranks)


def test_the_compiler_is_not_imported_before_it_is_used():
    code = "import sys, magi_attention.api.magi_attn_interface; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_by_two_hops():
    run("runtime_program.py", 6, "2", "3")
