"""Does a trained model's attention say what the definition says? Output and gradients, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from model import Decoder, rotation_angles
from packing import Packed
from torch import Tensor

from magi_attention import Mask, attention
from magi_attention.kernels.reference.dense import dense_attention

Run = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From q, k, v and sink to out and lse."""

NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")


@dataclass(frozen=True)
class Comparison:
    """Relative errors in the 2-norm against float64: ours, and the plain formula's at the same precision."""

    name: str
    ours: float
    plain: float
    allowance: float

    @property
    def within_rule(self) -> bool:
        """The tolerance rule: at most twice the plain error, and an allowance near one rounding."""
        return self.ours <= 2 * self.plain + self.allowance


def compare_with_oracle(model: Decoder, packed: Packed, mask: Mask) -> list[Comparison]:
    """The first layer's trained queries, keys, values and sink, through attention and its definition."""
    device = model.embedding.weight.device
    layer = model.layers[0]
    with torch.no_grad():
        x_TC = layer.attention_norm(model.embedding(torch.from_numpy(packed.inputs).to(device)))
        angles_TD = rotation_angles(torch.from_numpy(packed.positions).to(device), model.shape.head_dim)
        tensors = (*layer.attention.project(x_TC, angles_TD), layer.attention.sink.detach())
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(tensors[0].shape, generator=generator).to(tensors[0])

    def ours(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        out, meta = attention(q, k, v, mask, sink=sink, deterministic=True, backend=model.shape.backend)
        return out, meta.lse

    def plain(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return dense_attention(q, k, v, mask.table, sink, dtype=None)[:2]

    def exact(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return dense_attention(q, k, v, mask.table, sink)[:2]

    true = results(exact, [tensor.double() for tensor in tensors], dout.double())
    allowance = max(torch.finfo(tensors[0].dtype).eps / 4, 1e-6)
    errors = [
        [relative_error(a, b) for a, b in zip(results(f, tensors, dout), true, strict=True)]
        for f in (ours, plain)
    ]
    return [Comparison(name, *pair, allowance) for name, *pair in zip(NAMES, *errors, strict=True)]


def results(function: Run, tensors: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """out and lse of ``function``, and the gradients of its four inputs under ``dout``."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out, lse = function(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def relative_error(value: Tensor, true: Tensor) -> float:
    """|value - true| / |true| in the 2-norm."""
    return float((value.double() - true).norm() / true.norm())
