"""The only place that reads the process environment.

| variable | default | meaning |
|---|---|---|
| ``MAGI_ATTENTION_SANITY_CHECK`` | 0 | "1": check CUDA ranges on the host (waits for the GPU), name the bad slice; \
compare the keys of all ranks when one is made |
| ``MAGI_ATTENTION_DSINK_ALL_REDUCE_OP`` | none | "sum" or "avg": reduce gradients of sinks over the ranks |
| ``MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE`` | 1000 | plans of context parallelism to keep, per process group |
| ``NNODES``, ``NPROC_PER_NODE`` | unset | of a launch script: nodes, and ranks of one |
| ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` | one rank | of ``torchrun`` |
| ``MAGI_ATTENTION_BACKEND`` | unset | debugging: the backend to use wherever a caller names none |
| ``TRITON_INTERPRET`` | 0 | Triton's own switch: "1" runs Triton kernels in its CPU interpreter |
"""

from __future__ import annotations

import os
from dataclasses import dataclass


def sanity_check() -> bool:
    """Whether to check what costs time: range tensors on a GPU on the host, keys of all ranks against each other."""
    return os.environ.get("MAGI_ATTENTION_SANITY_CHECK", "0") == "1"


def backend_override() -> str | None:
    """The backend for calls that name none, or None for the automatic choice."""
    return os.environ.get("MAGI_ATTENTION_BACKEND") or None


def triton_interpreter() -> bool:
    """Whether Triton runs kernels in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def dsink_all_reduce_op() -> str:
    """What is done to gradients of sinks over the ranks: "none", "sum" or "avg"."""
    name = "MAGI_ATTENTION_DSINK_ALL_REDUCE_OP"
    op = os.environ.get(name, "none")
    if op not in ("none", "sum", "avg"):
        raise ValueError(f"{name}: expected none, sum or avg, got {op!r}.")
    return op


def dist_attn_runtime_dict_size() -> int:
    """How many plans of context parallelism to keep per process group."""
    return _integer("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", 1000)


@dataclass(frozen=True)
class Launch:
    """Where a process is among those that were launched together.

    Attributes:
        rank, world_size: among all. local_rank, local_world_size: on this node. num_nodes: nodes.
        has_address: whether a launcher said where the processes meet.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_nodes: int
    has_address: bool


def launch() -> Launch:
    """What ``torchrun``, or a script that sets the same variables, says; one process alone without it."""
    world_size = _integer("WORLD_SIZE", 1)
    local = _integer("LOCAL_WORLD_SIZE", _integer("NPROC_PER_NODE", world_size))
    num_nodes = _integer("NNODES", -(-world_size // max(local, 1)))
    rank = _integer("RANK", 0)
    where = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return Launch(rank, world_size, _integer("LOCAL_RANK", rank % max(local, 1)), local, num_nodes, where)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected an integer, got {text!r}.") from None
