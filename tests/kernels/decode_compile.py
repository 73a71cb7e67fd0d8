"""Compile the kernels on caches ahead of time for sm_90 and print what came out as JSON; run as a program."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from ahead_of_time import disassemble, spilled_bytes
from aot_compile import compiled

from magi_attention.kernels.triton.append import append_kernel
from magi_attention.kernels.triton.decode import decode_kernel
from magi_attention.kernels.triton.decode_launch import tiling_of


def figures(kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> dict[str, int]:
    """Spilled bytes, shared memory, and 16-byte copies and loads of one variant, bf16."""
    found, log = compiled(kernel, constants, options)
    assembly = disassemble(found)
    return {
        "spills": spilled_bytes(log),
        "shared": found.metadata.shared,
        "copies": len(re.findall(r"LDGSTS\.\S*128", assembly)),
        "narrow_copies": len(re.findall(r"LDGSTS(?!\S*128)", assembly)),
        "products": len(re.findall(r"\b(?:HMMA|HGMMA)", assembly)),
    }


def decode(
    rows: int, head_dim: int, items: int = 512, paged: bool = False, kept: bool = False
) -> dict[str, int]:
    """The kernel for ``rows`` queries times heads of a sequence."""
    cut = tiling_of(rows, items, head_dim, 2)
    absent = ("LEFTPAD", "ROWS", "CU_Q", "CU_NEW", "SINK", "SLOPES", *(() if paged else ("TABLE",)))
    constants: dict[str, Any] = dict.fromkeys(absent)
    constants |= {"PAGE_SIZE": 16 if paged else 0, "HAS_KEPT": kept, "MASKED": rows > 16, "SOFTCAP": False}
    constants |= {
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": head_dim,
        "BLOCK_DV": head_dim,
        "UNIT": 8,
        "UNIT_O": 8,
    }
    live = min(rows, cut.rows)
    constants |= {
        "BLOCK_B": 64,
        "BLOCK_M": cut.rows,
        "BLOCK_R": live,
        "BLOCK_N": cut.cols,
        "PRECISION": "tf32",
    }
    at_a_time = max(1, min(16, 2048 * cut.warps // (live * head_dim)))
    constants |= {"AT_A_TIME": at_a_time, "MOST_PIECES": 16, "DEPENDENT": True}
    options = {"num_warps": cut.warps, "num_stages": cut.stages, "launch_pdl": True}
    return figures(decode_kernel, constants, options)


def append(interleaved: bool) -> dict[str, int]:
    """The kernel that appends and turns."""
    constants = dict.fromkeys(("ROWS", "POSITIONS", "CU_NEW", "CU_Q", "TABLE"))
    constants |= {
        "TURNED": True,
        "INTERLEAVED": interleaved,
        "QUERIES_MOVE": True,
        "R": 64,
        "D": 128,
        "DV": 128,
    }
    constants |= {"UNIT": 8, "BLOCK_B": 64, "BLOCK_H": 16, "BLOCK_D": 128}
    return figures(append_kernel, constants, {"num_warps": 4})


def main() -> None:
    """Print the figures of every variant."""
    found = {
        f"decode {rows} {dim}": decode(rows, dim) for rows in (4, 16, 32, 64, 128) for dim in (64, 128, 256)
    }
    for dim in (64, 128, 256):
        found[f"decode 4 {dim} few"] = decode(4, dim, items=8)
    found["decode 4 128 paged"] = decode(4, 128, paged=True)
    found["decode 4 128 few paged"] = decode(4, 128, items=8, paged=True)
    found["decode 4 128 kept"] = decode(4, 128, kept=True)
    found["append halves"], found["append interleaved"] = append(False), append(True)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
