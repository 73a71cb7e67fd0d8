"""The registered operators ``magi_attention::forward``, ``backward`` and ``accumulate``.

Schemas, shapes for tracing and gradients live here; importing this module imports neither Triton nor a kernel.
Shapes: q (B, T, H, D), k (B, S, HK, D), v (B, S, HK, DV), sink (B, T, H) fp32 (one logit a row and head), bands (n, 6)
int32 on the CPU or on q's device, rng_state (2,) int64 (with dropout_p > 0), slopes (B, n, H) fp32 and diagonals (n,)
int32 (``Alibi``), backend a name or "" for the automatic choice, out (B, T, H, DV), lse (B, T, H), max_logits (H,).
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any

import torch

from magi_attention.kernels.problem import Alibi, Problem, stats_dtype
from magi_attention.kernels.select import backend_for, modifiers_of

_FORWARD = (
    "forward(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor bands, Tensor? rng_state, Tensor? slopes, "
    "Tensor? diagonals, float softmax_scale, float softcap, float dropout_p, bool need_max_logits, bool deterministic, "
    "int sm_margin, str backend) -> (Tensor out, Tensor lse, Tensor max_logits)"
)
_BACKWARD = (
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor out, Tensor lse, "
    "Tensor bands, Tensor? rng_state, Tensor? slopes, Tensor? diagonals, float softmax_scale, float softcap, "
    "float dropout_p, bool deterministic, int sm_margin, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)"
)
_ACCUMULATE = (
    "accumulate(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor bands, "
    "float softmax_scale, float softcap, bool need_max_logits, int sm_margin, str backend) -> Tensor max_logits"
)

_library = torch.library.Library("magi_attention", "DEF")
_library.define(_FORWARD)
_library.define(_BACKWARD)
_library.define(_ACCUMULATE)


@functools.cache
def _module(backend: str) -> Any:
    if backend == "hopper":
        from magi_attention.kernels.hopper import launch as hopper

        return hopper
    if backend == "triton":
        from magi_attention.kernels.triton import launch

        return launch
    if backend == "dense":
        from magi_attention.kernels.reference import dense_op

        return dense_op
    from magi_attention.kernels.reference import blockwise

    return blockwise


def _implementation(problem: Problem, backend: str) -> Any:
    modifiers = modifiers_of(problem.rng_state is not None, problem.alibi is not None)
    return _module(backend_for(problem.q, problem.v, backend or None, modifiers))


_HERE = contextlib.nullcontext()


def _device_of(q: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where to call a backend: Triton launches on the current device, which need not be that of the tensors."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        return torch.cuda.device(q.device)
    return _HERE


def _run(
    problem: Problem, need_max_logits: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A backend's (out, lse, max_logits), as schemas promise them: max_logits even where nobody asked for it."""
    q = problem.q
    with _device_of(q):
        out, lse, max_logits = _implementation(problem, backend).forward(problem, need_max_logits)
    return out, lse, lse.new_empty(q.shape[2]) if max_logits is None else max_logits


def _problem(given, deterministic, sm_margin):  # type: ignore[no-untyped-def]
    """From an operator's tensors and its first three scalars."""
    q, k, v, sink, bands, rng_state, slopes, diagonals, softmax_scale, softcap, dropout_p = given
    alibi = None if slopes is None else Alibi(slopes, diagonals)
    return Problem(
        q, k, v, sink, bands, softmax_scale, softcap, deterministic, sm_margin, None, dropout_p, rng_state, alibi
    )  # fmt: skip


def _forward(*inputs):  # type: ignore[no-untyped-def]
    *given, need_max_logits, deterministic, sm_margin, backend = inputs
    return _run(_problem(given, deterministic, sm_margin), need_max_logits, backend)


def _backward(dout, dlse, q, k, v, sink, out, lse, *others):  # type: ignore[no-untyped-def]
    *given, deterministic, sm_margin, backend = others
    problem = _problem((q, k, v, sink, *given), deterministic, sm_margin)
    with _device_of(q):
        return _implementation(problem, backend).backward(problem, out, lse, dout, dlse)


def _accumulate(  # type: ignore[no-untyped-def]
    out, lse, q, k, v, sink, bands, softmax_scale, softcap, need_max_logits, sm_margin, backend
):
    problem = Problem(q, k, v, sink, bands, softmax_scale, softcap, sm_margin=sm_margin, earlier=(out, lse))
    return _run(problem, need_max_logits, backend)[2]


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)
    _library.impl("accumulate", _accumulate, _device)


@torch.library.register_fake("magi_attention::forward", lib=_library)
def _forward_shapes(q, k, v, *others):  # type: ignore[no-untyped-def]
    batch, num_rows, num_heads, _ = q.shape
    stats = stats_dtype(q.dtype)
    out = q.new_empty(batch, num_rows, num_heads, v.shape[3])
    return out, q.new_empty(batch, num_rows, num_heads, dtype=stats), q.new_empty(num_heads, dtype=stats)


