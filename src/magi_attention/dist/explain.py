"""A plan in words."""

from __future__ import annotations

from dataclasses import dataclass

from magi_attention.dist.chunks import Ints, sums, work_of
from magi_attention.dist.cost import Heads, Loads, Machine, step_us, strategy
from magi_attention.dist.exchange import Exchange
from magi_attention.mask.bands import Q1

MIB = 1 << 20


@dataclass(frozen=True)
class Choice:
    """Whether heads travel, or else keys and values, and the reason."""

    by_heads: bool
    reason: str


def explain_plan(
    exchange: Exchange,
    heads: Heads,
    *,
    num_nodes: int = 1,
    machine: Machine | None = None,
    choice: Choice | None = None,
    together: Ints | None = None,
) -> str:
    """Balance, keys and bytes to receive, stages and estimated times of a plan, as text.

    Args:
        num_nodes: of as many neighbouring ranks each. machine: whose times; by default ``Machine()``.
        choice: what travels, if that is decided.
        together: (r,) work of each rank over all masks that were balanced with this one, itself included.
    """
    machine, moved = machine or Machine(), exchange.traffic(num_nodes)
    loads = exchange.loads(num_nodes)
    degrees = sorted({0, 1, 2, 4, exchange.degree})
    times = {degree: step_us(loads, heads, degree, machine) for degree in degrees}
    what, best = strategy(loads, heads, num_nodes=num_nodes, machine=machine)
    mebibytes = moved.received * heads.kv_bytes / MIB
    lines = [
        f"{exchange.num_ranks} ranks on {num_nodes} node(s), {int(loads.rows.sum())} rows",
        f"work in whole tiles: largest over mean {_over_mean(tile_work(exchange))}",
    ]
    if together is not None:
        lines.append(f"with the masks that it is balanced with: {_over_mean(together)}")
    if choice is not None:
        lines.append(f"in use: {_named(choice.by_heads)} travel; {choice.reason}")
    if choice is not None and choice.by_heads:
        lines += [_moved_by_heads(loads, heads), "of the work each rank has as much; with keys and values:"]
    lines.append(
        f"keys received by a rank: most {moved.received.max()}, mean {moved.received.mean():.0f}"
        f" ({mebibytes.max():.1f} MiB, {mebibytes.mean():.1f} MiB of keys and values)"
    )
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
    lines.append(f"estimated best: {_named(what == 'heads')} travel, {best:.0f} us in all")
    return "\n".join(lines)


def tile_work(exchange: Exchange) -> Ints:
    """(r,) pairs in all tiles that hold a visible one of each rank's rows, as placement counts them."""
    pieces, rank = exchange.pieces
    work, which = work_of(pieces, int(pieces[:, Q1].max(initial=0)))
    return sums(work, rank[which], exchange.num_ranks)


def _named(by_heads: bool) -> str:
    return "heads" if by_heads else "keys and values"


def _moved_by_heads(loads: Loads, heads: Heads) -> str:
    """Rows of others with own heads before attention, and own rows with others' heads after it."""
    ranks, (keys, values) = len(loads), heads.widths
    given = heads.num_heads_q * keys * heads.element_size + heads.kv_bytes
    back = heads.num_heads_q * values * heads.element_size
    rows = int(loads.rows.sum()) - loads.rows
    mebibytes = (rows * given + loads.rows * (ranks - 1) * back) / (ranks * MIB)
    return (
        f"rows received by a rank, with 1 / {ranks} of the heads: most {rows.max()}, mean {rows.mean():.0f}"
        f" ({mebibytes.max():.1f} MiB, {mebibytes.mean():.1f} MiB with what comes back)"
    )


def _over_mean(values: Ints) -> str:
    total = int(values.sum())
    return f"{int(values.max()) * len(values) / total:.3f}" if total else "1.000"
