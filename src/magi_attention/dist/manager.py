"""What stands behind a key: placement, plan and their copies on devices; remembered per process group."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from magi_attention import env
from magi_attention.common.intervals import Intervals
from magi_attention.config import BalancedDispatchAlg, SequentialDispatchAlg
from magi_attention.dist.chunks import cut, cuts_of, joint
from magi_attention.dist.cost import TYPICAL, Heads, strategy
from magi_attention.dist.exchange import Exchange, Share
from magi_attention.dist.explain import Choice, explain_plan, tile_work
from magi_attention.dist.group import ranks_of
from magi_attention.dist.heads import HeadWork, attend_by_heads, can_split
from magi_attention.dist.key import DistAttnRuntimeKey
from magi_attention.dist.key_placement import place_keys
from magi_attention.dist.outside_graphs import outside_graphs
from magi_attention.dist.placement import place
from magi_attention.dist.runtime import Work, attend
from magi_attention.dist.shard import Shards
from magi_attention.errors import complaint
from magi_attention.mask import Mask
from magi_attention.mask.bands import Bands
from magi_attention.mask.slices import bands_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DistAttnRuntimeMgr:
    """Where the tokens of a key lie, and what this rank computes and receives.

    Attributes:
        key: whose. q_shards, k_shards: which queries and which keys each rank holds.
        share: what this rank computes and receives; None if heads travel.
    """

    def __init__(self, key: DistAttnRuntimeKey, q_shards: Shards | None, k_shards: Shards | None) -> None:
        self.key = key
        self.q_shards = self._queries() if q_shards is None else q_shards
        if k_shards is None:
            k_shards = self.q_shards if key.is_same_source else self._keys()
        self.k_shards = k_shards
        self._works: dict[torch.device, Work | HeadWork] = {}
        self.share = self._planned()

    @cached_property
    def _bands(self) -> Bands:
        return bands_of(self.key.slices)

    def _queries(self) -> Shards:
        key, length = self.key, self.key.total_seqlen_q
        if key.cp_size == 1:
            return self._shards([np.array([[0, length]])], length - key.pad_size)
        masks = self._bands, *(mask.bands for mask in key.balance_with)
        chunks = joint([cut(bands, length, key.total_seqlen_k, key.chunk_size) for bands in masks])
        config = key.dist_attn_config.dispatch_config
        if config.uneven_shard and length < key.cp_size:  # the last ranks have nothing
            return self._shards([chunks.rows[n : n + 1] for n in range(key.cp_size)], length - key.pad_size)
        alg = config.alg if key.is_q_permutable else SequentialDispatchAlg()
        num_nodes = key.num_nodes if isinstance(alg, BalancedDispatchAlg) else 1
        parts = place(alg, chunks, key.cp_size, num_nodes)
        if num_nodes > 1:  # parts that are neighbours belong on one node
            order = np.argsort([rank for node in key.nodes for rank in node])
            parts = [parts[number] for number in order.tolist()]
        return self._shards([chunks.rows[part] for part in parts], length - key.pad_size)

    def _keys(self) -> Shards:
        """Keys of another source: each rank one piece as they come, or as many where its queries see them."""
        length, num_ranks = self.key.total_seqlen_k, self.key.cp_size
        cuts = cuts_of(length, max(-(-length // num_ranks), 1))
        pieces = [cuts[n : n + 1] for n in range(num_ranks)]
        if self.key.is_k_permutable and num_ranks > 1:
            seen = Exchange(self._bands, self.q_shards.ranges, pieces)
            pieces = place_keys(seen.seen, seen.stride, pieces, self.key.chunk_size)
        return self._shards(pieces, length - self.key.pad_size_k)

    def _shards(self, ranges: list[Intervals], length: int) -> Shards:
        return Shards(length, ranges, dist.get_rank(self.key.cp_group), self.key.cp_group)

    @cached_property
    def heads(self) -> Heads:
        """What a row consists of; something typical where the key does not say it."""
        key = self.key
        if key.num_heads_q is None or key.num_heads_kv is None:
            return replace(TYPICAL, head_dim=key.head_dim or TYPICAL.head_dim)
        return Heads(key.num_heads_q, key.num_heads_kv, key.head_dim or TYPICAL.head_dim)

    @cached_property
    def exchange(self) -> Exchange:
        """What each rank computes and receives."""
        overlap = self.key.dist_attn_config.overlap_config
        ranges = self.q_shards.ranges, self.k_shards.ranges
        nodes = None if self.key.hops is None else np.array(self.key.nodes)
        return Exchange.of(
            self._bands, *ranges, overlap, self.heads, num_nodes=self.key.num_nodes, nodes=nodes
        )

    def _planned(self) -> Share | None:
        return None if self.splits_heads else self.exchange.share(self.q_shards.rank)

    @property
    def splits_heads(self) -> bool:
        """Whether heads travel instead of keys."""
        return self.choice.by_heads

    @cached_property
    def choice(self) -> Choice:
        """Whether heads travel instead of keys, and why.

        Raises:
            ValueError: they are meant to, and the ranks do not divide them.
        """
        key, asked = self.key, self.key.dist_attn_config.strategy
        known = None not in (key.num_heads_q, key.num_heads_kv, key.head_dim)
        possible = known and can_split(self.heads.num_heads_q, self.heads.num_heads_kv, key.cp_size)
        if asked == "heads" and not possible:
            expected = f"num_heads_q, num_heads_kv and head_dim of the key, multiples of {key.cp_size} ranks"
            got = (key.num_heads_q, key.num_heads_kv, key.head_dim)
            raise ValueError(complaint("strategy 'heads'", expected, got, "Use strategy='keys'."))
        if asked != "auto":
            return Choice(asked == "heads", f"strategy='{asked}' was asked for")
        if key.cp_size == 1:
            return Choice(False, "there is one rank")
        if not possible:
            missing = "the key does not know num_heads_q, num_heads_kv and head_dim"
            return Choice(False, f"the {key.cp_size} ranks do not divide the heads" if known else missing)
        loads = self.exchange.loads(key.num_nodes)
        what, _ = strategy(loads, self.heads, degree=self.exchange.degree, num_nodes=key.num_nodes)
        return Choice(what == "heads", "that is estimated to be faster")

    @cached_property
    def fingerprint(self) -> str:
        """128 bits of the placement: equal on all ranks that can work together."""
        found = hashlib.blake2b(digest_size=16)
        for ranges in (*self.q_shards.ranges, *self.k_shards.ranges):
            found.update(np.ascontiguousarray(ranges, dtype=np.int64).tobytes() + b";")
        return found.hexdigest()

    @outside_graphs
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> tuple:
        """``runtime.attend`` of this rank's rows, or ``heads.attend_by_heads``."""
        work = self._works.get(q.device)
        if work is None:
            work = self._works[q.device] = self._work(q.device)
        if isinstance(work, HeadWork):
            return attend_by_heads(q, k, v, work, **settings)
        return attend(q, k, v, work, **settings)

    def _work(self, device: torch.device) -> Work | HeadWork:
        key, overlap = self.key, self.key.dist_attn_config.overlap_config
        if self.splits_heads:
            mask = Mask(self._bands, key.total_seqlen_q, key.total_seqlen_k)
            return HeadWork(mask, self.q_shards, self.k_shards, overlap.sm_margin)
        assert self.share is not None
        return Work.of(
            self.share,
            device,
            key.cp_group,
            hops=key.hops,
            hides_tail=overlap.hide_tail,
            sm_margin=overlap.sm_margin,
        )

    def explain(self) -> str:
        """Balance, what travels and why, keys and bytes to receive, stages and estimated times, as text."""
        together, ranges = None, (self.q_shards.ranges, self.k_shards.ranges)
        if self.key.balance_with:
            others = [tile_work(Exchange(mask.bands, *ranges)) for mask in self.key.balance_with]
            together = tile_work(self.exchange) + sum(others)
        return explain_plan(
            self.exchange, self.heads, num_nodes=self.key.num_nodes, choice=self.choice, together=together
        )

    @property
    def mask(self) -> Mask:
        """The mask without padding."""
        return Mask(self._bands, self.q_shards.length, self.k_shards.length)

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """(rows,) the rank that holds each row of the mask, by its place in ``key.cp_ranks``."""
        found = np.empty(self.key.total_seqlen_q, dtype=np.int64)
        found[torch.cat(self.q_shards.positions).numpy()] = np.repeat(
            np.arange(self.key.cp_size), self.q_shards.sizes
        )
        return found[: self.q_shards.length]

    def show(self, width: int = 64) -> str:
        """``Mask.show`` with the rank of each row."""
        return self.mask.show(width, self.owners)

    def figure(self, resolution: int = 256) -> Figure:
        """``Mask.figure`` coloured by the rank of each row."""
        return self.mask.figure(self.owners, resolution)


