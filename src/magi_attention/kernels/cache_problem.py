"""What the kernels for caches are asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class CacheProblem:
    """Attention of the last queries of each sequence to what a cache holds of it.

    Attributes:
        q: (B, T, H, D), or (tokens, H, D) with ``cu_seqlens_q``, (B + 1,) int32.
        k, v: (rows, positions, HK, D or DV), or pages of as many positions with ``block_table``; any strides but the last
            one's, which is 1.
        used: (B,) int32 or int64, keys of each sequence before the new ones, or a number.
        num_new: new keys of each, in the cache already; or their (B + 1,) int32 boundaries, ``cu_seqlens_new``.
        window: (left, right), -1 without a limit. keep_first: keys from the first one on that are seen in any window.
        full_when_one: a sequence with one query has no limit on the left.
        leftpad: (B,) int32 or int64, first position in use. cache_rows: (B,) int32 or int64, row of each sequence.
        block_table: (B, blocks) int32, pages of each sequence. sink: (H,). alibi_slopes: (B, H) fp32, contiguous.
        sm_margin: multiprocessors left to others.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    used: torch.Tensor | int
    softmax_scale: float
    num_new: int = 0
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_new: torch.Tensor | None = None
    softcap: float = 0.0
    window: tuple[int, int] = (-1, -1)
    keep_first: int = 0
    full_when_one: bool = False
    leftpad: torch.Tensor | None = None
    cache_rows: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sm_margin: int = 0

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.q) if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    @property
    def num_queries(self) -> int:
        """Of each sequence; 0 if boundaries say it."""
        return self.q.shape[1] if self.cu_seqlens_q is None else 0

    @property
    def num_kv_heads(self) -> int:
        """HK."""
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.q.shape[-2] // self.k.shape[2]

    @property
    def tokens(self) -> int:
        """Queries of all sequences."""
        return self.q.shape[:-2].numel()

    @property
    def rows(self) -> int:
        """Queries times heads that share a key head, of a sequence, on average."""
        return -(-self.tokens // self.batch) * self.group

    @property
    def capacity(self) -> int:
        """Positions that a sequence can have."""
        return self.k.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])

    @property
    def has_kept(self) -> bool:
        """Whether first keys may be seen that the window does not show."""
        return self.keep_first > 0 and self.window[0] >= 0

    @property
    def is_masked(self) -> bool:
        """Whether queries of a sequence see different keys."""
        return self.num_queries != 1 and max(self.window) >= 0

    def live_rows(self, block: int) -> int:
        """A power of two that no more rows of a tile of ``block`` rows are in use than."""
        if self.num_queries == 0:
            return block
        return min(block, 1 << (self.num_queries * self.group - 1).bit_length())

    def items(self, block: int) -> int:
        """At most so many tiles of ``block`` rows are there: a sequence's last one may be a short one."""
        return self.num_kv_heads * (self.tokens * self.group // block + self.batch)

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for out, of q's shape but for v's head dimension and in its dtype, and lse without that axis, fp32."""
        q = self.q
        return q.new_empty(*q.shape[:-1], self.v.shape[3]), q.new_empty(q.shape[:-1], dtype=torch.float32)

    def numbers(self) -> tuple[torch.Tensor | int | None, ...]:
        """Lengths and where things are, as both kernels take them."""
        is_number, table = isinstance(self.used, int), self.block_table
        return (
            None if is_number else self.used, self.leftpad, self.cache_rows, self.cu_seqlens_q, self.cu_seqlens_new,
            table, 0 if table is None else table.stride(0), self.sink, self.alibi_slopes,
        )  # fmt: skip

    def sizes(self) -> tuple[int, ...]:
        """What follows the memory that a launch works in, as both kernels take it."""
        used = self.used if isinstance(self.used, int) else 0
        return (
            self.batch, self.num_queries, self.q.shape[-2], self.group, self.k.shape[1], len(self.k), self.capacity, used,
            self.num_new, *self.window, self.keep_first, int(self.full_when_one),
        )  # fmt: skip
