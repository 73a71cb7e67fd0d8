"""Compile the Hopper kernel for caches ahead of time for sm_90 and print what came out as JSON; run as a program."""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from unittest import mock

import torch
from ahead_of_time import compile_for_hopper, disassemble, spilled_bytes
from hopper_compile import Recorder, type_of
from triton.experimental.gluon._runtime import GluonASTSource

from magi_attention.kernels.cache_problem import CacheProblem
from magi_attention.kernels.hopper import decode_launch


def problem(head_dim: int, rows: int = 4, page: int = 0, **settings: Any) -> CacheProblem:
    """``rows`` query heads of a key head."""
    q = torch.zeros(4, 1, 2 * rows, head_dim, dtype=torch.bfloat16)
    k = torch.zeros(4, 1024, 2, head_dim, dtype=torch.bfloat16)
    if page:
        k = k.view(-1, page, 2, head_dim)
        settings["block_table"] = torch.zeros(4, 1024 // page, dtype=torch.int32)
    lengths = torch.zeros(4, dtype=torch.int32)
    return CacheProblem(q, k, k.clone(), lengths, 0.1, **settings)


VARIANTS = {
    "64": problem(64),
    "128": problem(128),
    "256": problem(256),
    "128, 16 rows, softcap": problem(128, rows=16, softcap=10.0),
    "pages of 16": problem(128, page=16),
    "pages of 64": problem(128, page=64),
    "kept": problem(128, window=(100, 0), keep_first=4),
    "64 rows, pages of 8, kept": problem(128, rows=64, page=8, window=(100, 0), keep_first=4),
}


def figures(asked: CacheProblem) -> dict[str, int]:
    """Spilled bytes, shared memory, tensor core and copy engine instructions of what is launched for a problem."""
    calls: list[tuple[Any, tuple, dict[str, Any]]] = []
    recorder = Recorder(decode_launch.decode_kernel, calls)
    with mock.patch.object(decode_launch, "decode_kernel", recorder):
        decode_launch.decode(asked)
    ((kernel, args, options),) = calls
    names = kernel.arg_names
    constants = {name: options.pop(name) for name in names if name in options}
    given = dict(zip(names, args, strict=False))
    constants |= {name: None for name, value in given.items() if value is None}
    types = {name: "constexpr" if name in constants else type_of(given[name]) for name in names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if types[name].startswith("*")}
    compiled, log = compile_for_hopper(
        GluonASTSource(kernel, types, constexprs=constants, attrs=aligned), options
    )
    assembly = disassemble(compiled)
    return {
        "spills": spilled_bytes(log),
        "shared": compiled.metadata.shared,
        "products": len(re.findall(r"\bHGMMA", assembly)),
        "copies": len(re.findall(r"\bUTMALDG", assembly)),
        "serialised": len(re.findall(r"C75\d\d", log)),
    }


if __name__ == "__main__":
    json.dump({name: figures(asked) for name, asked in VARIANTS.items()}, sys.stdout)
