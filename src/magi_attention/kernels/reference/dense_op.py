"""The dense definition behind the operator's calling convention; gradients by autograd on the formula."""

from __future__ import annotations

from dataclasses import replace

import torch

from magi_attention.errors import complaint
from magi_attention.kernels.problem import Problem
from magi_attention.kernels.reference.dense import dense_attention


def forward(problem: Problem, need_max_logits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, max_logits), computed in fp64."""
    out, lse, top = _evaluate(problem)
    out = out.to(problem.q.dtype if problem.earlier is None else problem.stats_dtype)
    return *problem.merged(out, lse.to(problem.stats_dtype)), top.to(problem.stats_dtype)


def backward(
    problem: Problem, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dsink), computed in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (problem.q, problem.k, problem.v))
    sink = None if problem.sink is None else problem.sink.detach().double().requires_grad_()
    inputs = [q, k, v] if sink is None else [q, k, v, sink]
    with torch.enable_grad():
        out, lse, _ = _evaluate(replace(problem, q=q, k=k, v=v, sink=sink))
        # Rows that see nothing have out = 0 and lse = -inf whatever their gradients hold.
        loss = (out * torch.where(out == 0, 0.0, dout.double())).sum()
        if dlse is not None:
            blind = torch.isneginf(lse.detach())
            loss = loss + (lse.masked_fill(blind, 0.0) * dlse.double().masked_fill(blind, 0.0)).sum()
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    dq, dk, dv = (g.to(problem.q.dtype) for g in grads[:3])
    dsink = (
        grads[3].to(problem.stats_dtype) if sink is not None else lse.new_empty(0, dtype=problem.stats_dtype)
    )
    return dq, dk, dv, dsink


def _evaluate(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = problem.q.shape[0]
    if batch == 0:
        raise NotImplementedError(
            complaint("batch of backend 'dense'", "at least 1", 0, "Leave backend=None.")
        )
    results = []
    for b in range(batch):
        sink = None if problem.sink is None else problem.sink[b][:, None, :]
        results.append(
            dense_attention(
                problem.q[b],
                problem.k[b],
                problem.v[b],
                problem.bands,
                sink,
                softmax_scale=problem.softmax_scale,
                softcap=problem.softcap,
                dropout_p=problem.dropout_p,
                rng_state=problem.rng_state,
                alibi=problem.alibi,
                batch=b,
            )
        )
    outs, lses, tops = zip(*results, strict=True)
    return torch.stack(outs), torch.stack(lses), torch.stack(tops).amax(dim=0)
