"""What one call asks a backend to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of lse, max_logits and dsink for inputs of ``dtype``: fp32, and fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Alibi:
    """Linear biases: a pair that band n shows has ``-slope * |column - row - diagonal|`` added to its (capped) score.

    Attributes:
        slopes: fp32 (B, n, H), any strides. diagonals: int32 (n,), on the device of the slopes.
    """

    slopes: torch.Tensor
    diagonals: torch.Tensor


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention call, as every backend takes them.

    A backend is a module with ``forward(problem, need_max_logits) -> (out, lse, max_logits)`` and
    ``backward(problem, out, lse, dout, dlse) -> (dq, dk, dv, dsink)``; shapes as in ``ops``. max_logits may be None
    where it is not needed. With ``FORWARD_TAKES_PACKED`` the forward also takes q, k and v, and gives out and lse,
    without the batch axis.

    Attributes:
        q, k, v: (B, T, H, D), (B, S, HK, D), (B, S, HK, DV).
        sink: (B, T, H), one logit a row and head in fp32 (fp64 for fp64 inputs), any strides; or None.
        bands: int32 (n, 6), on the CPU or on q's device.
        softmax_scale: positive.
        softcap: 0 is off.
        deterministic: gradients must have the same bits every time (out always has).
        sm_margin: multiprocessors that persistent kernels leave free.
        earlier: None, or (out, lse) of the same rows over other columns, contiguous, (B, T, H, DV) and (B, T, H) in the
            stats dtype: ``forward`` merges its result into them, in place, and returns them. Where lse is -inf there
            is no earlier result, and out may hold anything.
        dropout_p: probability with which a weight is set to 0; the others are divided by 1 - dropout_p. 0 is off.
        rng_state: int64 (2,) on q's device, seed and offset of the dropout; or None.
        alibi: or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sink: torch.Tensor | None
    bands: torch.Tensor
    softmax_scale: float
    softcap: float
    deterministic: bool = False
    sm_margin: int = 0
    earlier: tuple[torch.Tensor, torch.Tensor] | None = None
    dropout_p: float = 0.0
    rng_state: torch.Tensor | None = None
    alibi: Alibi | None = None

    @property
    def stats_dtype(self) -> torch.dtype:
        """dtype of lse, max_logits and dsink."""
        return stats_dtype(self.q.dtype)

    def merged(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse), merged into ``earlier`` in place if there is one: weights exp(lse - joint lse), as in a softmax."""
        if self.earlier is None:
            return out, lse
        earlier_out, earlier_lse = self.earlier
        joint = torch.logaddexp(earlier_lse, lse)
        share, weight = (torch.exp(x - joint).nan_to_num_(0.0)[..., None] for x in (earlier_lse, lse))
        earlier_out.copy_(torch.where(share > 0, earlier_out * share, 0.0) + out * weight)
        earlier_lse.copy_(joint)
        return self.earlier
