"""Context parallelism: a key for a mask, tokens dealt to ranks by it, their attention, and the whole tensor again.

    key = magi_attn_flex_key(q_ranges, k_ranges, "causal", length, length, cp_group_or_mesh=group)
    local = dispatch(x, key)
    out, meta = calc_attn(q_of(local), k_of(local), v_of(local), key)
    whole = undispatch(out, key)

Every rank of the group calls the same functions with the same keys in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention import env
from magi_attention.api.dist_keys import (
    Heads,
    Slices,
    Sources,
    accept_singular,
    key_like,
    key_of,
    packed_slices,
)
from magi_attention.api.flex_mask import GeneralAttnMaskType
from magi_attention.common import AttnForwardMeta, AttnRanges, AttnRole
from magi_attention.config import DistAttnConfig
from magi_attention.dist import roll as rolling
from magi_attention.dist import shard
from magi_attention.dist.group import group_of
from magi_attention.dist.key import DistAttnRuntimeKey
from magi_attention.dist.manager import DistAttnRuntimeMgr, dist_attn_runtime_dict_mgr
from magi_attention.dist.reduce import with_reduced_gradient
from magi_attention.dist.shard import Shards
from magi_attention.errors import check_number, check_tensor, check_type, complaint
from magi_attention.mask import Mask

__all__ = [
    "calc_attn",
    "clear_cache",
    "dispatch",
    "explain_key",
    "get_most_recent_key",
    "get_position_ids",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "roll",
    "roll_simple",
    "undispatch",
]

_Door = TypeVar("_Door", bound=Callable[..., Any])
GroupOrMesh = dist.ProcessGroup | DeviceMesh | None

_RANGES = """
    q_ranges, k_ranges: n ranges of tokens each, ``AttnRanges`` or pairs: slice s lets queries ``q_ranges[s]`` see keys
        ``k_ranges[s]``. Without padding.
    attn_mask_type: type of each slice, or one for all: names or ``AttnMaskType``."""
_CUTS = """
    cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 or int64 boundaries of packed sequences, from 0. On a GPU the host waits
        for them. ``cu_seqlen_q`` and ``cu_seqlen_k`` are the same."""
_WINDOW = """
    causal: a query sees no later keys; aligned at the bottom-right corner of each sequence.
    window_size: (left, right) keys beside the diagonal that a query sees, -1 is unlimited; not with causal."""
_TOTALS = """
    total_seqlen_q, total_seqlen_k: queries and keys, without padding."""
_PLACE = """
    pad_size: tokens of padding. At least as many are added, and where shards are even as many more as make them so; None
        is none but these. Padding sees nothing and nobody sees it.
    chunk_size: tokens of a chunk, the unit that is dealt to ranks; None is chosen by lengths and ranks.
    cp_group_or_mesh: the ranks: a process group, or a mesh of one or two axes. Two are nodes and the GPUs of each: what
        several ranks of a node need then crosses to it once and is handed on there.
    dist_attn_config: placement and overlap; the defaults when None."""
_SOURCES = """
    is_same_source: queries and keys are the same tokens (self-attention), so that they lie on the same ranks.
    is_q_permutable, is_k_permutable: whether tokens may be dealt as balance wants it; otherwise each rank has the next
        piece of the sequence. Keys of another source that may be permuted are dealt to ranks whose
        queries see them."""
_HEADS = """
    num_heads_q, num_heads_kv, head_dim: what ``calc_attn`` will get, and refuse otherwise; None is anything."""
_JOINT = """
    balance_with: masks of other layers over the same tokens, with or without padding: work and keys to receive are
        balanced over the sum of all; one that serves several layers may be listed as often. Make their keys by
        make_flex_key_for_new_mask_after_dispatch or make_varlen_key_for_new_mask_after_dispatch."""
_KEY_TEXT = """{summary}

No rank asks another: the plan is a function of the arguments, which must be equal on every rank of the group. With
MAGI_ATTENTION_SANITY_CHECK=1 ranks compare them, and all raise where they differ. Plans are remembered per group, so
that the same arguments give an equal key at once.

Args:{arguments}

Returns:
    {returns}.

Raises:
    TypeError, ValueError: arguments that do not fit, named; no placement of so few tokens on so many ranks.
