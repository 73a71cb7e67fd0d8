"""Run ``attention`` and the fp64 definition on the same inputs and hold one against the other.

The truth is ``dense_attention`` in fp64 and autograd through it; the yardstick is the same formula at the
input's precision. Both are quadratic in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from magi_attention.attention import BandMask, accumulate, alibi_operands, attention
from magi_attention.kernels.problem import Alibi
from magi_attention.kernels.reference.dense import dense_attention, multiplicity
from magi_attention.mask import Mask
from magi_attention.mask.bands import K0, K1
from magi_attention.testing.tolerance import Comparison, figure


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one call of ``attention`` and the gradients that come back.

    Attributes:
        q, k, v, mask, sink, softmax_scale, softcap, dropout_p, rng_state, alibi_slopes: as in ``attention``; with
            dropout, rng_state must be given.
        dout: gradient of out, or None.
        dlse: gradient of lse, fp32 (fp64 for fp64 inputs), or None. Without dout and dlse only the forward is
            compared.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: BandMask
    sink: torch.Tensor | None = None
    dout: torch.Tensor | None = None
    dlse: torch.Tensor | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    rng_state: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None

    @property
    def modifiers(self) -> dict[str, Any]:
        """What changes scores or weights, as ``attention`` takes it; what is off is left out, but for softcap."""
        chosen: dict[str, Any] = {"softcap": self.softcap}
        if self.dropout_p > 0:
            chosen |= {"dropout_p": self.dropout_p, "rng_state": self.rng_state}
        if self.alibi_slopes is not None:
            chosen["alibi_slopes"] = self.alibi_slopes
        return chosen


def random_case(
    mask: BandMask,
    *,
    heads: tuple[int, int] = (2, 2),
    head_dim: int | tuple[int, int] = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch: int | None = None,
    seed: int = 0,
    sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> Case:
    """Standard normal q, k, v, dout and dlse that fit ``mask``.

    Args:
        heads: (H, HK). head_dim: D, or (D, DV).
        batch: leading axis, or none.
        seed: of the generator on ``device``.
        sink, softmax_scale, softcap: passed on.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    dim, dim_v = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
    lead = () if batch is None else (batch,)

    def draw(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*lead, *shape, generator=generator, device=device, dtype=of)

    q = draw(mask.num_rows, heads[0], dim)
    k = draw(mask.num_cols, heads[1], dim)
    v = draw(mask.num_cols, heads[1], dim_v)
    dout = draw(mask.num_rows, heads[0], dim_v)
    dlse = draw(mask.num_rows, heads[0], of=torch.promote_types(dtype, torch.float32))
    return Case(q, k, v, mask, sink, dout, dlse, softmax_scale, softcap)


def compare(
    case: Case,
    *,
    backend: str | None = None,
    rows: Sequence[int] | None = None,
    deterministic: bool = False,
    max_logits: bool = True,
) -> Comparison:
    """Figures of out, lse and, with dout or dlse, of dq, dk, dv and dsink; then of a forward with max_logits.

    Kernels need no running maximum that nobody asked for: with it, the call may take another way through them.

    Args:
        case: inputs; strides are kept. K/V rows that nobody sees, and q, dout, dlse of rows that see nothing,
            may hold anything.
        backend: as in ``attention``.
        rows: compare these distinct rows only, in out, lse and dq: the definition is then evaluated for them
            alone, so that long inputs are affordable.
        deterministic: as in ``attention``.
        max_logits: whether to look at the second call.
    """
    calls = {"": results(case, backend, deterministic=deterministic)}
    if max_logits:
        forward = replace(case, dout=None, dlse=None)
        calls[" +max"] = results(forward, backend, return_max_logits=True)
    return _figures(case, calls, rows)


def compare_parts(
    case: Case, cuts: Sequence[int], *, backend: str | None = None, rows: Sequence[int] | None = None
) -> Comparison:
    """Figures of out, lse and max_logits when ``accumulate`` takes the columns between ``cuts`` one part at a time.

    Args:
        case: as in ``compare``; gradients are ignored.
        cuts: ascending column numbers, 0 and the last one left out. The first part has the sink.
        backend, rows: as in ``compare``.
    """
    case = replace(case, dout=None, dlse=None)
    stats = torch.promote_types(case.q.dtype, torch.float32)
    out = case.q.new_full((*case.q.shape[:-1], case.v.shape[-1]), torch.nan, dtype=stats)
    lse = out.new_full(out.shape[:-1], -torch.inf)
    num_rows, num_cols = case.mask.num_rows, case.mask.num_cols
    whole = Mask(case.mask.table.cpu().numpy().astype(np.int64), num_rows, num_cols)
    tops: list[torch.Tensor] = []
    for begin, end in pairwise([0, *cuts, num_cols]):
        top = accumulate(
            out,
            lse,
            case.q,
            case.k[..., begin:end, :, :],
            case.v[..., begin:end, :, :],
            whole.localise([(0, num_rows)], [(begin, end)]),
            sink=None if tops else case.sink,
            softmax_scale=case.softmax_scale,
            softcap=case.softcap,
            return_max_logits=True,
            backend=backend,
        )
        assert top is not None
        tops.append(top)
    found = {"out": out, "lse": lse, "max_logits": torch.stack(tops).amax(dim=0)}
    return _figures(case, {"": found}, rows)


