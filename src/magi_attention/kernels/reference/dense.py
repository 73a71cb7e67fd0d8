"""The definition of the result, quadratic in memory: what every other kernel is compared with.

    s_ijb = cap(scale * q_i . k_j) - slope |j - i - d_b|,   cap(x) = softcap * tanh(x / softcap)   (or x)
    lse_i = log( sum_jb exp(s_ijb) + sum_t exp(z_it) )
    o_i   = sum_jb exp(s_ijb - lse_i) r_ij v_j

summed over the bands b through which row i sees column j, with z the sink logits and r the dropout: 0, or 1 / (1 - p).
"""

from __future__ import annotations

import torch

from magi_attention.kernels.problem import Alibi
from magi_attention.kernels.reference.modifiers import alibi_bias, column_keys, kept, row_keys
from magi_attention.mask.bands import INF


def multiplicity(table: torch.Tensor, num_rows: int, num_cols: int) -> torch.Tensor:
    """(num_rows, num_cols) int32 count of the bands that cover each pair. ``table`` is (n, 6)."""
    rows = torch.arange(num_rows, device=table.device)[:, None]
    cols = torch.arange(num_cols, device=table.device)[None, :]
    count = torch.zeros(num_rows, num_cols, dtype=torch.int32, device=table.device)
    for q0, q1, k0, k1, lo, hi in table.tolist():
        inside = (rows >= q0) & (rows < q1) & (cols >= k0) & (cols < k1)
        diagonal = cols - rows
        count += inside & (diagonal >= max(lo, -INF)) & (diagonal <= min(hi, INF))
    return count


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    sink: torch.Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype | None = torch.float64,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    alibi: Alibi | None = None,
    batch: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention by the formula above; differentiable by autograd.

    Args:
        q: (T, H, D). k: (S, HK, D) with H % HK == 0. v: (S, HK, DV).
        table: (n, 6) integer bands.
        sink: sink logits, "sh" (s_sink, H) or "ssh" (T, s_sink, H), or None.
        softmax_scale: D ** -0.5 when None.
        softcap: 0 switches the cap off.
        dtype: everything is computed in this dtype; None keeps the inputs' dtype and multiplies matrices in it, with
            the softmax in at least fp32: the plain low-precision formula of the tolerance rule.
        dropout_p, rng_state: of the dropout; no state, no dropout.
        alibi: None, or linear biases. batch: which batch entry's biases and dropout.

    Returns:
        out (T, H, DV), lse (T, H), max_logits (H,), all in the computing dtype (softmax dtype for the last two).
    """
    num_rows, num_heads, _ = q.shape
    work = q.dtype if dtype is None else dtype
    count = multiplicity(table, num_rows, k.shape[0]).to(q.device)
    # Keys that nobody sees may hold NaN: they must not enter a product, not even with weight zero.
    unseen = (count == 0).all(dim=0)[:, None, None]
    v_HSV = (
        v.to(work).masked_fill(unseen, 0).repeat_interleave(num_heads // k.shape[1], dim=1).transpose(0, 1)
    )
    logits, max_logits = dense_logits(q, k, table, count, softmax_scale, softcap, work, alibi, batch)
    if sink is not None:
        z = sink.to(logits.dtype).movedim(-1, 0)
        z = z[:, None, :].expand(-1, num_rows, -1) if z.dim() == 2 else z
        logits = torch.cat([logits, z], dim=2)
    lse = safe_logsumexp(logits)
    finite = torch.where(torch.isneginf(lse), 0.0, lse)
    weights = torch.exp(logits[:, :, : k.shape[0]] - finite[:, :, None]).to(work)
    if rng_state is not None:
        rows, cols = (torch.arange(size, device=q.device) for size in (num_rows, k.shape[0]))
        keys = row_keys(rng_state, batch, num_heads, rows)
        weights = weights * kept(keys, column_keys(rng_state, cols), dropout_p) / (1 - dropout_p)
    out = (weights @ v_HSV).transpose(0, 1)
    return out, lse.transpose(0, 1), max_logits.detach()


def dense_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    table: torch.Tensor,
    count: torch.Tensor,
    softmax_scale: float | None,
    softcap: float,
    dtype: torch.dtype,
    alibi: Alibi | None = None,
    batch: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Capped and biased scores (H, T, S), -inf where nothing is seen, and the largest of each head (H,).

    ``count`` is the table's ``multiplicity``. A pair that several bands show has the log of their sum. In at least fp32.
    """
    num_heads, head_dim = q.shape[1:]
    high = torch.promote_types(dtype, torch.float32)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    unseen, blind = (count == 0).all(dim=0), (count == 0).all(dim=1)
    k_HSD = k.to(dtype).masked_fill(unseen[:, None, None], 0)
    k_HSD = k_HSD.repeat_interleave(num_heads // k.shape[1], dim=1).transpose(0, 1)
    q_HTD = q.to(dtype).masked_fill(blind[:, None, None], 0).transpose(0, 1)
    logits = (q_HTD @ k_HSD.transpose(1, 2)).to(high) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    visible = (count > 0)[None]
    bias = count.clamp(min=1).to(high).log()
    largest = logits
    if alibi is not None:
        biases = _biases(alibi, batch, table, count, high)
        bias, largest = biases.logsumexp(0).masked_fill(count == 0, 0.0), logits + biases.amax(0)
    max_logits = largest.masked_fill(~visible, -torch.inf).flatten(1)
    max_logits = (
        max_logits.amax(dim=1) if max_logits.shape[1] else max_logits.new_full((num_heads,), -torch.inf)
    )
    return (logits + bias).masked_fill(~visible, -torch.inf), max_logits


def _biases(
    alibi: Alibi, batch: int, table: torch.Tensor, count: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(n + 1, H, T, S): linear biases of each band, -inf where it does not show the pair; the last one shows nothing."""
    rows, cols = (torch.arange(n, device=count.device) for n in count.shape)
    biases = torch.full(
        (len(table) + 1, alibi.slopes.shape[2], *count.shape), -torch.inf, dtype=dtype, device=count.device
    )
    for band in range(len(table)):
        shown = multiplicity(table[band : band + 1], *count.shape).to(count.device) > 0
        bias = alibi_bias(alibi, batch, band, rows, cols, dtype)
        biases[band] = bias.masked_fill(~shown, -torch.inf)
    return biases


def safe_logsumexp(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """logsumexp whose value is -inf, and whose gradient is 0, where every term is -inf (or there is no term)."""
    if x.shape[dim] == 0:
        return x.sum(dim) - torch.inf
    top = x.detach().amax(dim=dim, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = torch.exp(x - top).sum(dim)
    empty = total == 0
    return torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1.0, total)) + top.squeeze(dim))
