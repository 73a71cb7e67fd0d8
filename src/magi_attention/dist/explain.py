"""A plan in words."""

from __future__ import annotations

import numpy as np

from magi_attention.dist.chunks import Chunks, Ints
from magi_attention.dist.cost import Heads, Machine, step_us, strategy
from magi_attention.dist.exchange import Exchange


def explain_plan(
    exchange: Exchange,
    heads: Heads,
    *,
    chunks: Chunks | None = None,
    parts: list[list[int]] | None = None,
    num_nodes: int = 1,
    machine: Machine | None = None,
) -> str:
    """Balance, keys and bytes to receive, stages and estimated times of a plan, as text.

    Args:
        chunks, parts: what was placed and where; without them the balance is that of visible pairs.
        num_nodes: of as many neighbouring ranks each. machine: whose times; by default ``Machine()``.
    """
    machine, moved = machine or Machine(), exchange.traffic(num_nodes)
    loads = exchange.loads(num_nodes)
    work = loads.own + loads.remote
    if chunks is not None and parts is not None:
        work = np.array([chunks.work[part].sum() for part in parts])
    degrees = sorted({0, 1, 2, 4, exchange.degree})
    times = {degree: step_us(loads, heads, degree, machine) for degree in degrees}
    what, best = strategy(loads, heads, num_nodes=num_nodes, machine=machine)
    mebibytes = moved.received * heads.kv_bytes / (1 << 20)
    lines = [
        f"{exchange.num_ranks} ranks on {num_nodes} node(s), {int(loads.rows.sum())} rows",
        f"work in whole tiles: largest over mean {_over_mean(work)}",
        f"keys received by a rank: most {moved.received.max()}, mean {moved.received.mean():.0f}"
        f" ({mebibytes.max():.1f} MiB, {mebibytes.mean():.1f} MiB of keys and values)",
    ]
    if num_nodes > 1:
        lines.append(
            f"from other nodes: most {moved.between.max()}, mean {moved.between.mean():.0f} needed by a rank;"
            f" each key comes to a node once, {moved.once.sum() / exchange.num_ranks:.0f} a rank"
        )
    lines.append(f"stages: {exchange.num_stages} (degree {exchange.degree})")
    lines += [
        f"estimated us with degree {degree}: {forward:.0f} forward, {backward:.0f} backward"
        for degree, (forward, backward) in times.items()
    ]
    lines.append(
        f"estimated best: {'keys and values' if what == 'kv' else 'heads'} travel, {best:.0f} us in all"
    )
    return "\n".join(lines)


def _over_mean(values: Ints) -> str:
    total = int(values.sum())
    return f"{int(values.max()) * len(values) / total:.3f}" if total else "1.000"
