"""Ranks of a program as forks of one process, which imports what takes long once.

Arguments: a folder, the number of ranks, the program and its arguments. ``rank.txt`` is what a rank wrote to its error
output, ``rank.code`` its exit status.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

import pytest  # noqa: F401  as what follows: programs use it
import torch.distributed.tensor
import torch.fx.experimental.symbolic_shapes

import magi_attention.api.magi_attn_interface  # noqa: F401


def main() -> None:
    """Start them all, then wait for each."""
    folder, ranks, *sys.argv = sys.argv[1:]
    assert not torch.cuda.is_initialized()  # forks could not use it
    children = []
    for rank in range(int(ranks)):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (Path(folder) / f"{rank}.txt").open("w") as file:
                os.dup2(file.fileno(), 2)
            become(sys.argv[0])
        children.append(child)
    for rank, child in enumerate(children):
        _, status = os.waitpid(child, 0)
        (Path(folder) / f"{rank}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def become(program: str) -> None:
    """Run ``program`` in place of this one."""
    code = 0
    sys.path.insert(0, str(Path(program).parent))
    try:
        runpy.run_path(program, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
