"""Plans remembered by the identity and version of a band table, or by its content when the host can read it."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from magi_attention.mask.bands import clip, transpose
from magi_attention.plan.tiles import TilePlan, build_plan

_MAX_ENTRIES = 256


@dataclass(frozen=True)
class PlanKey:
    """What a plan depends on, beside the bands."""

    num_rows: int
    num_cols: int
    block_rows: int
    block_cols: int
    transposed: bool
    device: torch.device


@dataclass
class _Entry:
    # Holding the table keeps its memory, and so its address, from being given to another tensor.
    table: torch.Tensor | None
    plan: TilePlan
    stream: int
    ready: Any


class PlanCache:
    """Least-recently-used plans. Thread safe; the autograd engine asks from its own threads."""

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._max_entries = max_entries
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget every plan."""
        with self._lock:
            self._entries.clear()

    def plan_for(self, table: torch.Tensor, key: PlanKey) -> TilePlan:
        """The plan of ``table`` under ``key``, built on the first request.

        A CPU table is planned on the host and copied to ``key.device``; a CUDA table is planned on its device without
        synchronisation. Inside a CUDA graph capture a device plan is always built anew, so that a replay follows the
        table's content.
        """
        capturing = key.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if table.is_cuda and (capturing or table.is_inference()):
            return _build(table, key)
        by_identity = (
            None
            if table.is_inference()
            else (table.data_ptr(), table._version, table.shape, table.stride(), key)
        )
        found = self._get(by_identity)
        if found is not None:
            return found
        by_content = None if table.is_cuda else (_digest(table), key)
        plan = self._get(by_content)
        if plan is None:
            if capturing:
                raise RuntimeError(
                    "plan of a host mask: expected it to be built before a CUDA graph capture begins. Call the function "
                    "once with this mask before capturing, or pass the ranges as CUDA tensors."
                )
            plan = _build(table, key)
            self._put(by_content, None, plan, key.device)
        self._put(by_identity, table, plan, key.device)
        return plan

    def _get(self, name: tuple | None) -> TilePlan | None:
        if name is None:
            return None
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return None
            self._entries.move_to_end(name)
        _order_after(entry)
        return entry.plan

    def _put(
        self, name: tuple | None, table: torch.Tensor | None, plan: TilePlan, device: torch.device
    ) -> None:
        if name is None:
            return
        stream, ready = 0, None
        if device.type == "cuda":
            current = torch.cuda.current_stream(device)
            stream, ready = current.cuda_stream, current.record_event()
        with self._lock:
            self._entries[name] = _Entry(table, plan, stream, ready)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)


def _order_after(entry: _Entry) -> None:
    """Make the current stream wait for a plan that another stream built."""
    if entry.ready is None:
        return
    current = torch.cuda.current_stream(entry.plan.tiles.device)
    if current.cuda_stream != entry.stream:
        current.wait_event(entry.ready)
        for tensor in (entry.plan.tiles, entry.plan.band_list, entry.plan.bands):
            tensor.record_stream(current)


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
