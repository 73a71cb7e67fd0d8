"""The families of masks that have a name, each a few vectorised lines of band arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.errors import complaint
from magi_attention.mask import dense, slices
from magi_attention.mask.arguments import Integers, Window, boundaries, integers, reach, size
from magi_attention.mask.bands import HI, INF, K0, K1, LO, Q0, Q1, Bands, shift_diagonal

if TYPE_CHECKING:
    from magi_attention.mask.mask import Mask


def _rectangles(corners: NDArray[np.int64], hi: int = INF) -> Bands:
    """Bands of (n, 4) corners ``(q0, q1, k0, k1)`` without the empty ones, all below the diagonal ``hi``."""
    filled = corners[(corners[:, Q0] < corners[:, Q1]) & (corners[:, K0] < corners[:, K1])]
    table = np.empty((len(filled), 6), dtype=np.int64)
    table[:, :LO] = filled
    table[:, LO] = -INF
    table[:, HI] = hi
    return table


def _windowed(
    corners: NDArray[np.int64], window: tuple[int | None, int | None], keep_first: int, force_fa_decode: bool
) -> Bands:
    """One window per rectangle, aligned at its bottom-right corner, and a second band for its first keys.

    The second band holds what the left side hides of the first ``keep_first`` keys; the two are disjoint.
    """
    table = _rectangles(corners)
    left, right = window
    diagonal = table[:, K1] - table[:, Q1]
    if right is not None:
        table[:, HI] = diagonal + right
    if left is None:
        return table
    limited = table[:, Q1] - table[:, Q0] != 1 if force_fa_decode else np.ones(len(table), dtype=bool)
    table[limited, LO] = diagonal[limited] - left
    if keep_first == 0:
        return table
    first = table[limited]
    first[:, K1] = np.minimum(first[:, K0] + keep_first, first[:, K1])
    first[:, HI] = first[:, LO] - 1
    first[:, LO] = -INF
    return np.concatenate([table, first])


def _multiples(name: str, step: int, end: int) -> NDArray[np.int64]:
    """0, step, 2 step, ..., end."""
    if operator.index(step) < 1:
        raise ValueError(complaint(name, "at least 1", step))
    return np.append(np.arange(0, end, step), end)


def _mask(cls: type[MaskBuilders], table: Bands, num_rows: int, num_cols: int) -> Mask:
    return cast("type[Mask]", cls)(table, num_rows, num_cols)


class MaskBuilders:
    """Constructors of ``Mask`` by name. In the pictures rows are queries and columns are keys."""

    @classmethod
    def full(cls, num_rows: int, num_cols: int | None = None) -> Mask:
        """Every query sees every key (``num_cols`` is ``num_rows`` when None).

        full(2, 5)    xxxxx
                      xxxxx

        Raises:
            ValueError: a negative size.
        """
        return cls.sliding_window(num_rows, num_cols)

    @classmethod
    def causal(cls, num_rows: int, num_cols: int | None = None) -> Mask:
        """The last query sees every key, the query above it one key less, and so on (bottom-right aligned).

        causal(5)    x....    causal(2, 5)    xxxx.    causal(5, 2)    ..
                     xx...                    xxxxx                    ..
                     xxx..                                             ..
                     xxxx.                                             x.
                     xxxxx                                             xx

        Raises:
            ValueError: a negative size.
        """
        return cls.sliding_window(num_rows, num_cols, causal=True)

    @classmethod
    def sliding_window(
        cls,
        num_rows: int,
        num_cols: int | None = None,
        window: Window = (-1, -1),
        causal: bool = False,
        keep_first: int = 0,
    ) -> Mask:
        """Query i sees the keys from i + d - left to i + d + right, where d = num_cols - num_rows.

        window (1, 0)    x....    the same with    x....    window (0, 1),    ..xx.
                         xx...    keep_first 1     xx...    3 x 5             ...xx
                         .xx..                     xxx..                      ....x
                         ..xx.                     x.xx.
                         ...xx                     x..xx

        Args:
            num_rows: queries.
            num_cols: keys; ``num_rows`` when None.
            window: (left, right), each a number of keys beside the diagonal; -1 or None is unlimited.
            causal: sets right to 0.
            keep_first: this many first keys stay visible although the left side of the window hides them.

        Raises:
            ValueError: a negative size or ``keep_first``, or a window that is not a pair of integers >= -1.
        """
        num_cols = num_rows if num_cols is None else num_cols
        return cls.varlen(
            [0, size("num_rows", num_rows)], [0, size("num_cols", num_cols)], causal, window, keep_first
        )

    @classmethod
    def varlen(
        cls,
        cu_seqlens_q: Integers,
        cu_seqlens_k: Integers | None = None,
        causal: bool = False,
        window: Window = (-1, -1),
        keep_first: int = 0,
        force_fa_decode: bool = False,
    ) -> Mask:
        """Packed sequences: the queries of each see its own keys only, as in ``sliding_window``.

        cu_seqlens [0, 2, 5]    xx...    causal    x....
                                xx...              xx...
                                ..xxx              ..x..
                                ..xxx              ..xx.
                                ..xxx              ..xxx

        Args:
            cu_seqlens_q: (n + 1,) boundaries of the sequences among the queries, as a list, array or CPU
                tensor.
            cu_seqlens_k: (n + 1,) boundaries among the keys; those of the queries when None.
            causal, window, keep_first: as in ``sliding_window``, per sequence.
            force_fa_decode: the left side is unlimited for a sequence that has exactly one query.

        The mask has ``cu_seqlens_q[-1]`` rows and ``cu_seqlens_k[-1]`` columns. Sequences may be empty.

        Raises:
            ValueError: boundaries that are negative, decrease or differ in number; a bad window or
                ``keep_first``.
            TypeError: boundaries that are not integers.
        """
        cuts_q = boundaries("cu_seqlens_q", cu_seqlens_q)
        cuts_k = cuts_q if cu_seqlens_k is None else boundaries("cu_seqlens_k", cu_seqlens_k)
        if len(cuts_q) != len(cuts_k):
            raise ValueError(
                complaint("cu_seqlens_k length", f"{len(cuts_q)} like cu_seqlens_q", len(cuts_k))
            )
        corners = np.stack([cuts_q[:-1], cuts_q[1:], cuts_k[:-1], cuts_k[1:]], axis=1)
        table = _windowed(corners, reach(window, causal), size("keep_first", keep_first), force_fa_decode)
        return _mask(cls, table, int(cuts_q[-1]), int(cuts_k[-1]))

    @classmethod
    def block_causal(cls, num_rows: int, block_size: int | Integers, num_cols: int | None = None) -> Mask:
        """Blocks of queries see their own block of keys in full, and everything before it.

        block_causal(5, 2)    xx...
                              xx...
                              xxxx.
                              xxxx.
                              xxxxx

        Args:
            num_rows: queries.
            block_size: rows per block (the last may be shorter), or the block boundaries [0, ..., num_rows].
            num_cols: keys, ``num_rows`` when None. The last query is aligned with the last key.

        Raises:
            ValueError: a block size below 1, or boundaries that do not run from 0 to ``num_rows``.
        """
        num_rows = size("num_rows", num_rows)
        num_cols = num_rows if num_cols is None else size("num_cols", num_cols)
        if np.ndim(block_size) == 0:  # type: ignore[arg-type]
            cuts = _multiples("block_size", cast(int, block_size), num_rows)
        else:
            cuts = boundaries("block_size", block_size)
            if cuts[0] != 0 or cuts[-1] != num_rows:
                wanted = f"from 0 to {num_rows}"
                raise ValueError(complaint("block boundaries", wanted, f"{cuts[0]} to {cuts[-1]}"))
        visible = cuts[1:] + num_cols - num_rows
        corners = np.stack([cuts[:-1], cuts[1:], np.zeros_like(visible), visible], axis=1)
        return _mask(cls, _rectangles(corners), num_rows, num_cols)

    @classmethod
    def chunked(cls, num_rows: int, chunk: int, num_cols: int | None = None, causal: bool = True) -> Mask:
        """Local attention in chunks: a query sees the keys of its own chunk, up to itself when ``causal``.

        chunked(5, 2)    x....    chunked(3, 2, 5)    ..x..
                         xx...                        ..xx.
                         ..x..                        ....x
                         ..xx.
                         ....x

        Args:
            num_rows: queries; query i stands at key i + num_cols - num_rows.
            chunk: keys per chunk, counted from key 0.
            num_cols: keys, ``num_rows`` when None.
            causal: whether a query is blind to the rest of its chunk.

        Raises:
            ValueError: a chunk below 1 or a negative size.
        """
        num_rows = size("num_rows", num_rows)
        num_cols = num_rows if num_cols is None else size("num_cols", num_cols)
        offset = num_cols - num_rows
        cuts = _multiples("chunk", chunk, num_cols)
        rows = np.clip(cuts - offset, 0, num_rows)
        corners = np.stack([rows[:-1], rows[1:], cuts[:-1], cuts[1:]], axis=1)
        return _mask(cls, _rectangles(corners, hi=offset if causal else INF), num_rows, num_cols)

    @classmethod
    def prefix_tree(cls, lengths: Integers, parents: Integers) -> Mask:
        """Packed nodes of a tree: a token sees its node's ancestors in full and its own node up to itself.

        prefix_tree([2, 1, 2], [-1, 0, 0])    x....
                                              xx...
                                              xxx..
                                              xx.x.
                                              xx.xx

        Args:
            lengths: (n,) tokens per node.
            parents: (n,) index of each node's parent, smaller than its own, or -1 for a root.

        Ancestors that are packed right before each other (or before the node) share a band.

        Raises:
            ValueError: a negative length, a parent that does not come before its child, or different numbers
                of both.
        """
        sizes, parent = integers("lengths", lengths), integers("parents", parents)
        node = np.arange(len(sizes))
        if len(parent) != len(sizes):
            raise ValueError(complaint("parents length", f"{len(sizes)} like lengths", len(parent)))
        for name, wrong, wanted in (
            ("lengths", sizes < 0, "at least 0"),
            ("parents", (parent < -1) | (parent >= node), "-1 or the index of an earlier node"),
        ):
            if wrong.any():
                worst = int(np.argmax(wrong))
                got = (sizes if name == "lengths" else parent)[worst]
                raise ValueError(complaint(f"{name}[{worst}]", wanted, got))
        ends = np.cumsum(sizes)
        starts = ends - sizes
        # The first of the ancestors that are packed without a gap before each node.
        top = np.maximum.accumulate(np.where(parent == node - 1, 0, node)) if len(node) else node
        parts = [_rectangles(np.stack([starts, ends, starts[top], ends], axis=1), hi=0)]
        ancestor = parent[top]
        while (seen := ancestor >= 0).any():
            node, ancestor = node[seen], ancestor[seen]
            corners = np.stack([starts[node], ends[node], starts[top[ancestor]], ends[ancestor]], axis=1)
            parts.append(_rectangles(corners))
            ancestor = parent[top[ancestor]]
        total = int(sizes.sum())
        return _mask(cls, np.concatenate(parts), total, total)

    @classmethod
    def shared_question(cls, question_len: int, answer_lens: Integers) -> Mask:
        """One question and many answers, each of which sees the question and itself, causally.

        shared_question(2, [1, 2])    x....
                                      xx...
                                      xxx..
                                      xx.x.
                                      xx.xx

        Args:
            question_len: tokens of the question, packed first.
            answer_lens: (n,) tokens of each answer.

        Raises:
            ValueError: a negative length.
        """
        answers = integers("answer_lens", answer_lens)
        question = size("question_len", question_len)
        return cls.prefix_tree(np.append(question, answers), np.append(-1, np.zeros_like(answers)))

    @classmethod
    def block_diagonal(cls, masks: Sequence[Mask]) -> Mask:
        """Several masks packed along the diagonal: each one's queries see keys of the same one only.

        block_diagonal([Mask.causal(2), Mask.full(1, 3)])    x....
                                                             xx...
                                                             ..xxx
        """
        rows = np.cumsum([0, *(mask.num_rows for mask in masks)])
        cols = np.cumsum([0, *(mask.num_cols for mask in masks)])
        counts = [len(mask.bands) for mask in masks]
        table = np.concatenate([np.zeros((0, 6), dtype=np.int64), *(mask.bands for mask in masks)])
        table[:, Q0 : Q1 + 1] += np.repeat(rows[:-1], counts)[:, None]
        table[:, K0 : K1 + 1] += np.repeat(cols[:-1], counts)[:, None]
        table[:, LO:] = shift_diagonal(table[:, LO:], np.repeat(cols[:-1] - rows[:-1], counts)[:, None])
        return _mask(cls, table, int(rows[-1]), int(cols[-1]))

    @classmethod
    def from_ranges(
        cls,
        q_ranges: object,
        k_ranges: object,
        types: object = None,
        num_rows: int | None = None,
        num_cols: int | None = None,
    ) -> Mask:
        """A union of slices, one band each: a range of queries, a range of keys and the type of their mask.

        full  xxxxx    causal  xxx..    inv_causal  xxxxx    bi_causal  xxx..
              xxxxx            xxxx.                .xxxx               .xxx.
              xxxxx            xxxxx                ..xxx               ..xxx

        Args:
            q_ranges, k_ranges: n half-open ranges (start, end) each: ``AttnRanges``, a list of pairs, or an
                integer array or tensor (n, 2). Any order, overlap and empty ranges are allowed.
            types: per slice 0 / "full", 1 / "causal" (bottom-right aligned), 2 / "inv_causal" (top-left
                aligned), 3 / "bi_causal" (both) or an ``AttnMaskType``; one for all; None is full.
            num_rows, num_cols: sizes of the mask; the largest end when None.

        Raises:
            ValueError: a range with start > end, below 0 or beyond the size, an unknown type, different
                lengths.
            TypeError: ranges that are not integers.
        """
        return _mask(cls, *slices.from_ranges(q_ranges, k_ranges, types, num_rows, num_cols))

    @classmethod
    def from_dense(cls, dense_mask: NDArray[np.bool_] | torch.Tensor) -> Mask:
        """The bands of a boolean matrix, exactly; regular masks come back as few bands, any other works too.

        Args:
            dense_mask: (num_rows, num_cols) booleans, array or tensor; True is visible.

        Raises:
            ValueError: not two dimensions.
            TypeError: not boolean.
        """
        return _mask(cls, *dense.from_dense(dense_mask))

    @classmethod
    def from_flex(
        cls,
        mask_mod: dense.MaskMod,
        num_rows: int,
        num_cols: int | None = None,
        *,
        batch: int = 1,
        num_heads: int = 1,
        device: str | torch.device = "cpu",
    ) -> Mask:
        """The bands of a FlexAttention ``mask_mod(b, h, q_idx, kv_idx)``, evaluated at every pair.

        Time grows with num_rows * num_cols; memory with one block of rows.

        Args:
            mask_mod: predicate on integer scalar tensors; it is vectorised with ``torch.vmap``.
            num_rows, num_cols: queries and keys (as many when None).
            batch, num_heads: the predicate is also evaluated for these batch entries and heads, and must
                agree with b = h = 0.
            device: where the tensors that the predicate has captured live.

        Raises:
            ValueError: the predicate depends on the batch entry or the head.
            TypeError: the predicate returns something that is not boolean.
        """
        num_rows = size("num_rows", num_rows)
        num_cols = num_rows if num_cols is None else size("num_cols", num_cols)
        return _mask(
            cls, dense.from_flex(mask_mod, num_rows, num_cols, batch, num_heads, device), num_rows, num_cols
        )
