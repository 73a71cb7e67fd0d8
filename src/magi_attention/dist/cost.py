"""Microseconds of a plan: attention by the work in whole tiles, keys by bytes and links, and what is chosen by them.

Estimates decide how many stages there are and whether keys or heads travel, on every rank alike: plain operations on
numbers that all ranks have, without sums whose order depends on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from magi_attention.dist.chunks import Ints
from magi_attention.errors import check_count, check_number, check_type, complaint

DIRECTIONS = ("forward", "backward")
MERGED_BYTES = {"forward": 22, "backward": 33}
"""Bytes of memory's time that a further call takes for an element of the output, or of the gradient of queries.

From a second call's time on an H200, 64k tokens of documents on two ranks. The output is written, read, written and
rounded in fp32 (18 bytes), tiles without keys too; the backward fills, rounds and adds a gradient, and sums rows again.
"""


@dataclass(frozen=True)
class Link:
    """How long bytes take from one rank to the others.

    Attributes:
        latency_us: of a collective call. gb_per_s: of each rank, in one direction, all-to-all.
    """

    latency_us: float
    gb_per_s: float

    def __post_init__(self) -> None:
        for name in ("latency_us", "gb_per_s"):
            check_number(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ValueError(complaint(name, "above 0", getattr(self, name)))

    def us(self, num_bytes: float) -> float:
        """Microseconds for so many bytes, 0 for none."""
        return self.latency_us + num_bytes / (self.gb_per_s * 1e3) if num_bytes else 0.0


NVLINK = Link(20.0, 300.0)
INFINIBAND = Link(30.0, 45.0)
GLOO = Link(200.0, 1.0)


@dataclass(frozen=True)
class Machine:
    """What estimates are made of; the defaults are those of H200 nodes.

    The rates of operations are what our kernels reached on an H200 for long bf16 sequences with head dimension 128, the
    one forward less a tenth for transfers beside them; the memory's is lowered, too. Bandwidths of NVLink and
    of 400 Gb/s InfiniBand were not measured by us: they are effective all-to-all rates as they are reported. Latencies
    and the time of a call are assumed.

    Attributes:
        forward_tflops, backward_tflops: operations on pairs of whole tiles. memory_gb_per_s: of merging partial results.
        call_us: of one more attention call on the device. intra, inter: links within and between nodes.
    """

    forward_tflops: float = 620.0
    backward_tflops: float = 560.0
    memory_gb_per_s: float = 4000.0
    call_us: float = 15.0
    intra: Link = NVLINK
    inter: Link = INFINIBAND

    def scaled(self, calc: float, comm: float) -> Machine:
        """With computation ``calc`` times as slow, and bytes ``comm`` times."""
        intra, inter = (replace(link, gb_per_s=link.gb_per_s / comm) for link in (self.intra, self.inter))
        rates = self.forward_tflops / calc, self.backward_tflops / calc
        return replace(self, forward_tflops=rates[0], backward_tflops=rates[1], intra=intra, inter=inter)


CPU = Machine(0.1, 0.08, 5.0, 100.0, GLOO, GLOO)
"""Two cores and gloo. The forward rate was measured, the others are assumed."""


@dataclass(frozen=True)
class Heads:
    """What a row consists of.

    Attributes:
        num_heads_q, num_heads_kv: heads. head_dim, head_dim_v: of keys, and of values if that differs.
        element_size: bytes of a number. gradient_size: bytes of one of a gradient that travels.
    """

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int | None = None
    element_size: int = 2
    gradient_size: int = 2

    def __post_init__(self) -> None:
        for name in ("num_heads_q", "num_heads_kv", "head_dim", "element_size", "gradient_size"):
            check_count(name, getattr(self, name))
        if self.num_heads_kv < 1 or self.num_heads_q % self.num_heads_kv:
            raise ValueError(
                complaint("num_heads_q", f"a multiple of num_heads_kv {self.num_heads_kv}", self.num_heads_q)
            )

    @property
    def widths(self) -> tuple[int, int]:
        """Head dimensions of keys and values."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    def operations(self, work: int, direction: str) -> int:
        """Operations on ``work`` pairs: two products of matrices forward, five backward."""
        keys, values = self.widths
        return (
            2 * work * self.num_heads_q * (keys + values if direction == "forward" else 3 * keys + 2 * values)
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.num_heads_kv * sum(self.widths) * self.element_size

    @property
    def kv_gradient_bytes(self) -> int:
        """Bytes of their gradients."""
        return self.num_heads_kv * sum(self.widths) * self.gradient_size


TYPICAL = Heads(64, 8, 128)
"""Where nobody says otherwise."""


@dataclass(frozen=True, eq=False)
class Loads:
    """What each rank does: integers of shape (r,).

    Attributes:
        rows: its queries. own, remote: pairs in whole tiles with its own keys, and with those of others.
        received: keys of others. abroad: those that come to it from other nodes, for its whole node, all 0 without nodes.
    """

    rows: Ints
    own: Ints
    remote: Ints
    received: Ints
    abroad: Ints | None = None

    def __len__(self) -> int:
        return len(self.rows)


def attention_us(work: int, heads: Heads, direction: str, machine: Machine) -> float:
    """Microseconds of ``work`` pairs in whole tiles, without that of the call."""
    rate = machine.forward_tflops if direction == "forward" else machine.backward_tflops
    return heads.operations(int(work), direction) / (rate * 1e6)


def transfer_us(received: int, abroad: int, token_bytes: int, machine: Machine) -> float:
    """Microseconds of tokens from other nodes, and of handing on within the node what a rank does not bring itself."""
    near = machine.intra.us(max(received - abroad, 0) * token_bytes)
    return near + machine.inter.us(abroad * token_bytes)


def step_us(loads: Loads, heads: Heads, degree: int, machine: Machine) -> tuple[float, float]:
    """Microseconds forward and backward of the rank that takes longest, with ``degree`` stages."""
    abroad = np.zeros_like(loads.received) if loads.abroad is None else loads.abroad
    table = np.column_stack([loads.rows, loads.own, loads.remote, loads.received, abroad])
    ranks = [tuple(row) for row in np.unique(table, axis=0).tolist()]
    forward, backward = (
        max((_rank_us(rank, heads, degree, each, machine) for rank in ranks), default=0.0)
        for each in DIRECTIONS
    )
    return forward, backward


def _rank_us(rank: tuple[int, ...], heads: Heads, degree: int, direction: str, machine: Machine) -> float:
    """A stage travels while the one before is computed; backward the gradients of another one go home meanwhile."""
    rows, own, remote, received, abroad = rank
    parts = max(degree, 1)
    local, other = (attention_us(work, heads, direction, machine) for work in (own, remote))
    # A token's latency is paid by each stage, its bytes by one.
    cast = transfer_us(-(-received // parts), -(-abroad // parts), heads.kv_bytes, machine)
    back = 0.0
    if direction == "backward":
        back = transfer_us(-(-received // parts), -(-abroad // parts), heads.kv_gradient_bytes, machine)
    if degree == 0 or not received:
        return cast + machine.call_us + local + other + back
    # Whatever it computes, a further call takes time for each row.
    row_bytes = MERGED_BYTES[direction] * heads.num_heads_q * max(heads.widths)
    merge = rows * row_bytes / (machine.memory_gb_per_s * 1e3)
    local, stage = local + machine.call_us, other / parts + machine.call_us + merge
    return max(cast, local) + (parts - 1) * max(cast, stage, back) + stage + back


def choose_degree(loads: Loads, heads: Heads, most: int, machine: Machine | None = None) -> int:
    """The stages, 0 to ``most``, whose forward and backward take the least together; the fewer of equal ones."""
    check_type("heads", heads, Heads)
    return min(range(most + 1), key=lambda degree: sum(step_us(loads, heads, degree, machine or Machine())))


def heads_us(loads: Loads, heads: Heads, machine: Machine, num_nodes: int = 1) -> tuple[float, float]:
    """Microseconds forward and backward if each rank computes some heads of all rows.

    Queries, keys, values and outputs travel, of each rank's rows all but its own part, and backward beside them the
    gradients of all four; nothing is computed meanwhile. All rows are put in order before and after, read and written
    twice.
    """
    ranks = len(loads)
    keys, values = heads.widths
    rows, away = int(loads.rows.max(initial=0)), ranks - ranks // num_nodes
    query, out = heads.num_heads_q * keys, heads.num_heads_q * values
    back_and_forth = query + out + heads.num_heads_kv * (keys + values)
    total = int((loads.own + loads.remote).sum())
    found = []
    for direction in DIRECTIONS:
        size = back_and_forth * heads.element_size
        if direction == "backward":
            size += (query + out) * heads.element_size + heads.num_heads_kv * (
                keys + values
            ) * heads.gradient_size
        near, far = (rows * size * part // ranks for part in (ranks - away - 1, away))
        travel = max(machine.intra.us(near), machine.inter.us(far))
        latency = machine.inter.latency_us if num_nodes > 1 else machine.intra.latency_us
        compute = attention_us(-(-total // ranks), heads, direction, machine)
        order = 4 * rows * size / (machine.memory_gb_per_s * 1e3)
        found.append(travel + latency + order + machine.call_us + compute)  # there and back are two calls
    return found[0], found[1]


def strategy(
    loads: Loads,
    heads: Heads,
    *,
    degree: int | None = None,
    num_nodes: int = 1,
    machine: Machine | None = None,
) -> tuple[str, float]:
    """What had better travel, and the microseconds of forward and backward together.

    Args:
        degree: stages if keys travel; None for the best of at most 8.

    Returns:
        "kv", keys and values to the rows that see them; or "heads", rows to the rank that computes their heads, which
        needs ``num_heads_kv`` to be a multiple of the ranks. "kv" if both take as long.
    """
    machine = machine or Machine()
    if len(loads) % num_nodes:
        raise ValueError(complaint("num_nodes", f"a divisor of the {len(loads)} ranks", num_nodes))
    degree = choose_degree(loads, heads, 8, machine) if degree is None else degree
    kv = sum(step_us(loads, heads, degree, machine))
    if heads.num_heads_kv % len(loads) == 0:
        by_heads = sum(heads_us(loads, heads, machine, num_nodes))
        if by_heads < kv:
            return "heads", by_heads
    return "kv", kv