class DistAttnRuntimeDictManager:
    """Managers by key, for each process group those used last.

    Args:
        max_size_per_group: how many; None is what ``MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE`` says, 1000 if nothing.
    """

    def __init__(self, max_size_per_group: int | None = None) -> None:
        self.max_size_per_group = max_size_per_group
        self._groups: dict[tuple[int, ...], OrderedDict[DistAttnRuntimeKey, DistAttnRuntimeMgr]] = {}
        self._recent: OrderedDict[DistAttnRuntimeKey, None] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: DistAttnRuntimeKey) -> DistAttnRuntimeMgr | None:
        """The manager, now the one used last; None if there is none."""
        with self._lock:
            group = self._groups.get(key.cp_ranks)
            if group is None or key not in group:
                return None
            group.move_to_end(key)
            return group[key]

    def __contains__(self, key: DistAttnRuntimeKey) -> bool:
        with self._lock:
            return key in self._groups.get(key.cp_ranks, {})

    def __getitem__(self, key: DistAttnRuntimeKey) -> DistAttnRuntimeMgr:
        """``get``, and ValueError that says what to do if there is none."""
        found = self.get(key)
        if found is None:
            remedy = (
                "It was cleared, evicted or comes from elsewhere. Make it again by magi_attn_flex_key or "
                "magi_attn_varlen_key, or raise MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE."
            )
            raise ValueError(complaint("key", "a key whose plan is remembered", key, remedy))
        return found

    def __setitem__(self, key: DistAttnRuntimeKey, manager: DistAttnRuntimeMgr) -> None:
        most = self.max_size_per_group
        most = env.dist_attn_runtime_dict_size() if most is None else most
        with self._lock:
            group = self._groups.setdefault(key.cp_ranks, OrderedDict())
            group[key] = manager
            group.move_to_end(key)
            self.note(key)
            while len(group) > max(most, 0):
                self._recent.pop(group.popitem(last=False)[0], None)

    def note(self, key: DistAttnRuntimeKey) -> None:
        """``key`` is the one made last."""
        with self._lock:
            self._recent[key] = None
            self._recent.move_to_end(key)

    def keys(self, cp_group: dist.ProcessGroup | None = None) -> list[DistAttnRuntimeKey]:
        """Keys of a group, or of all, those used last at the end."""
        with self._lock:
            wanted = self._groups if cp_group is None else [ranks_of(cp_group)]
            return [key for ranks in wanted for key in self._groups.get(ranks, {})]

    def get_most_recent_key(self, cp_group: dist.ProcessGroup | None = None) -> DistAttnRuntimeKey:
        """The key made last, of a group or of all.

        Raises:
            ValueError: there is none.
        """
        with self._lock:
            for key in reversed(self._recent):
                if cp_group is None or key.cp_ranks == ranks_of(cp_group):
                    return key
        raise ValueError(complaint("keys", "at least one", "none", "Make one by magi_attn_flex_key."))

    def clear(self, cp_group: dist.ProcessGroup | None = None) -> None:
        """Forget the keys of a group, or of all."""
        with self._lock:
            for key in self.keys(cp_group):
                self._recent.pop(key, None)
            if cp_group is None:
                self._groups.clear()
            else:
                self._groups.pop(ranks_of(cp_group), None)


dist_attn_runtime_dict_mgr = DistAttnRuntimeDictManager()
"""The one that all functions of ``magi_attention.api`` use."""


def manager_of(
    key: DistAttnRuntimeKey, q_shards: Shards | None = None, k_shards: Shards | None = None
) -> DistAttnRuntimeMgr:
    """The manager of a key that was just made: remembered, or planned now, without collectives.

    Args:
        q_shards, k_shards: where queries and keys lie already; None deals them.

    Raises:
        ValueError: no placement is possible.
    """
    found = dist_attn_runtime_dict_mgr.get(key)
    if found is None:
        found = DistAttnRuntimeMgr(key, q_shards, k_shards)
        dist_attn_runtime_dict_mgr[key] = found
    else:
        dist_attn_runtime_dict_mgr.note(key)
    return found