@torch.library.register_fake("magi_attention::backward", lib=_library)
def _backward_shapes(dout, dlse, q, k, v, sink, out, lse, *others):  # type: ignore[no-untyped-def]
    dsink = lse.new_empty(lse.shape if sink is not None else (0,))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


@torch.library.register_fake("magi_attention::accumulate", lib=_library)
def _accumulate_shapes(  # type: ignore[no-untyped-def]
    out, lse, q, k, v, sink, bands, softmax_scale, softcap, need_max_logits, sm_margin, backend
):
    return q.new_empty(q.shape[2], dtype=stats_dtype(q.dtype))


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, softmax_scale, softcap, dropout_p, _, deterministic, sm_margin, backend = inputs
    out, lse, max_logits = output
    if max_logits is not None:
        ctx.mark_non_differentiable(max_logits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse)
    ctx.scalars = (softmax_scale, softcap, dropout_p, deterministic, sm_margin, backend)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _: None) -> tuple:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        raise NotImplementedError("attention: second derivatives are not available. Differentiate once.")
    q, k, v, sink, *mask, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    packed = q.dim() == 3
    if packed:
        dout, q, k, v, out, lse = (x[None] for x in (dout, q, k, v, out, lse))
        dlse = None if dlse is None else dlse[None]
    arguments = (dout, dlse, q, k, v, sink, out, lse, *mask)
    direct = _nobody_listens() and _are_plain(*arguments)
    call = _backward if direct else backward
    dq, dk, dv, dsink = call(*arguments, *ctx.scalars)
    if packed:
        dq, dk, dv = dq[0], dk[0], dv[0]
    return dq, dk, dv, (dsink if sink is not None else None), *[None] * (len(mask) + len(ctx.scalars) + 1)


torch.library.register_autograd(
    "magi_attention::forward", _differentiate, setup_context=_save_for_backward, lib=_library
)

_operator = torch.ops.magi_attention.forward.default
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    bands: torch.Tensor,
    rng_state: torch.Tensor | None,
    slopes: torch.Tensor | None,
    diagonals: torch.Tensor | None,
    *scalars: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(out, lse, max_logits) of one backend; differentiable in q, k, v, sink through out and lse.

    q, k and v may come without their batch axis: then out and lse do as well. The sink always has its own. max_logits
    may be None where nobody asked for it.
    """
    # The way through the dispatcher takes longer than launching a kernel.
    others = (sink, bands, rng_state, slopes, diagonals)
    if _nobody_listens() and _are_plain(q, k, v, *others):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink)):
            return _Direct.apply(q, k, v, *others, *scalars)
        return _forward_directly(q, k, v, *others, *scalars)
    if q.dim() == 4:
        return _operator(q, k, v, *others, *scalars)
    out, lse, max_logits = _operator(q[None], k[None], v[None], *others, *scalars)
    return out[0], lse[0], max_logits


def _forward_directly(q, *inputs):  # type: ignore[no-untyped-def]
    *given, need_max_logits, deterministic, sm_margin, backend = inputs
    problem = _problem((q, *given), deterministic, sm_margin)
    implementation = _implementation(problem, backend)
    needs_batch = q.dim() == 3 and not getattr(implementation, "FORWARD_TAKES_PACKED", False)
    if needs_batch:
        problem = replace(problem, q=q[None], k=problem.k[None], v=problem.v[None])
    with _device_of(q), torch._C._AutoDispatchBelowAutograd():  # as the operator calls a backend
        out, lse, max_logits = implementation.forward(problem, need_max_logits)
    return (out[0], lse[0], max_logits) if needs_batch else (out, lse, max_logits)


class _Direct(torch.autograd.Function):
    """The operator and its gradient without the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _forward_directly(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _differentiate(ctx, *gradients)


def _nobody_listens() -> bool:
    """Whether no compiler, tracer, mode, transform or profiler wants to see which operators are called."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def _are_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether the operator would hand these to a backend as they are."""
    for x in tensors:  # a generator would take twice as long
        if x is None:
            continue
        if (
            type(x) not in _PLAIN
            or not (x.is_cuda or x.is_cpu)
            or x.layout is not torch.strided
            or x.is_neg()
        ):
            return False
    return True


backward = torch.ops.magi_attention.backward.default
"""(dq, dk, dv, dsink) of a forward whose out and lse are given; not differentiable."""

accumulate = torch.ops.magi_attention.accumulate.default
"""max_logits of further columns, whose result is merged into fp32 (out, lse) in place; not differentiable."""