def _figures(case: Case, calls: dict[str, dict[str, torch.Tensor]], rows: Sequence[int] | None) -> Comparison:
    """What each call found, by label, against the formula."""
    wanted = case if rows is None else _restricted(case, rows)
    clean = _cleaned(wanted)
    if rows is not None:
        at = torch.as_tensor(rows, device=case.q.device)
        calls = {
            label: {
                name: ours[name].index_select(-3 + (name == "lse"), at)
                for name in ("out", "lse", "dq")
                if name in ours
            }
            for label, ours in calls.items()
        }
    exact, plain = _by_formula(clean, torch.float64), _by_formula(clean, None)
    units, zeros = _units(clean, exact), _zeros(clean)
    return Comparison(
        tuple(
            figure(name + label, value, exact[name], plain[name], unit=units[name], zeros=zeros.get(name))
            for label, ours in calls.items()
            for name, value in ours.items()
        )
    )


def results(case: Case, backend: str | None = None, **settings: Any) -> dict[str, torch.Tensor]:
    """What one call of ``attention`` returns, by the names of ``Figure``: out, lse, max_logits if filled, gradients.

    Args:
        settings: as in ``attention``.
    """
    leaves = _leaves(case, case.q.dtype)
    out, meta = attention(
        leaves["dq"],
        leaves["dk"],
        leaves["dv"],
        case.mask,
        sink=leaves.get("dsink"),
        softmax_scale=case.softmax_scale,
        backend=backend,
        **case.modifiers,
        **settings,
    )
    assert meta.lse is not None
    return _with_gradients(case, leaves, out, meta.lse, meta.max_logits)


def assert_matches_oracle(
    case: Case, *, backend: str | None = None, rows: Sequence[int] | None = None, deterministic: bool = False
) -> Comparison:
    """``compare``, and AssertionError with the table of figures when a tensor breaks the rule."""
    result = compare(case, backend=backend, rows=rows, deterministic=deterministic)
    if not result.ok:
        shapes = f"q {tuple(case.q.shape)}, k {tuple(case.k.shape)}, v {tuple(case.v.shape)}, {case.q.dtype}"
        settings = f"scale {case.softmax_scale}, {case.modifiers}, backend {backend}"
        raise AssertionError(f"attention against fp64: {shapes}, {settings}\n{case.mask!r}\n{result}")
    return result


