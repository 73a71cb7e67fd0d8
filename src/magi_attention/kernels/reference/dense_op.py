"""The dense definition behind the operator's calling convention; gradients by autograd on the formula."""

from __future__ import annotations

import torch

from magi_attention.kernels.reference.dense import dense_attention


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    bands: torch.Tensor,
    softmax_scale: float,
    softcap: float,
    need_max_logits: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, max_logits), computed in fp64."""
    out, lse, top = _run(q, k, v, sink, bands, softmax_scale, softcap)
    stats = torch.promote_types(q.dtype, torch.float32)
    return out.to(q.dtype), lse.to(stats), top.to(stats)


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    bands: torch.Tensor,
    softmax_scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dsink), computed in fp64."""
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    sink = None if sink is None else sink.detach().double().requires_grad_()
    with torch.enable_grad():
        full_out, full_lse, _ = _run(*inputs, sink, bands, softmax_scale, softcap)
        blind = torch.isneginf(full_lse.detach())
        loss = (full_out * torch.where(full_out == 0, 0.0, dout.double())).sum()
        if dlse is not None:
            loss = loss + (torch.where(blind, 0.0, full_lse) * torch.where(blind, 0.0, dlse.double())).sum()
        grads = torch.autograd.grad(loss, [*inputs, *([] if sink is None else [sink])], allow_unused=True)
    dense = [
        torch.zeros_like(x) if g is None else g.to(x.dtype) for g, x in zip(grads[:3], (q, k, v), strict=True)
    ]
    dsink = lse.new_empty(0) if sink is None else grads[3].to(lse.dtype)
    return dense[0], dense[1], dense[2], dsink


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    bands: torch.Tensor,
    softmax_scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outs, lses, tops = [], [], []
    for b in range(q.shape[0]):
        row_sink = None if sink is None else sink[b][:, None, :]
        out, lse, top = dense_attention(
            q[b], k[b], v[b], bands, row_sink, softmax_scale=softmax_scale, softcap=softcap
        )
        outs.append(out)
        lses.append(lse)
        tops.append(top)
    return torch.stack(outs), torch.stack(lses), torch.stack(tops).amax(dim=0)
