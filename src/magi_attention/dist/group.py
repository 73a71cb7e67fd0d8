"""The process group that a user means by a process group or a device mesh."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.errors import complaint

_flattened: dict[tuple[object, tuple[int, ...], str], dist.ProcessGroup] = {}
"""By the default group, which is another one after torch.distributed was initialised again, ranks and backend."""


def group_of(group_or_mesh: object) -> tuple[dist.ProcessGroup, DeviceMesh | None]:
    """The group, and the mesh if one was given.

    A mesh of two axes, nodes and the ranks of each, is flattened: its ranks in ascending order. Its own two groups serve
    keys that come to a node once; see ``DistAttnRuntimeKey.hops``.

    Raises:
        ValueError: neither of both, a mesh of more than two axes, a group without this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        remedy = "Call magi_attention.utils.setup_dist_env() or torch.distributed.init_process_group() first."
        raise ValueError(complaint("cp_group_or_mesh", "an initialised torch.distributed", "none", remedy))
    if isinstance(group_or_mesh, DeviceMesh):
        return _of_mesh(group_or_mesh), group_or_mesh
    if not isinstance(group_or_mesh, dist.ProcessGroup):
        outside = group_or_mesh is dist.GroupMember.NON_GROUP_MEMBER
        got = "a group without this process" if outside else type(group_or_mesh).__name__
        remedy = "num_heads_q, num_heads_kv, head_dim and window_size are given by keyword."
        raise ValueError(complaint("cp_group_or_mesh", "a ProcessGroup or DeviceMesh", got, remedy))
    if dist.get_rank(group_or_mesh) < 0:
        raise ValueError(complaint("cp_group_or_mesh", "a group with this process", "one without it"))
    return group_or_mesh, None


def _of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.ndim != 2:
        raise ValueError(complaint("cp_group_or_mesh", "a mesh of one or two axes", f"{mesh.ndim} axes"))
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    world = dist.group.WORLD
    if world is not None and ranks == ranks_of(world):
        return world
    place = world, ranks, dist.get_backend(mesh.get_group(0))
    if place not in _flattened:
        # Ranks outside the mesh do not come here, so that only those in it may take part.
        _flattened[place] = dist.new_group(list(ranks), backend=place[2], use_local_synchronization=True)
    return _flattened[place]


def ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The global ranks of a group, in its order."""
    return tuple(dist.get_process_group_ranks(group))
