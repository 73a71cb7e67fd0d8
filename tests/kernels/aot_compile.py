"""Compile the Triton kernels ahead of time for sm_90, which needs no GPU, and print what came out as JSON.

Run as a program, without the interpreter: kernels that were defined under it cannot be compiled.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

from ahead_of_time import compile_for_hopper, spilled_bytes
from triton.compiler import ASTSource

from magi_attention.kernels.triton.backward import delta_kernel, dkdv_kernel, dq_kernel
from magi_attention.kernels.triton.forward import forward_kernel
from magi_attention.plan.tiling import choose_tiles

STATISTICS = {"LSE", "LSE2", "DELTA", "MAX_LOGITS", "SINK", "DSINK", "DLSE", "SLOPES", "PARTS", "STATS"}
TABLES = {
    *("TILES", "BAND_LIST", "BANDS", "DIAGONALS", "DQ_STATE", "KEYS"),
    *("USED", "LEFTPAD", "ROWS", "CU_Q", "CU_NEW", "TABLE", "COUNTERS", "POSITIONS"),
}


def signature(kernel: Any, constants: dict[str, Any], element: str) -> dict[str, str]:
    """Triton type of every parameter, by its annotation or its name."""
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            types[name] = "constexpr"
        elif parameter.annotation_type:
            types[name] = parameter.annotation_type
        elif name in STATISTICS:
            types[name] = "*fp32"
        elif name == "RNG_STATE":
            types[name] = "*i64"
        elif name in TABLES:
            types[name] = "*i32"
        elif name.endswith("_DESC"):
            rows = constants["BLOCK_M" if name[0] in "QD" else "BLOCK_N"]
            types[name] = f"tensordesc<{element}[1, {rows}, 1, {constants['BLOCK_D']}]>"
        else:
            types[name] = f"*{element}" if name.isupper() else "i32"
    return types


def compiled(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], element: str = "bf16"
) -> tuple[Any, str]:
    """One variant, and what ptxas said; pointers are aligned."""
    names = [parameter.name for parameter in kernel.params]
    constants = {name: value for name, value in constants.items() if name in names}
    types = signature(kernel, constants, element)
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if types[name].startswith("*")}
    return compile_for_hopper(ASTSource(kernel, types, constexprs=constants, attrs=aligned), options)


def figures(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], element: str = "bf16"
) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and matrix instructions of one variant."""
    found, log = compiled(kernel, constants, options, element)
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log))),
        "spills": spilled_bytes(log),
        "shared": found.metadata.shared,
        "wgmma": found.asm["ptx"].count("wgmma.mma_async"),
    }


def variants() -> dict[str, dict[str, int]]:
    """Figures of every kernel at head dimensions 64 and 128 with the tiles of the table."""
    found = {}
    for head_dim in (64, 128):
        shape = {"D": head_dim, "DV": head_dim, "BLOCK_D": head_dim, "BLOCK_DV": head_dim}
        flags = {
            "SOFTCAP": False,
            "HAS_SINK": False,
            "HAS_DLSE": False,
            "HAS_MAX": False,
            "ACCUMULATE": False,
        }
        common = {**shape, **flags, "PRECISION": "tf32", "TMA": True}
        for name, kernel in (
            ("forward", forward_kernel),
            ("backward_dq", dq_kernel),
            ("backward_dkdv", dkdv_kernel),
        ):
            tile = choose_tiles(name, head_dim, 2)
            rows, cols = tile.block_rows, tile.block_cols
            if name == "backward_dkdv":
                rows, cols = cols, rows
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            blocks = {"BLOCK_M": rows, "BLOCK_N": cols, "ROWS_TMA": tile.rows_in_registers}
            for feature in ("", " DROPOUT", " ALIBI"):
                chosen = {"DROPOUT": feature == " DROPOUT", "ALIBI": feature == " ALIBI"}
                found[f"{name} {head_dim}{feature}"] = figures(
                    kernel, {**common, **blocks, **chosen}, options
                )
        flags = {"HAS_SINK": True, "HAS_DLSE": True, "TILE": 0}
        delta = {**shape, **flags, "PACK": 1, "BLOCK_M": 64}
        found[f"delta {head_dim}"] = figures(delta_kernel, delta, {"num_warps": 4})
    return found


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "0"
    json.dump(variants(), sys.stdout)