"""
_KEY = "the ``DistAttnRuntimeKey``"
_BOTH = "this rank's rows of x, differentiable, and the ``DistAttnRuntimeKey``"
_X = """
    x: (total_seqlen_q, ...), the same on every rank."""


def _documented(summary: str, returns: str, *arguments: str) -> Callable[[_Door], _Door]:
    """Give a function the docstring of its family."""

    def document(function: _Door) -> _Door:
        function.__doc__ = _KEY_TEXT.format(summary=summary, arguments="".join(arguments), returns=returns)
        return function

    return document


@_documented("A key for a mask given as slices.", _KEY, _RANGES, _TOTALS, _PLACE, _SOURCES, _HEADS, _JOINT)
def magi_attn_flex_key(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: GeneralAttnMaskType,
    total_seqlen_q: int,
    total_seqlen_k: int,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: GroupOrMesh = None,
    dist_attn_config: DistAttnConfig | None = None,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    *,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    balance_with: Sequence[Mask] = (),
) -> DistAttnRuntimeKey:
    return key_of(
        lambda: Slices(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k),
        pad_size,
        chunk_size,
        cp_group_or_mesh,
        dist_attn_config,
        Sources(is_same_source, is_q_permutable, is_k_permutable),
        Heads(num_heads_q, num_heads_kv, head_dim),
        balance_with,
    )


@_documented("A key for packed sequences.", _KEY, _CUTS, _PLACE, _WINDOW, _HEADS, _JOINT)
@accept_singular
def magi_attn_varlen_key(
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: GroupOrMesh = None,
    causal: bool = False,
    dist_attn_config: DistAttnConfig | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    balance_with: Sequence[Mask] = (),
) -> DistAttnRuntimeKey:
    return key_of(
        lambda: packed_slices(cu_seqlens_q, cu_seqlens_k, causal, window_size),
        pad_size,
        chunk_size,
        cp_group_or_mesh,
        dist_attn_config,
        Sources(),
        Heads(num_heads_q, num_heads_kv, head_dim),
        balance_with,
    )


@_documented(
    "``magi_attn_flex_key``, and ``dispatch`` of x.",
    _BOTH,
    _X,
    _RANGES,
    _TOTALS,
    _PLACE,
    _SOURCES,
    _HEADS,
    _JOINT,
)
def magi_attn_flex_dispatch(
    x: torch.Tensor,
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: GeneralAttnMaskType,
    total_seqlen_q: int,
    total_seqlen_k: int,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: GroupOrMesh = None,
    dist_attn_config: DistAttnConfig | None = None,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    *,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    balance_with: Sequence[Mask] = (),
) -> tuple[torch.Tensor, DistAttnRuntimeKey]:
    key = key_of(
        lambda: Slices(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k),
        pad_size,
        chunk_size,
        cp_group_or_mesh,
        dist_attn_config,
        Sources(is_same_source, is_q_permutable, is_k_permutable),
        Heads(num_heads_q, num_heads_kv, head_dim),
        balance_with,
    )
    return dispatch(x, key), key


@_documented(
    "``magi_attn_varlen_key``, and ``dispatch`` of x.", _BOTH, _X, _CUTS, _PLACE, _WINDOW, _HEADS, _JOINT
)
@accept_singular
def magi_attn_varlen_dispatch(
    x: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: GroupOrMesh = None,
    causal: bool = False,
    dist_attn_config: DistAttnConfig | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    balance_with: Sequence[Mask] = (),
) -> tuple[torch.Tensor, DistAttnRuntimeKey]:
    key = key_of(
        lambda: packed_slices(cu_seqlens_q, cu_seqlens_k, causal, window_size),
        pad_size,
        chunk_size,
        cp_group_or_mesh,
        dist_attn_config,
        Sources(),
        Heads(num_heads_q, num_heads_kv, head_dim),
        balance_with,
    )
    return dispatch(x, key), key


_NEW_MASK = """
    key_for_dispatch: the key by which the tokens were dealt.
    dist_attn_config: its overlap; placement stays. That of key_for_dispatch when None."""
_FROM_ANOTHER = """
    key_for_dispatch_k: the key by which the keys were dealt, for attention to another sequence: that of an encoder."""


@_documented(
    "A key for another mask, given as slices, over tokens that stay where they are.",
    _KEY,
    _RANGES,
    _NEW_MASK,
    _FROM_ANOTHER,
    _HEADS.replace("None is anything", "as in key_for_dispatch when None"),
)
def make_flex_key_for_new_mask_after_dispatch(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: GeneralAttnMaskType,
    key_for_dispatch: DistAttnRuntimeKey,
    dist_attn_config: DistAttnConfig | None = None,
    *,
    key_for_dispatch_k: DistAttnRuntimeKey | None = None,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
) -> DistAttnRuntimeKey:
    return key_like(
        lambda: Slices(q_ranges, k_ranges, attn_mask_type),
        key_for_dispatch,
        key_for_dispatch_k,
        dist_attn_config,
        Heads(num_heads_q, num_heads_kv, head_dim),
    )


@_documented(
    "A key for other packed sequences over tokens that stay where they are.",
    _KEY,
    _CUTS,
    _NEW_MASK,
    _WINDOW,
    _HEADS.replace("None is anything", "as in key_for_dispatch when None"),
)
@accept_singular
def make_varlen_key_for_new_mask_after_dispatch(
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    key_for_dispatch: DistAttnRuntimeKey | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig | None = None,
    *,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
) -> DistAttnRuntimeKey:
    return key_like(
        lambda: packed_slices(cu_seqlens_q, cu_seqlens_k, causal, window_size),
        key_for_dispatch,
        None,
        dist_attn_config,
        Heads(num_heads_q, num_heads_kv, head_dim),
    )


def dispatch(
    x: torch.Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0, *, role: AttnRole | str = AttnRole.QUERY
) -> torch.Tensor:
    """This rank's rows of a tensor that all ranks have.

    Args:
        x: (total, ...) without padding, any trailing shape and dtype, the same on every rank.
        key: whose placement. pad_value: what rows of padding hold.
        role: of x: "query", or "key" or "value" where keys are another sequence; the same in self-attention.

    Returns:
        (rows, ...). Differentiable: every rank gets the whole gradient of x, gathered from all.

    Raises:
        ValueError: a key whose plan is not remembered, an x of another length. TypeError: no tensor, no key.
    """
    shards = _shards(key, role)
    remedy = "Padding is added inside: give the tensor without it."
    check_tensor("x", x, remedy=remedy)
    if x.dim() == 0 or len(x) != shards.length:
        raise ValueError(complaint("x shape", f"({shards.length}, ...)", tuple(x.shape), remedy))
    check_type("pad_value", pad_value, (int, float))
    if not (x.is_floating_point() or x.is_complex()) and not float(pad_value).is_integer():
        raise ValueError(complaint("pad_value", f"an integer for {x.dtype}", pad_value))
    return shard.dispatch(x, shards, pad_value)


def undispatch(
    x: torch.Tensor,
    key: DistAttnRuntimeKey,
    is_partial_grad: bool = False,
    *,
    role: AttnRole | str = AttnRole.QUERY,
) -> torch.Tensor:
    """The whole tensor, in order and without padding, of which every rank has some rows.

    Args:
        x: (rows, ...) of this rank.
        key, role: as in ``dispatch``.
        is_partial_grad: False where every rank computes the same loss: a rank takes its rows of its own gradient. True
            where the loss is the sum of what the ranks compute: gradients are summed.

    Returns:
        (total, ...), the same on every rank. Differentiable.

    Raises:
        ValueError: a key whose plan is not remembered, an x of another length. TypeError: no tensor, no key.
    """
    shards = _shards(key, role)
    _check_local("x", x, shards)
    check_type("is_partial_grad", is_partial_grad, bool)
    return shard.undispatch(x, shards, is_partial_grad)


def calc_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key: DistAttnRuntimeKey,
    sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[torch.Tensor, AttnForwardMeta]:
    """Attention of this rank's queries to all keys that the mask of ``key`` shows; every rank of the group calls it.

    The gradient of a sink is that of this rank's rows, to be summed as those of other parameters are.
    MAGI_ATTENTION_DSINK_ALL_REDUCE_OP "sum" or "avg" does so in the backward; do not sum again then.

    Args:
        q: (rows, num_heads_q, head_dim), this rank's queries.
        k, v: (rows, num_heads_kv, head_dim or head_dim_v), its keys and values.
        sink: (s_sink, num_heads_q), the same on every rank: logits in the denominator, neither scaled nor capped.
        softmax_scale: head_dim ** -0.5 when None.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is off.
        return_max_logits: fill ``meta.max_logits``.

    Returns:
        out (rows, num_heads_q, head_dim_v) in q's dtype, and ``AttnForwardMeta``: lse (rows, num_heads_q), fp32 (fp64 for
        fp64), differentiable, and max_logits (num_heads_q,) fp32, the largest logit over the rows of all ranks, or None.

    Raises:
        ValueError: a key whose plan is not remembered, shapes that do not fit. TypeError: other types or dtypes.
    """
    manager = _manager(key)
    _check_operands(q, k, v, key, manager.q_shards, manager.k_shards)
    check_type("return_max_logits", return_max_logits, bool)
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    check_number("softcap", softcap)
    if sink is not None:
        remedy = "One set of sinks for all rows, whole on every rank."
        check_tensor("sink", sink, shape=("s_sink", q.shape[1]), device=q.device, remedy=remedy)
        sink = with_reduced_gradient(sink, env.dsink_all_reduce_op(), key.cp_group)
    out, lse, max_logits = manager.attend(
        q, k, v, sink=sink, softmax_scale=softmax_scale, softcap=softcap,
        return_max_logits=return_max_logits,
    )  # fmt: skip
    return out, AttnForwardMeta(lse, max_logits)


def get_position_ids(
    key: DistAttnRuntimeKey,
    *,
    role: AttnRole | str = AttnRole.QUERY,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Positions in the whole sequence of this rank's rows, (rows,) int64; that of the last token for padding.

    Args:
        key, role: as in ``dispatch``.
        device: when None the CPU for groups that use gloo, else the current CUDA device.

    Raises:
        ValueError: a key whose plan is not remembered.
    """
    shards = _shards(key, role)
    if device is None:
        device = "cpu" if dist.get_backend(key.cp_group) == "gloo" else "cuda"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return shards.own(place).clamp(max=shards.length - 1)