def _by_formula(case: Case, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    leaves = _leaves(case, case.q.dtype if dtype is None else dtype)
    q, k, v, sink = (leaves.get(name) for name in ("dq", "dk", "dv", "dsink"))
    assert q is not None and k is not None and v is not None
    batched = q.dim() == 4
    settings: dict[str, Any] = {"softmax_scale": case.softmax_scale, "softcap": case.softcap, "dtype": dtype}
    settings |= {"dropout_p": case.dropout_p, "rng_state": case.rng_state}
    slopes, diagonals = alibi_operands(case.alibi_slopes, case.mask, q)
    settings["alibi"] = None if slopes is None or diagonals is None else Alibi(slopes, diagonals)
    parts = []
    for b in range(q.shape[0] if batched else 1):
        q_THD, k_SKD, v_SKV = (x[b] if batched else x for x in (q, k, v))
        own = sink[b] if sink is not None and sink.dim() == 4 else sink
        parts.append(dense_attention(q_THD, k_SKD, v_SKV, case.mask.table, own, **settings, batch=b))
    outs, lses, tops = ([part[n] for part in parts] for n in range(3))
    out, lse = (torch.stack(xs) if batched else xs[0] for xs in (outs, lses))
    return _with_gradients(case, leaves, out, lse, torch.stack(tops).amax(dim=0))


def _leaves(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs by the name of their gradient, without history, strides kept."""
    values = {"dq": case.q, "dk": case.k, "dv": case.v}
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in values.items()}
    if case.sink is not None:
        leaves["dsink"] = case.sink.detach().to(torch.promote_types(dtype, case.sink.dtype)).requires_grad_()
    return leaves


def _with_gradients(
    case: Case,
    leaves: dict[str, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    max_logits: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    found = {"out": out.detach(), "lse": lse.detach()}
    if max_logits is not None:
        found["max_logits"] = max_logits.detach()
    pairs = [(x, g) for x, g in ((out, case.dout), (lse, case.dlse)) if g is not None]
    if pairs:
        outputs, gradients = zip(*((x, g.to(x.dtype)) for x, g in pairs), strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[name] = torch.zeros_like(leaf) if grad is None else grad
    return found


def _visibility(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) rows that see nothing and (S,) columns that nobody sees."""
    count = multiplicity(case.mask.table, case.mask.num_rows, case.mask.num_cols).to(case.q.device)
    return (count == 0).all(dim=1), (count == 0).all(dim=0)


def _cleaned(case: Case) -> Case:
    """The same result from inputs without the garbage that must not matter."""
    blind, unseen = _visibility(case)

    def clear(x: torch.Tensor | None, where: torch.Tensor, trailing: int) -> torch.Tensor | None:
        return None if x is None else x.detach().masked_fill(where.view(-1, *[1] * trailing), 0)

    q, k, v = clear(case.q, blind, 2), clear(case.k, unseen, 2), clear(case.v, unseen, 2)
    assert q is not None and k is not None and v is not None
    dlse = clear(case.dlse, blind, 1) if case.sink is None else case.dlse
    return replace(case, q=q, k=k, v=v, dout=clear(case.dout, blind, 2), dlse=dlse)


def _restricted(case: Case, rows: Sequence[int]) -> Case:
    """Only these query rows, in this order, and the keys from the first to the last that one of them sees."""
    at = torch.as_tensor(rows, device=case.q.device)
    index = np.asarray(rows, dtype=np.int64)
    whole = Mask(case.mask.table.cpu().numpy(), case.mask.num_rows, case.mask.num_cols)
    if case.rng_state is not None or case.alibi_slopes is not None:
        raise NotImplementedError("rows: dropout and ALiBi depend on row and band numbers. Compare all rows.")
    strip = whole.localise(np.stack([index, index + 1], axis=1), [(0, whole.num_cols)]).canonical()
    begin, end = (
        (int(strip.bands[:, K0].min()), int(strip.bands[:, K1].max())) if len(strip.bands) else (0, 0)
    )
    mask = strip.localise([(0, len(index))], [(begin, end)])

    def take(x: torch.Tensor | None, dim: int) -> torch.Tensor | None:
        return None if x is None else x.index_select(dim, at)

    return replace(
        case,
        q=case.q.index_select(-3, at),
        k=case.k.narrow(-3, begin, end - begin),
        v=case.v.narrow(-3, begin, end - begin),
        mask=mask,
        sink=case.sink if case.sink is None or case.sink.dim() == 2 else take(case.sink, -3),
        dout=take(case.dout, -3),
        dlse=take(case.dlse, -2),
    )


def _zeros(case: Case) -> dict[str, torch.Tensor]:
    """Where a tensor must be exactly zero."""
    blind, unseen = (x[:, None, None] for x in _visibility(case))
    return {"out": blind, "dq": blind, "dk": unseen, "dv": unseen}


def _units(case: Case, exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Size of the terms that each result sums: what rounding errors are proportional to."""

    def largest(*tensors: torch.Tensor | None) -> float:
        finite = [x[torch.isfinite(x)].double().abs() for x in tensors if x is not None]
        return max((x.max().item() for x in finite if x.numel()), default=0.0)

    scale = case.q.shape[-1] ** -0.5 if case.softmax_scale is None else abs(case.softmax_scale)
    q, k, v, dout = (largest(x) for x in (case.q, case.k, case.v, case.dout))
    # A weight is the exponential of a logit: its relative error is the logit's absolute one.
    products = scale * q * k * case.q.shape[-1] ** 0.5
    distance = case.mask.num_rows + case.mask.num_cols
    biases = 0.0 if case.alibi_slopes is None else distance * largest(case.alibi_slopes)
    logits = max(1.0, products, biases, largest(exact["lse"], exact["max_logits"], case.sink))
    slope = logits * (dout * v * case.v.shape[-1] ** 0.5 + largest(case.dlse))
    queries = max(case.q.shape[-3] * case.q.shape[-2] // max(case.k.shape[-2], 1), 1) ** 0.5
    return {
        "out": v * logits,
        "lse": logits,
        "max_logits": logits,
        "dq": scale * k * slope,
        "dk": scale * q * slope * queries,
        "dv": dout * logits * queries,
        "dsink": slope * queries,
    }
