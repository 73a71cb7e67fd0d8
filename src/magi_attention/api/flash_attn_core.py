"""What the flash_attn functions share: head padding, the call, and what comes back in FlashAttention 2's shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from magi_attention.attention import (
    BandMask,
    alibi_operands,
    attention,
    attention_backward,
    draw_rng_state,
)
from magi_attention.errors import check_tensor, check_type, complaint
from magi_attention.kernels.problem import Alibi
from magi_attention.kernels.reference.dense import dense_logits, multiplicity
from magi_attention.kernels.reference.modifiers import column_keys, kept, row_keys
from magi_attention.mask import Mask

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Boundaries = tuple[torch.Tensor, torch.Tensor]
"""cu_seqlens_q and cu_seqlens_k."""


@dataclass(frozen=True)
class Options:
    """Arguments of a call beside tensors and mask, under FlashAttention's names.

    ``sink`` is in a layout of ``attention``; ``rng_state`` what the dropout is drawn from, None for a new one.
    """

    dropout_p: float = 0.0
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    deterministic: bool = False
    sink: torch.Tensor | None = None
    rng_state: torch.Tensor | None = None
    sm_margin: int = 0

    def with_state(self, device: torch.device) -> Options:
        """With a state of the dropout: zeros where there is no dropout."""
        if self.rng_state is not None:
            return self
        if self.dropout_p > 0:
            return replace(self, rng_state=draw_rng_state(device))
        return replace(self, rng_state=torch.zeros(2, dtype=torch.int64, device=device))

    @property
    def state(self) -> torch.Tensor:
        """What ``with_state`` made sure of."""
        assert self.rng_state is not None
        return self.rng_state

    def settings(self, head_dim: int) -> dict[str, Any]:
        """As ``attention`` and ``attention_backward`` take them, but for the sink."""
        return {
            "softmax_scale": head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale,
            "softcap": max(self.softcap, 0.0),
            "dropout_p": self.dropout_p,
            "rng_state": self.rng_state if self.dropout_p > 0 else None,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
            "sm_margin": self.sm_margin,
        }


def sink_of(s_aux: torch.Tensor | None, learnable_sink: torch.Tensor | None) -> torch.Tensor | None:
    """The sink in a layout of ``attention``, whichever of its two names it came under."""
    if s_aux is not None and learnable_sink is not None:
        raise ValueError(complaint("s_aux, learnable_sink", "one of them", "both", "They are the same sink."))
    sink = learnable_sink if s_aux is None else s_aux
    if sink is not None:
        check_type("s_aux", sink, torch.Tensor)
    return sink[None] if sink is not None and sink.dim() == 1 else sink


def check_together(
    alibi_slopes: torch.Tensor | None, keep_first: int, pattern_of_pages: bool = False
) -> None:
    """NotImplementedError for what does not work together."""
    if alibi_slopes is not None and keep_first:
        remedy = "Leave one of them out."
        raise NotImplementedError(complaint("alibi_slopes, keep_first", "one of them", "both", remedy))
    if pattern_of_pages:
        remedy = "Ask for S_dmask without block_table."
        raise NotImplementedError(
            complaint("return_attn_probs", "False with pages and dropout", True, remedy)
        )


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is made of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BandMask,
    options: Options,
    return_attn_probs: bool,
    boundaries: Boundaries | None = None,
) -> Result:
    """out, or (out, softmax_lse, S_dmask); with the boundaries of packed sequences."""
    check_type("return_attn_probs", return_attn_probs, bool)
    if return_attn_probs:
        options = options.with_state(q.device)
    out, lse = forward(q, k, v, mask, options)
    if not return_attn_probs:
        return out
    return out, to_softmax_lse(lse), dropout_pattern(q, k, mask, options, boundaries)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BandMask, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse as ``attention`` returns them; heads may have any dimension."""
    settings = options.settings(q.shape[-1])
    out, meta = attention(_padded(q), _padded(k), _padded(v), mask, sink=options.sink, **settings)
    assert meta.lse is not None
    # A view would be another node of the graph, and of every backward.
    return out if out.shape[-1] == v.shape[-1] else out[..., : v.shape[-1]], meta.lse


