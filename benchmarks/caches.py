"""Caches to decode from, calls on them, and what is true of such a call.

A call is small and the caches are large: calls go round several caches, so that every one of them reads memory and
none the L2 cache. The reference takes the keys that are seen, of a few sequences: its size is queries times keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.check import Verdict, compare
from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache
from magi_attention.kernels.reference.dense import dense_attention
from magi_attention.mask.bands import INF

LENGTHS_SEED = 20
SHORTEST = 16


@dataclass(frozen=True)
class Shape:
    """Sequences of ``context`` positions, and how calls go round ``copies`` caches of them.

    Attributes:
        spots: calls on each cache; every one ends a window before the other, where only a window is seen.
        ragged: lengths are uniform between a ``SHORTEST``-th of the context and all of it.
    """

    batch: int
    heads: int
    kv_heads: int
    context: int
    copies: int
    spots: int = 1
    ragged: bool = False
    head_dim: int = 128

    def lengths(self, spot: int, window: int) -> list[int]:
        """Keys of each sequence in a call."""
        if self.ragged:
            generator = np.random.default_rng(LENGTHS_SEED)
            low = self.context // SHORTEST
            return generator.integers(low, self.context, self.batch, endpoint=True).tolist()
        return [self.context - spot * window] * self.batch

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one cache in half precision."""
        return 4 * self.batch * self.context * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Work:
    """What one call does. ``page`` 0 is a contiguous cache, ``window`` 0 sees everything.

    ``append``: the last of the keys comes with the call, is turned and written, and the query is turned likewise.
    """

    queries: int = 1
    page: int = 0
    window: int = 0
    keep_first: int = 0
    append: bool = False

    @property
    def name(self) -> str:
        words = ["one query" if self.queries == 1 else f"{self.queries} queries"]
        words += [f"window {self.window}"] if self.window else []
        words += [f"first {self.keep_first}"] if self.keep_first else []
        words += ["append", "rotary"] if self.append else []
        return ", ".join(words)

    def seen(self, length: int) -> int:
        """Keys of a sequence that any query sees."""
        if not self.window:
            return length
        return min(length, self.window + self.queries - 1 + self.keep_first)

    def shrunk(self, by: int) -> Work:
        return replace(self, window=self.window // by)


@dataclass(frozen=True)
class New:
    """A key and a value of each sequence (b, 1, hk, d), and the tables of the rotary embedding."""

    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Step:
    """Operands of one call: q (b, s, h, d), and a cache (b, positions, hk, d) or its pages and their table.

    ``lengths`` holds what each sequence has after the call, ``used`` what it has before.
    """

    work: Work
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    lengths: list[int]
    used: torch.Tensor
    table: torch.Tensor | None = None
    new: New | None = None

    def call(self) -> torch.Tensor:
        """Ours."""
        work, new = self.work, self.new
        settings: dict = {
            "cache_seqlens": self.used,
            "block_table": self.table,
            "keep_first": work.keep_first,
        }
        if new is not None:
            settings |= {"k": new.k, "v": new.v, "rotary_cos": new.cos, "rotary_sin": new.sin}
        out = flash_attn_with_kvcache(
            self.q,
            self.k_cache,
            self.v_cache,
            causal=work.queries > 1 or work.window > 0,
            window_size=(work.window - 1, 0) if work.window else (-1, -1),
            rotary_interleaved=False,
            **settings,
        )
        assert isinstance(out, torch.Tensor)
        return out

    def history(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (length, hk, d) that the cache holds for a sequence: copies."""
        if self.table is None:
            k, v = self.k_cache[b], self.v_cache[b]
        else:
            pages = self.table[b].long()
            k, v = self.k_cache[pages].flatten(0, 1), self.v_cache[pages].flatten(0, 1)
        return k[: self.lengths[b]].clone(), v[: self.lengths[b]].clone()

    def visible(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (b, keys, hk, d) of what the queries see, for calls that see one piece of equal length."""
        end = self.lengths[0]
        begin = end - self.work.seen(end)
        return self.k_cache[:, begin:end], self.v_cache[:, begin:end]

    def sampled(self) -> list[int]:
        """The sequences that are checked: both ends, the shortest and the longest."""
        lengths = self.lengths
        extremes = lengths.index(min(lengths)), lengths.index(max(lengths))
        return sorted({0, len(lengths) - 1, *extremes})


class Caches:
    """Standard normal caches of a shape, and the steps that go round them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        rows = (shape.batch, shape.context, shape.kv_heads)
        self.pairs = [(self._draw(*rows), self._draw(*rows)) for _ in range(shape.copies)]

    def _draw(self, *rows: int) -> torch.Tensor:
        return torch.randn(
            *rows, self.shape.head_dim, generator=self.generator, dtype=self.dtype, device=self.device
        )

    def steps(self, work: Work) -> list[Step]:
        """One call on every spot of every cache; pages are copies of the caches."""
        shape, steps = self.shape, []
        for k_cache, v_cache in self.pairs:
            table = None
            if work.page:
                blocks = shape.batch * shape.context // work.page
                order = torch.randperm(blocks, generator=self.generator, device=self.device)
                k_cache, v_cache = (_pages(cache, order, work.page) for cache in (k_cache, v_cache))
                table = order.to(torch.int32).view(shape.batch, -1)
            for spot in range(shape.spots):
                lengths = shape.lengths(spot, work.window)
                used = torch.tensor(lengths, dtype=torch.int32, device=self.device) - int(work.append)
                q = self._draw(shape.batch, work.queries, shape.heads)
                new = self._new() if work.append else None
                steps.append(Step(work, q, k_cache, v_cache, lengths, used, table, new))
        return steps

    def _new(self) -> New:
        shape = self.shape
        k, v = (self._draw(shape.batch, 1, shape.kv_heads) for _ in range(2))
        pairs = torch.arange(0, shape.head_dim, 2, dtype=torch.float64, device=self.device)
        positions = torch.arange(shape.context, dtype=torch.float64, device=self.device)
        angles = positions[:, None] * 10000.0 ** (-pairs / shape.head_dim)
        return New(k, v, angles.cos().to(self.dtype), angles.sin().to(self.dtype))


def _pages(cache: torch.Tensor, order: torch.Tensor, page: int) -> torch.Tensor:
    """Page n of the sequences, counted through all of them, at ``order[n]``."""
    pages = torch.empty(len(order), page, *cache.shape[2:], dtype=cache.dtype, device=cache.device)
    pages[order] = cache.view_as(pages)
    return pages


def _turned(x: torch.Tensor, new: New, position: int) -> torch.Tensor:
    """(s, h, d) in fp64, every half of the channels turned against the other."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = new.cos[position].double(), new.sin[position].double()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _by_formula(
    work: Work, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """The dense formula on what is seen: the first keys, and the window or everything."""
    if work.window:
        recent = min(len(k), work.window + len(q) - 1)
        first = min(work.keep_first, len(k) - recent)
        k, v = (torch.cat([x[:first], x[len(x) - recent :]]) for x in (k, v))
    # Several queries with a window see different keys, of which this one diagonal knows nothing.
    assert len(q) == 1 or not work.window
    table = torch.tensor([[0, len(q), 0, len(k), -INF, len(k) - len(q)]])
    return dense_attention(q, k, v, table, dtype=dtype)[0]


class Truth:
    """What a step should give, from its operands before the call, for sampled sequences."""

    def __init__(self, step: Step) -> None:
        self.step, self.sequences = step, step.sampled()
        self.before = [step.history(b) for b in self.sequences]
        outs = [self._outs(b, *pair) for b, pair in zip(self.sequences, self.before, strict=True)]
        self.exact, self.plain = (torch.stack(each) for each in zip(*outs, strict=True))

    def _outs(self, b: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By the formula in fp64, and at the precision of the operands."""
        work, new, q = self.step.work, self.step.new, self.step.q[b]
        exact_q, exact_k = q.double(), k.double()
        if new is not None:
            v = torch.cat([v[:-1], new.v[b]])
            exact_q, last = (_turned(x, new, len(k) - 1) for x in (q, new.k[b]))
            exact_k = torch.cat([exact_k[:-1], last])
        exact = _by_formula(work, exact_q, exact_k, v.double(), torch.float64)
        return exact, _by_formula(work, exact_q.to(q.dtype), exact_k.to(k.dtype), v, None)

    def judge(self, out: torch.Tensor) -> Verdict:
        """``out`` (b, s, h, d) of the call, and what the call left in the cache."""
        verdict = Verdict()
        by_norm, by_element = compare(out[self.sequences], self.exact, self.plain)
        verdict.figures |= {"out": by_norm, "out max": by_element}
        for name, entry in self._cache():
            known = verdict.figures.get(name)
            if known is None or known["error"] <= known["bound"]:
                verdict.figures[name] = entry
        return verdict

    def _cache(self) -> Iterator[tuple[str, dict[str, float]]]:
        """The new key within its rounding; the new value and everything else to the bit."""
        new = self.step.new
        for b, (k, v) in zip(self.sequences, self.before, strict=True):
            held_k, held_v = self.step.history(b)
            if new is not None:
                exact = _turned(new.k[b], new, len(k) - 1)
                yield "new key", compare(held_k[-1:], exact, exact.to(k.dtype))[0]
                k, held_k, v = k[:-1], held_k[:-1], torch.cat([v[:-1], new.v[b]])
            changed = int((held_k != k).sum() + (held_v != v).sum())
            yield "cache", {"error": float(changed), "plain": 0.0, "bound": 0.0}
