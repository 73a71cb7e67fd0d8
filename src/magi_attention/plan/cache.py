"""Plans remembered by the identity and version of a band table, or by its content when the host can read it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from magi_attention.common.recent import Recent
from magi_attention.mask.bands import clip, transpose
from magi_attention.plan.tiles import TilePlan, build_plan

_MAX_ENTRIES = 256
_CPU = torch.device("cpu")


class PlanKey(NamedTuple):
    """What a plan depends on, beside the bands. A tuple, because every call looks one up."""

    num_rows: int
    num_cols: int
    block_rows: int
    block_cols: int
    transposed: bool
    device: torch.device


@dataclass(frozen=True)
class _Entry:
    # Holding the table keeps its memory, and so its address, from being given to another tensor.
    table: torch.Tensor | None
    plan: TilePlan
    stream: int
    ready: Any


class PlanCache:
    """Least-recently-used plans. Thread safe; the autograd engine asks from its own threads."""

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._entries: Recent[_Entry] = Recent(max_entries)
        self._captured: dict[int, TilePlan] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget every plan, but for those that captured graphs read."""
        self._entries.clear()

    def plan_for(self, table: torch.Tensor, key: PlanKey) -> TilePlan:
        """The plan of ``table`` under ``key``, built on the first request.

        A CPU table is planned on the host and copied to ``key.device``; a CUDA table is planned on its device without
        synchronisation. Inside a CUDA graph capture a device plan is always built anew, so that a replay follows the
        table's content.
        """
        capturing = key.device != _CPU and torch.cuda.is_current_stream_capturing()
        if table.is_cuda and (capturing or table.is_inference()):
            return _build(table, key)
        found = self._find(table, key, may_build=not capturing)
        if capturing:
            # The graph reads it at every replay: it stays for good. A capture begins with nothing left to wait for.
            self._captured[id(found.plan)] = found.plan
            return found.plan
        return _ordered(found)

    def _find(self, table: torch.Tensor, key: PlanKey, may_build: bool) -> _Entry:
        identity = None
        if not table.is_inference():
            identity = (table.data_ptr(), table._version, table.shape, table.stride(), key)
        found = self._entries.get(identity)
        if found is not None:
            return found
        content = None if table.is_cuda else (_digest(table), key)
        found = self._entries.get(content)
        if not may_build:
            if found is None:
                raise RuntimeError(
                    "plan of a host mask: expected it to be built before a CUDA graph capture begins, got a new mask. "
                    "Call the function once with this mask before capturing, or pass the ranges as CUDA tensors."
                )
            return found
        if found is None:
            found = _Entry(None, _build(table, key), *_stream_mark(key.device))
            if content is not None:
                self._entries.put(content, found)
        if identity is not None:
            self._entries.put(identity, replace(found, table=table))
        return found


def _stream_mark(device: torch.device) -> tuple[int, Any]:
    """The current stream, and an event on it that fires when what was queued so far is done."""
    if device.type != "cuda":
        return 0, None
    current = torch.cuda.current_stream(device)
    return current.cuda_stream, current.record_event()


def _ordered(entry: _Entry) -> TilePlan:
    """The entry's plan, for the current stream: it waits when another stream built it."""
    tiles = entry.plan.tiles
    if entry.ready is not None and current_stream(tiles.get_device()) != entry.stream:
        current = torch.cuda.current_stream(tiles.device)
        current.wait_event(entry.ready)
        for tensor in (tiles, entry.plan.band_list, entry.plan.bands):
            tensor.record_stream(current)
    return entry.plan


def current_stream(device_index: int) -> int:
    """Handle of the device's current stream; ``torch.cuda.current_stream`` would make an object of it in every call."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def _digest(table: torch.Tensor) -> bytes:
    return hashlib.blake2b(table.numpy().tobytes(), digest_size=16).digest()


def _build(table: torch.Tensor, key: PlanKey) -> TilePlan:
    if table.device.type != "cpu":
        from magi_attention.plan.device import build_device_plan

        return build_device_plan(
            table, key.num_rows, key.num_cols, key.block_rows, key.block_cols, transposed=key.transposed
        )
    bands = clip(table.numpy().astype(np.int64), (0, key.num_rows), (0, key.num_cols))
    rows = key.num_cols if key.transposed else key.num_rows
    plan = build_plan(transpose(bands) if key.transposed else bands, rows, key.block_rows, key.block_cols)
    if key.device.type == "cpu":
        return plan
    moved = {name: getattr(plan, name).to(key.device) for name in ("tiles", "band_list", "bands")}
    return replace(plan, **moved)


plan_cache = PlanCache()
"""The process's plan cache."""
