"""From the arguments of the key-making functions to a key: checked, padded, planned, and in debug mode compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from magi_attention import env
from magi_attention.api.functools import infer_attn_mask_from_cu_seqlens
from magi_attention.common import AttnMaskType
from magi_attention.config import (
    DistAttnConfig,
    RandomSelectDispatchAlg,
    SequentialDispatchAlg,
    ZigzagDispatchAlg,
)
from magi_attention.dist.agreement import agreed
from magi_attention.dist.group import group_of
from magi_attention.dist.key import DistAttnRuntimeKey, automatic_chunk_size, padding
from magi_attention.dist.manager import DistAttnRuntimeMgr, dist_attn_runtime_dict_mgr, manager_of
from magi_attention.errors import check_count, check_tensor, check_type, complaint
from magi_attention.mask import Mask
from magi_attention.mask.slices import slice_table

P = ParamSpec("P")
R = TypeVar("R")
Planned = tuple[DistAttnRuntimeKey, DistAttnRuntimeMgr]


@dataclass(frozen=True)
class Slices:
    """A mask as users write it: the arguments of the same names."""

    q_ranges: Any
    k_ranges: Any
    attn_mask_type: Any
    total_seqlen_q: Any = None
    total_seqlen_k: Any = None

    def table(self, total_seqlen_q: int, total_seqlen_k: int) -> Any:
        """(n, 5) checked against these lengths, which are without padding."""
        return slice_table(
            self.q_ranges,
            self.k_ranges,
            self.attn_mask_type,
            total_seqlen_q,
            total_seqlen_k,
            "attn_mask_type",
        )


@dataclass(frozen=True)
class Heads:
    """What ``calc_attn`` is to expect; None is anything."""

    num_heads_q: int | None = None
    num_heads_kv: int | None = None
    head_dim: int | None = None

    def check(self) -> None:
        """TypeError or ValueError unless they are counts that fit together."""
        for f in fields(self):
            if (value := getattr(self, f.name)) is not None:
                _check_positive(f.name, value)
        if self.num_heads_q and self.num_heads_kv and self.num_heads_q % self.num_heads_kv:
            expected = f"a multiple of num_heads_kv {self.num_heads_kv}"
            raise ValueError(complaint("num_heads_q", expected, self.num_heads_q))

    def or_those_of(self, key: DistAttnRuntimeKey) -> Heads:
        """These, and those of ``key`` where nothing was said."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return Heads(
            **{name: getattr(key, name) if value is None else value for name, value in given.items()}
        )


@dataclass(frozen=True)
class Sources:
    """Whether queries and keys are the same tokens, and which of them may be permuted."""

    is_same_source: bool = True
    is_q_permutable: bool = True
    is_k_permutable: bool = True

    def check(self, total_seqlen_q: int, total_seqlen_k: int) -> None:
        """TypeError or ValueError unless they fit together and to the lengths."""
        for f in fields(self):
            check_type(f.name, getattr(self, f.name), bool)
        if not self.is_same_source:
            return
        if self.is_q_permutable != self.is_k_permutable:
            got = f"{self.is_q_permutable} and {self.is_k_permutable}"
            remedy = "Tokens of the same source lie where they lie; is_same_source=False tells them apart."
            raise ValueError(complaint("is_q_permutable and is_k_permutable", "the same", got, remedy))
        if total_seqlen_q != total_seqlen_k:
            remedy = "Cross-attention is magi_attn_flex_key with is_same_source=False."
            expected = f"total_seqlen_q {total_seqlen_q} where both have the same source"
            raise ValueError(complaint("total_seqlen_k", expected, total_seqlen_k, remedy))


