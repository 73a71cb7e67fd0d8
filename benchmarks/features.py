"""What features cost against the plain call: softcap, a sink, fp16, dropout, ALiBi, deterministic gradients, parts."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.ahead import together
from benchmarks.bench import DTYPES, SMALL_TOKENS
from benchmarks.check import sampled_rows
from benchmarks.masks import Workload, workload
from benchmarks.opinion import disagreements
from benchmarks.peers import Run, first_line
from benchmarks.replay import repeated
from benchmarks.report import Report, Row, machine_state
from benchmarks.timing import DIRECTIONS, Entrant, race, stopwatch, summary
from magi_attention import Mask, accumulate, attention
from magi_attention.kernels.select import modifiers_of, refusal, request_of
from magi_attention.testing import Case, compare, compare_parts, random_case

MASK, TOKENS, HEADS, HEAD_DIM = "causal", 16384, (32, 8), 128


@dataclass(frozen=True)
class Variant:
    """A feature of the call; ``directions`` are those that it may change.

    ``parts``: the columns are taken in so many calls of ``accumulate``, which has no backward.
    """

    name: str
    softcap: float = 0.0
    num_sinks: int = 0
    dtype: str | None = None
    deterministic: bool = False
    dropout_p: float = 0.0
    alibi: bool = False
    parts: int = 1
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def measured(self) -> tuple[str, ...]:
        """The directions that it has."""
        return DIRECTIONS if self.parts == 1 else ("forward",)

    @property
    def modifiers(self) -> str:
        """What a backend must have."""
        return modifiers_of(self.dropout_p > 0, self.alibi)


VARIANTS = (
    Variant("plain"),
    Variant("softcap", softcap=30.0),
    Variant("sink", num_sinks=1),
    Variant("fp16", dtype="fp16"),
    Variant("deterministic", deterministic=True, directions=("backward",)),
    Variant("two parts", parts=2, directions=("forward",)),
    Variant("dropout", dropout_p=0.17),
    Variant("alibi", alibi=True),
)


def offered(backend: str, device: torch.device) -> list[Variant]:
    """The variants that ``backend`` has."""
    tensor = torch.empty(1, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)
    return [v for v in VARIANTS if refusal(backend, request_of(tensor, tensor, v.modifiers)) is None]


def _case(variant: Variant, work: Workload, dtype: str, device: torch.device, seed: int) -> Case:
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    sink = torch.randn(variant.num_sinks, HEADS[0], generator=generator, device=device)
    case = random_case(
        work.mask,
        heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPES[variant.dtype or dtype],
        device=device,
        seed=seed,
        sink=sink if variant.num_sinks else None,
        softcap=variant.softcap,
    )
    if variant.dropout_p:
        state = torch.tensor([seed, 1], device=device)
        case = replace(case, dropout_p=variant.dropout_p, rng_state=state)
    if variant.alibi:
        case = replace(case, alibi_slopes=0.01 * torch.rand(HEADS[0], generator=generator, device=device))
    return replace(case, dlse=None)


def _fault(variant: Variant, case: Case, rows: list[int] | None, backend: str) -> str:
    """What is wrong with the variant's result, or ""; ``rows`` as in ``compare``."""
    if variant.parts > 1:
        result = compare_parts(case, _cuts(variant, case.mask.num_cols), backend=backend, rows=rows)
    else:
        result = compare(case, backend=backend, rows=rows)
    if not result.ok:
        broken = [f"{f.name} {f.ratio:.2f} of its bound {f.fault}" for f in result.figures if not f.ok]
        return "error against fp64: " + ", ".join(broken)
    if variant.deterministic:
        return "; ".join(disagreements(case, result, backend, rows, deterministic=True))
    return ""


def _small_fault(variant: Variant, tokens: int, backend: str, dtype: str, device: torch.device) -> str:
    """The same of a small instance, in every row and gradient."""
    work = workload(MASK, min(tokens, SMALL_TOKENS[device.type]))
    return _fault(variant, _case(variant, work, dtype, device, seed=0), None, backend)


