"""Samples of several calls in a row: replays of a captured CUDA graph where capture works, else queued calls.

A replay has no host time between its kernels. Calls queued one after the other have none either, as long as the
host enqueues faster than the device works, which bursts of a few milliseconds of the sizes measured here keep.
The backward of a burst is repeated on one forward: ``torch.autograd.grad(..., retain_graph=True)``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.peers import first_line
from benchmarks.timing import CudaStopwatch, Entrant, WallStopwatch

SAMPLE_SECONDS = 4e-3
MAX_CALLS = 32

Call = Callable[[], Any]


@dataclass(frozen=True)
class Burst:
    """``go()`` enqueues ``calls`` calls of ``call``; ``how`` says in which way.

    A captured graph reads the tensors of ``call`` but does not hold them: the burst does.
    """

    go: Call
    call: Call
    calls: int
    how: str


@dataclass
class Repeated(Entrant):
    """An entrant whose lap is one burst per direction.

    Attributes:
        stream: where everything runs; None on the CPU. The nodes of a backward run on the stream of their forward, so
            that stream is the one a capture must listen to.
        bursts: by direction.
    """

    stream: torch.cuda.Stream | None = None
    bursts: dict[str, Burst] = field(default_factory=dict)

    def lap(self, watch: CudaStopwatch | WallStopwatch, directions: tuple[str, ...]) -> dict[str, float]:
        """Seconds of one call by direction, of those that there are bursts of."""
        with on_stream(self.stream):
            mine = [direction for direction in directions if direction in self.bursts]
            readings = {direction: watch(self.bursts[direction].go)[1] for direction in mine}
            return {
                direction: reading() / self.bursts[direction].calls for direction, reading in readings.items()
            }


def on_stream(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[Any]:
    """``stream`` as the current one; nothing for None."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def repeated(
    entrant: Entrant,
    directions: tuple[str, ...],
    watch: CudaStopwatch | WallStopwatch,
    capture: bool = True,
    calls: int | None = None,
) -> Repeated:
    """``entrant`` with bursts instead of single calls; ``failure`` is set when a call raises.

    Without ``capture`` the calls of a burst are queued, not captured. ``calls``: of a burst; None makes it last a few
    milliseconds.
    """
    q, k, v, dout = entrant.leaves
    stream = torch.cuda.Stream(q.device) if q.is_cuda else None
    result = Repeated(entrant.name, entrant.run, entrant.leaves, stream=stream)
    try:
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(q.device))
        with on_stream(stream):
            out = entrant.run(q, k, v)
            single: dict[str, Call] = {
                "forward": lambda: entrant.run(q, k, v),
                "backward": lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
            }
            for direction in directions:
                burst = burst_of(single[direction], stream, watch, capture, calls)
                result.bursts[direction] = burst
                result.timed[direction] = burst.how
    except Exception as error:
        result.failure = first_line(error)
    return result


def burst_of(
    call: Call,
    stream: torch.cuda.Stream | None,
    watch: CudaStopwatch | WallStopwatch,
    capture: bool = True,
    calls: int | None = None,
) -> Burst:
    """Calls it until warm, and decides how many calls a sample has, unless told. ``stream`` is current."""
    call()
    if stream is None:
        return Burst(call, call, 1, WallStopwatch.how)
    if calls is None:
        seconds = watch(call)[1]()
        calls = min(MAX_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))
    if not capture:
        return _queued(call, calls, "not wanted")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
    except Exception as error:  # what cannot be captured fails in as many ways as there are libraries
        torch.cuda.synchronize()
        return _queued(call, calls, first_line(error))
    return Burst(graph.replay, call, calls, f"graph replay, {calls} calls")


def _queued(call: Call, calls: int, reason: str) -> Burst:
    def go() -> None:
        for _ in range(calls):
            call()

    return Burst(go, call, calls, f"{calls} queued calls (no capture: {reason})")
