"""FlashAttention's attention by its formula, one sequence at a time, in the dtype of the inputs; what its tests share."""

from __future__ import annotations

import torch


def visible(
    sq: int,
    sk: int,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    max_sk: int | None = None,
    keep_first: int = 0,
    force_fa_decode: bool = False,
    chunk: int = 0,
) -> torch.Tensor:
    """(sq, sk): which keys each query sees; ``max_sk`` is the longest sequence of keys of the call."""
    max_sk = sk if max_sk is None else max_sk
    left, right = (-1 if side >= max_sk else side for side in window)
    right = 0 if causal else right
    i, j = torch.arange(sq)[:, None] + sk - sq, torch.arange(sk)[None, :]
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0 and not (force_fa_decode and sq == 1):
        seen &= (j >= i - left) | (j < keep_first)
    if right >= 0:
        seen &= j <= i + right
    if chunk:
        seen &= torch.div(i, chunk, rounding_mode="floor") == torch.div(j, chunk, rounding_mode="floor")
    return seen


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (sq, h, dv) and lse (h, sq), -inf for a row that sees nothing, of q (sq, h, d), k (sk, hk, d), v (sk, hk, dv).

    ``slopes`` (h,); ``sink`` (s, h) or (sq, s, h). Matrices are multiplied in the inputs' dtype, the softmax is in at
    least fp32.
    """
    sq, heads, dim = q.shape
    sk, group = k.shape[0], heads // k.shape[1]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    rows = []
    for h in range(heads):
        s = (q[:, h] @ k[:, h // group].T).to(torch.promote_types(q.dtype, torch.float32)) * scale
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        if slopes is not None:
            distance = (
                torch.arange(sq, device=q.device)[:, None]
                + sk
                - sq
                - torch.arange(sk, device=q.device)[None, :]
            )
            distance = distance.abs()
            s = s - slopes[h].to(s.dtype) * distance
        s = s.masked_fill(~seen, -torch.inf)
        if sink is not None:
            own = sink[..., h].to(s.dtype)
            s = torch.cat([s, own.expand(sq, -1) if own.dim() == 1 else own], dim=1)
        blind = (s == -torch.inf).all(dim=1, keepdim=True)
        weights = torch.softmax(s.masked_fill(blind, 0.0), dim=1).masked_fill(blind, 0.0)[:, :sk]
        lse = torch.logsumexp(s.masked_fill(blind, 0.0), dim=1).masked_fill(blind[:, 0], -torch.inf)
        rows.append((weights.to(v.dtype) @ v[:, h // group], lse))
    return torch.stack([out for out, _ in rows], dim=1), torch.stack([lse for _, lse in rows])


def leaves(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return list(torch.autograd.grad(out, inputs, dout))
