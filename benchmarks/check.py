"""The gate before the stopwatch: a subject is compared with the fp64 definition, or it gets no number.

Two comparisons. On a small instance of the mask family everything is compared: the output and all gradients.
At the full size, on the tensors that are timed, a sample of query rows is: their outputs and their dq, which
depend on those rows alone. The bound is twice the error of the plain formula at the input's precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.masks import Workload
from benchmarks.peers import Run, Subject
from magi_attention.kernels.reference.dense import dense_attention
from magi_attention.mask.bands import localise

SAMPLED_ROWS = 32


@dataclass(frozen=True)
class Inputs:
    """q (T, H, D), k and v (T, HK, D) and the output's gradient (T, H, D), of one dtype on one device.

    All may have a leading batch axis.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    @classmethod
    def random(
        cls,
        tokens: int,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        batch: int | None = None,
    ) -> Inputs:
        """Standard normal tensors; ``heads`` is (H, HK), ``batch`` the leading axis or none."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(count: int) -> torch.Tensor:
            shape = (*(() if batch is None else (batch,)), tokens, count, head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        return cls(draw(heads[0]), draw(heads[1]), draw(heads[1]), draw(heads[0]))


@dataclass(frozen=True)
class Oracle:
    """What is true of some rows, and what the plain formula makes of it.

    Attributes:
        rows: (R,) int64 rows whose out and dq are compared; None for all rows and all gradients.
        exact: name to fp64 tensor.
        plain: name to the same value by the dense formula at the input's precision.
    """

    rows: torch.Tensor | None
    exact: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]


@dataclass
class Verdict:
    """Outcome of the comparisons, by value: relative error, the plain formula's error, and the bound."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(entry["error"] <= entry["bound"] for entry in self.figures.values())

    @property
    def reason(self) -> str:
        worst = [f"{name} {e['error']:.1e} > {e['bound']:.1e}" for name, e in self.figures.items()]
        bad = [
            text for text, e in zip(worst, self.figures.values(), strict=True) if not e["error"] <= e["bound"]
        ]
        return "error against fp64: " + ", ".join(bad)


def sampled_rows(work: Workload, seed: int) -> torch.Tensor:
    """(R,) distinct sorted rows: the two ends, the sides of segment boundaries, and random rows."""
    cuts = work.segments[1:-1]
    edges = np.concatenate([[0, work.tokens - 1], cuts[:6], cuts[:6] - 1])
    random = np.random.default_rng(seed).permutation(work.tokens)[: SAMPLED_ROWS - len(edges)]
    return torch.from_numpy(np.unique(np.concatenate([edges, random])))


def _by_formula(
    inputs: Inputs, table: torch.Tensor, dtype: torch.dtype | None, all_gradients: bool
) -> dict[str, torch.Tensor]:
    """Output and gradients of the dense definition computed in ``dtype`` (None: the inputs' own)."""
    q, k, v = (tensor.detach().clone() for tensor in (inputs.q, inputs.k, inputs.v))
    leaves = {"dq": q, "dk": k, "dv": v} if all_gradients else {"dq": q}
    for leaf in leaves.values():
        leaf.requires_grad_()
    if q.dim() == 4:
        sequences = zip(q, k, v, strict=True)
        out = torch.stack([dense_attention(*qkv, table, dtype=dtype)[0] for qkv in sequences])
    else:
        out = dense_attention(q, k, v, table, dtype=dtype)[0]
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def full_oracle(work: Workload, inputs: Inputs) -> Oracle:
    """Every row and every gradient; quadratic in memory, for small instances."""
    table = work.mask.table.to(inputs.q.device)
    exact = Inputs(*(tensor.double() for tensor in (inputs.q, inputs.k, inputs.v, inputs.dout)))
    return Oracle(
        None, _by_formula(exact, table, torch.float64, True), _by_formula(inputs, table, None, True)
    )


def row_oracle(work: Workload, inputs: Inputs, seed: int) -> Oracle:
    """Output and dq of sampled rows, each from the definition restricted to those rows."""
    rows = sampled_rows(work, seed)
    ranges = np.stack([rows.numpy(), rows.numpy() + 1], axis=1)
    bands = localise(work.mask.bands, ranges, np.array([[0, work.tokens]]))
    table = torch.from_numpy(bands).to(inputs.q.device)
    index = rows.to(inputs.q.device)
    q, dout = (tensor.index_select(-3, index) for tensor in (inputs.q, inputs.dout))
    some = Inputs(q, inputs.k, inputs.v, dout)
    exact = Inputs(*(tensor.double() for tensor in (some.q, some.k, some.v, some.dout)))
    return Oracle(
        index, _by_formula(exact, table, torch.float64, False), _by_formula(some, table, None, False)
    )


def compare(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> list[dict[str, float]]:
    """Error, the plain formula's error and the bound, in the Frobenius norm and in the largest element.

    Both are relative to the exact tensor. The absolute term keeps a lucky plain result from setting a bound
    that no rounding of the output to its dtype could meet.
    """
    figures = []
    eps = torch.finfo(got.dtype).eps
    deltas = got.double() - exact, plain.double() - exact
    for size, slack in (
        (torch.linalg.vector_norm, max(eps / 8, 1e-6)),
        (lambda t: t.abs().max(), max(eps, 1e-5)),
    ):
        scale = max(float(size(exact)), 1e-30)
        error, reference = (float(size(delta)) / scale for delta in deltas)
        figures.append(
            {
                "error": error if math.isfinite(error) else math.inf,
                "plain": reference,
                "bound": 2 * reference + slack,
            }
        )
    return figures


def leaves_of(subject: Subject, inputs: Inputs, gradients: bool) -> tuple[torch.Tensor, ...]:
    """q, k, v and dout in the subject's layout; the first three require gradients when wanted."""
    q, k, v, dout = (subject.arrange(tensor) for tensor in (inputs.q, inputs.k, inputs.v, inputs.dout))
    for leaf in (q, k, v):
        leaf.requires_grad_(gradients)
    return q, k, v, dout


def outcome(run: Run, leaves: tuple[torch.Tensor, ...], backward: bool) -> dict[str, torch.Tensor]:
    """out, and dq, dk, dv when ``backward``, of one call."""
    q, k, v, dout = leaves
    out = run(q, k, v)
    got = {"out": out.detach()}
    if backward:
        got |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), dout), strict=True))
    return got


def judge(subject: Subject, got: dict[str, torch.Tensor], oracle: Oracle) -> Verdict:
    """Compare what a subject returned (``outcome``) with the oracle."""
    verdict = Verdict()
    where = "small" if oracle.rows is None else "rows"
    for name in oracle.exact.keys() & got.keys():
        value = subject.restore(got[name], oracle.exact[name].dim() == 4)
        value = value if oracle.rows is None else value.index_select(-3, oracle.rows)
        by_norm, by_element = compare(value, oracle.exact[name], oracle.plain[name])
        verdict.figures[f"{where} {name}"] = by_norm
        verdict.figures[f"{where} {name} max"] = by_element
    return verdict
