"""The profile of decoding: ``flash_attn_with_kvcache`` against the speed of the memory and against cuDNN.

| batch, heads | keys | what runs |
|---|---|---|
| 64, 32/8 | 8k | one query, also with pages of 16; four queries; one query whose key is appended and turned |
| 1, 32/8 | 4k, 64k | one query, also with pages of 16 |
| 16, 16/1 | 16k | one query |
| 8, 32/8 | 128k | one query that sees 2048 keys; and the first 10 |
| 64, 32/8 | 1k to 16k | one query |
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.bench import DTYPES
from benchmarks.caches import Caches, Shape, Step, Truth, Work
from benchmarks.check import Verdict
from benchmarks.masks import BLOCKS, workload
from benchmarks.peers import SUBJECTS, Unsupported, first_line
from benchmarks.replay import repeated
from benchmarks.report import Report, Row, machine_state
from benchmarks.timing import CudaStopwatch, Entrant, WallStopwatch, race, stopwatch, summary

PROFILE = "decode"
DEFAULT_SUBJECTS = ("sdpa-cudnn",)
OURS = "kvcache"
READ_GBPS = 4600.0
"""What a kernel that only reads reaches on an H200."""
ROUNDS_OF_A_GRAPH = 8
DIRECTION = "forward"


@dataclass(frozen=True)
class Aim:
    """What a work should reach; None is no aim.

    Attributes:
        microseconds: at most. gbps: at least.
        gain: speed over the peer's, at least.
        factor, more: time over the first work's of the group, as a factor and in microseconds, at most.
    """

    microseconds: float | None = None
    gbps: float | None = None
    gain: float | None = None
    factor: float | None = None
    more: float | None = None


@dataclass(frozen=True)
class Group:
    """Works on the same caches, raced against each other; peers do the first one."""

    shape: Shape
    works: tuple[tuple[Work, Aim], ...]


WINDOW = Work(window=2048)
GROUPS = (
    Group(
        Shape(64, 32, 8, 8192, copies=2),
        (
            (Work(), Aim(gbps=4450.0, gain=1.0)),
            (Work(page=16), Aim(gbps=4370.0)),
            (Work(queries=4), Aim(factor=1.05)),
            (Work(append=True), Aim(more=3.0)),
        ),
    ),
    Group(
        Shape(1, 32, 8, 4096, copies=64),
        ((Work(), Aim(microseconds=10.5)), (Work(page=16), Aim(microseconds=10.5))),
    ),
    Group(
        Shape(1, 32, 8, 65536, copies=4),
        ((Work(), Aim(microseconds=65.0)), (Work(page=16), Aim(microseconds=65.0))),
    ),
    Group(Shape(16, 16, 1, 16384, copies=8), ((Work(), Aim(microseconds=36.0)),)),
    Group(
        Shape(8, 32, 8, 131072, copies=2, spots=8),
        ((WINDOW, Aim(microseconds=21.0)), (replace(WINDOW, keep_first=10), Aim(factor=1.05))),
    ),
    Group(Shape(64, 32, 8, 16384, copies=2, ragged=True), ((Work(), Aim(gbps=0.9 * READ_GBPS)),)),
)


def shrunk(group: Group, by: int) -> Group:
    """The same with lengths divided by ``by``, for a dry run."""
    shape = replace(group.shape, context=group.shape.context // by)
    return Group(shape, tuple((work.shrunk(by), aim) for work, aim in group.works))


def row_of(shape: Shape, work: Work, dtype: str) -> Row:
    """Our row of a work, without figures. Bytes are those of one call, in the mean over the spots."""
    subject = f"{OURS} page {work.page}" if work.page else OURS
    lengths = [n for spot in range(shape.spots) for n in shape.lengths(spot, work.window)]
    seen = sum(map(work.seen, lengths)) / shape.spots
    name = f"{work.name}, ragged" if shape.ragged else work.name
    row = Row(
        name, shape.context, shape.heads, shape.kv_heads, shape.head_dim, dtype, DIRECTION, subject, True,
        area=round(work.queries * seen / shape.batch), batch=shape.batch,
    )  # fmt: skip
    row.bytes_read = round(2 * seen * shape.kv_heads * shape.head_dim * DTYPES[dtype].itemsize)
    return row


Calls = list[tuple[Step, Callable[[], torch.Tensor]]]


def our_calls(caches: Caches, work: Work) -> Calls:
    return [(step, step.call) for step in caches.steps(work)]


def peer_calls(name: str, steps: Sequence[Step], device: torch.device) -> Calls:
    """A peer on what the queries of ``steps`` see, as contiguous tensors in its own layout.

    Raises:
        Unsupported: it does not run here.
    """
    subject = SUBJECTS[name]
    missing = subject.missing(device.type)
    if missing:
        raise Unsupported(missing)
    # One query that sees all its keys is the full mask, whatever the numbers of rows and columns.
    run = subject.prepare(workload("full", 4 * BLOCKS), device)

    def call_of(step: Step) -> Callable[[], torch.Tensor]:
        q, k, v = (subject.arrange(x) for x in (step.q, *step.visible()))
        return lambda: subject.restore(run(q, k, v), batched=True)

    return [(step, call_of(step)) for step in steps]


def check(calls: Calls) -> Verdict:
    """The first and the last of ``calls`` against the formula: the first of them that fails, else the last."""
    for step, call in (calls[0], calls[-1]):
        truth = Truth(step)
        verdict = truth.judge(call())
        if not verdict.ok:
            break
    return verdict


def admit(row: Row, make: Callable[[], Calls], watch: CudaStopwatch | WallStopwatch) -> Entrant | None:
    """A checked entrant that goes round the calls; without one the row says why."""
    try:
        calls = make()
        verdict = check(calls)
    except Unsupported as error:
        row.status, row.reason = "unsupported", str(error)
        return None
    except Exception as error:
        row.status, row.reason = "failed", first_line(error)
        return None
    row.check = verdict.figures
    if not verdict.ok:
        row.status, row.reason = "wrong", verdict.reason
        return None
    rounds = itertools.cycle([call for _, call in calls])
    # The cycle has its own operands: the leaves only say where they are.
    entrant = Entrant(row.subject, lambda q, k, v: next(rounds)(), (calls[0][0].q,) * 4)
    return repeated(entrant, (DIRECTION,), watch, calls=ROUNDS_OF_A_GRAPH * len(calls))


def measure_group(
    group: Group, dtype: str, device: torch.device, peers: Sequence[str], rounds: int, limit_seconds: float
) -> list[Row]:
    """Rows of the works in their order, then those of the peers: checked, then timed in turn."""
    shape, watch = group.shape, stopwatch(device)
    # Kernels for sequences of one length have nothing to say about others.
    names = () if shape.ragged else peers
    ours = [row_of(shape, work, dtype) for work, _ in group.works]
    others = [replace(ours[0], subject=name, ours=False) for name in names]
    raced: list[tuple[Row, Entrant | None]] = []
    try:
        caches = Caches(shape, DTYPES[dtype], device)
        first = caches.steps(group.works[0][0])
        for row in others:
            raced.append((row, admit(row, partial(peer_calls, row.subject, first, device), watch)))
        for row, (work, _) in zip(ours, group.works, strict=True):
            raced.append((row, admit(row, partial(our_calls, caches, work), watch)))
        entrants = [entrant for _, entrant in raced if entrant is not None]
        race(entrants, watch, (DIRECTION,), rounds, limit_seconds, warmup=int(device.type == "cuda"))
    except Exception as error:
        for row in (*ours, *others):
            if row.status == "ok":
                row.status, row.reason = "failed", f"harness: {first_line(error)}"
        return [*ours, *others]
    for row, entrant in raced:
        if entrant is not None and entrant.failure:
            row.status, row.reason = "failed", entrant.failure
        elif entrant is not None:
            row.timed = entrant.timed[DIRECTION]
            row.fill(summary(entrant.seconds[DIRECTION]))
    return [*ours, *others]


def add_targets(report: Report, group: Group, rows: Sequence[Row]) -> None:
    """The aims of ``group`` against its ``rows``, as far as these have figures."""
    shape, count = group.shape, len(group.works)
    base = rows[0].seconds
    for row, (_, aim) in zip(rows[:count], group.works, strict=True):
        if not row.seconds or not row.gbps:
            continue
        label = f"{shape.batch} x {shape.context}, {shape.heads}/{shape.kv_heads}, {row.mask}, {row.subject}"
        if aim.microseconds:
            name = f"{label}: {aim.microseconds:g} us / measured"
            report.add_target(name, aim.microseconds * 1e-6 / row.seconds, 1.0)
        if aim.gbps:
            report.add_target(f"{label}: GB/s", row.gbps, aim.gbps)
        for peer in rows[count:]:
            if aim.gain and peer.seconds:
                report.add_target(f"{label}: speed / {peer.subject}", peer.seconds / row.seconds, aim.gain)
        if aim.factor and base:
            name = f"{label}: time of {rows[0].mask} / measured"
            report.add_target(name, base / row.seconds, 1 / aim.factor)
        if aim.more and base:
            name = f"{label}: time of {rows[0].mask} + {aim.more:g} us / measured"
            report.add_target(name, (base + aim.more * 1e-6) / row.seconds, 1.0)


def measure_decode(
    report: Report, peers: Sequence[str], dtype: str, rounds: int, limit_seconds: float, shrink: int = 1
) -> None:
    """Rows and targets of every group."""
    device = torch.device(report.arguments["device"])
    names = [name for name in peers if not SUBJECTS[name].ours]
    done = []
    for group in (shrunk(group, shrink) for group in GROUPS):
        rows = measure_group(group, dtype, device, names, rounds, limit_seconds)
        done.append((group, rows))
        report.states.append({"mask": rows[0].mask, "tokens": rows[0].tokens, **machine_state(device)})
        report.add(rows)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    for group, rows in done:
        add_targets(report, group, rows)
