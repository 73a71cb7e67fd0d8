"""Stopwatches and interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.peers import Run, first_line

FLUSH_BYTES = 1 << 30
DIRECTIONS = ("forward", "backward")


class CudaStopwatch:
    """Device time of what a call enqueues.

    Before each call a buffer larger than the L2 cache is overwritten. That evicts the inputs, and it keeps
    the device busy while the host enqueues, so that Python's launch latency stays out of the figure.
    """

    how = "events around one call"

    def __init__(self, device: torch.device) -> None:
        total = torch.cuda.get_device_properties(device).total_memory
        self.flush = torch.empty(min(FLUSH_BYTES, total // 16), dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        """The call's result, and a function that waits for the device and returns seconds."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        result = call()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3

        return result, seconds


class WallStopwatch:
    """Wall-clock time of a call on the CPU."""

    how = "wall clock of one call"

    def __call__(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        begin = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begin
        return result, lambda: elapsed


def stopwatch(device: torch.device) -> CudaStopwatch | WallStopwatch:
    return CudaStopwatch(device) if device.type == "cuda" else WallStopwatch()


@dataclass
class Entrant:
    """A checked subject in the rounds of one configuration.

    Attributes:
        name: the subject's name.
        run: its prepared function.
        leaves: q, k, v, dout in its layout.
        seconds: direction to the samples taken so far.
        failure: why it left the race, or "".
        timed: direction to how a sample is taken, where it is not the stopwatch's own way.
    """

    name: str
    run: Run
    leaves: tuple[torch.Tensor, ...]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failure: str = ""
    timed: dict[str, str] = field(default_factory=dict)

    def lap(self, watch: CudaStopwatch | WallStopwatch, directions: tuple[str, ...]) -> dict[str, float]:
        """One forward, and one backward of it when wanted; seconds by direction."""
        q, k, v, dout = self.leaves
        out, forward = watch(lambda: self.run(q, k, v))
        readings = {"forward": forward}
        if "backward" in directions:
            _, readings["backward"] = watch(lambda: torch.autograd.grad(out, (q, k, v), dout))
        return {direction: readings[direction]() for direction in directions}


def race(
    entrants: list[Entrant],
    watch: CudaStopwatch | WallStopwatch,
    directions: tuple[str, ...],
    rounds: int,
    limit_seconds: float,
    warmup: int = 2,
) -> None:
    """Round-robin laps, so that clocks and temperature drift alike for all; fills ``entrant.seconds``.

    The first of each round changes. Past ``limit_seconds`` no further round begins, except that every entrant
    gets one timed lap.
    """
    start = time.perf_counter()
    racing = [entrant for entrant in entrants if not entrant.failure]
    for lap in range(warmup + rounds):
        late = time.perf_counter() - start > limit_seconds
        if late and lap > warmup:
            return
        if late and 0 < lap < warmup:
            continue
        shift = lap % max(1, len(racing))
        for entrant in racing[shift:] + racing[:shift]:
            try:
                readings = entrant.lap(watch, directions)
            except Exception as error:
                entrant.failure = first_line(error)
                continue
            if lap >= warmup:
                for direction, seconds in readings.items():
                    entrant.seconds.setdefault(direction, []).append(seconds)
        racing = [entrant for entrant in racing if not entrant.failure]


def summary(samples: list[float]) -> dict[str, float]:
    """Median and quartiles in seconds."""
    q1, median, q3 = np.percentile(samples, [25, 50, 75]).tolist()
    return {"seconds": median, "seconds_q1": q1, "seconds_q3": q3, "rounds": len(samples)}
