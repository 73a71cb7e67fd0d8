"""The tolerance rule: at most twice the error of the plain formula at the same precision.

    error(ours, fp64) <= 2 * error(plain, fp64) + floor

in the max norm and in the 2-norm, over the entries that are finite in fp64. The plain formula is the dense
definition written in PyTorch at the input's precision. ``floor`` is an eighth of one rounding of the largest
value (half precision only) plus two roundings of the arithmetic. NaN and infinities must be where fp64 has
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FACTOR = 2.0
_ROUNDINGS = 2.0


@dataclass(frozen=True)
class Figure:
    """How far one tensor is from fp64.

    Attributes:
        name: "out", "lse", "max_logits", "dq", "dk", "dv" or "dsink"; " +max" follows in a call with max_logits.
        error: max norm and 2-norm of the difference to fp64.
        plain: the same of the plain formula.
        bound: what ``error`` may be.
        fault: what is wrong beside rounding, such as NaN where fp64 has a number; empty when nothing is.
    """

    name: str
    error: tuple[float, float]
    plain: tuple[float, float]
    bound: tuple[float, float]
    fault: str = ""

    @property
    def ratio(self) -> float:
        """The larger of error / bound over the two norms; above 1 is a failure."""
        return max(_quotient(e, b) for e, b in zip(self.error, self.bound, strict=True))

    @property
    def ok(self) -> bool:
        """True when the tensor keeps the rule."""
        return not self.fault and self.ratio <= 1


@dataclass(frozen=True)
class Comparison:
    """Figures of every tensor of the compared calls, in the order out, lse, ..."""

    figures: tuple[Figure, ...]

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)

    @property
    def ok(self) -> bool:
        """True when every tensor keeps the rule."""
        return all(figure.ok for figure in self.figures)

    def __str__(self) -> str:
        lines = [f"{'':16}{'max error':>11}{'plain':>11}{'2-norm':>11}{'plain':>11}{'error/bound':>13}"]
        for f in self.figures:
            numbers = (f.error[0], f.plain[0], f.error[1], f.plain[1])
            columns = "".join(f"{number:11.2e}" for number in numbers)
            lines.append(f"{f.name:16}{columns}{f.ratio:13.3f}{'' if f.ok else '  <- '}{f.fault}")
        return "\n".join(lines)


def figure(
    name: str,
    ours: torch.Tensor,
    exact: torch.Tensor,
    plain: torch.Tensor,
    *,
    unit: float,
    zeros: torch.Tensor | None = None,
) -> Figure:
    """Hold ``ours`` against the rule.

    Args:
        name: of the tensor.
        ours: any floating dtype; its precision sets the rounding of the result.
        exact: the same in fp64.
        plain: the same by the plain formula at the input's precision.
        unit: size of the terms that were summed; cancellation may leave a much smaller result.
        zeros: bool, broadcastable to ``ours``: entries that must be exactly zero.
    """
    fault = _fault(ours, exact, zeros)
    finite = torch.isfinite(exact)
    truth = exact[finite]
    error, reference = (_norms((x.double() - exact)[finite]) for x in (ours, plain))
    rounding = torch.finfo(ours.dtype).eps / 8 if ours.dtype.itemsize < 4 else 0.0
    arithmetic = _ROUNDINGS * torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps * unit
    size = _norms(truth)
    floor = (rounding * size[0] + arithmetic, rounding * size[1] + arithmetic * truth.numel() ** 0.5)
    bound = (FACTOR * reference[0] + floor[0], FACTOR * reference[1] + floor[1])
    return Figure(name, error, reference, bound, fault)


def _quotient(error: float, bound: float) -> float:
    if error == 0:
        return 0.0
    return error / bound if bound else float("inf")


def _norms(x: torch.Tensor) -> tuple[float, float]:
    if not x.numel():
        return 0.0, 0.0
    x = x.nan_to_num(nan=torch.inf)
    return x.abs().max().item(), x.norm().item()


def _fault(ours: torch.Tensor, exact: torch.Tensor, zeros: torch.Tensor | None) -> str:
    if ours.shape != exact.shape:
        raise AssertionError(f"shape: expected {tuple(exact.shape)}, got {tuple(ours.shape)}")
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        have, want = test(ours), test(exact)
        if not torch.equal(have, want):
            return f"{int((have & ~want).sum())} {what} too many, {int((want & ~have).sum())} missing"
    if zeros is not None:
        leaked = int((ours != 0).logical_and(zeros).sum())
        if leaked:
            return f"{leaked} entries that must be exactly 0 are not"
    return ""
