"""Random calls of ``flash_attn_with_kvcache`` with every argument that goes together, and what must come of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flash_reference import reference, visible

from magi_attention.api import flash_attn_3_kvcache, flash_attn_kvcache
from magi_attention.api.rotary import apply_rotary_emb_torch
from magi_attention.testing.tolerance import Figure, figure

PAGE_SIZES = (1, 3, 16, 64, 256)


@dataclass
class CacheCase:
    """A call. ``keys`` and ``values`` hold what sequence b sees in its ``spans[b]``, new ones included; ``queries`` its
    queries, turned."""

    door: Any
    q: torch.Tensor
    caches: list[torch.Tensor]
    settings: dict[str, Any]
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    expected_caches: list[torch.Tensor] = field(default_factory=list)
    packed: bool = False

    def call(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out (tokens, h, dv) and lse (h, tokens), -inf for a row that sees nothing."""
        out, lse, *_ = self.door(self.q, *self.caches, return_softmax_lse=True, **self.settings)
        if not self.packed:
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        return out, lse.masked_fill(torch.isposinf(lse), -torch.inf)

    def formula(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by the formula."""
        s, results = self.settings, []
        slopes, sink = s.get("alibi_slopes"), s.get("s_aux")
        table = s.get("block_table", s.get("page_table"))
        capacity = self.caches[0].shape[1] * (1 if table is None else table.shape[1])
        for b, (q, k, v) in enumerate(zip(self.queries, self.keys, self.values, strict=True)):
            seen = visible(
                len(q), len(k), s["causal"], s["window_size"], capacity, s.get("keep_first", 0),
                s.get("force_fa_decode", False), s.get("attention_chunk", 0),
            )  # fmt: skip
            own = None if slopes is None else slopes if slopes.dim() == 1 else slopes[b]
            q, k, v = (x.to(dtype) for x in (q, k, v))
            logits = None if sink is None else sink[None] if sink.dim() == 1 else sink
            results.append(
                reference(q, k, v, seen.to(q.device), s["softmax_scale"], s["softcap"], own, logits)
            )
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results], dim=1)

    def figures(self) -> list[Figure]:
        """Errors of the call against fp64, with the formula in the inputs' dtype as the yardstick."""
        found, exact, plain = self.call(), self.formula(torch.float64), self.formula(self.q.dtype)
        scale = self.settings["softmax_scale"] or self.q.shape[-1] ** -0.5
        unit = max(1.0, 16 * abs(scale) * self.q.shape[-1] ** 0.5, 32.0)
        return [
            figure(name, ours, truth.double(), rough, unit=unit)
            for name, ours, truth, rough in zip(("out", "lse"), found, exact, plain, strict=True)
        ]

    def check_caches(self) -> None:
        """New keys and values are where they belong, and nothing else has changed."""
        for cache, expected in zip(self.caches, self.expected_caches, strict=True):
            assert torch.equal(torch.isnan(cache), torch.isnan(expected))
            known = ~torch.isnan(expected)
            eps = torch.finfo(cache.dtype).eps
            torch.testing.assert_close(cache[known], expected[known], rtol=2 * eps, atol=eps)


def cache_case(
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    most: int = 40,
    head_dims: tuple[int, ...] = (16, 24, 13),
) -> CacheCase:
    """The call that ``seed`` stands for; caches of at most about ``most`` positions a sequence."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of).to(device)

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def integers(values: Any) -> torch.Tensor:
        return torch.tensor(list(map(int, values)), dtype=torch.int32, device=device)

    is_fa3 = chance(0.5)
    batch, num_kv, group = int(rng.integers(1, 5)), int(rng.integers(1, 3)), int(rng.choice([1, 3, 4, 8]))
    dim = int(rng.choice(head_dims))
    dim_v = int(rng.choice(head_dims)) if is_fa3 and chance(0.3) else dim
    packed = is_fa3 and chance(0.4)
    counts = rng.integers(0, 6, batch) if packed else np.full(batch, rng.choice([1, 1, 2, 5, 17]))
    num_new = rng.integers(0, 4, batch) if packed and chance(0.5) else np.full(batch, rng.integers(0, 4))
    page = int(rng.choice(PAGE_SIZES)) if chance(0.5) else 0
    positions = int(rng.integers(5, most + 1))
    blocks = -(-positions // page) if page else 1
    size = page or positions
    used = rng.integers(0, blocks * size + 1 - num_new)
    has_new, has_rows = bool(num_new.any()), chance(0.4)
    leftpads = rng.integers(0, used // 2 + 1) if chance(0.3) else np.zeros(batch, dtype=int)

    num_places = batch * blocks + 2
    places = rng.permutation(num_places)[: batch * blocks].reshape(batch, blocks)
    spare = int(
        rng.integers(0, 2)
    )  # heads that are not in the call: strides are not those of contiguous memory
    whole = [
        torch.full((num_places, size, num_kv + spare, d), torch.nan, dtype=dtype, device=device)
        for d in (dim, dim_v)
    ]
    caches = [x[:, :, spare:] for x in whole]
    held = [
        torch.full((batch, blocks * size, num_kv, d), torch.nan, dtype=dtype, device=device)
        for d in (dim, dim_v)
    ]
    for b in range(batch):
        for x in held:
            x[b, leftpads[b] : used[b]] = draw(int(used[b] - leftpads[b]), num_kv, x.shape[-1])
    _fill(caches, held, places, size)

    q_parts = [draw(int(n), num_kv * group, dim) for n in counts]
    new_parts = [[draw(int(n), num_kv, d) for n in num_new] for d in (dim, dim_v)]
    window = [(-1, -1), (-1, 0), (7, 0), (3, 2), (0, 0), (60, 1)][rng.integers(6)]
    settings: dict[str, Any] = {
        "causal": chance(0.5),
        "window_size": window,
        "cache_seqlens": integers(used),
        "softmax_scale": float(rng.uniform(0.1, 0.4)) if chance(0.3) else None,
        "softcap": float(rng.uniform(1, 20)) if chance(0.3) else 0.0,
        "force_fa_decode": chance(0.3),
    }
    if chance(0.3):
        settings["s_aux"] = draw(num_kv * group) if chance(0.5) else draw(2, num_kv * group, of=torch.float32)
    if not is_fa3 and chance(0.3):
        heads = num_kv * group
        settings["alibi_slopes"] = draw(
            *((heads,) if chance(0.5) else (batch, heads)), of=torch.float32
        ).abs()
    elif chance(0.5):
        settings["keep_first"] = int(rng.integers(0, 6))
    if is_fa3 and chance(0.2):
        settings["attention_chunk"] = int(rng.integers(1, 20))
        settings.pop("keep_first", None)
        settings["force_fa_decode"] = False
    if leftpads.any():
        settings["cache_leftpad"] = integers(leftpads)
    if page:
        table = places.copy()
        for b in range(batch):
            table[b, -(-int(used[b] + num_new[b]) // page) :] = rng.choice([-1, 10**9])
        if has_rows:
            order = rng.permutation(batch)
            table = table[np.argsort(order)]
            settings["cache_batch_idx"] = integers(order)
        settings["page_table" if is_fa3 else "block_table"] = integers(table.ravel()).view(batch, blocks)
    elif has_rows:
        settings["cache_batch_idx"] = integers(places[:, 0])
    else:
        for x, h in zip(caches, held, strict=True):
            x[:] = torch.nan
            x[:batch] = h
        places = np.arange(batch)[:, None]

    if has_new:
        cut = packed and len(set(num_new)) > 1
        settings["k"], settings["v"] = (
            torch.cat(parts) if cut else torch.stack(parts) for parts in new_parts
        )
        if cut:
            settings["cu_seqlens_k_new"] = integers([0, *np.cumsum(num_new)])
        if chance(0.5):
            settings["q"] = torch.cat(q_parts) if packed else torch.stack(q_parts)
            _turn(settings, q_parts, new_parts[0], used, rng, blocks * size, is_fa3)
    for b in range(batch):
        for x, parts in zip(held, new_parts, strict=True):
            x[b, used[b] : used[b] + num_new[b]] = parts[b]
    expected = [x.clone() for x in caches]
    _fill(expected, held, places, size)
    keys, values = ([x[b, leftpads[b] : used[b] + num_new[b]] for b in range(batch)] for x in held)
    q = settings.pop("q", None)
    if q is None:
        q = torch.cat(q_parts) if packed else torch.stack(q_parts)
    if packed:
        settings["cu_seqlens_q"] = integers([0, *np.cumsum(counts)])
    door = (flash_attn_3_kvcache if is_fa3 else flash_attn_kvcache).flash_attn_with_kvcache
    return CacheCase(door, q, caches, settings, q_parts, keys, values, expected, packed)


def _fill(caches: list[torch.Tensor], held: list[torch.Tensor], places: np.ndarray, size: int) -> None:
    """Lay the sequences' keys and values into their rows or pages."""
    for cache, x in zip(caches, held, strict=True):
        for b, row in enumerate(places):
            for block, place in enumerate(row):
                cache[int(place)] = x[b, block * size : (block + 1) * size]


def _turn(settings, q_parts, k_parts, used, rng, capacity, is_fa3) -> None:  # type: ignore[no-untyped-def]
    """Rotary embeddings in ``settings``; the parts become what they turn them into."""
    dim = q_parts[0].shape[-1]
    half = int(rng.integers(1, dim // 2 + 1))
    frequency = torch.linspace(1.0, 0.01, half, dtype=torch.float64)
    angles = (torch.arange(capacity + 40)[:, None] * frequency).to(q_parts[0].device)
    cos, sin = angles.cos().to(q_parts[0].dtype), angles.sin().to(q_parts[0].dtype)
    interleaved, begins = bool(rng.random() < 0.5), used
    settings |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    if is_fa3 and rng.random() < 0.3:
        begins = rng.integers(0, 20, len(used))
        settings["rotary_seqlens"] = torch.tensor(begins, dtype=torch.int32, device=cos.device)
    local = settings["causal"] or any(0 <= side < capacity for side in settings["window_size"])
    for b, begin in enumerate(map(int, begins)):
        for parts, moves in ((q_parts, local), (k_parts, True)):
            at = begin + torch.arange(len(parts[b]), device=cos.device) * int(moves)
            if len(parts[b]):
                parts[b] = apply_rotary_emb_torch(parts[b], cos[at], sin[at], interleaved)