def get_most_recent_key(cp_group: GroupOrMesh = None) -> DistAttnRuntimeKey:
    """The key made last, by the ranks of ``cp_group`` or, when None, by any. Better pass keys along.

    Raises:
        ValueError: none was made, or all were forgotten.
    """
    return dist_attn_runtime_dict_mgr.get_most_recent_key(_group(cp_group))


def clear_cache(cp_group: GroupOrMesh = None) -> None:
    """Forget the plans of ``cp_group``, or all when None. Their keys must be made again."""
    dist_attn_runtime_dict_mgr.clear(_group(cp_group))


def explain_key(key: DistAttnRuntimeKey) -> str:
    """How even the work of ``key`` is, what travels and why, how much of it, in how many stages, and estimated times.

    Raises:
        ValueError: a key whose plan is not remembered. TypeError: no key.
    """
    return _manager(key).explain()


def roll(
    x: torch.Tensor,
    shift: int,
    dim: int,
    key: DistAttnRuntimeKey,
    *,
    role: AttnRole | str = AttnRole.QUERY,
) -> torch.Tensor:
    """This rank's rows of ``torch.roll(whole, shift, dim)``, for labels of the next token; only what moves is sent.

    Tokens wrap at the end of the sequence, padding stays where it is.

    Args:
        x: this rank's rows along ``dim``, any other shape.
        shift: tokens, positive to the right; any integer.
        key, role: as in ``dispatch``.

    Returns:
        As x. Differentiable.

    Raises:
        ValueError: a key whose plan is not remembered, another length along dim. TypeError: other types.
    """
    shards = _shards(key, role)
    check_type("x", x, torch.Tensor)
    for name, value in (("shift", shift), ("dim", dim)):
        check_type(name, value, int)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(complaint("dim", f"an axis of {tuple(x.shape)}", dim))
    rows = x.movedim(dim, 0).contiguous()
    _check_local("x", rows, shards)
    return rolling.roll(rows, shift, shards).movedim(0, dim)