def write_gradients(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    mask: BandMask,
    options: Options,
    given: tuple[torch.Tensor | None, ...],
) -> torch.Tensor:
    """Write the gradients for the out and softmax_lse of an earlier call into those of dq, dk and dv that are ``given``.

    Returns softmax_d, rowsum(dout * out).
    """
    lse, settings = from_softmax_lse(softmax_lse), options.settings(q.shape[-1])
    dout, q, k, v, out = map(_padded, (dout, q, k, v, out))
    gradients = attention_backward(dout, q, k, v, out, lse, mask, **settings)
    for into, gradient in zip(given, gradients, strict=True):
        if into is not None:
            into.copy_(gradient[..., : into.shape[-1]])
    products = torch.where(out == 0, 0.0, dout.float() * out.float())
    return products.sum(-1).transpose(-1, -2).contiguous()


def written_into(name: str, given: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    """``result``, in the tensor that was ``given`` for it under this name, if there is one."""
    if given is None:
        return result
    check_tensor(name, given, shape=result.shape, dtypes=(result.dtype,), device=result.device)
    return given.copy_(result)


def _padded(x: torch.Tensor) -> torch.Tensor:
    """With zeros up to whole 16 bytes a row, which the GPU kernels need."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)) if x.is_cuda and x.shape[-1] % 8 else x


def to_softmax_lse(lse: torch.Tensor) -> torch.Tensor:
    """(..., T, H) with -inf for a row that sees nothing -> (..., H, T) with +inf."""
    return lse.transpose(-1, -2).masked_fill(torch.isneginf(lse).transpose(-1, -2), torch.inf).contiguous()


def from_softmax_lse(softmax_lse: torch.Tensor) -> torch.Tensor:
    """The inverse of ``to_softmax_lse``."""
    lse = softmax_lse.transpose(-1, -2)
    return lse.masked_fill(torch.isposinf(lse), -torch.inf).contiguous()


@torch.no_grad()
def dropout_pattern(
    q: torch.Tensor, k: torch.Tensor, mask: BandMask, options: Options, boundaries: Boundaries | None
) -> torch.Tensor:
    """S_dmask: (b, H, rows, columns), both rounded up to 128, in q's dtype; empty without dropout.

    ``exp(score - the row's largest)``, negative where dropped. Quadratic in memory, and the host waits for
    ``boundaries``: for tests.
    """
    if options.dropout_p == 0:
        return q.new_empty(0)
    settings = options.settings(q.shape[-1])
    slopes, diagonals = alibi_operands(options.alibi_slopes, mask, q)
    if boundaries is None:
        spans = [(b, 0, q.shape[1], 0, k.shape[1]) for b in range(q.shape[0])]
    else:
        cuts_q, cuts_k = (x.tolist() for x in boundaries)
        spans = [(0, *cuts_q[n : n + 2], *cuts_k[n : n + 2]) for n in range(len(cuts_q) - 1)]
        q, k = q[None], k[None]
    column_keys_S = column_keys(options.state, torch.arange(k.shape[1], device=k.device))
    whole = Mask(mask.table.cpu().numpy(), mask.num_rows, mask.num_cols)
    rows = max((q1 - q0 for _, q0, q1, _, _ in spans), default=0)
    cols = max((k1 - k0 for *_, k0, k1 in spans), default=0)
    result = q.new_zeros(len(spans), q.shape[2], -(-rows // 128) * 128, -(-cols // 128) * 128)
    for n, (b, q0, q1, k0, k1) in enumerate(spans):
        table = whole.localise([(q0, q1)], [(k0, k1)]).table.to(q.device)
        alibi = None
        if slopes is not None and diagonals is not None:
            band = slice(n, n + 1) if boundaries is not None else slice(None)
            alibi = Alibi(slopes[:, band], diagonals[band] - (k0 - q0))
        count = multiplicity(table, q1 - q0, k1 - k0)
        logits, _ = dense_logits(
            q[b, q0:q1], k[b, k0:k1], table, count, settings["softmax_scale"], settings["softcap"], torch.float32,
            alibi, b,
        )  # fmt: skip
        top = logits.amax(dim=2, keepdim=True) if k1 > k0 else logits.new_zeros(1)
        weights = torch.exp(logits - top.nan_to_num(neginf=0.0))
        keys = row_keys(options.state, b, q.shape[2], torch.arange(q0, q1, device=q.device))
        keep = kept(keys, column_keys_S[k0:k1], options.dropout_p)
        result[n, :, : q1 - q0, : k1 - k0] = torch.where(keep, weights, -weights)
    return result
