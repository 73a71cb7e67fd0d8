"""Bursts: how many calls a sample has, and what happens where capture fails."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import replay, timing


class FakeStream:
    def synchronize(self):
        pass


class FakeWatch:
    """Every call takes ``seconds``."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, call):
        return call(), lambda: self.seconds


@pytest.fixture
def device(monkeypatch):
    """Graphs that record what was called between begin and end, and replay it; or refuse to."""

    class Graph:
        def replay(self):
            for call in self.recorded:
                call()

    def install(refuse=False):
        @contextlib.contextmanager
        def capture(graph, stream):
            graph.recorded = []
            yield
            if refuse:
                raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    return install


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (1e-3, 4), (1.1e-3, 4), (1e-9, replay.MAX_CALLS)])
def test_a_sample_lasts_a_few_milliseconds(device, seconds, calls):
    device()
    burst = replay.burst_of(lambda: None, FakeStream(), FakeWatch(seconds))
    assert burst.calls == calls
    assert burst.how == f"graph replay, {calls} calls"


def test_a_sample_has_as_many_calls_as_it_is_told(device):
    device()
    cycle, seen = itertools.cycle("ab"), []
    burst = replay.burst_of(lambda: seen.append(next(cycle)), FakeStream(), FakeWatch(1.0), calls=6)
    assert burst.calls == 6 and burst.how == "graph replay, 6 calls"
    assert "".join(seen[1:]) == "bababa"  # one call before them, to warm up


def test_a_call_that_cannot_be_captured_is_queued_as_often(device):
    device(refuse=True)
    count = []
    burst = replay.burst_of(lambda: count.append(1), FakeStream(), FakeWatch(1e-3))
    assert burst.calls == 4 and "4 queued calls" in burst.how and "capturing" in burst.how
    count.clear()
    burst.go()
    assert len(count) == 4


def test_calls_that_are_not_to_be_captured_are_queued(device):
    device()
    count = []
    burst = replay.burst_of(lambda: count.append(1), FakeStream(), FakeWatch(1e-3), capture=False)
    assert burst.how.startswith("4 queued calls")
    count.clear()
    burst.go()
    assert len(count) == 4


def test_a_graph_keeps_the_tensors_of_its_call(device):
    device()

    def call():
        return None

    assert replay.burst_of(call, FakeStream(), FakeWatch(1e-3)).call is call


def test_a_lap_is_divided_by_the_calls_of_its_burst():
    bursts = {
        name: replay.Burst(lambda: None, lambda: None, calls, "")
        for name, calls in (("forward", 4), ("backward", 2))
    }
    entrant = replay.Repeated("x", lambda q, k, v: q, (torch.ones(1),) * 4, bursts=bursts)
    assert entrant.lap(FakeWatch(1.0), timing.DIRECTIONS) == {"forward": 0.25, "backward": 0.5}


def test_the_backward_of_one_forward_is_repeated():
    leaves = tuple(torch.ones(3, requires_grad=True) for _ in range(3))
    forwards = []

    def run(q, k, v):
        forwards.append(1)
        return q * k * v

    single = timing.Entrant("x", run, (*leaves, torch.ones(3)))
    entrant = replay.repeated(single, timing.DIRECTIONS, timing.WallStopwatch())
    assert not entrant.failure
    forwards.clear()
    for _ in range(3):
        entrant.bursts["backward"].go()
    assert forwards == []
    timing.race([entrant], timing.WallStopwatch(), timing.DIRECTIONS, rounds=2, limit_seconds=10.0, warmup=0)
    assert {name: len(samples) for name, samples in entrant.seconds.items()} == {"forward": 2, "backward": 2}


def test_an_entrant_that_failed_before_the_race_keeps_its_reason():
    def run(q, k, v):
        raise RuntimeError("no such kernel")

    single = timing.Entrant("x", run, tuple(torch.ones(3) for _ in range(4)))
    entrant = replay.repeated(single, ("forward",), timing.WallStopwatch())
    timing.race([entrant], timing.WallStopwatch(), ("forward",), rounds=2, limit_seconds=10.0)
    assert "no such kernel" in entrant.failure and entrant.seconds == {}
