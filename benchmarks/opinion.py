"""A call with other settings held against the default one, which has been held against fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from magi_attention.testing import Case, Comparison, results


def disagreements(
    case: Case, comparison: Comparison, backend: str, rows: Sequence[int] | None = None, **settings: Any
) -> list[str]:
    """What a call with ``settings`` returns that cannot be right if ``comparison`` is.

    Both results may be as far from fp64 as the figure's bound, so their difference may be twice that.

    Args:
        rows: those that ``comparison`` was restricted to, as in ``compare``.
    """
    plain, other = results(case, backend), results(case, backend, **settings)
    found = []
    for figure in comparison.figures:
        if figure.name not in other:
            continue
        x, y = plain[figure.name].double(), other[figure.name].double()
        if rows is not None:
            at = torch.as_tensor(rows, device=x.device)
            x, y = (value.index_select(-3 + (figure.name == "lse"), at) for value in (x, y))
        finite = torch.isfinite(x)
        if not torch.equal(finite, torch.isfinite(y)):
            found.append(f"{figure.name}: infinities or NaN differ with {settings}")
            continue
        difference = (x - y)[finite]
        sizes = (
            (difference.abs().max().item(), difference.norm().item()) if difference.numel() else (0.0, 0.0)
        )
        if any(size > 2 * bound for size, bound in zip(sizes, figure.bound, strict=True)):
            found.append(f"{figure.name}: {sizes[0]:.2e} from the default with {settings}")
    return found


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equality of bits: NaN equals itself, 0 differs from -0."""
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
