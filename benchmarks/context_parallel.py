"""Attention over several GPUs: this library's context parallelism against other ways to share it, and the kernel alone.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --json benchmarks/results/context-parallel.json
    python benchmarks/context_parallel.py --ranks 4 --json benchmarks/results/context-parallel-4-ranks.json

Every subject is compared with one device before it is timed: out and the gradients of this rank's rows. TFLOP/s are per
GPU, of the slowest rank. "kernel alone" is the same work a GPU without anything to wait for: all tokens, some of the
heads. ``--ranks`` computes the parts of so many ranks one after the other on one GPU, without transfers, see cp_ranks.py.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.cp_peers import Peer, shards_of
from benchmarks.cp_ranks import Ranks, median_seconds
from benchmarks.planner import packs
from benchmarks.report import Report, Row, environment
from magi_attention import Mask, attention
from magi_attention.api import calc_attn, magi_attn_flex_key
from magi_attention.common import AttnOverlapMode
from magi_attention.config import (
    BalancedDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    OverlapConfig,
)
from magi_attention.dist import cost
from magi_attention.dist.explain import explain_plan
from magi_attention.dist.manager import dist_attn_runtime_dict_mgr
from magi_attention.dist.runtime import Work
from magi_attention.dist.shard import Shards

HEADS, KV_HEADS, HEAD_DIM = 64, 8, 128
ALONE, OURS, PEERS = "kernel alone", "ours", ("ring", "all-gather", "ulysses")
HOST_CYCLES = 6_000_000
"""Of a device: about 3 ms, in which the host enqueues a call."""
WORST = 1e-2
"""Largest relative error of a result, as a norm, against one device in the same precision."""
DYNAMIC = OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=None)
CONFIGS = {
    OURS: DistAttnConfig(DispatchConfig(alg=BalancedDispatchAlg()), DYNAMIC),
    "ours, degree 1": DistAttnConfig(
        DispatchConfig(alg=BalancedDispatchAlg()), OverlapConfig(degree=1), strategy="keys"
    ),
    "ours, min-heap": DistAttnConfig(DispatchConfig(alg=MinHeapDispatchAlg()), DYNAMIC),
}
AIMS = {
    ("causal", "forward"): (0.95, 1.0),
    ("causal", "backward"): (0.95, 1.0),
    ("varlen_causal", "forward"): (0.88, 1.35),
    ("varlen_causal", "backward"): (0.85, 1.1),
    ("window", "forward"): (None, 1.35),
    ("window", "backward"): (None, 1.1),
}
"""Least speed over the kernel alone, and over the best of the peers."""


def mask_of(name: str, tokens: int) -> Mask:
    """One sequence, packed documents, or one sequence with a window of 4096 keys."""
    if name == "varlen_causal":
        return Mask.varlen(packs(tokens, 1, 0)[0].tolist(), causal=True)
    return Mask.causal(tokens) if name == "causal" else Mask.sliding_window(tokens, tokens, (4095, 0))


class Subject:
    """One of them on this rank: what it computes from, and samples by direction."""

    def __init__(self, name: str, mask: Mask, device: torch.device, data: list[torch.Tensor]) -> None:
        self.name, self.seconds = name, {"forward": [], "backward": []}
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.shards: Shards | None = None
        if name == ALONE:
            heads = [slice(rank * x.shape[1] // ranks, (rank + 1) * x.shape[1] // ranks) for x in data]
            local = [x[:, part].contiguous() for x, part in zip(data, heads, strict=True)]
            self.call: Callable[..., torch.Tensor] = lambda q, k, v: attention(q, k, v, mask)[0]
        else:
            self.call = self._ours(mask) if name in CONFIGS else self._peer(mask, rank, ranks)
            assert self.shards is not None
            local = [x.index_select(0, self.shards.own(device)) for x in data]
        *self.leaves, self.dout = local
        for leaf in self.leaves:
            leaf.requires_grad_()

    def _ours(self, mask: Mask) -> Callable[..., torch.Tensor]:
        queries, keys, types = mask.to_slices()
        self.key = magi_attn_flex_key(
            queries, keys, types or "full", mask.num_rows, mask.num_cols, cp_group_or_mesh=dist.group.WORLD,
            dist_attn_config=CONFIGS[self.name], num_heads_q=HEADS, num_heads_kv=KV_HEADS, head_dim=HEAD_DIM,
        )  # fmt: skip
        self.shards = dist_attn_runtime_dict_mgr[self.key].q_shards
        return lambda q, k, v: calc_attn(q, k, v, self.key)[0]

    def _peer(self, mask: Mask, rank: int, ranks: int) -> Callable[..., torch.Tensor]:
        self.shards = shards_of(mask, self.name, rank, ranks)
        return Peer(self.name, mask, self.shards)

    def results(self) -> list[torch.Tensor]:
        """out and the gradients of q, k and v."""
        out = self.call(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.dout)]

    def sample(self) -> None:
        """Time one forward and one backward, all ranks at once."""
        stamps = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        begin_together()
        stamps[0].record()
        out = self.call(*self.leaves)
        stamps[1].record()
        begin_together()
        stamps[2].record()
        torch.autograd.grad(out, self.leaves, self.dout)
        stamps[3].record()
        torch.cuda.synchronize()
        times = torch.tensor(
            [stamps[0].elapsed_time(stamps[1]), stamps[2].elapsed_time(stamps[3])], device=out.device
        )
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        for direction, value in zip(self.seconds, times.tolist(), strict=True):
            self.seconds[direction].append(value * 1e-3)


def begin_together() -> None:
    """All devices wait as long from about the same moment on, so that the host is ahead of them, as it is in training."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    torch.cuda._sleep(HOST_CYCLES)


