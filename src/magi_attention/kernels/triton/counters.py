"""Counters that kernels find at zero and leave at zero, so that no launch has to clear them.

Each stream has its own, and each call that a CUDA graph captures: launches that may run at the same time never share
one.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

_RESERVE = 1 << 20
_ALIGN = 4
"""Counters in 16 bytes: Triton compiles anew for a pointer that is not at whole ones."""


@dataclass
class _Reserve:
    """The counters of a device: how many are given away, and to which stream."""

    counters: torch.Tensor
    given: int = 0
    of_streams: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, count: int) -> torch.Tensor | None:
        """Counters that nobody has; None when they have run out."""
        if self.given + count > len(self.counters):
            return None
        self.given += count
        return self.counters[self.given - count : self.given]


_reserves: dict[torch.device, _Reserve] = {}
_lock = threading.Lock()


def zeroed(count: int, device: torch.device) -> torch.Tensor:
    """At least ``count`` int32 zeros for one launch on the current stream, which must leave zeros."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    count = -(-count // _ALIGN) * _ALIGN
    with _lock:
        found = (
            _captured(count, device) if torch.cuda.is_current_stream_capturing() else _eager(count, device)
        )
    return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found


def _captured(count: int, device: torch.device) -> torch.Tensor | None:
    reserve = _reserves.get(device)
    return None if reserve is None else reserve.take(count)


def _eager(count: int, device: torch.device) -> torch.Tensor | None:
    if device not in _reserves:
        _reserves[device] = _Reserve(_allocate(device))
    reserve, stream = _reserves[device], torch.cuda.current_stream(device).cuda_stream
    own = reserve.of_streams.get(stream)
    if own is None or len(own) < count:
        # Twice as many as asked for: what a stream has had before is lost.
        own = reserve.take(2 * count)
        if own is not None:
            reserve.of_streams[stream] = own
    return own


def _allocate(device: torch.device) -> torch.Tensor:
    """From the common pool: a compiler's or a graph's private one serves this thread, and takes its memory back."""

    def make() -> torch.Tensor:
        counters = torch.zeros(_RESERVE, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        return counters

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(make).result()
