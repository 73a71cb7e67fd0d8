"""What ``flex_flash_attn_func`` accepts: older positional orders, checks of everything but the ranges."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from magi_attention.errors import check_count, check_tensor, check_type, complaint

P = ParamSpec("P")
R = TypeVar("R")

_NUM_LEADING = 5
_LENGTHS_FIRST = (
    "max_seqlen_q", "max_seqlen_k", "attn_type_map", "softmax_scale", "softcap", "deterministic", "sm_margin",
    "disable_fwd_atomic_reduction", "auto_range_merge",
)  # fmt: skip
_TYPES_FIRST = (
    "attn_type_map", "sink", "softmax_scale", "softcap", "deterministic", "sm_margin",
    "disable_fwd_atomic_reduction", "auto_range_merge", "ref_block_size",
)  # fmt: skip


def accept_older_orders(function: Callable[P, R]) -> Callable[P, R]:
    """Give positional arguments after k_ranges the names that they had in either of two older signatures.

    An integer right after k_ranges can only be max_seqlen_q, because attn_type_map is never an integer; it
    selects the older order that begins with the two lengths.

    Raises:
        TypeError: more positional arguments than the order has, or one given twice.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        if len(args) <= _NUM_LEADING:
            return function(*args, **kwargs)
        later = args[_NUM_LEADING:]
        names = _LENGTHS_FIRST if type(later[0]) is int else _TYPES_FIRST
        if len(later) > len(names):
            expected = f"at most {_NUM_LEADING + len(names)}, the last being {names[-1]}"
            remedy = "Pass everything after attn_type_map by keyword."
            raise TypeError(complaint("positional arguments", expected, len(args), remedy))
        named = dict(zip(names, later, strict=False))
        for name in named:
            if name in kwargs:
                expected = f"once; the position after k_ranges read as ({', '.join(names[: len(later)])})"
                raise TypeError(
                    complaint(name, expected, "a position and a keyword", "Pass it by keyword only.")
                )
        return function(*args[:_NUM_LEADING], **named, **kwargs)

    return call


@dataclass(frozen=True)
class KernelHints:
    """Arguments that choose among kernels of equal results elsewhere; here they are checked, no more."""

    deterministic: bool
    disable_fwd_atomic_reduction: bool
    disable_bwd_dkv_atomic_reduction: bool
    auto_range_merge: bool
    swap_ab: bool
    pack_gqa: bool
    cat_gqa: bool
    sparse_load: bool
    swap_bwd_qk_loop: bool
    ref_block_size: tuple[int, int] | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        """TypeError for a value of the wrong type, ValueError for an illegal one or a contradiction."""
        for name in _SWITCHES:
            check_type(name, getattr(self, name), bool)
        for name in ("max_seqlen_q", "max_seqlen_k"):
            if (length := getattr(self, name)) is not None:
                check_count(name, length)
        for wrong, names, why in (
            (
                self.sparse_load and not self.auto_range_merge,
                "sparse_load",
                "auto_range_merge=True beside it",
            ),
            (self.pack_gqa and self.cat_gqa, "pack_gqa and cat_gqa", "at most one of them"),
            (
                self.swap_bwd_qk_loop and self.deterministic,
                "swap_bwd_qk_loop",
                "deterministic=False beside it",
            ),
            (self.swap_bwd_qk_loop and self.cat_gqa, "swap_bwd_qk_loop", "cat_gqa=False beside it"),
            (
                self.disable_bwd_dkv_atomic_reduction and self.swap_bwd_qk_loop,
                "disable_bwd_dkv_atomic_reduction",
                "swap_bwd_qk_loop=False beside it",
            ),
            (
                self.disable_bwd_dkv_atomic_reduction
                and num_heads != num_kv_heads
                and not (self.pack_gqa or self.cat_gqa),
                "disable_bwd_dkv_atomic_reduction",
                "pack_gqa=True or cat_gqa=True when k and v have fewer heads than q",
            ),
        ):
            if wrong:
                raise ValueError(
                    complaint(names, why, "the contrary", "These hints do nothing here; drop one.")
                )
        if self.ref_block_size is not None:
            self._check_block_size(num_heads, num_kv_heads)

    def _check_block_size(self, num_heads: int, num_kv_heads: int) -> None:
        size = self.ref_block_size
        if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(type(n) is int for n in size)):
            raise TypeError(complaint("ref_block_size", "a pair of integers or None", size))
        rows, cols = size
        if self.swap_ab:
            legal, wanted = rows in (8, 16, 32, 64) and cols == 64, "(8, 16, 32 or 64; 64) with swap_ab"
        else:
            legal = rows in (64, 128, 192) and 0 < cols <= 256 and cols % 16 == 0
            wanted = "(64, 128 or 192; a multiple of 16 up to 256)"
        if not legal:
            raise ValueError(complaint("ref_block_size", wanted, tuple(size), _AUTOMATIC))
        if self.pack_gqa and rows % (num_heads // num_kv_heads):
            wanted = f"rows that are a multiple of the {num_heads // num_kv_heads} query heads per key head"
            raise ValueError(complaint("ref_block_size with pack_gqa", wanted, rows, _AUTOMATIC))


_SWITCHES = (
    "deterministic", "disable_fwd_atomic_reduction", "disable_bwd_dkv_atomic_reduction", "auto_range_merge",
    "swap_ab", "pack_gqa", "cat_gqa", "sparse_load", "swap_bwd_qk_loop",
)  # fmt: skip
_AUTOMATIC = "Tiles are chosen automatically; leave it None."


def check_packed_tokens(q: torch.Tensor, k: torch.Tensor) -> None:
    """Axes and heads of q and k, which ranges and hints refer to; ``attention`` checks the rest and v."""
    check_tensor("q", q, shape=("num_tokens_q", "num_heads_q", "head_dim"), remedy=_PACKED)
    check_tensor("k", k, shape=("num_tokens_k", "num_heads_k", "head_dim"), remedy=_PACKED)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            complaint("heads of q", f"a multiple of the {k.shape[1]} heads of k and v", q.shape[1])
        )


