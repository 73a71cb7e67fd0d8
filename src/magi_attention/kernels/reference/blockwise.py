"""The CPU default: exact attention tile by tile with torch operations, memory linear in tokens, any device and dtype.

It walks the same plan as the GPU kernels. Each step multiplies one tile of query rows with one chunk of the columns
that the tile sees, for a few heads at a time, so that the scores stay in cache; chunks are merged by log-sum-exp.
Half precision is computed in fp32.

Axes: T query rows, S key rows, K kv heads, G query heads of one kv head, R = G * tile rows (folded together, because
they multiply the same keys), C columns of a chunk, D and V head dimensions of q/k and of v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from magi_attention.kernels.problem import Alibi, Problem
from magi_attention.kernels.reference.modifiers import Keys, alibi_bias, column_keys, kept, row_keys
from magi_attention.plan.cache import PlanKey, plan_cache
from magi_attention.plan.tiles import run_geometry

_CHUNK_COLS = 2048
_TILE_ROWS = 256
# Scores of one step: about 4 MB in fp32, what two cores' caches hold.
_STEP_SCORES = 1 << 20
# Stands for -inf inside a chunk: torch.softmax of a row of -inf would be NaN.
_HIDDEN = -1e30


@dataclass(frozen=True)
class _Chunk:
    """Columns [begin, end) of one run; [0, left) and [right, end - begin) are partial: there the diagonals cut."""

    band: int
    begin: int
    end: int
    left: int
    right: int
    lo: int
    hi: int

    def hide(self, scores: torch.Tensor, row_begin: int, num_rows: int) -> None:
        """Overwrite the scores (K, R, C) of invisible pairs, in place."""
        scores = scores.view(scores.shape[0], -1, num_rows, scores.shape[2])
        for first, last in ((0, self.left), (self.right, self.end - self.begin)):
            if first < last:
                rows = torch.arange(row_begin, row_begin + num_rows, device=scores.device)[:, None]
                cols = torch.arange(self.begin + first, self.begin + last, device=scores.device)
                diagonal = cols - rows
                scores[..., first:last].masked_fill_((diagonal < self.lo) | (diagonal > self.hi), _HIDDEN)


@dataclass(frozen=True)
class _Tile:
    row_begin: int
    row_end: int
    chunks: list[_Chunk]


def _tiles(problem: Problem) -> Iterator[_Tile]:
    """Tiles that see something, with what they see."""
    q, k = problem.q, problem.k
    group = q.shape[2] // k.shape[2]
    block_rows = max(32, _TILE_ROWS // group)
    key = PlanKey(q.shape[1], k.shape[1], block_rows, 1, False, torch.device("cpu"))
    plan = plan_cache.plan_for(problem.bands.cpu(), key)
    tiles, band_list = plan.tiles.numpy().astype(np.int64), plan.band_list.numpy()
    table = plan.bands.numpy().astype(np.int64)
    for row_begin, row_end, begin, count in tiles:
        if count == 0:
            continue
        seen = table[band_list[begin : begin + count]]
        runs = run_geometry(np.full(count, row_begin), np.full(count, row_end), seen, 1)
        chunks: list[_Chunk] = []
        numbers = band_list[begin : begin + count].tolist()
        for number, (first, last, _, full_begin, full_end) in zip(
            numbers, zip(*(r.tolist() for r in runs), strict=True), strict=True
        ):
            _, _, _, _, lo, hi = table[number].tolist()
            chunks += _cut(number, first, last, first + full_begin, first + full_end, lo, hi)
        yield _Tile(int(row_begin), int(row_end), chunks)


def _cut(
    band: int, first: int, last: int, full_begin: int, full_end: int, lo: int, hi: int
) -> Iterator[_Chunk]:
    """A run in chunks of nearly equal width; columns [full_begin, full_end) need no mask."""
    pieces = -(-(last - first) // _CHUNK_COLS)
    edges = [first + (last - first) * n // pieces for n in range(pieces + 1)]
    for begin, end in pairwise(edges):
        left = min(max(full_begin, begin), end) - begin
        right = min(max(full_end, begin + left), end) - begin
        yield _Chunk(band, begin, end, left, right, lo, hi)


def _fold(x: torch.Tensor, num_kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, H, D) -> (K, G * rows, D)."""
    rows, _, dim = x.shape
    return x.to(dtype).view(rows, num_kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, dim)


