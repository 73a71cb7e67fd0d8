"""The one verb: exact attention of packed tokens under a mask made of bands, whole or a part of the columns at a time."""

from __future__ import annotations

from typing import Protocol

import torch

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.recent import Recent
from magi_attention.errors import check_count, check_number, check_tensor, check_type, complaint
from magi_attention.kernels import ops
from magi_attention.kernels.problem import stats_dtype
from magi_attention.kernels.reference.dense import safe_logsumexp
from magi_attention.kernels.select import backend_for, check_backend, modifiers_of
from magi_attention.mask.bands import INF

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BandMask(Protocol):
    """What attention needs of a mask: ``mask.Mask`` (host) and ``mask.DeviceMask`` (device) both have it."""

    @property
    def table(self) -> torch.Tensor: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_cols(self) -> int: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BandMask,
    *,
    sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_max_logits: bool = False,
    deterministic: bool = False,
    sm_margin: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, AttnForwardMeta]:
    """Exact attention: ``out_i = sum_j exp(s_ij - lse_i) v_j`` over the pairs that ``mask`` shows.

    ``s_ij = softmax_scale * q_i . k_j``, capped to ``softcap * tanh(s / softcap)`` when softcap > 0;
    ``lse_i = log(sum_j exp(s_ij) + sum_t exp(sink_it))``. A row that sees nothing has out 0, lse -inf (or the sinks'
    logsumexp) and zero gradients. Differentiable in q, k, v and sink, through out and through lse.

    Args:
        q: (T, H, D) or (B, T, H, D), fp16, bf16, fp32 or fp64; last stride 1 avoids a copy.
        k: (S, HK, D) or (B, S, HK, D), same dtype; H % HK == 0, query head h reads K/V head h // (H // HK).
        v: (S, HK, DV) or (B, S, HK, DV), same dtype.
        mask: over T rows and S columns, shared by the batch. See ``Mask``.
        sink: extra logits in the denominator, not scaled, not capped: (s_sink, H), or per row (T, s_sink, H) or
            (B, T, s_sink, H). Computed in fp32.
        softmax_scale: D ** -0.5 when None.
        softcap: 0 is off.
        dropout_p: probability, below 1, with which a weight becomes 0; the others are divided by ``1 - dropout_p``.
            lse does not change. The backward drops the same weights.
        rng_state: int64 (2,), seed and offset of the dropout, on q's device: which weights are dropped is a function
            of it and of batch entry, head, row and column alone, the same on every backend. None draws one from the
            device's default generator, so that ``torch.manual_seed`` repeats the call.
        alibi_slopes: fp32, (H,), or (n, H), one row a band, and with a batch axis (B, H) instead: adds
            ``-slope * |j - i - (k1 - q1)|`` to the (capped) score of a pair in the band (q0, q1, k0, k1, lo, hi),
            the distance from the diagonal that ends in the band's lower right corner (Press et al. 2021). Not
            differentiable.
        return_max_logits: fill ``meta.max_logits`` (H,) fp32: the largest (capped) logit each head saw, biases
            included, -inf if none.
        deterministic: the same gradient bits every time (out and lse always are). The Hopper backward sums dq in the
            order of arrival; with this, the portable backward runs in its place.
        sm_margin: streaming multiprocessors that the Hopper kernels leave free for communication; the other kernels
            are not persistent and leave the sharing to the GPU's scheduler.
        backend: "hopper", "triton", "blockwise" or "dense" by name, or None for the automatic choice; see ``explain``.

    Returns:
        out (T, H, DV) or (B, T, H, DV) in q's dtype, and ``AttnForwardMeta`` with lse (T, H) or (B, T, H), fp32
        (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: arguments that do not fit together. NotImplementedError: a feature or a named backend
            that cannot run this call; the message says why.
    """
    _check_scalars(softcap, sm_margin)
    modifiers = _modifiers(dropout_p, alibi_slopes)
    q, k, v, sink, bands, scale = _operands(q, k, v, mask, sink, softmax_scale, backend, modifiers)
    out, lse, max_logits = ops.forward(
        q,
        k,
        v,
        sink,
        bands,
        _rng_state(dropout_p, rng_state, q),
        *alibi_operands(alibi_slopes, mask, q),
        scale,
        float(softcap),
        float(dropout_p),
        return_max_logits,
        bool(deterministic),
        int(sm_margin),
        backend or "",
    )
    return out, AttnForwardMeta(lse, max_logits if return_max_logits else None)