def _cuts(variant: Variant, num_cols: int) -> list[int]:
    return [num_cols * n // variant.parts for n in range(1, variant.parts)]


def _run_parts(variant: Variant, case: Case, backend: str) -> Run:
    num_rows, num_cols = case.mask.num_rows, case.mask.num_cols
    assert isinstance(case.mask, Mask)
    ranges = list(pairwise([0, *_cuts(variant, num_cols), num_cols]))
    masks = [case.mask.localise([(0, num_rows)], [each]) for each in ranges]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=torch.float32)
        lse = out.new_full(out.shape[:-1], -torch.inf)
        with torch.no_grad():
            for mask, (begin, end) in zip(masks, ranges, strict=True):
                accumulate(out, lse, q, k[begin:end], v[begin:end], mask, backend=backend)
            return out.to(q.dtype)

    return run


def _run(variant: Variant, case: Case, backend: str) -> Run:
    if variant.parts > 1:
        return _run_parts(variant, case, backend)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(
            q,
            k,
            v,
            case.mask,
            sink=case.sink,
            deterministic=variant.deterministic,
            **case.modifiers,
            backend=backend,
        )[0]

    return run


def measure_features(
    report: Report, backend: str, dtype: str, rounds: int, limit_seconds: float, shrink: int = 1
) -> None:
    """Rows of every variant, and as costs their speed over the plain call's, by direction."""
    device = torch.device(report.arguments["device"])
    work = workload(MASK, TOKENS // shrink)
    watch, variants = stopwatch(device), offered(backend, device)
    if device.type == "cuda":
        together([__file__, str(VARIANTS.index(v)), backend, dtype, device.type] for v in variants)
    rows: dict[tuple[str, str], Row] = {}
    entrants: dict[str, Entrant] = {}
    for variant in variants:
        label = backend if variant.name == "plain" else f"{backend} {variant.name}"
        shape = (work.name, work.tokens, *HEADS, HEAD_DIM, variant.dtype or dtype)
        for direction in variant.measured:
            rows[variant.name, direction] = Row(*shape, direction, label, True, work.area)
        try:
            case = _case(variant, work, dtype, device, seed=0)
            fault = _small_fault(variant, work.tokens, backend, dtype, device)
            if not variant.modifiers:  # which depend on the numbers of rows: the small instance has to do
                fault = fault or _fault(variant, case, sampled_rows(work, seed=0).tolist(), backend)
            status, reason = ("wrong", fault) if fault else ("ok", "")
        except Exception as error:
            status, reason = "failed", first_line(error)
        for direction in variant.measured:
            rows[variant.name, direction].status = status
            rows[variant.name, direction].reason = reason
        if status == "ok":
            q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
            assert case.dout is not None
            single = Entrant(label, _run(variant, case, backend), (q, k, v, case.dout))
            entrants[variant.name] = repeated(single, variant.measured, watch)
    race(list(entrants.values()), watch, DIRECTIONS, rounds, limit_seconds, warmup=1)
    report.states.append({"mask": work.name, "tokens": work.tokens, **machine_state(device)})
    _record(report, rows, entrants)


def _record(report: Report, rows: dict[tuple[str, str], Row], entrants: dict[str, Entrant]) -> None:
    for (name, direction), row in rows.items():
        entrant = entrants.get(name)
        if entrant is None:
            continue
        if entrant.failure:
            row.status, row.reason = "failed", entrant.failure
        else:
            row.timed = entrant.timed[direction]
            row.fill(summary(entrant.seconds[direction]))
    report.add(rows.values())
    for variant in VARIANTS[1:]:
        for direction in variant.directions:
            if (variant.name, direction) not in rows:
                continue
            with_it, without = rows[variant.name, direction], rows["plain", direction]
            if with_it.status == without.status == "ok" and with_it.seconds and without.seconds:
                report.add_cost(
                    f"{variant.name} {direction}, speed over the plain call's",
                    without.seconds / with_it.seconds,
                )


def _compile(variant: Variant, backend: str, dtype: str, device: torch.device) -> None:
    """Leave in the disk cache what ``measure_features`` compiles for a variant."""
    _small_fault(variant, TOKENS, backend, dtype, device)
    case = _case(variant, workload(MASK, SMALL_TOKENS[device.type]), dtype, device, seed=0)
    leaves = tuple(x.detach().requires_grad_() for x in (case.q, case.k, case.v))
    out = _run(variant, case, backend)(*leaves)
    if "backward" in variant.measured:
        torch.autograd.grad(out, leaves, case.dout)


if __name__ == "__main__":
    _compile(VARIANTS[int(sys.argv[1])], sys.argv[2], sys.argv[3], torch.device(sys.argv[4]))