def key_of(
    given: Callable[[], Slices],
    pad_size: int | None,
    chunk_size: int | None,
    cp_group_or_mesh: object,
    config: DistAttnConfig | None,
    sources: Sources,
    heads: Heads,
    balance_with: Sequence[Mask],
) -> DistAttnRuntimeKey:
    """A planned key with a placement of its own."""
    group, mesh = group_of(cp_group_or_mesh)

    def make() -> Planned:
        slices = given()
        chosen = DistAttnConfig() if config is None else config
        check_type("dist_attn_config", chosen, DistAttnConfig)
        heads.check()
        for name in ("total_seqlen_q", "total_seqlen_k"):
            _check_positive(name, getattr(slices, name))
        sources.check(slices.total_seqlen_q, slices.total_seqlen_k)
        num_ranks, uneven = dist.get_world_size(group), chosen.dispatch_config.uneven_shard
        if pad_size is not None:
            check_count("pad_size", pad_size)
        asked = pad_size or 0
        size = _chunk_size(chunk_size, chosen, slices.total_seqlen_q + asked, num_ranks)
        pad = padding(slices.total_seqlen_q, num_ranks, size, asked, uneven)
        k_pad = pad if sources.is_same_source else padding(slices.total_seqlen_k, num_ranks, 1, 0, uneven)
        key = DistAttnRuntimeKey(
            slices.table(slices.total_seqlen_q, slices.total_seqlen_k),
            slices.total_seqlen_q + pad,
            slices.total_seqlen_k + k_pad,
            pad,
            k_pad,
            size,
            group,
            chosen,
            cp_mesh=mesh,
            balance_with=_padded(balance_with, slices.total_seqlen_q, pad, chosen, sources),
            **vars(heads),
            **vars(sources),
        )
        return key, manager_of(key)

    return _planned(make, group)


def key_like(
    given: Callable[[], Slices],
    key: DistAttnRuntimeKey | None,
    k_key: DistAttnRuntimeKey | None,
    config: DistAttnConfig | None,
    heads: Heads,
) -> DistAttnRuntimeKey:
    """A planned key for tokens that lie where those of ``key`` do, and keys where the queries of ``k_key`` do."""
    check_type("key_for_dispatch", key, DistAttnRuntimeKey)
    assert key is not None
    if k_key is not None:
        check_type("key_for_dispatch_k", k_key, DistAttnRuntimeKey)

    def make() -> Planned:
        manager = dist_attn_runtime_dict_mgr[key]
        q_shards, k_shards = manager.q_shards, manager.k_shards
        chosen = key.dist_attn_config
        if config is not None:
            check_type("dist_attn_config", config, DistAttnConfig)
            chosen = replace(config, dispatch_config=chosen.dispatch_config)
        merged = heads.or_those_of(key)
        merged.check()
        others: dict[str, Any] = {
            "balance_with": (), "placed_like": key.placed_like or key, "k_placed_like": key.k_placed_like
        }  # fmt: skip
        if k_key is not None:
            if k_key.cp_group is not key.cp_group:
                expected = f"a key of the group of key_for_dispatch, ranks {key.cp_ranks}"
                raise ValueError(complaint("key_for_dispatch_k", expected, k_key.cp_ranks))
            k_shards = dist_attn_runtime_dict_mgr[k_key].q_shards
            others |= {"k_placed_like": k_key.placed_like or k_key, "is_same_source": False}
            others |= {"total_seqlen_k": k_key.total_seqlen_q, "pad_size_k": k_key.pad_size}
        new = replace(key, dist_attn_config=chosen, **vars(merged), **others)
        new = replace(new, slices=given().table(q_shards.length, k_shards.length))
        return new, manager_of(new, q_shards, k_shards)

    return _planned(make, key.cp_group)


_HEEDLESS = (SequentialDispatchAlg, ZigzagDispatchAlg, RandomSelectDispatchAlg)
"""Algorithms that place without regard to the mask."""