@torch.no_grad()
def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: BandMask,
    *,
    dlse: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``attention`` from an out and lse that are already there, which may be those of more columns.

    Weights are ``exp(s_ij - lse_i)``, and ``delta_i = out_i . dout_i - dlse_i``: with the out and lse of all columns,
    calls over parts of the columns give the parts' shares, as ring attention needs them. Without sinks, and not
    differentiable.

    Args:
        dout: as out, the gradient. out: (T, H, DV) or (B, T, H, DV) in q's dtype.
        lse, dlse: (T, H) or (B, T, H), fp32 (fp64 for fp64 inputs).
        rng_state: needed with dropout. The others: as in ``attention``.

    Returns:
        dq, dk, dv, shaped as q, k, v.

    Raises:
        As ``attention``.
    """
    _check_scalars(softcap, sm_margin)
    modifiers = _modifiers(dropout_p, alibi_slopes)
    if dropout_p > 0 and rng_state is None:
        raise ValueError(complaint("rng_state", "that of the forward", None, "Give it to both calls."))
    negative = softmax_scale is not None and softmax_scale < 0
    q, k, v, _, bands, scale = _operands(q, k, v, mask, None, softmax_scale, backend, modifiers)
    shape, stats = (*q.shape[:-1], v.shape[-1]), stats_dtype(q.dtype)
    check_tensor("out", out, shape=shape, dtypes=(q.dtype,), device=q.device)
    check_tensor("dout", dout, shape=shape, dtypes=(q.dtype,), device=q.device)
    check_tensor("lse", lse, shape=shape[:-1], dtypes=(stats,), device=q.device)
    if dlse is not None:
        check_tensor("dlse", dlse, shape=shape[:-1], dtypes=(stats,), device=q.device)
    others = (_rng_state(dropout_p, rng_state, q), *alibi_operands(alibi_slopes, mask, q))
    packed = q.dim() == 3
    if packed:
        dout, q, k, v, out, lse = (x[None] for x in (dout, q, k, v, out, lse))
        dlse = None if dlse is None else dlse[None]
    dq, dk, dv, _ = ops.backward(
        dout, dlse, q, k, v, None, out, lse.contiguous(), bands, *others, scale, float(softcap), float(dropout_p),
        bool(deterministic), int(sm_margin), backend or "",
    )  # fmt: skip
    dq = -dq if negative else dq
    return (dq[0], dk[0], dv[0]) if packed else (dq, dk, dv)


def accumulate(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BandMask,
    *,
    sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
    sm_margin: int = 0,
    backend: str | None = None,
) -> torch.Tensor | None:
    """Attention over further columns, merged in place into the result ``(out, lse)`` of earlier ones.

    ``lse' = logaddexp(lse, lse_new)`` and ``out' = exp(lse - lse') out + exp(lse_new - lse') out_new``, in fp32: calls
    over parts of the columns end in the result over all of them, as context parallelism needs it. Begin with lse -inf:
    where lse is -inf, out may hold anything. Give the sink to one of the calls. Not differentiable: gradients come from
    the final out and lse.

    Args:
        out: (T, H, DV) or (B, T, H, DV), fp32 (fp64 for fp64 inputs), contiguous; overwritten.
        lse: (T, H) or (B, T, H), same dtype, contiguous; overwritten.
        q, k, v, mask, sink, softmax_scale, softcap, return_max_logits, sm_margin, backend: as in ``attention``; k, v
            and the columns of ``mask`` are those of this part.

    Returns:
        (H,) fp32, the largest (capped) logit each head saw in this part; None unless ``return_max_logits``.

    Raises:
        As ``attention``; NotImplementedError too if a gradient would be recorded.
    """
    _check_scalars(softcap, sm_margin)
    inputs = [x for x in (out, lse, q, k, v, sink) if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        remedy = "Call it under torch.no_grad()."
        raise NotImplementedError(complaint("accumulate", "inputs without gradient", "requires_grad", remedy))
    q, k, v, *others = _operands(q, k, v, mask, sink, softmax_scale, backend)
    expected = (*q.shape[:-1], v.shape[-1])
    for name, x, shape in (("out", out, expected), ("lse", lse, expected[:-1])):
        check_tensor(name, x, shape=shape, dtypes=(stats_dtype(q.dtype),), device=q.device)
        if not x.is_contiguous():
            raise ValueError(complaint(name, "a contiguous tensor", f"strides {x.stride()}"))
    if q.dim() == 3:
        out, lse, q, k, v = (x[None] for x in (out, lse, q, k, v))
    max_logits = ops.accumulate(
        out, lse, q, k, v, *others, float(softcap), return_max_logits, int(sm_margin), backend or ""
    )
    return max_logits if return_max_logits else None


def _operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BandMask,
    sink: torch.Tensor | None,
    softmax_scale: float | None,
    backend: str | None,
    modifiers: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, float]:
    """Checked: q, k, v, sink (B, T, H), bands and a scale that is not negative."""
    _check_tensors(q, k, v)
    _check_mask(mask, q, k)
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if scale < 0:  # kernels keep a running maximum of scaled scores
        q, scale = -q, -scale
    if backend is not None:
        check_backend(backend)
        # The operator asks again; while traced, nothing may look at the device.
        if not torch.compiler.is_compiling():
            backend_for(q, v, backend, modifiers)
    return q, k, v, _sink_of(sink, q), mask.table, scale


def _sink_of(sink: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """One logit a row and head, (B, T, H): the logsumexp over the sinks, expanded without a copy."""
    if sink is None:
        return None
    batched = q.dim() == 4
    batch = q.shape[0] if batched else 1
    num_rows, num_heads, _ = q.shape[-3:]
    check_type("sink", sink, torch.Tensor)
    shapes: tuple[tuple[int | str, ...], ...] = (("s_sink", num_heads), (num_rows, "s_sink", num_heads))
    if batched:
        shapes = (*shapes, (batch, num_rows, "s_sink", num_heads))
    fitting = next((s for s in shapes if len(s) == sink.dim()), shapes[0])
    check_tensor("sink", sink, shape=fitting, dtypes=_FLOATS, device=q.device, remedy=_SINK_REMEDY)
    logit = safe_logsumexp(sink.to(stats_dtype(q.dtype)), dim=-2)
    return logit.expand(batch, num_rows, num_heads)


_SINK_REMEDY = 'Layouts: "sh" (s_sink, num_heads) or "ssh" (num_tokens_q, s_sink, num_heads).'


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if _fit(q, k, v):  # asked in every call: a fraction of the time that finding out what is wrong takes
        return
    check_type("q", q, torch.Tensor)
    if q.dim() not in (3, 4):
        raise ValueError(complaint("q shape", "(T, H, D) or (B, T, H, D)", tuple(q.shape)))
    check_tensor("q", q, dtypes=_FLOATS)
    batch, head_dim = q.shape[:-3], q.shape[-1]
    check_tensor("k", k, shape=(*batch, "S", "HK", head_dim), dtypes=(q.dtype,), device=q.device)
    check_tensor("v", v, shape=(*batch, k.shape[-3], k.shape[-2], "DV"), dtypes=(q.dtype,), device=q.device)
    num_heads, num_kv_heads = q.shape[-2], k.shape[-2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        expected = f"a multiple of the {num_kv_heads} heads of k and v"
        raise ValueError(complaint("heads of q", expected, num_heads))
    if head_dim == 0 or v.shape[-1] == 0:
        raise ValueError(complaint("head dimension", "at least 1", (head_dim, v.shape[-1])))


def _fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether ``_check_tensors`` has nothing to complain about."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        return False
    if not (q.dtype in _FLOATS and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return False
    if not (q.dim() in (3, 4) and q.dim() == k.dim() == v.dim()):
        return False
    *q_batch, _, num_heads, head_dim = q.shape
    *k_batch, num_cols, num_kv_heads, k_dim = k.shape
    *v_batch, v_cols, v_heads, v_dim = v.shape
    if not (head_dim == k_dim and head_dim > 0 and v_dim > 0 and q_batch == k_batch == v_batch):
        return False
    return num_cols == v_cols and num_kv_heads == v_heads > 0 and num_heads % num_kv_heads == 0


def _check_mask(mask: BandMask, q: torch.Tensor, k: torch.Tensor) -> None:
    try:
        table, num_rows, num_cols = mask.table, mask.num_rows, mask.num_cols
    except AttributeError:
        remedy = "Build one with Mask.causal, Mask.varlen, ..."
        raise TypeError(complaint("mask", "a Mask or DeviceMask", type(mask).__name__, remedy)) from None
    if num_rows != q.shape[-3] or num_cols != k.shape[-3]:
        expected = f"{q.shape[-3]} rows x {k.shape[-3]} columns"
        raise ValueError(complaint("mask size", expected, f"{num_rows} x {num_cols}"))
    if table.device != q.device and table.device.type != "cpu":
        raise ValueError(complaint("mask.table device", f"cpu or {q.device}", table.device))
    if num_rows >= INF // 2 or num_cols >= INF // 2:
        raise ValueError(complaint("tokens", f"fewer than {INF // 2}", max(num_rows, num_cols)))


def _modifiers(dropout_p: float, alibi_slopes: object) -> str:
    """What a backend must be able to do beside the rest."""
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(complaint("dropout_p", "0 <= dropout_p < 1", dropout_p))
    return modifiers_of(dropout_p > 0, alibi_slopes is not None)


def _rng_state(dropout_p: float, rng_state: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if dropout_p == 0:
        if rng_state is not None:
            raise ValueError(complaint("rng_state", "None without dropout", "a tensor", "Set dropout_p."))
        return None
    if rng_state is None:
        return draw_rng_state(q.device)
    check_tensor("rng_state", rng_state, shape=(2,), dtypes=(torch.int64,), device=q.device)
    return rng_state


def draw_rng_state(device: torch.device) -> torch.Tensor:
    """Seed and offset of a dropout, from the device's default generator."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def alibi_operands(
    slopes: torch.Tensor | None, mask: BandMask, q: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Slopes (B, n, H), expanded without a copy, and the diagonals of the n bands."""
    if slopes is None:
        return None, None
    num_bands, num_heads, batched = len(mask.table), q.shape[-2], q.dim() == 4
    check_type("alibi_slopes", slopes, torch.Tensor)
    shape = (num_heads,) if slopes.dim() == 1 else (q.shape[0] if batched else num_bands, num_heads)
    check_tensor("alibi_slopes", slopes, shape=shape, dtypes=(torch.float32,), device=q.device)
    if slopes.requires_grad and torch.is_grad_enabled():
        remedy = "Detach them."
        raise NotImplementedError(complaint("alibi_slopes", "no gradient", "requires_grad", remedy))
    if slopes.dim() == 2:
        slopes = slopes[:, None] if batched else slopes[None]
    batch = q.shape[0] if batched else 1
    return slopes.expand(batch, num_bands, num_heads), _diagonals(mask.table, q.device)


_moved: Recent[tuple[torch.Tensor, torch.Tensor]] = Recent(256)


def _diagonals(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """k1 - q1 of each band, int32 (n,); those of a host mask are moved to a GPU once, for which the host waits."""
    if table.device == device or torch.compiler.is_compiling() or table.is_inference():
        return (table[:, 3] - table[:, 1]).to(device)
    key = (id(table), table._version, device)
    found = _moved.get(key)
    if found is None:
        found = table, (table[:, 3] - table[:, 1]).to(device)  # holding the table keeps its id
        _moved.put(key, found)
    return found[1]


def _check_scalars(softcap: float, sm_margin: int) -> None:
    check_number("softcap", softcap)
    if softcap < 0:
        raise ValueError(complaint("softcap", "0 (off) or a positive number", softcap))
    check_count("sm_margin", sm_margin)
