"""Small things around context parallelism: padding, and masks written as slices.

Query i of sq stands at key i + sk - sq: everything is aligned at the bottom-right corner.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from magi_attention.common import AttnMaskType, AttnRange, AttnRanges
from magi_attention.errors import check_count, check_tensor, check_type, complaint

Slices = tuple[AttnRanges, AttnRanges, list[AttnMaskType]]
"""Ranges of queries, ranges of keys, and the type of each pair of them."""


def compute_pad_size(total_seqlen_q: int, cp_size: int, chunk_size: int) -> int:
    """Tokens to add so that every rank gets as many chunks: ``-total_seqlen_q mod (cp_size * chunk_size)``."""
    check_count("total_seqlen_q", total_seqlen_q)
    for name, size in (("cp_size", cp_size), ("chunk_size", chunk_size)):
        check_count(name, size)
        if size == 0:
            raise ValueError(complaint(name, "at least 1", size))
    return -total_seqlen_q % (cp_size * chunk_size)


def squash_batch_dim(x: torch.Tensor) -> torch.Tensor:
    """(batch, seqlen, ...) as (batch * seqlen, ...)."""
    check_type("x", x, torch.Tensor)
    if x.dim() < 2:
        raise ValueError(complaint("x shape", "(batch, seqlen, ...)", tuple(x.shape)))
    return x.flatten(0, 1)


def pad_at_dim(
    x: torch.Tensor, dim: int, pad_size: int, value: float = 0.0, side: str = "right"
) -> torch.Tensor:
    """``x`` with ``pad_size`` entries of ``value`` more along ``dim``, on its "left" or "right" side. Differentiable."""
    check_type("x", x, torch.Tensor)
    check_count("pad_size", pad_size)
    if side not in ("left", "right"):
        raise ValueError(complaint("side", '"left" or "right"', repr(side)))
    widths = [0, 0] * (x.dim() - 1 - _axis(x, dim))
    widths += [pad_size, 0] if side == "left" else [0, pad_size]
    return pad(x, widths, value=value)


def unpad_at_dim(x: torch.Tensor, dim: int, pad_size: int) -> torch.Tensor:
    """``x`` without its last ``pad_size`` entries along ``dim``."""
    check_type("x", x, torch.Tensor)
    check_count("pad_size", pad_size)
    size = x.shape[_axis(x, dim)]
    if pad_size > size:
        raise ValueError(complaint("pad_size", f"at most {size}", pad_size))
    return x.narrow(dim, 0, size - pad_size)


def _axis(x: torch.Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(complaint("dim", f"an axis of {tuple(x.shape)}", dim))
    return dim % x.dim()


def apply_padding(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: list[AttnMaskType],
    total_seqlen: int,
    pad_size: int,
) -> Slices:
    """The slices and one more: queries [total_seqlen, total_seqlen + pad_size), which see nothing. Given ones stay."""
    check_type("q_ranges", q_ranges, AttnRanges)
    check_type("k_ranges", k_ranges, AttnRanges)
    check_count("total_seqlen", total_seqlen)
    check_count("pad_size", pad_size)
    q_ranges, k_ranges = q_ranges.clone(), k_ranges.clone()
    q_ranges.append(AttnRange(total_seqlen, total_seqlen + pad_size))
    k_ranges.append(AttnRange(0, 0))
    return q_ranges, k_ranges, [*attn_mask_type, AttnMaskType.FULL]


def infer_varlen_mask_from_batch(
    batch_size: int, seq_len: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens_q and cu_seqlens_k, (batch_size + 1,) int32 each, of a batch of sequences of the same length."""
    check_count("batch_size", batch_size)
    check_count("seq_len", seq_len)
    cuts = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
    return cuts, cuts.clone()


def infer_attn_mask_from_sliding_window(
    q_range: AttnRange, k_range: AttnRange, window_size: tuple[int, int] | list[int]
) -> Slices:
    """The window (left, right) of one sequence as at most three slices; -1 is unlimited.

    Queries before the first key, of a sequence with more queries than keys, are left out.
    """
    check_type("q_range", q_range, AttnRange)
    check_type("k_range", k_range, AttnRange)
    left, right = _window(window_size)
    begin = max(q_range.start, q_range.end - k_range.seqlen)
    found = _windowed(begin, q_range.end, k_range.start, k_range.end, left, right)
    return _slices(found if k_range.seqlen else [])


