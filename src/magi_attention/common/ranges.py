"""``AttnRanges``: an ordered list of token ranges and its set algebra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from operator import index
from typing import TypeAlias, cast, overload

import numpy as np
import torch

from magi_attention.common import intervals as algebra
from magi_attention.common.intervals import Intervals
from magi_attention.common.range import AttnRange
from magi_attention.errors import check_type, complaint

AnyRanges: TypeAlias = "AttnRanges | Iterable[AttnRange | Sequence[int]]"
_INT32 = np.iinfo(np.int32)
_FROM_PAIR = "AttnRange.from_range makes one from a pair."


def is_valid_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> bool:
    """Whether ``cu_seqlens`` rises strictly from 0 to ``seq_len``. An empty list means no segments: valid."""
    if len(cu_seqlens) == 0:
        return True
    values = [index(value) for value in cu_seqlens]
    rises = all(before < after for before, after in pairwise(values))
    return values[0] == 0 and rises and values[-1] == seq_len


def check_valid_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> None:
    """ValueError unless ``is_valid_cu_seqlens(cu_seqlens, seq_len)``."""
    if not is_valid_cu_seqlens(cu_seqlens, seq_len):
        raise ValueError(
            complaint("cu_seqlens", f"integers that rise strictly from 0 to {seq_len}", list(cu_seqlens))
        )


class AttnRanges:
    """An ordered list of ``AttnRange``; it need not be sorted, and ranges may overlap.

    The list owns its ranges: whatever goes in is copied, so that no later edit of the original shows up here.
    What ``ranges[i]`` and iteration give are the list's own ranges; to edit one of them edits the list.

    Both can be edited until somebody takes the hash of the list, for instance by using it as a dictionary
    key. From then on the list and its ranges are frozen: an edit raises ``TypeError``. ``clone()`` gives an
    editable copy.

    Where a method takes ``check``, the ranges are checked once more; an ``AttnRange`` is valid at any time.
    """

    __slots__ = ("_hash", "_ranges")

    def __init__(self) -> None:
        self._ranges: list[AttnRange] = []
        self._hash: int | None = None

    @staticmethod
    def from_ranges(ranges: AnyRanges, check: bool = False) -> AttnRanges:
        """Copies of ``ranges``: an AttnRanges, or an iterable of AttnRange, tuples or lists (start, end).

        Raises:
            RangeError: a range with start > end.
        """
        result = AttnRanges()
        result._ranges = [AttnRange.from_range(attn_range, check) for attn_range in ranges]
        return result

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> AttnRanges:
        """The segments ``[cu[i], cu[i + 1])`` of a packed sequence of ``seq_len`` tokens.

        Raises:
            ValueError: ``cu_seqlens`` does not rise strictly from 0 to ``seq_len``.
        """
        check_valid_cu_seqlens(cu_seqlens, seq_len)
        return AttnRanges.from_ranges(pairwise(cu_seqlens))

    @staticmethod
    def _from_table(table: Intervals) -> AttnRanges:
        result = AttnRanges()
        result._ranges = [AttnRange(start, end) for start, end in table.tolist()]
        return result

    def _table(self) -> Intervals:
        """Bounds as int64 (n, 2)."""
        bounds = chain.from_iterable(r.to_naive_range() for r in self._ranges)
        return np.fromiter(bounds, dtype=np.int64, count=2 * len(self._ranges)).reshape(-1, 2)

    def _merged_table(self, is_merged: bool) -> Intervals:
        table = self._table()
        if is_merged and not algebra.is_merged(table):
            got = "ranges that overlap, touch or are out of order"
            raise ValueError(complaint("AttnRanges", "merged ranges, as promised", got, "Call merge()."))
        return algebra.merge(table)

    def _check_editable(self) -> None:
        if self._hash is not None:
            raise TypeError(
                complaint("AttnRanges", "an editable list", "one frozen by hash()", "Edit a clone().")
            )

    def append(self, attn_range: AttnRange, check: bool = False) -> None:
        """Add a copy of ``attn_range`` at the end."""
        self.insert(len(self._ranges), attn_range, check)

    def insert(self, idx: int, attn_range: AttnRange, check: bool = False) -> None:
        """Add a copy of ``attn_range`` before position ``idx``, which is clamped as for a list."""
        self._check_editable()
        check_type("attn_range", attn_range, AttnRange, _FROM_PAIR)
        self._ranges.insert(idx, AttnRange.from_range(attn_range, check))

    def extend(self, attn_ranges: AttnRanges, check: bool = False) -> None:
        """Add copies of all of ``attn_ranges`` at the end."""
        self._check_editable()
        self._ranges.extend(AttnRanges.from_ranges(attn_ranges, check)._ranges)

    def pop(self, idx: int = -1) -> AttnRange:
        """Remove and return the range at ``idx``; IndexError if there is none."""
        self._check_editable()
        if not self._ranges:
            raise IndexError("pop from empty AttnRanges")
        return self._ranges.pop(idx)

    def clone(self) -> AttnRanges:
        """An editable deep copy."""
        return AttnRanges.from_ranges(self)

    def clear_empty(self) -> AttnRanges:
        """A copy without the empty ranges."""
        return AttnRanges.from_ranges(r for r in self._ranges if not r.is_empty())

    def sort(self) -> AttnRanges:
        """A copy sorted by start; ranges with equal starts keep their order."""
        in_order: list[AttnRange] = sorted(self._ranges, key=lambda r: r.start)
        return AttnRanges.from_ranges(in_order)

    def merge(self) -> AttnRanges:
        """A sorted copy in which overlapping and touching ranges are joined; lone empty ranges stay."""
        return AttnRanges._from_table(algebra.merge(self._table()))

    def merge_with_split_alignment(self, split_alignment: int = 1) -> AttnRanges:
        """``merge()`` with starts rounded down and ends rounded up to multiples of ``split_alignment``.

        Raises:
            ValueError: ``split_alignment < 1``.
        """
        _check_positive("split_alignment", split_alignment)
        table = algebra.merge(self._table())
        table = np.stack((table[:, 0] // split_alignment, -(-table[:, 1] // split_alignment)), axis=1)
        return AttnRanges._from_table(algebra.merge(table * split_alignment))

    def chunk(self, chunk_size: int, check: bool = True) -> list[AttnRanges]:
        """Cut the ranges, laid end to end in their order, into lists of ``chunk_size`` tokens.

        The last list may be shorter. Empty ranges are left out.

        Raises:
            ValueError: ``chunk_size < 1``, or ``check`` and the ranges overlap.
        """
        _check_positive("chunk_size", chunk_size)
        if check and not self.is_non_overlap():
            got = f"{self.intersect_size()} tokens that an earlier range has already"
            raise ValueError(complaint("AttnRanges.chunk", "disjoint ranges", got, "Call merge() first."))
        return [AttnRanges._from_table(part) for part in algebra.chunks(self._table(), chunk_size)]

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRanges:
        """Every range clipped to ``[start, end)``, without those that become empty."""
        return AttnRanges.from_ranges(r.truncate(start, end) for r in self._ranges).clear_empty()

    def is_sorted(self) -> bool:
        """Whether no start is smaller than the one before."""
        return all(before.start <= after.start for before, after in pairwise(self._ranges))

    def is_merged(self) -> bool:
        """Whether ``merge()`` would change nothing."""
        return algebra.is_merged(self._table())

    def is_non_overlap(self) -> bool:
        """Whether no position is in two ranges."""
        return self.intersect_size() == 0

    def is_cu_seqlens(self, seqlen: int) -> bool:
        """Whether the ranges follow each other without gaps from 0 to ``seqlen``."""
        ends = [0] + [r.end for r in self._ranges]
        return [r.start for r in self._ranges] == ends[:-1] and ends[-1] == seqlen

    def to_cu_seqlens(self, seq_len: int) -> list[int]:
        """Cumulative lengths ``[0, end of the first range, ..., seq_len]``.

        Raises:
            ValueError: not ``is_cu_seqlens(seq_len)``.
        """
        if not self.is_cu_seqlens(seq_len):
            raise ValueError(complaint("AttnRanges", f"ranges without gaps from 0 to {seq_len}", self))
        return [0] + [r.end for r in self._ranges]

    def make_range_local(
        self, attn_range: AttnRange, is_self_merged: bool = False, prefix_offset: Sequence[int] | None = None
    ) -> tuple[AttnRange, AttnRange]:
        """Where a range lies once the merged ranges of ``self`` are laid end to end.

        Args:
            attn_range: a range inside one of the merged ranges.
            is_self_merged: promise that ``self`` is merged.
            prefix_offset: where each merged range begins when laid end to end, if the caller knows it.

        Returns:
            The range in local coordinates, and the merged range that contains it.

        Raises:
            ValueError: no merged range contains ``attn_range``, or the promise is false.
        """
        merged = self._merged_table(is_self_merged)
        host = _hosts_or_complain(merged, np.array([attn_range.to_naive_range()]))[0]
        begin = algebra.offsets(merged)[host] if prefix_offset is None else prefix_offset[host]
        target = AttnRange(*merged[host].tolist())
        return attn_range.offset(int(begin) - target.start), target

    def make_ranges_local(self, other: AttnRanges, is_self_merged: bool = False) -> AttnRanges:
        """``make_range_local`` for every range of ``other``, in its order, without the containing ranges."""
        merged, table = self._merged_table(is_self_merged), other._table()
        host = _hosts_or_complain(merged, table)
        shift = algebra.offsets(merged)[host] - merged[host, 0]
        return AttnRanges._from_table(table + shift[:, None])

    def find_hole_ranges(
        self, other: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """Positions in ``self`` but not in ``other``, merged. The flags promise that a side is merged."""
        sides = self._merged_table(is_self_merged), other._merged_table(is_other_merged)
        return AttnRanges._from_table(algebra.difference(*sides))

    def find_overlap_ranges(
        self, other: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """Positions in both ``self`` and ``other``, merged. The flags promise that a side is merged."""
        sides = self._merged_table(is_self_merged), other._merged_table(is_other_merged)
        return AttnRanges._from_table(algebra.overlap(*sides))

    def intersect_size(self) -> int:
        """How many positions are counted again by a further range: ``total_seqlen - union_size()``."""
        return self.total_seqlen - self.union_size()

    def intersect_size_with(self, other: AttnRanges) -> int:
        """Number of positions in both ``self`` and ``other``."""
        return self.find_overlap_ranges(other).total_seqlen

    def union_size(self) -> int:
        """Number of positions in at least one range; each counts once."""
        return algebra.total_size(algebra.merge(self._table()))

    def union_size_with(self, other: AttnRanges) -> int:
        """Number of positions in ``self`` or ``other``; each counts once."""
        return algebra.total_size(algebra.merge(np.concatenate((self._table(), other._table()))))

    @property
    def total_seqlen(self) -> int:
        """Sum of the lengths, in tokens; a position in two ranges counts twice."""
        return sum(r.seqlen for r in self._ranges)

    @property
    def max_seqlen(self) -> int:
        """Length of the longest range, in tokens; 0 without ranges."""
        return max((r.seqlen for r in self._ranges), default=0)

    @property
    def start(self) -> int:
        """Smallest start; ValueError without ranges."""
        self._check_not_empty("start")
        return min(r.start for r in self._ranges)

    @property
    def end(self) -> int:
        """Largest end; ValueError without ranges."""
        self._check_not_empty("end")
        return max(r.end for r in self._ranges)

    @property
    def size(self) -> int:
        """Number of ranges."""
        return len(self._ranges)

    @property
    def points(self) -> list[int]:
        """All starts and ends, sorted, each once."""
        return np.unique(self._table()).tolist()

    def _check_not_empty(self, what: str) -> None:
        if not self._ranges:
            raise ValueError(complaint(f"AttnRanges.{what}", "at least one range", "none"))

    def to_tensor(self, device: torch.device | str | int = "cpu") -> torch.Tensor:
        """Bounds as an int32 tensor (n, 2).

        Raises:
            ValueError: a bound outside int32.
        """
        table = self._table()
        if table.size and not (_INT32.min <= table.min() and table.max() <= _INT32.max):
            raise ValueError(complaint("AttnRanges.to_tensor", "bounds within int32", [self.start, self.end]))
        return torch.from_numpy(table.astype(np.int32)).to(device)

    def to_naive_ranges(self) -> list[tuple[int, int]]:
        """A list of ``(start, end)``."""
        return [r.to_naive_range() for r in self._ranges]

    def is_valid(self) -> bool:
        """Whether every range has start <= end."""
        return all(r.is_valid_close() for r in self._ranges)

    def check_valid(self) -> None:
        """ValueError unless ``is_valid()``."""
        for attn_range in self._ranges:
            attn_range.check_valid()

    def is_empty(self) -> bool:
        """Whether there are no ranges at all."""
        return not self._ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def __iter__(self) -> Iterator[AttnRange]:
        return iter(self._ranges)

    @overload
    def __getitem__(self, idx: int) -> AttnRange: ...

    @overload
    def __getitem__(self, idx: slice) -> AttnRanges: ...

    def __getitem__(self, idx: int | slice) -> AttnRange | AttnRanges:
        if isinstance(idx, slice):
            return AttnRanges.from_ranges(self._ranges[idx])
        return self._ranges[idx]

    def __setitem__(self, idx: int | slice, value: AttnRange | AttnRanges) -> None:
        self._check_editable()
        if isinstance(idx, slice):
            check_type(
                "slice of AttnRanges", value, AttnRanges, "AttnRanges.from_ranges makes one from pairs."
            )
            self._ranges[idx] = [r.clone() for r in cast(AttnRanges, value)]
        else:
            check_type("item of AttnRanges", value, AttnRange, _FROM_PAIR)
            self._ranges[idx] = cast(AttnRange, value).clone()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttnRanges):
            return NotImplemented
        return self._ranges == other._ranges

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(tuple(self._ranges))
        return self._hash

    def __reduce__(self) -> tuple[object, tuple[list[tuple[int, int]]]]:
        return AttnRanges.from_ranges, (self.to_naive_ranges(),)

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self._ranges))}]" if self._ranges else "[[,)]"


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(complaint(name, "a positive number of tokens", value))


def _hosts_or_complain(merged: Intervals, table: Intervals) -> np.ndarray:
    """``hosts``, with a ValueError that names the first range which no merged range contains."""
    host = algebra.hosts(merged, table)
    if (host < 0).any():
        start, end = table[int(np.argmax(host < 0))].tolist()
        expected = f"one inside one of the {len(merged)} merged ranges"
        raise ValueError(complaint("range to make local", expected, f"[{start}, {end})"))
    return host