def _unfold(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(K, G * rows, D) -> (rows, H, D)."""
    return x.view(x.shape[0], -1, num_rows, x.shape[2]).permute(2, 0, 1, 3).flatten(1, 2)


def _by_head(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(S, K, D) -> contiguous (K, S, D)."""
    return x.to(dtype).transpose(0, 1).contiguous()


def _head_steps(num_kv_heads: int, group: int, folded_rows: int) -> Iterator[tuple[slice, slice]]:
    """K/V heads of each step, and the query heads that read them."""
    step = max(1, _STEP_SCORES // (folded_rows * _CHUNK_COLS))
    for begin in range(0, num_kv_heads, step):
        end = min(begin + step, num_kv_heads)
        yield slice(begin, end), slice(begin * group, end * group)


class _Room:
    """Memory for the scores of one step, used again by every step: fresh pages would cost as much as the products."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype) -> None:
        self._buffer = like.new_empty(0, dtype=dtype)

    def of(self, *shape: int) -> torch.Tensor:
        """An uninitialised tensor of this shape; the one before it is gone."""
        if self._buffer.numel() < math.prod(shape):
            self._buffer = self._buffer.new_empty(math.prod(shape))
        return self._buffer[: math.prod(shape)].view(shape)


def forward(problem: Problem, need_max_logits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, max_logits) of one call."""
    q, k, v, work = problem.q, problem.k, problem.v, problem.stats_dtype
    batch, num_rows, num_heads, _ = q.shape
    num_kv_heads, group = k.shape[2], num_heads // k.shape[2]
    out = q.new_zeros(
        batch, num_rows, num_heads, v.shape[3], dtype=q.dtype if problem.earlier is None else work
    )
    lse = q.new_full((batch, num_rows, num_heads), -torch.inf, dtype=work)
    max_logits = q.new_full((num_kv_heads, group), -torch.inf, dtype=work)
    tiles, rooms = list(_tiles(problem)), (_Room(q, work), _Room(q, work))
    columns = _column_keys(problem)
    for b in range(batch):
        k_KSD, v_KSV = _by_head(k[b], work), _by_head(v[b], work)
        for tile in tiles:
            rows = slice(tile.row_begin, tile.row_end)
            height = tile.row_end - tile.row_begin
            q_KRD = _fold(q[b, rows], num_kv_heads, work) * problem.softmax_scale
            keys = _tile_keys(problem, columns, b, tile)
            for heads, q_heads in _head_steps(num_kv_heads, group, q_KRD.shape[1]):
                scores = _Scores(q_KRD[heads], k_KSD[heads], tile, problem, b, q_heads, keys, rooms)
                tile_out, tile_lse, top = _attend(scores, v_KSV[heads])
                out[b, rows, q_heads] = _unfold(tile_out, height).to(out.dtype)
                lse[b, rows, q_heads] = _unfold(tile_lse, height)[:, :, 0]
                if need_max_logits:
                    per_head = top.view(top.shape[0], -1, height).amax(dim=2)
                    max_logits[heads] = torch.maximum(max_logits[heads], per_head)
    if problem.sink is not None:
        with_sink = torch.logaddexp(lse, problem.sink.to(work))
        out = (out * torch.exp(lse - with_sink).nan_to_num_(0.0)[..., None]).to(out.dtype)
        lse = with_sink
    return *problem.merged(out, lse), max_logits.flatten()


@dataclass(frozen=True)
class _Scores:
    """Scores of one tile of scaled queries ``q`` (K, R, D) with keys ``k`` (K, S, D), a chunk at a time.

    ``heads`` are the query heads of batch entry ``batch`` that ``q`` holds, ``keys`` those of the dropout for all heads'
    rows and for all columns. Two rooms: one for the scores, one for what is made from them.
    """

    q: torch.Tensor
    k: torch.Tensor
    tile: _Tile
    problem: Problem
    batch: int
    heads: slice
    keys: tuple[Keys, torch.Tensor] | None
    rooms: tuple[_Room, _Room]

    def empty(self, room: int, chunk: _Chunk) -> torch.Tensor:
        """Space for (K, R, C) numbers in ``rooms[room]``."""
        return self.rooms[room].of(*self.q.shape[:2], chunk.end - chunk.begin)

    def of(self, chunk: _Chunk) -> torch.Tensor:
        """(K, R, C), invisible pairs at ``_HIDDEN``."""
        return self.biased(self.capped(chunk), chunk)

    def capped(self, chunk: _Chunk) -> torch.Tensor:
        """(K, R, C) of all pairs, without biases."""
        softcap = self.problem.softcap
        k_KDC = self.k[:, chunk.begin : chunk.end].transpose(1, 2)
        scores = torch.bmm(self.q, k_KDC, out=self.empty(0, chunk))
        if softcap > 0:
            scores.div_(softcap).tanh_().mul_(softcap)
        return scores

    def biased(self, scores: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        """Linear biases added to capped scores, invisible pairs at ``_HIDDEN``; in place."""
        alibi = self.problem.alibi
        if alibi is not None:
            rows, cols = self.pairs(chunk)
            slopes = Alibi(alibi.slopes[..., self.heads], alibi.diagonals)
            bias = alibi_bias(slopes, self.batch, chunk.band, rows, cols, scores.dtype)
            scores.view(-1, len(rows), len(cols)).add_(bias)
        chunk.hide(scores, self.tile.row_begin, self.tile.row_end - self.tile.row_begin)
        return scores

    def pairs(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the tile and columns of the chunk."""
        device = self.q.device
        rows = torch.arange(self.tile.row_begin, self.tile.row_end, device=device)
        return rows, torch.arange(chunk.begin, chunk.end, device=device)

    def kept(self, chunk: _Chunk) -> torch.Tensor | None:
        """(K, R, C) bool, the weights that dropout keeps; None without."""
        if self.keys is None:
            return None
        (multiplier, offset), cols = self.keys
        rows = multiplier[self.heads], offset[self.heads]
        keep = kept(rows, cols[chunk.begin : chunk.end], self.problem.dropout_p)
        return keep.view(*self.q.shape[:2], -1)

    def dropped(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """``x`` (K, R, C) under dropout; ``x`` itself without."""
        return x if keep is None else x.mul(keep).div_(1 - self.problem.dropout_p)


def _column_keys(problem: Problem) -> torch.Tensor | None:
    """The dropout's keys of all columns."""
    if problem.rng_state is None:
        return None
    return column_keys(problem.rng_state, torch.arange(problem.k.shape[1], device=problem.q.device))


def _tile_keys(
    problem: Problem, columns: torch.Tensor | None, batch: int, tile: _Tile
) -> tuple[Keys, torch.Tensor] | None:
    """The dropout's keys of the tile's rows, for all heads of a batch entry, and of all columns."""
    if problem.rng_state is None or columns is None:
        return None
    rows = torch.arange(tile.row_begin, tile.row_end, device=problem.q.device)
    return row_keys(problem.rng_state, batch, problem.q.shape[2], rows), columns


def _attend(scores: _Scores, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (K, R, V), lse (K, R, 1) and largest score (K, R, 1) of one tile."""
    parts = []
    for chunk in scores.tile.chunks:
        s = scores.of(chunk)
        top = s.amax(dim=2, keepdim=True)
        weights = torch.softmax(s, dim=2, out=scores.empty(1, chunk))
        # The largest weight is exp(top - lse).
        lse = top - torch.log(weights.amax(dim=2, keepdim=True))
        seen = scores.dropped(weights, scores.kept(chunk))
        parts.append((torch.bmm(seen, v[:, chunk.begin : chunk.end]), lse, top))
    out, lse, top = parts[0]
    for more_out, more_lse, more_top in parts[1:]:
        joint = torch.logaddexp(lse, more_lse)
        out = out * torch.exp(lse - joint) + more_out * torch.exp(more_lse - joint)
        lse, top = joint, torch.maximum(top, more_top)
    return out, lse, top


def backward(
    problem: Problem, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dsink) of one call; tiles add to dk and dv one after the other."""
    q, k, v, work = problem.q, problem.k, problem.v, problem.stats_dtype
    batch, num_kv_heads, group = q.shape[0], k.shape[2], q.shape[2] // k.shape[2]
    delta = _delta(out, dout, lse, dlse)
    dq, dk, dv = q.new_zeros(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    tiles, rooms = list(_tiles(problem)), (_Room(q, work), _Room(q, work))
    columns = _column_keys(problem)
    for b in range(batch):
        k_KSD, v_KSV = _by_head(k[b], work), _by_head(v[b], work)
        dk_KSD, dv_KSV = torch.zeros_like(k_KSD), torch.zeros_like(v_KSV)
        v_KSV = torch.cat([v_KSV, torch.ones_like(v_KSV[:, :, :1])], dim=2)
        for tile in tiles:
            rows = slice(tile.row_begin, tile.row_end)
            q_KRD = _fold(q[b, rows], num_kv_heads, work) * problem.softmax_scale
            dout_KRV = _fold(dout[b, rows], num_kv_heads, work)
            lse_KR1 = _fold(lse[b, rows, :, None], num_kv_heads, work)
            # (do, -delta) . (v, 1) = do . v - delta, without a pass over the scores.
            dout_KRV = torch.cat([dout_KRV, -_fold(delta[b, rows, :, None], num_kv_heads, work)], dim=2)
            keys = _tile_keys(problem, columns, b, tile)
            for heads, q_heads in _head_steps(num_kv_heads, group, q_KRD.shape[1]):
                scores = _Scores(q_KRD[heads], k_KSD[heads], tile, problem, b, q_heads, keys, rooms)
                dq_KRD = _tile_gradients(
                    scores, v_KSV[heads], dout_KRV[heads], lse_KR1[heads], dk_KSD[heads], dv_KSV[heads]
                )
                dq_tile = _unfold(dq_KRD * problem.softmax_scale, tile.row_end - tile.row_begin)
                dq[b, rows, q_heads] = dq_tile.to(q.dtype)
        dk[b], dv[b] = dk_KSD.transpose(0, 1), dv_KSV.transpose(0, 1)
    return dq, dk, dv, _dsink(problem.sink, lse, delta)


def _tile_gradients(
    scores: _Scores,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> torch.Tensor:
    """dq (K, R, D) without the softmax scale; adds this tile's share to ``dk`` and ``dv`` in place.

    ``dout`` carries -delta and ``v`` ones in a last column.
    """
    dq = torch.zeros_like(scores.q)
    softcap = scores.problem.softcap
    for chunk in scores.tile.chunks:
        cols = slice(chunk.begin, chunk.end)
        s = scores.capped(chunk)
        slope = 1 - (s / softcap).square_() if softcap > 0 else None
        weights = scores.biased(s, chunk).sub_(lse).exp_()
        keep = scores.kept(chunk)
        dv[:, cols].baddbmm_(scores.dropped(weights, keep).transpose(1, 2), dout[:, :, :-1])
        ds = scores.empty(1, chunk)
        if keep is None:
            torch.bmm(dout, v[:, cols].transpose(1, 2), out=ds)
        else:
            torch.bmm(dout[:, :, :-1], v[:, cols, :-1].transpose(1, 2), out=ds)
            ds = scores.dropped(ds, keep).add_(dout[:, :, -1:])
        ds.mul_(weights)
        if slope is not None:
            ds.mul_(slope.masked_fill_(weights == 0, 0.0))
        dq.baddbmm_(ds, scores.k[:, cols])
        dk[:, cols].baddbmm_(ds.transpose(1, 2), scores.q)
    return dq


def _delta(
    out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None
) -> torch.Tensor:
    """o . do - dlse (B, T, H); 0 for a row that sees nothing, whatever its dout holds."""
    products = torch.where(out == 0, 0.0, out.to(lse.dtype) * dout.to(lse.dtype))
    delta = products.sum(dim=3)
    if dlse is not None:
        delta = delta - dlse
    return delta.masked_fill(torch.isneginf(lse), 0.0)


def _dsink(sink: torch.Tensor | None, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    if sink is None:
        return lse.new_empty(0)
    weight = torch.exp(sink.to(lse.dtype) - lse.masked_fill(torch.isneginf(lse), 0.0))
    return -weight * delta
