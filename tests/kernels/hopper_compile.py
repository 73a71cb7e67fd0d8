"""Compile what the Hopper launches launch, ahead of time for sm_90, and print what came out as JSON.

A launch is recorded instead of run: tiles and register counts are those of the library. Run as a program, without the
interpreter, whose functions cannot be compiled.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ahead_of_time import compile_for_hopper, disassemble, spilled_bytes
from control_flow import Graph, block_loops, divergent_barriers, loop_figures, read_llvm, read_sass, split
from hopper_variants import ELEMENTS, SABOTAGE, Edit, Variant, variants
from triton import JITFunction
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from magi_attention.kernels.hopper import launch
from magi_attention.kernels.problem import Alibi, Problem
from magi_attention.kernels.triton import launch as portable


class Recorder:
    """Takes a kernel's place in ``launch``: notes what it is launched with, and launches nothing."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, tuple, dict[str, Any]]]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def _keys(problem: Problem) -> tuple[torch.Tensor | None, int, torch.Tensor | None]:
    """``dropout_keys`` without a launch."""
    if problem.rng_state is None:
        return None, 0, None
    return torch.zeros(8, dtype=torch.int32), 4, torch.zeros(4, 1024, dtype=torch.int32)


def launched(variant: Variant) -> tuple[Any, tuple, dict[str, Any]]:
    """The Gluon kernel that the library launches for the variant, its arguments and its options."""
    tokens, heads_kv = 1024, 2
    heads = heads_kv * variant.group
    q = torch.zeros(1, tokens, heads, variant.head_dim, dtype=variant.dtype)
    k = torch.zeros(1, tokens, heads_kv, variant.head_dim, dtype=variant.dtype)
    lse = torch.zeros(1, tokens, heads)
    bands = torch.tensor([[0, tokens, 0, tokens, -(1 << 30), 0]], dtype=torch.int32)
    bands = bands.repeat(tokens if variant.short else 1, 1)
    sink = lse if variant.sink else None
    earlier = (q.float(), lse.clone()) if variant.accumulate else None
    problem = Problem(
        q, k, k.clone(), sink, bands, 1.0, float(variant.softcap), earlier=earlier,
        dropout_p=0.1 * variant.dropout, rng_state=torch.zeros(2, dtype=torch.int64) if variant.dropout else None,
        alibi=Alibi(torch.zeros(1, len(bands), heads), bands[:, 5]) if variant.alibi else None,
    )  # fmt: skip
    calls: list[tuple[Any, tuple, dict[str, Any]]] = []
    replaced = {
        name: Recorder(value, calls) for name, value in vars(launch).items() if isinstance(value, JITFunction)
    }
    replaced["portable"] = mock.Mock(modifiers=portable.modifiers, dropout_keys=_keys)
    replaced["_num_programs"] = mock.Mock(return_value=132)
    replaced["_work_counter"] = mock.Mock(return_value=torch.zeros(2, dtype=torch.int32))
    launch._forward_of.cache_clear()  # it remembers the kernel
    with mock.patch.multiple(launch, **replaced):
        if variant.kernel == "forward":
            launch.forward(problem, variant.max_logits)
        else:
            launch.backward(problem, q, lse, q, None)
    calls = [call for call in calls if isinstance(call[0], GluonJITFunction)]
    assert len(calls) == 1, f"{variant}: expected one kernel, found {len(calls)}"
    return calls[0]


def type_of(value: Any) -> str:
    """Triton's name for the type of a kernel's argument."""
    if isinstance(value, torch.Tensor):
        return "*" + ELEMENTS[value.dtype]
    if isinstance(value, int):
        return "i32"
    if isinstance(value, float):
        return "fp32"
    return f"tensordesc<{ELEMENTS[value.base.dtype]}{[*value.block_shape]},{value.layout!r}>"


def figures(variant: Variant, edit: Edit | None = None) -> dict[str, Any]:
    """What became of one variant: its options, and what ptxas, SASS and LLVM IR say."""
    kernel, args, options = launched(variant)
    if edit is not None:
        kernel = edited(kernel, edit)
    names = kernel.arg_names
    constants = {name: options.pop(name) for name in names if name in options}
    given = dict(zip(names, args, strict=False))
    constants |= {name: None for name, value in given.items() if value is None}
    types = {name: "constexpr" if name in constants else type_of(given[name]) for name in names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if types[name].startswith("*")}
    source = GluonASTSource(kernel, types, constexprs=constants, attrs=aligned)
    compiled, log = compile_for_hopper(source, options)
    sass = read_sass(disassemble(compiled))
    votes, barriers = divergent_barriers(read_llvm(compiled.asm["llir"]))
    return {
        "kernel": kernel.__name__,
        **{name: value for name, value in constants.items() if isinstance(value, int)},
        "specialised": [
            name for name in names if types[name] == "i32" and name not in _unspecialised(kernel)
        ],
        "warnings": re.findall(r"C75\d\d", log),
        "spills": spilled_bytes(log),
        "shared": compiled.metadata.shared,
        "taken": _register_counts(sass, "USETMAXREG.TRY_ALLOC"),
        "given": _register_counts(sass, "USETMAXREG.DEALLOC"),
        "loops": [loop_figures(sass, *loop) for loop in block_loops(sass)],
        "votes": votes,
        "divergent_barriers": barriers,
    }


def _register_counts(sass: Graph, instruction: str) -> list[int]:
    code = [split(line) for lines in sass.blocks.values() for line in lines]
    return sorted({int(rest.split()[-1], 16) for _, opcode, rest in code if opcode.startswith(instruction)})


def _unspecialised(kernel: Any) -> set[str]:
    return {parameter.name for parameter in kernel.params if parameter.do_not_specialize}


def edited(kernel: Any, edit: Edit) -> Any:
    """The kernel of the same name in an edited copy of its module."""
    module = sys.modules[kernel.__module__]
    text, count = re.subn(edit.pattern, edit.replacement, Path(module.__file__).read_text())
    assert count == 1, f"{edit}: expected one place to edit in {kernel.__module__}, found {count}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edited.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("edited", path)
        sys.modules["edited"] = copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
    return getattr(copy, kernel.__name__)


def compiled_figures(name: str) -> tuple[str, dict[str, Any]]:
    """Name and figures of a variant or of an edit of ``SABOTAGE``; the error, if it does not compile."""
    edit = SABOTAGE.get(name)
    variant = edit.variant if edit else next(variant for variant in variants() if str(variant) == name)
    try:
        return name, figures(variant, edit)
    except Exception:
        return name, {"error": traceback.format_exc()}


def main() -> None:
    work = [*map(str, variants()), *SABOTAGE]
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        json.dump(dict(pool.imap(compiled_figures, work)), sys.stdout)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "0"
    main()
