"""Over gloo processes: attention equals that of one device, and what is dealt to ranks comes back."""

from __future__ import annotations

import pytest
from launch import run


@pytest.mark.parametrize("name", ["runtime_program.py", "shard_program.py"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_over_processes(ranks, name):
    run(name, ranks)


def test_by_two_hops():
    run("runtime_program.py", 6, "2", "3")