def check(subject: Subject, expected: list[torch.Tensor], device: torch.device) -> dict[str, float]:
    """Relative errors of out and gradients, the largest of all ranks.

    Raises:
        RuntimeError: one of them is too large.
    """
    assert subject.shards is not None
    rows, errors = subject.shards.own(device), {}
    for name, ours, whole in zip(("out", "dq", "dk", "dv"), subject.results(), expected, strict=True):
        truth = whole.index_select(0, rows).float()
        errors[name] = ((ours.float() - truth).norm() / truth.norm()).item()
    worst = torch.tensor(list(errors.values()), device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not bool((worst < WORST).all()):
        raise RuntimeError(f"{subject.name}: errors {dict(zip(errors, worst.tolist(), strict=True))}")
    return dict(zip(errors, worst.tolist(), strict=True))


def measure(report: Report, name: str, tokens: int, args: argparse.Namespace, device: torch.device) -> None:
    """All subjects on one mask."""
    mask, ranks = mask_of(name, tokens), dist.get_world_size()
    torch.manual_seed(0)
    shapes = [(tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    data = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    expected = reference(mask, data)
    subjects, errors = [], {}
    for each in (ALONE, *args.subjects):
        subject = Subject(each, mask, device, data)
        if each != ALONE:
            errors[each] = check(subject, expected, device)
        subjects.append(subject)
    del expected, data
    for subject in subjects:
        subject.sample()
        subject.seconds = {direction: [] for direction in subject.seconds}
    for _ in range(args.rounds):
        for subject in subjects:
            subject.sample()
    for subject in subjects:
        for direction, samples in subject.seconds.items():
            low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
            row = Row(name, tokens, HEADS, KV_HEADS, HEAD_DIM, "bf16", direction, subject.name,
                      subject.name == OURS, mask.area // ranks)  # fmt: skip
            row.rounds, row.timed = args.rounds, "events around one call, slowest rank"
            row.check = {n: {"relative": e} for n, e in errors.get(subject.name, {}).items()}
            row.fill({"seconds": median, "seconds_q1": low, "seconds_q3": high})
            report.add([row])
    ours = next(subject for subject in subjects if subject.name == OURS)
    report.add_cost(f"plan of {name} {tokens}", in_line(dist_attn_runtime_dict_mgr[ours.key].explain()))
    add_targets(report, name, tokens)
    del subjects
    gc.collect()
    torch.cuda.empty_cache()


def measure_ranks(
    report: Report, name: str, tokens: int, args: argparse.Namespace, device: torch.device
) -> None:
    """The parts of ``args.ranks`` ranks, and the kernel alone on as much work."""
    mask = mask_of(name, tokens)
    torch.manual_seed(0)
    shapes = [(tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    data = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    heads = cost.Heads(HEADS, KV_HEADS, HEAD_DIM)
    ranks = Ranks(mask, args.ranks, heads)
    alone = [x[:, : x.shape[1] // args.ranks].contiguous() for x in data]
    samples = {
        ALONE: median_seconds(alone[:3], alone[3], Work(mask, (), None), args.rounds),
        OURS: ranks.slowest(data, args.rounds),
    }
    for subject, seconds in samples.items():
        for direction, value in zip(("forward", "backward"), seconds, strict=True):
            row = Row(name, tokens, HEADS, KV_HEADS, HEAD_DIM, "bf16", direction, subject, subject == OURS,
                      mask.area // args.ranks)  # fmt: skip
            row.rounds, row.timed = args.rounds, "events around one call, slowest rank, without transfers"
            row.fill({"seconds": value, "seconds_q1": value, "seconds_q3": value})
            report.add([row])
    report.add_cost(f"plan of {name} {tokens}", in_line(explain_plan(ranks.exchange, heads)))
    add_targets(report, name, tokens)


def reference(mask: Mask, data: list[torch.Tensor]) -> list[torch.Tensor]:
    """out and gradients of one device, some heads after the others to save memory."""
    parts = []
    for number in range(KV_HEADS):
        group = HEADS // KV_HEADS
        q, k, v, dout = (
            x[:, number * n : (number + 1) * n] for x, n in zip(data, (group, 1, 1, group), strict=True)
        )
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = attention(*leaves, mask)
        parts.append([out.detach(), *torch.autograd.grad(out, leaves, dout.contiguous())])
    return [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]


def in_line(text: str) -> str:
    """Lines as one."""
    return "; ".join(text.splitlines())


def add_targets(report: Report, name: str, tokens: int) -> None:
    """Compare with what is wanted."""
    for direction in ("forward", "backward"):
        rows = {
            r.subject: r for r in report.rows if (r.mask, r.tokens, r.direction) == (name, tokens, direction)
        }
        over_alone, over_peers = AIMS[name, direction]
        ours = rows[OURS].tflops or 0.0
        what = f"{name} {tokens} {direction}"
        if over_alone is not None:
            report.add_target(f"{what}: ours / kernel alone", ours / (rows[ALONE].tflops or 1.0), over_alone)
        best = max((rows[peer].tflops or 0.0 for peer in PEERS if peer in rows), default=0.0)
        if best:
            report.add_target(f"{what}: ours / best of {', '.join(PEERS)}", ours / best, over_peers)


def main(argv: list[str] | None = None) -> int:
    """Command line, under torchrun."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", default=["causal:65536", "varlen_causal:65536", "window:65536"])
    parser.add_argument("--subjects", nargs="+", default=[*CONFIGS, *PEERS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, help="compute their parts one after the other")
    parser.add_argument("--commit")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if args.ranks is None:
        dist.init_process_group("nccl", device_id=device)
        if dist.get_rank() > 0:
            args.json = None
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the end
    arguments = {"ranks": args.ranks or dist.get_world_size(), "rounds": args.rounds}
    report = Report(environment(device, args.commit), arguments, args.json)
    for work in args.work:
        name, _, tokens = work.partition(":")
        (measure if args.ranks is None else measure_ranks)(report, name, int(tokens), args, device)
    if args.ranks is None:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
