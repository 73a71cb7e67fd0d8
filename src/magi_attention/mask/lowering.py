"""Bands computed on the device that holds the ranges, without waiting for it: no size comes from data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from magi_attention.errors import check_tensor, complaint
from magi_attention.mask.arguments import Window, reach, size
from magi_attention.mask.bands import INF

_INTEGERS = (torch.int32, torch.int64)
# Coordinates are clamped to this before they are subtracted, so that int32 cannot overflow.
_FAR = INF // 2 - 1


@dataclass(frozen=True, eq=False)
class DeviceMask:
    """Bands that live on a device and whose values the host does not know.

    Attributes:
        table: (n, 6) int32 bands ``(q0, q1, k0, k1, lo, hi)``; empty bands are allowed.
        num_rows, num_cols: number of query and key tokens.

    Raises:
        TypeError, ValueError: the table is not an (n, 6) int32 tensor.
    """

    table: torch.Tensor
    num_rows: int
    num_cols: int

    def __post_init__(self) -> None:
        check_tensor("DeviceMask table", self.table, shape=("n", 6), dtypes=(torch.int32,))


def lower_ranges(
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    types: torch.Tensor | None,
    num_rows: int,
    num_cols: int,
) -> torch.Tensor:
    """The bands of ``Mask.from_ranges`` as an (n, 6) int32 tensor on the device of the ranges.

    Values cannot be complained about without waiting for the device, so they are made harmless: ends are
    clipped to the tensor, and a slice with start > end or an unknown type shows nothing.

    Args:
        q_ranges, k_ranges: (n, 2) int32 or int64, half-open.
        types: (n,) int32 or int64, 0 full, 1 causal, 2 inv_causal, 3 bi_causal; None is all full.
        num_rows, num_cols: number of query and key tokens.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes.
    """
    check_tensor("q_ranges", q_ranges, shape=("n", 2), dtypes=_INTEGERS)
    check_tensor("k_ranges", k_ranges, shape=(q_ranges.shape[0], 2), dtypes=_INTEGERS, device=q_ranges.device)
    q0, q1 = q_ranges.clamp(-_FAR, _FAR).to(torch.int32).unbind(1)
    k0, k1 = k_ranges.clamp(-_FAR, _FAR).to(torch.int32).unbind(1)
    lo, hi = torch.full_like(q0, -INF), torch.full_like(q0, INF)
    valid = (q0 <= q1) & (k0 <= k1)
    if types is not None:
        check_tensor("types", types, shape=(q_ranges.shape[0],), dtypes=_INTEGERS, device=q_ranges.device)
        valid &= (types >= 0) & (types <= 3)
        # The ends before clipping place the diagonals: clipping a slice must not move what it shows.
        hi = torch.where((types & 1) != 0, k1 - q1, hi)
        lo = torch.where((types & 2) != 0, k0 - q0, lo)
    return _clipped(q0, q1, k0, k1, lo, hi, valid, num_rows, num_cols)


def lower_varlen(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    num_rows: int,
    num_cols: int,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    keep_first: int = 0,
    force_fa_decode: bool = False,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bands of ``Mask.varlen`` on the device of the boundaries: (n, 6) int32, 2 n with ``keep_first``.

    Args:
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 or int64 boundaries; the keys' are the queries' when None.
        num_rows, num_cols: number of query and key tokens in the packed tensors.
        causal, window, keep_first, force_fa_decode: as in ``Mask.varlen``.
        seqused_q, seqused_k: (n,) how many tokens of each sequence are in use; the others are invisible.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, a bad window or ``keep_first``.
    """
    cuts_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check_tensor("cu_seqlens_q", cu_seqlens_q, shape=("n + 1",), dtypes=_INTEGERS)
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError(complaint("cu_seqlens_q length", "at least 1", 0))
    check_tensor(
        "cu_seqlens_k", cuts_k, shape=cu_seqlens_q.shape, dtypes=_INTEGERS, device=cu_seqlens_q.device
    )
    q0, q1 = _sequences("seqused_q", cu_seqlens_q, seqused_q)
    k0, k1 = _sequences("seqused_k", cuts_k, seqused_k)
    return lower_windows(
        q0,
        q1,
        k0,
        k1,
        num_rows,
        num_cols,
        window=reach(window, causal),
        keep_first=size("keep_first", keep_first),
        force_fa_decode=force_fa_decode,
    )


def _sequences(name: str, cuts: torch.Tensor, used: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Begin and end of each sequence, int32."""
    begin, end = cuts[:-1].clamp(-_FAR, _FAR).to(torch.int32), cuts[1:].clamp(-_FAR, _FAR).to(torch.int32)
    if used is None:
        return begin, end
    check_tensor(name, used, shape=begin.shape, dtypes=_INTEGERS, device=cuts.device)
    return begin, torch.minimum(begin + used.clamp(0, _FAR).to(torch.int32), end)


def lower_windows(
    q0: torch.Tensor,
    q1: torch.Tensor,
    k0: torch.Tensor,
    k1: torch.Tensor,
    num_rows: int,
    num_cols: int,
    *,
    window: tuple[int | None, int | None] = (None, None),
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> torch.Tensor:
    """Windows aligned at the bottom-right corner of the rectangles [q0, q1) x [k0, k1), all (n,) int32.

    ``window`` is (left, right) as ``reach`` gives it: None for unlimited, right = 0 for causal.
    Returns (n, 6) int32, and n more bands for the first keys when ``keep_first`` has an effect.
    """
    left, right = window
    diagonal = k1 - q1
    valid = (q0 <= q1) & (k0 <= k1)
    lo = torch.full_like(q0, -INF) if left is None else diagonal - left
    hi = torch.full_like(q0, INF) if right is None else diagonal + right
    lo, hi = lo.clamp(min=-INF), hi.clamp(max=INF)
    if left is not None and force_fa_decode:
        lo = torch.where(q1 - q0 == 1, -INF, lo)
    table = _clipped(q0, q1, k0, k1, lo, hi, valid, num_rows, num_cols)
    if left is None or keep_first == 0:
        return table
    first_end = torch.minimum(k0 + min(keep_first, _FAR), k1)
    first = _clipped(
        q0,
        q1,
        k0,
        first_end,
        torch.full_like(lo, -INF),
        (lo - 1).clamp(min=-INF),
        valid & (lo > -INF),
        num_rows,
        num_cols,
    )
    return torch.cat([table, first])


def _clipped(
    q0: torch.Tensor,
    q1: torch.Tensor,
    k0: torch.Tensor,
    k1: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    valid: torch.Tensor,
    num_rows: int,
    num_cols: int,
) -> torch.Tensor:
    """(n, 6) int32 bands within the tensor; an invalid one keeps its corner and loses its extent."""
    q0, k0 = q0.clamp(0, num_rows), k0.clamp(0, num_cols)
    q1 = torch.where(valid, q1.clamp(0, num_rows), q0)
    k1 = torch.where(valid, k1.clamp(0, num_cols), k0)
    return torch.stack([q0, q1, k0, k1, lo, hi], dim=1)