def _padded(
    masks: Sequence[Mask], length: int, pad: int, config: DistAttnConfig, sources: Sources
) -> tuple[Mask, ...]:
    """Masks over ``length`` tokens, or ``pad`` more, as masks over all of them, once it is known that they matter."""
    check_type("balance_with", masks, (list, tuple), "Give a sequence of magi_attention.Mask.")
    if not masks:
        return ()
    if not sources.is_same_source:
        remedy = "Queries and keys of two sequences are dealt for one mask."
        got = "is_same_source=False"
        raise NotImplementedError(complaint("balance_with", "masks of self-attention", got, remedy))
    alg = config.dispatch_config.alg
    if not sources.is_q_permutable or isinstance(alg, _HEEDLESS):
        got = type(alg).__name__ if sources.is_q_permutable else "is_q_permutable=False"
        remedy = "Use MinHeapDispatchAlg() or BalancedDispatchAlg()."
        raise ValueError(complaint("balance_with", "a placement that depends on masks", got, remedy))
    for number, mask in enumerate(masks):
        check_type(f"balance_with[{number}]", mask, Mask)
        size = mask.num_rows, mask.num_cols
        if size not in ((length, length), (length + pad, length + pad)):
            expected = f"{length} rows and columns, or {length + pad} with padding"
            raise ValueError(complaint(f"balance_with[{number}]", expected, f"{size[0]} x {size[1]}"))
    return tuple(Mask(mask.bands, length + pad, length + pad) for mask in masks)


def _planned(make: Callable[[], Planned], group: dist.ProcessGroup) -> DistAttnRuntimeKey:
    return agreed(make, group) if env.sanity_check() else make()[0]


def _chunk_size(given: int | None, config: DistAttnConfig, length: int, num_ranks: int) -> int:
    configured = config.dispatch_config.chunk_size
    if given is None:
        return automatic_chunk_size(length, num_ranks) if configured is None else configured
    _check_positive("chunk_size", given)
    if configured not in (None, given):
        remedy = "Give it once."
        raise ValueError(complaint("chunk_size", f"{configured} as in DispatchConfig", given, remedy))
    return given


def _check_positive(name: str, value: Any) -> None:
    check_count(name, value)
    if value == 0:
        raise ValueError(complaint(name, "at least 1", value))


def packed_slices(
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, causal: bool, window_size: Any
) -> Slices:
    """Packed sequences as slices."""
    check_type("causal", causal, bool)
    tables = _segments("cu_seqlens_q", cu_seqlens_q), _segments("cu_seqlens_k", cu_seqlens_k)
    if len(tables[0]) != len(tables[1]):
        expected = f"{len(tables[0]) + 1} boundaries like cu_seqlens_q"
        raise ValueError(complaint("cu_seqlens_k", expected, len(tables[1]) + 1))
    if window_size in ((-1, -1), [-1, -1]):
        kind = AttnMaskType.CAUSAL if causal else AttnMaskType.FULL
        return Slices(*tables, kind, *(int(table[:, 1].max(initial=0)) for table in tables))
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    return Slices(*infer_attn_mask_from_cu_seqlens(cu_seqlens_q, cu_seqlens_k, causal, window_size))


def _segments(name: str, cuts: torch.Tensor | None) -> NDArray[np.int64]:
    """(n, 2) begins and ends between n + 1 boundaries."""
    check_tensor(name, cuts, shape=("n + 1",), dtypes=(torch.int32, torch.int64))
    assert cuts is not None
    found = cuts.detach().cpu().numpy().astype(np.int64)
    if len(found) == 0 or found[0] != 0 or (np.diff(found) < 0).any():
        got = found.tolist() if len(found) < 10 else f"{len(found)} values"
        raise ValueError(complaint(name, "boundaries from 0 that never decrease", got))
    return np.stack([found[:-1], found[1:]], axis=1)


def accept_singular(function: Callable[P, R]) -> Callable[P, R]:
    """Accept ``cu_seqlen_q`` and ``cu_seqlen_k``, as examples spell them, too.

    Raises:
        TypeError: both spellings.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        for side in ("q", "k"):
            name = f"cu_seqlens_{side}"
            if f"cu_seqlen_{side}" in kwargs:
                if name in kwargs:
                    raise TypeError(complaint(name, "once", f"cu_seqlen_{side} as well"))
                kwargs[name] = kwargs.pop(f"cu_seqlen_{side}")
        return function(*args, **kwargs)

    return call