_PACKED = "Pack a batch along the first axis and give each sequence a slice."


def check_sink_layout(
    sink: torch.Tensor | None, layout: str, per_row: str = "(num_tokens_q, s_sink, num_heads_q)"
) -> None:
    """The layout is known, available, and has as many axes as the sink; ``attention`` checks their sizes.

    ``per_row`` names the axes of "ssh".
    """
    if layout not in ("sh", "ssh", "shd"):
        raise ValueError(complaint("sink_layout", '"sh", "ssh" or "shd"', repr(layout)))
    if layout == "shd":
        raise NotImplementedError(
            complaint("sink_layout", '"sh" or "ssh"', '"shd"', "Sinks with value vectors are not available.")
        )
    if sink is None:
        return
    check_type("sink", sink, torch.Tensor)
    axes = "(s_sink, num_heads_q)" if layout == "sh" else per_row
    if sink.dim() != axes.count(",") + 1:
        remedy = 'sink_layout="sh" is one set of sinks for all rows, "ssh" one per row.'
        raise ValueError(complaint(f'sink with sink_layout="{layout}"', axes, tuple(sink.shape), remedy))


def check_mask_source(
    q_ranges: object,
    k_ranges: object,
    indices: object,
    index_attn: bool,
    q_block_size: int,
    k_block_size: int,
) -> None:
    """Exactly one description of the mask, and one that is available."""
    check_type("index_attn", index_attn, bool)
    for name, size in (("q_block_size", q_block_size), ("k_block_size", k_block_size)):
        check_count(name, size)
        if size != 1:
            raise ValueError(complaint(name, "1", size, "Larger blocks are slices: give them as ranges."))
    if indices is not None and (q_ranges is not None or k_ranges is not None):
        raise ValueError(complaint("mask", "ranges or index_attn_indices", "both"))
    if indices is not None or index_attn:
        raise NotImplementedError(
            complaint(
                "index_attn_indices" if indices is not None else "index_attn",
                "ranges",
                "a list of key rows per query",
                "No kernel gathers single keys. Give runs of consecutive keys as q_ranges and k_ranges, or a "
                "boolean matrix to attention(q, k, v, Mask.from_dense(matrix)).",
            )
        )
    for name, ranges in (("q_ranges", q_ranges), ("k_ranges", k_ranges)):
        if ranges is None:
            raise ValueError(complaint(name, "ranges (n, 2) of both queries and keys", None))