def infer_attn_mask_from_cu_seqlens(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] = (-1, -1),
    global_window_size: int = 0,
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType], int, int]:
    """Packed sequences as slices: (q_ranges, k_ranges, types, total_seqlen_q, total_seqlen_k).

    Args:
        cu_seqlens_q, cu_seqlens_k: (n + 1,) integer boundaries, also on a GPU, for which the host waits.
        causal: without a window only.
        global_window_size: keys from the first of each sequence on that are seen beside the window.

    Raises:
        TypeError, ValueError: boundaries of other shapes, causal with a window.
    """
    integers = (torch.int32, torch.int64)
    check_tensor("cu_seqlens_q", cu_seqlens_q, shape=("n + 1",), dtypes=integers)
    check_tensor("cu_seqlens_k", cu_seqlens_k, shape=cu_seqlens_q.shape, dtypes=integers)
    check_count("global_window_size", global_window_size)
    left, right = _window(window_size)
    if causal and (left, right) != (-1, -1):
        remedy = "Give (left, 0) without causal."
        raise ValueError(complaint("window_size", "(-1, -1) with causal", (left, right), remedy))
    cuts_q, cuts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    found: list[_Slice] = []
    for q0, q1, k0, k1 in zip(cuts_q, cuts_q[1:], cuts_k, cuts_k[1:], strict=False):
        if causal or (left, right) == (-1, -1):
            found.append((q0, q1, k0, k1, AttnMaskType.CAUSAL if causal else AttnMaskType.FULL))
        elif global_window_size and 0 <= left < k1 - k0 - 1:
            found += _with_first_keys(q0, q1, k0, k1, left, right, global_window_size)
        else:
            found += _windowed(max(q0, q1 - (k1 - k0)), q1, k0, k1, left, right)
    return *_slices(found), cuts_q[-1], cuts_k[-1]


_Slice = tuple[int, int, int, int, AttnMaskType]
"""Queries [q0, q1) and keys [k0, k1)."""


def _windowed(q0: int, q1: int, k0: int, k1: int, left: int, right: int) -> list[_Slice]:
    """Rows whose window begins before the keys, rows within, rows whose window ends behind them."""
    rows, cols = q1 - q0, k1 - k0
    shift = cols - rows
    head_end = rows if left < 0 or left >= cols - 1 else min(max(left - shift, 0), rows)
    sees_all = right < 0 or (right >= cols - 1 and shift >= 0)
    tail_begin = 0 if sees_all else min(max(rows - right, 0), rows)
    if head_end <= tail_begin:
        parts = [
            (0, head_end, 0, head_end + shift + right, AttnMaskType.CAUSAL),
            (
                head_end,
                tail_begin,
                head_end + shift - left,
                tail_begin + shift + right,
                AttnMaskType.BICAUSAL,
            ),
            (tail_begin, rows, tail_begin + shift - left, cols, AttnMaskType.INVCAUSAL),
        ]
    else:
        parts = [
            (0, tail_begin, 0, cols, AttnMaskType.CAUSAL),
            (tail_begin, head_end, 0, cols, AttnMaskType.FULL),
            (head_end, rows, 0, cols, AttnMaskType.INVCAUSAL),
        ]
    return [(q0 + a, q0 + b, k0 + c, k0 + d, kind) for a, b, c, d, kind in parts if a < b and c < d]


def _with_first_keys(q0: int, q1: int, k0: int, k1: int, left: int, right: int, first: int) -> list[_Slice]:
    """The first keys for every row that its right side lets see them, and the window over the keys behind them."""
    rows, cols = q1 - q0, k1 - k0
    first, shift = min(first, cols), cols - rows
    right = cols if right < 0 else right
    begin = max(q0, q0 - shift - right)  # the first row that sees a key
    all_from = min(max(q0 + first - shift - right - 1, begin), q1)
    found = [
        (begin, all_from, k0, k0 + all_from - q0 + shift + right, AttnMaskType.CAUSAL),
        (all_from, q1, k0, k0 + first, AttnMaskType.FULL),
    ]
    behind = max(q0, q0 + first - shift - right)
    window = _windowed(behind, q1, k0 + first, k1, left, right) if first < cols else []
    return [piece for piece in found if piece[0] < piece[1] and piece[2] < piece[3]] + window


def _window(window_size: object) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(complaint("window_size", "a pair (left, right)", window_size))
    for side in window_size:
        if isinstance(side, bool) or not isinstance(side, int):
            raise TypeError(complaint("window_size", "integers", type(side).__name__))
        if side < -1:
            raise ValueError(complaint("window_size", "at least -1, which is unlimited", side))
    return window_size[0], window_size[1]


def _slices(found: list[_Slice]) -> Slices:
    queries = AttnRanges.from_ranges([(q0, q1) for q0, q1, *_ in found])
    keys = AttnRanges.from_ranges([(k0, k1) for _, _, k0, k1, _ in found])
    return queries, keys, [kind for *_, kind in found]
