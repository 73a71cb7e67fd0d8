"""Estimates: what they count, what follows from them, and a plan in words."""

from __future__ import annotations

import numpy as np
import pytest

from magi_attention.config import BalancedDispatchAlg
from magi_attention.dist.chunks import cut
from magi_attention.dist.cost import (
    Heads,
    Link,
    Loads,
    Machine,
    attention_us,
    choose_degree,
    step_us,
    strategy,
    transfer_us,
)
from magi_attention.dist.exchange import Exchange
from magi_attention.dist.explain import explain_plan
from magi_attention.dist.placement import place
from magi_attention.mask import Mask

HEADS = Heads(64, 8, 128)


def loads(rows: int, own: int, remote: int, received: int, ranks: int = 8, abroad: int = 0) -> Loads:
    return Loads(*(np.full(ranks, x, dtype=np.int64) for x in (rows, own, remote, received, abroad)))


def test_operations_and_bytes():
    assert HEADS.operations(1000, "forward") == 4 * 1000 * 64 * 128
    assert HEADS.operations(1000, "backward") == 10 * 1000 * 64 * 128
    assert Heads(4, 4, 192, 128).operations(1, "forward") == 2 * 4 * 320
    assert (HEADS.kv_bytes, Heads(8, 1, 64, 32, 4, 2).kv_bytes) == (4096, 384)
    assert Heads(8, 1, 64, 32, 4, 2).kv_gradient_bytes == 192
    machine = Machine(forward_tflops=1.0, intra=Link(10.0, 1.0), inter=Link(100.0, 0.5))
    assert attention_us(1000, HEADS, "forward", machine) == pytest.approx(32.768)
    assert transfer_us(3, 0, 1000, machine) == pytest.approx(13.0)
    assert transfer_us(3, 2, 1000, machine) == pytest.approx(115.0)  # one hop behind the other
    assert transfer_us(0, 0, 1000, machine) == 0


def test_the_slowest_rank_counts():
    even = loads(8192, 10**8, 10**8, 10**4)
    one = Loads(even.rows, even.own.copy(), even.remote, even.received)
    one.own[3] *= 2
    assert step_us(one, HEADS, 1, Machine()) > step_us(even, HEADS, 1, Machine())


@pytest.mark.parametrize(
    ("machine", "case", "expected"),
    [
        (Machine(), loads(64, 10**4, 10**4, 32), {0}),
        (Machine(), loads(8192, 3 * 10**8, 10**8, 10**4), {0, 1}),
        (Machine(intra=Link(20.0, 5.0)), loads(8192, 10**8, 10**9, 10**5), set(range(2, 9))),
        (Machine(), loads(8192, 10**8, 0, 0), {0}),
    ],
)
def test_degrees(machine, case, expected):
    assert choose_degree(case, HEADS, 8, machine) in expected


def test_slower_links_and_computation_scale():
    scaled = Machine().scaled(2.0, 3.0)
    assert scaled.forward_tflops == Machine().forward_tflops / 2
    assert scaled.inter.gb_per_s == pytest.approx(Machine().inter.gb_per_s / 3)


def test_strategies():
    """Heads travel where the work of ranks differs much, and never where there are too few of them."""
    even, uneven = loads(8192, 10**8, 10**8, 2 * 10**4), loads(8192, 10**8, 4 * 10**9, 57344)
    uneven.own[0] = 6 * 10**9
    assert strategy(even, HEADS)[0] == "kv"
    name, us = strategy(uneven, HEADS)
    assert name == "heads" and us < sum(step_us(uneven, HEADS, 1, Machine()))
    assert strategy(uneven, Heads(64, 4, 128))[0] == "kv"
    apart = Machine(inter=Link(30.0, 0.05))
    assert strategy(uneven, HEADS, num_nodes=2, machine=apart)[0] == "kv"


def test_refusals():
    with pytest.raises(ValueError, match="num_heads_q: expected a multiple of num_heads_kv 3, got 8"):
        Heads(8, 3, 64)
    with pytest.raises(ValueError, match="gb_per_s: expected above 0, got 0"):
        Link(1.0, 0)
    with pytest.raises(ValueError, match="num_nodes: expected a divisor of the 8 ranks, got 3"):
        strategy(loads(1, 1, 1, 1), HEADS, num_nodes=3)


def test_a_plan_in_words():
    mask = Mask.varlen([0, 3000, 3100, 8000, 16384], causal=True)
    chunks = cut(mask.bands, 16384, 16384, 512)
    parts = place(BalancedDispatchAlg(), chunks, 4, 2)
    ranges = [chunks.rows[part] for part in parts]
    exchange = Exchange(mask.bands, ranges, ranges, 3)
    text = explain_plan(exchange, HEADS, num_nodes=2)
    work = [chunks.work[part].sum() for part in parts]
    assert text.startswith("4 ranks on 2 node(s), 16384 rows")
    assert f"largest over mean {max(work) / np.mean(work):.3f}" in text
    assert f"most {exchange.received.max()}, mean {exchange.received.mean():.0f}" in text
    assert f"stages: {exchange.num_stages} (degree 3)" in text
    assert "each key comes to a node once" in text and "estimated us with degree 3:" in text
    nothing = Exchange(np.zeros((0, 6), dtype=np.int64), ranges, ranges)
    assert "most 0, mean 0" in explain_plan(nothing, HEADS)