def roll_simple(
    x: torch.Tensor,
    shift: int,
    dim: int,
    key: DistAttnRuntimeKey,
    *,
    role: AttnRole | str = AttnRole.QUERY,
) -> torch.Tensor:
    """``roll`` under another name."""
    return roll(x, shift, dim, key, role=role)


def _group(cp_group: GroupOrMesh) -> dist.ProcessGroup | None:
    return None if cp_group is None else group_of(cp_group)[0]


def _manager(key: DistAttnRuntimeKey) -> DistAttnRuntimeMgr:
    check_type("key", key, DistAttnRuntimeKey, "magi_attn_flex_key and magi_attn_varlen_key make one.")
    return dist_attn_runtime_dict_mgr[key]


def _shards(key: DistAttnRuntimeKey, role: AttnRole | str) -> Shards:
    manager = _manager(key)
    try:
        role = AttnRole(role)
    except ValueError:
        raise ValueError(complaint("role", '"query", "key" or "value"', role)) from None
    return manager.q_shards if role is AttnRole.QUERY else manager.k_shards


_LOCAL = "These are rows of one rank, as dispatch gives them."


def _check_local(name: str, x: torch.Tensor, shards: Shards) -> None:
    check_type(name, x, torch.Tensor)
    rows = shards.sizes[shards.rank]
    if x.dim() == 0 or len(x) != rows:
        raise ValueError(complaint(f"{name} shape", f"({rows}, ...)", tuple(x.shape), _LOCAL))


def _check_operands(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key: DistAttnRuntimeKey, queries: Shards, keys: Shards
) -> None:
    """Shapes of this rank's tensors, which no other function knows; ``accumulate`` checks the rest."""
    rows, cols = (shards.sizes[shards.rank] for shards in (queries, keys))
    heads, kv_heads = key.num_heads_q or "num_heads_q", key.num_heads_kv or "num_heads_kv"
    check_tensor("q", q, shape=(rows, heads, key.head_dim or "head_dim"), remedy=_LOCAL)
    check_tensor(
        "k", k, shape=(cols, kv_heads, q.shape[2]), dtypes=(q.dtype,), device=q.device, remedy=_LOCAL
    )
    check_tensor(
        "v", v, shape=(*k.shape[:2], "head_dim_v"), dtypes=(q.dtype,), device=q.device, remedy=_LOCAL
    )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            complaint("heads of q", f"a multiple of the {k.shape[1]} heads of k and v", q.shape[1])
        )
