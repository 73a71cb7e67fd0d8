"""Plans of context parallelism, simulated: how long one takes, how even the work is, how many keys travel. No GPU.

    python benchmarks/planner.py --json benchmarks/results/planner.json

Packs of documents with 8192 tokens a rank, nodes of eight ranks. Before a plan is timed it is checked: shares of ranks
hold every visible pair of their rows, and senders send what receivers expect.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.report import Report, environment
from magi_attention import config
from magi_attention.dist.chunks import Chunks, Ints, cut
from magi_attention.dist.cost import Heads
from magi_attention.dist.exchange import Exchange, Share
from magi_attention.dist.placement import Partition, place
from magi_attention.mask import Mask
from magi_attention.mask.bands import areas

TOKENS_A_RANK, RANKS_A_NODE, CHUNK = 8192, 8, 1024
HEADS = Heads(64, 8, 128)
REPEATS = 7
CHECKED = 16
"""Ranks whose shares are checked."""

# Share of documents by length, in percent, as MagiAttention's benchmarks draw them: at the middle of a bin.
LENGTHS = {
    (0, 10): 0.22,
    (11, 50): 2.91,
    (51, 100): 5.20,
    (101, 200): 10.23,
    (201, 500): 28.19,
    (501, 1024): 24.64,
    (1025, 2048): 15.65,
    (2049, 4096): 7.34,
    (4097, 8192): 3.05,
    (8193, 16384): 1.29,
    (16385, 32768): 0.85,
    (32769, 65536): 0.14,
    (65537, 131072): 0.17,
    (131073, 196608): 0.14,
}
DRAWS = 20000
PACKS = {8: 10, 16: 5, 32: 3, 64: 3}
"""Packs that figures are the means of, by ranks; else one."""

TARGETS = [
    (8, "min-heap", "plan_ms", 3.0),
    (8, "balanced", "plan_ms", 10.0),
    (64, "min-heap", "plan_ms", 15.0),
    (64, "balanced", "plan_ms", 60.0),
    (1024, "balanced", "plan_ms", 2000.0),
    (8, "balanced", "received_most", 15000.0),
    (8, "balanced", "imbalance", 1.05),
]


def packs(tokens: int, count: int, seed: int) -> list[Ints]:
    """Boundaries of documents, none longer than a quarter of the pack; the last one is cut off."""
    rng = np.random.default_rng(seed)
    weights = np.array(list(LENGTHS.values()))
    middles = np.array([(low + high) // 2 for low, high in LENGTHS])
    most, draws = (
        tokens // 4,
        rng.choice(middles, max(DRAWS, count * tokens // 400), p=weights / weights.sum()),
    )
    rest = draws % most
    pieces = np.concatenate([np.full(int((draws // most).sum()), most), rest[rest > 0]])
    rng.shuffle(pieces)
    ends, found = np.cumsum(pieces), []
    for _ in range(count):
        stop = int(np.searchsorted(ends, tokens))
        found.append(np.concatenate([[0], ends[:stop], [tokens]]))
        ends = ends[stop + 1 :] - ends[stop]
    return found


def algorithms(ranks: int) -> dict[str, Callable[[Chunks], Partition]]:
    """By name, for so many ranks."""
    plain = {
        "balanced": config.BalancedDispatchAlg(),
        "min-heap": config.MinHeapDispatchAlg(),
        "zigzag": config.ZigzagDispatchAlg(),
        "sequential": config.SequentialDispatchAlg(),
    }
    found: dict[str, Callable[[Chunks], Partition]] = {
        name: lambda chunks, alg=alg: place(alg, chunks, ranks) for name, alg in plain.items()
    }
    if ranks > RANKS_A_NODE:
        nodes = ranks // RANKS_A_NODE
        found["balanced, nodes first"] = lambda chunks: place(plain["balanced"], chunks, ranks, nodes)
    return found


def check(exchange: Exchange, rows: Sequence[Ints], seed: int) -> None:
    """Of some ranks, that their shares hold what their rows see, and agree on what they send each other.

    Raises:
        RuntimeError: they do not.
    """
    ranks = np.random.default_rng(seed).permutation(exchange.num_ranks)[:CHECKED].tolist()
    shares = {rank: exchange.share(rank) for rank in ranks}
    for rank, share in shares.items():
        tables = [share.bands, *(stage.bands for stage in share.stages)]
        found = sum(int(areas(table).sum()) for table in tables)
        pieces, owner = exchange.pieces
        if found != int(areas(pieces[owner == rank]).sum()):
            raise RuntimeError(f"WRONG: rank {rank} computes {found} pairs")
        for other in ranks:
            _check_pair(share, shares[other], rows[other])


def _check_pair(receiver: Share, sender: Share, rows: Ints) -> None:
    held = _positions(rows)
    for one, other in zip(receiver.stages, sender.stages, strict=True):
        expected, sent = _positions(one.receive[sender.rank]), held[_positions(other.send[receiver.rank])]
        if not np.array_equal(expected, sent):
            raise RuntimeError(
                f"WRONG: rank {sender.rank} sends other keys than rank {receiver.rank} expects"
            )


def _positions(ranges: Ints) -> Ints:
    return np.concatenate([np.arange(0), *(np.arange(begin, end) for begin, end in ranges.tolist())])


def measured(
    mask: Mask, ranks: int, placing: Callable[[Chunks], Partition], repeats: int
) -> dict[str, float]:
    """Figures of one plan: milliseconds are the least of ``repeats``, for one rank's share."""

    def plan() -> tuple[Chunks, Partition, Exchange]:
        chunks = cut(mask.bands, mask.num_rows, mask.num_cols, CHUNK)
        parts = placing(chunks)
        rows = [chunks.rows[part] for part in parts]
        exchange = Exchange(mask.bands, rows, rows)
        exchange.share(0)
        return chunks, parts, exchange

    chunks, parts, exchange = plan()
    check(exchange, exchange.queries, seed=0)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        plan()
        seconds.append(time.perf_counter() - begin)
    work = np.array([chunks.work[part].sum() for part in parts])
    nodes = max(ranks // RANKS_A_NODE, 1)
    moved = exchange.traffic(nodes)
    return {
        "plan_ms": min(seconds) * 1e3,
        "imbalance": float(work.max() / work.mean()),
        "received_most": float(moved.received.max()),
        "received_mean": float(moved.received.mean()),
        "mebibytes_most": float(moved.received.max() * HEADS.kv_bytes / (1 << 20)),
        "within_node_mean": float(moved.within.mean()),
        "between_nodes_mean": float(moved.between.mean()),
        "between_nodes_once_mean": float(moved.once.sum() / ranks),
    }


def run(report: Report, ranks: Sequence[int], causal: bool, seed: int, repeats: int, most_packs: int) -> None:
    """Measure every algorithm for each number of ranks, and compare with the targets."""
    for count in ranks:
        tokens = count * TOKENS_A_RANK
        masks = [
            Mask.varlen(cuts, causal=causal)
            for cuts in packs(tokens, min(PACKS.get(count, 1), most_packs), seed)
        ]
        for name, placing in algorithms(count).items():
            each = [measured(mask, count, placing, repeats if count < 256 else 2) for mask in masks]
            figures = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
            line: dict[str, Any] = {"ranks": count, "tokens": tokens, "algorithm": name, "packs": len(masks)}
            report.placements.append({**line, **figures})
            print(count, name, {key: round(value, 3) for key, value in figures.items()}, flush=True)
            report.write()
    for count, name, figure, limit in TARGETS if causal else []:
        for line in report.placements:
            if (line["ranks"], line["algorithm"]) == (count, name):
                report.add_target(
                    f"{count} ranks, {name}, {figure}: {limit:g} / measured", limit / line[figure], 1.0
                )


def main(argv: list[str] | None = None) -> int:
    """Command line; exit code 1 after a wrong plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 256, 1024])
    parser.add_argument(
        "--full", action="store_true", help="rows see their whole document, not what is before them"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--packs", type=int, default=max(PACKS.values()), help="at most so many")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report = Report(environment(torch.device("cpu")), arguments, args.json)
    try:
        run(report, args.ranks, not args.full, args.seed, args.repeats, args.packs)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
