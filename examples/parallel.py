"""A training run on several ranks: tokens are dealt to them by context parallelism, weights are sharded by FSDP2.

A rank holds some rows of the packed sequence and a part of every weight. ``calc_attn`` brings the keys and values that
its rows see on other ranks, FSDP2 the weights of one layer at a time. Both use the same mesh of one axis.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from model import Decoder, Sight
from packing import IGNORED, Packed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import main as torchrun

from magi_attention import Mask
from magi_attention.api import clear_cache, dispatch, magi_attn_flex_key
from magi_attention.utils import setup_dist_env


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run. ``mesh`` is None where there is only one."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def shard(self, model: Decoder) -> None:
        """Leave each rank a part of every weight, in place; layers are gathered one by one when they are needed."""
        if self.mesh is not None:
            for layer in model.layers:
                fully_shard(layer, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)

    def gather(self, model: Decoder, whole: Decoder) -> Decoder:
        """``whole`` with the weights of ``model``, complete on every rank."""
        if self.mesh is None:
            return model
        whole.load_state_dict({name: part.full_tensor() for name, part in model.state_dict().items()})
        return whole

    def deal(self, packed: Packed, mask: Mask) -> tuple[Tensor, Tensor, Tensor, Sight]:
        """Inputs, targets and positions of this rank's tokens, and what its rows see."""
        arrays = (packed.inputs, packed.targets, packed.positions)
        inputs, targets, positions = (torch.from_numpy(array).to(self.device) for array in arrays)
        if self.mesh is None:
            return inputs, targets, positions, mask
        clear_cache(self.mesh)  # No mask comes again, so that older plans would only take memory.
        key = magi_attn_flex_key(*mask.to_slices(), mask.num_rows, mask.num_cols, cp_group_or_mesh=self.mesh)
        # Padding has a token and a position like any other, but no target, so that it adds nothing to the loss.
        return dispatch(inputs, key), dispatch(targets, key, IGNORED), dispatch(positions, key), key

    def total(self, x: Tensor) -> float:
        """The sum of what the ranks have."""
        found = x.detach().clone()
        if self.mesh is not None:
            dist.all_reduce(found, group=self.mesh.get_group())
        return found.item()


def num_launched() -> int | None:
    """The processes that ``torchrun`` started; None without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else None


def is_first_launched() -> bool:
    """Whether this process is the first of them, or alone."""
    return int(os.environ.get("RANK", 0)) == 0


def num_here() -> int:
    """How many of them share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def launch(size: int) -> None:
    """Run this program again as ``size`` processes on this machine, by ``torchrun``; returns if all end well.

    Raises:
        SystemExit: one does not.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    torchrun(["--standalone", f"--nproc-per-node={size}", *sys.argv])


def join(size: int, device: torch.device) -> Ranks:
    """This process, once it has met the others."""
    if size == 1:
        return Ranks(0, 1, device, None)
    rank, local_rank, *_ = setup_dist_env("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
    return Ranks(rank, size, device, init_device_mesh(device.type, (size,), mesh_dim_names=("cp",)))
