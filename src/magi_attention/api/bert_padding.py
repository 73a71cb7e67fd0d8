"""Padded batches to packed tokens and back, under the names of ``flash_attn.bert_padding``.

How many tokens a batch holds decides the shape of what comes back, so the ``unpad`` functions wait for the device.
``rearrange`` and ``repeat`` can be imported from here too if einops is installed.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn import functional as F

from magi_attention.errors import check_count, check_tensor, complaint

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INDICES = (torch.int64, torch.int32)


def __getattr__(name: str) -> Any:
    if name not in ("rearrange", "repeat"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("einops"), name)
    except ImportError as error:
        raise ImportError(
            complaint(name, "einops, which it belongs to", "no such package", "Run `pip install einops`.")
        ) from error


def index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``x[indices]`` along the first axis; what is taken twice collects both gradients.

    Args:
        x: (n, ...), any dtype.
        indices: (m,) int64 or int32 in [0, n), on x's device.

    Returns:
        (m, ...) like x.

    Raises:
        TypeError, ValueError: not tensors of these shapes, dtypes and devices; on the CPU, indices outside of x.
    """
    _check_rows("x", x)
    _check_indices(indices, x, x.shape[0])
    return x.index_select(0, indices)


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """Zeros, except for ``values`` at ``indices`` along the first axis.

    Args:
        values: (m, ...), any dtype.
        indices: (m,) int64 or int32 in [0, first_axis_dim), each at most once, on the device of values.
        first_axis_dim: n.

    Returns:
        (n, ...) like values.

    Raises:
        TypeError, ValueError: not tensors of these shapes, dtypes and devices; on the CPU, indices of n or more.
    """
    _check_rows("values", values)
    check_count("first_axis_dim", first_axis_dim)
    _check_indices(indices, values, first_axis_dim, length=values.shape[0])
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def index_first_axis_residual(x: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x[indices]``, and x to go on with; gradients of both reach x.

    Args:
        x: (n, ...), any dtype.
        indices: (m,) int64 or int32 in [0, n), on x's device.

    Returns:
        (m, ...), and (n, ...) in the memory of x.

    Raises:
        TypeError, ValueError: as ``index_first_axis``.
    """
    return index_first_axis(x, indices), x.view_as(x)


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Pack the tokens of a padded batch.

    Args:
        hidden_states: (b, s, ...), any dtype.
        attention_mask: (b, s) bool or integers, on the same device; what is not zero is a token.
        unused_mask: None, or likewise the tokens that are kept in memory although nobody attends to them.

    Returns:
        The tokens of both masks (nnz, ...) in the order of the batch, their places ``indices`` (nnz,) int64 among
        the b * s, ``cu_seqlens`` (b + 1,) int32 and the longest length (an int) of both masks together, and
        ``seqused`` (b,) int32, the lengths of ``attention_mask`` alone.

    Raises:
        TypeError, ValueError: not tensors of these shapes, dtypes and devices.
    """
    _check_batch(hidden_states, "attention_mask", attention_mask, (torch.bool, *_INTEGERS))
    used = attention_mask != 0
    stored = used
    if unused_mask is not None:
        _check_batch(hidden_states, "unused_mask", unused_mask, (torch.bool, *_INTEGERS))
        stored = used | (unused_mask != 0)
    lengths = stored.sum(dim=1, dtype=torch.int32)
    indices = stored.flatten().nonzero().flatten()
    longest = int(lengths.max()) if len(lengths) else 0
    seqused = used.sum(dim=1, dtype=torch.int32)
    return (
        hidden_states.flatten(0, 1).index_select(0, indices),
        indices,
        _cumulative(lengths),
        longest,
        seqused,
    )


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Pack a padded batch whose rows hold several sequences one after the other.

    Args:
        hidden_states: (b, s, ...), any dtype.
        attention_mask_in_length: (b, s) integers, on the same device. Each row lists the lengths of its sequences,
            in order; zeros are skipped. For s = 6, [2, 3, 0, 0, 0, 0] is a sequence of two tokens, one of three,
            and one token of padding.

    Returns:
        The tokens (nnz, ...), their places ``indices`` (nnz,) int64 among the b * s, ``cu_seqlens`` int32 of all n
        sequences (n + 1,), and the longest length (an int).

    Raises:
        TypeError: not tensors, or not of these dtypes.
        ValueError: wrong shapes or devices, negative lengths, or lengths that add up to more than s.
    """
    _check_batch(hidden_states, "attention_mask_in_length", attention_mask_in_length, _INTEGERS)
    seqlen = hidden_states.shape[1]
    totals = attention_mask_in_length.sum(dim=1)
    tokens = torch.arange(seqlen, device=totals.device) < totals[:, None]
    indices = tokens.flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    shortest = longest = total = 0
    if len(lengths):
        lengths = lengths.to(torch.int64)
        shortest, longest, total = torch.stack([lengths.min(), lengths.max(), lengths.sum()]).tolist()
    if shortest < 0:
        raise ValueError(complaint("attention_mask_in_length", "lengths of at least 0", shortest))
    if total != len(indices):
        expected = f"rows that add up to at most the {seqlen} tokens of a row"
        remedy = "Give each row the lengths of its own sequences, zeros behind."
        raise ValueError(complaint("attention_mask_in_length", expected, int(totals.max()), remedy))
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, _cumulative(lengths), longest


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Packed tokens back to their places in a padded batch: the inverse of ``unpad_input``.

    Args:
        hidden_states: (nnz, ...), any dtype.
        indices: (nnz,) int64 or int32, places among the batch * seqlen, each at most once, on the same device.
        batch, seqlen: sizes of the batch.

    Returns:
        (batch, seqlen, ...), zero where no token is.

    Raises:
        TypeError, ValueError: as ``index_put_first_axis``; batch or seqlen negative or no integer.
    """
    check_count("batch", batch)
    check_count("seqlen", seqlen)
    _check_rows("hidden_states", hidden_states)
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _check_rows(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dim() == 0:
        raise ValueError(complaint(f"{name} shape", "at least one axis", ()))


def _check_indices(indices: torch.Tensor, rows: torch.Tensor, end: int, length: int | None = None) -> None:
    shape = ("num_indices" if length is None else length,)
    check_tensor("indices", indices, shape=shape, dtypes=_INDICES, device=rows.device)
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or not indices.numel():
        return
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high >= end:
        got = low if low < 0 else high
        raise ValueError(complaint("indices", f"integers in [0, {end})", got))


def _check_batch(hidden_states: torch.Tensor, name: str, mask: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor("hidden_states", hidden_states)
    if hidden_states.dim() < 2:
        shape = tuple(hidden_states.shape)
        raise ValueError(complaint("hidden_states shape", "(batch, seqlen, ...)", shape))
    shape = tuple(hidden_states.shape[:2])
    remedy = "The mask has one entry per token, zero for padding."
    check_tensor(name, mask, shape=shape, dtypes=dtypes, device=hidden_states.device, remedy=remedy)
