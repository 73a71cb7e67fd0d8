"""``DistAttnRuntimeKey``: all that a plan of context parallelism is a function of."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.common import AttnMaskType, AttnRanges
from magi_attention.config import DistAttnConfig
from magi_attention.dist.group import ranks_of
from magi_attention.mask import Mask

MIN_CHUNKS = 8
"""Chunks of a rank, at least, where the size of a chunk is left to the library and there are enough tokens."""
TILE = 128
"""Rows that kernels compute together: what longer chunks are multiples of."""


@dataclass(frozen=True, eq=False, repr=False)
class DistAttnRuntimeKey:
    """A mask over tokens that are dealt to the ranks of a group: an immutable, hashable value.

    Made by ``magi_attn_flex_key`` and its relatives, with the plan that it stands for. Keys of equal arguments are equal.

    Attributes:
        slices: (n, 5) int64, read-only: query start and end, key start and end, type integer.
        total_seqlen_q, total_seqlen_k: tokens of the queries and keys, padding included.
        pad_size, pad_size_k: tokens of padding behind the queries and behind the keys.
        chunk_size: tokens of a chunk.
        cp_group, cp_mesh: the ranks. cp_mesh is None where a group was given; with two axes, nodes and the ranks of each,
            keys come to a node once and are handed on there. cp_ranks: their global numbers, ascending.
        dist_attn_config: placement and overlap.
        num_heads_q, num_heads_kv, head_dim: what ``calc_attn`` expects, None where it was not said.
        is_same_source, is_q_permutable, is_k_permutable: as in ``magi_attn_flex_key``.
        balance_with: other masks, padding included, whose work was dealt together with this one's.
        placed_like, k_placed_like: keys whose placement of queries, and of keys, this one shares; None for its own.
    """

    slices: NDArray[np.int64]
    total_seqlen_q: int
    total_seqlen_k: int
    pad_size: int
    pad_size_k: int
    chunk_size: int
    cp_group: dist.ProcessGroup
    dist_attn_config: DistAttnConfig
    num_heads_q: int | None = None
    num_heads_kv: int | None = None
    head_dim: int | None = None
    is_same_source: bool = True
    is_q_permutable: bool = True
    is_k_permutable: bool = True
    balance_with: tuple[Mask, ...] = ()
    placed_like: DistAttnRuntimeKey | None = None
    k_placed_like: DistAttnRuntimeKey | None = None
    cp_mesh: DeviceMesh | None = None
    cp_ranks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cp_ranks", ranks_of(self.cp_group))
        slices = np.array(self.slices, dtype=np.int64).reshape(-1, 5)
        slices.setflags(write=False)
        object.__setattr__(self, "slices", slices)

    @cached_property
    def q_ranges(self) -> AttnRanges:
        """Query ranges of the slices, not editable."""
        return _frozen(self.slices[:, :2])

    @cached_property
    def k_ranges(self) -> AttnRanges:
        """Key ranges of the slices, not editable."""
        return _frozen(self.slices[:, 2:4])

    @cached_property
    def attn_mask_type(self) -> tuple[AttnMaskType, ...]:
        """Types of the slices."""
        return tuple(map(AttnMaskType.from_int_type, self.slices[:, 4].tolist()))

    @property
    def uneven_shard(self) -> bool:
        """Whether ranks may hold different numbers of tokens."""
        return self.dist_attn_config.dispatch_config.uneven_shard

    @property
    def cp_size(self) -> int:
        """Ranks of the group."""
        return len(self.cp_ranks)

    @property
    def num_nodes(self) -> int:
        """Rows of a mesh of two axes, ranks of a node each; 1 else."""
        return len(self.nodes)

    @cached_property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each node, by their places in ``cp_ranks``: rows of a mesh of two axes; all in one else."""
        if self.cp_mesh is None or self.cp_mesh.ndim == 1:
            return (tuple(range(self.cp_size)),)
        place = {rank: number for number, rank in enumerate(self.cp_ranks)}
        return tuple(tuple(place[rank] for rank in row) for row in self.cp_mesh.mesh.tolist())

    @property
    def hops(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
        """The groups by which keys come to a node once: between nodes and within them.

        None if there is one node or one rank a node, so that one hop does the same.
        """
        if self.cp_mesh is None or 1 in (len(self.nodes), len(self.nodes[0])):
            return None
        return self.cp_mesh.get_group(0), self.cp_mesh.get_group(1)

    @cached_property
    def digest(self) -> str:
        """128 bits of the slices."""
        return hashlib.blake2b(self.slices.tobytes(), digest_size=16).hexdigest()

    def described(self) -> dict[str, Any]:
        """What must be equal on all ranks, by name and causes first: numbers and text. Lengths are without padding."""
        first = {
            "total_seqlen_q": self.total_seqlen_q - self.pad_size,
            "total_seqlen_k": self.total_seqlen_k - self.pad_size_k,
            "dist_attn_config": repr(self.dist_attn_config),
            "chunk_size": self.chunk_size,
        }
        left = ("slices", "cp_group", "cp_mesh", "balance_with", "placed_like", "k_placed_like", *first)
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left}
        others["balance_with"] = [mask.fingerprint() for mask in self.balance_with]
        likes = {
            name: None if like is None else sorted(like.described().items())
            for name, like in (("placed_like", self.placed_like), ("k_placed_like", self.k_placed_like))
        }
        return first | others | likes | {"nodes of cp_mesh": self.nodes, "slices": self.digest}

    @cached_property
    def _identity(self) -> tuple[Hashable, ...]:
        others = [getattr(self, f.name) for f in fields(self) if f.name not in ("slices", "cp_mesh")]
        return len(self.slices), self.digest, self.nodes, *others

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DistAttnRuntimeKey):
            return NotImplemented
        return self is other or self._identity == other._identity

    @cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, Any]) -> DistAttnRuntimeKey:
        """Itself: a model that holds a key can be copied, a process group cannot."""
        return self

    def __repr__(self) -> str:
        sizes = f"{self.total_seqlen_q} x {self.total_seqlen_k} tokens (padding {self.pad_size})"
        return (
            f"DistAttnRuntimeKey({len(self.slices)} slices, {sizes}, {self.cp_size} ranks, {self.digest[:8]})"
        )


def _frozen(table: NDArray[np.int64]) -> AttnRanges:
    ranges = AttnRanges.from_ranges(table.tolist())
    hash(ranges)  # from now on nobody can edit it
    return ranges


def automatic_chunk_size(length: int, num_ranks: int) -> int:
    """Tokens of a chunk: at least ``MIN_CHUNKS`` chunks a rank, whole tiles where that many have one, little padding."""
    if num_ranks == 1:
        return length
    tiles = -(-length // (num_ranks * TILE))
    if tiles < MIN_CHUNKS:
        return max(-(-length // (MIN_CHUNKS * num_ranks)), 1)
    return TILE * -(-tiles // (2 * MIN_CHUNKS))


def padding(length: int, num_ranks: int, chunk_size: int, asked: int, uneven: bool) -> int:
    """Tokens to add to ``length``: what was asked for, and where shards are even as many more as make them so."""
    return asked if uneven else asked + -(length + asked) % (num_ranks * chunk_size)
