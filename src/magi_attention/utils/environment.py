"""Begin and end of a program on many ranks."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from magi_attention import env
from magi_attention.dist.manager import dist_attn_runtime_dict_mgr
from magi_attention.errors import check_type, complaint

Setup = tuple[int, int, int, int, int, dist.ProcessGroup, int | torch.device, int | None]


def setup_dist_env(
    backend: str | None = None,
    base_seed: int | None = None,
    seed_bias: Callable[[int], int] = lambda rank: 0,
) -> Setup:
    """Initialise torch.distributed as ``torchrun`` says; without it, one rank alone.

    Args:
        backend: of torch.distributed; None is "nccl" where there is a CUDA GPU, else "gloo".
        base_seed: seed of Python, numpy and torch, plus ``seed_bias(rank)``; None leaves them alone.

    Returns:
        rank, local_rank, world_size, num_nodes, num_local_ranks, world_group, device, seed. device is the index of the
        current CUDA device, or ``torch.device("cpu")``. seed is None without ``base_seed``.

    Raises:
        ValueError: several ranks, and no address where they meet.
    """
    launch = env.launch()
    if base_seed is not None:
        check_type("base_seed", base_seed, int)
    if launch.world_size > 1 and not launch.has_address:
        remedy = "Start the program with torchrun."
        raise ValueError(
            complaint("environment", "MASTER_ADDR and MASTER_PORT beside WORLD_SIZE", "neither", remedy)
        )
    device: int | torch.device = torch.device("cpu")
    if torch.cuda.is_available() and (backend is None or "nccl" in backend):
        torch.cuda.set_device(launch.local_rank)
        device = torch.cuda.current_device()
    if not dist.is_initialized():
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        store = None if launch.has_address else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size)
    seed = None if base_seed is None else base_seed + seed_bias(launch.rank)
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    world = dist.group.WORLD
    assert world is not None
    local = launch.local_world_size
    return launch.rank, launch.local_rank, launch.world_size, launch.num_nodes, local, world, device, seed


def clearup_dist_env() -> None:
    """Forget all plans of context parallelism and destroy the process groups."""
    dist_attn_runtime_dict_mgr.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
