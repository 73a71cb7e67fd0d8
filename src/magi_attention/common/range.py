"""``AttnRange``: one half-open interval of token positions."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

from magi_attention.errors import complaint


class RangeError(ValueError):
    """A range whose start lies behind its end."""


class AttnRange:
    """The half-open interval ``[start, end)`` of token positions.

    Positions may be negative; ``start == end`` is the empty range, which is valid and keeps its position.

    A range can be edited through ``start`` and ``end`` until somebody takes its hash, for instance by using
    it as a dictionary key. From then on it is frozen: an edit raises ``TypeError``. ``clone()`` gives an
    editable copy.

    Args:
        start: first position, in tokens.
        end: one past the last position, in tokens.

    Raises:
        RangeError: ``start > end``.
        TypeError: a bound that is not an integer.
    """

    __slots__ = ("_end", "_frozen", "_start")

    def __init__(self, start: int, end: int) -> None:
        self._frozen = False
        self._set(index(start), index(end))

    def _set(self, start: int, end: int) -> None:
        if self._frozen:
            raise TypeError(
                complaint("AttnRange", "an editable range", f"{self}, frozen by hash()", "Edit a clone().")
            )
        self.check_valid(start, end)
        self._start, self._end = start, end

    @property
    def start(self) -> int:
        """First position. Setting it raises RangeError for start > end, TypeError for a frozen range."""
        return self._start

    @start.setter
    def start(self, value: int) -> None:
        self._set(index(value), self._end)

    @property
    def end(self) -> int:
        """One past the last position. Setting it raises as for ``start``."""
        return self._end

    @end.setter
    def end(self, value: int) -> None:
        self._set(self._start, index(value))

    @property
    def seqlen(self) -> int:
        """Number of positions, in tokens."""
        return self._end - self._start

    @staticmethod
    def from_range(attn_range: Sequence[int] | AttnRange, check: bool = False) -> AttnRange:
        """A new range from another one, or from the first two elements of a tuple or list.

        Args:
            attn_range: where the bounds come from.
            check: check the order of the bounds once more; the constructor does so in any case.

        Raises:
            RangeError: start > end.
            ValueError: fewer than two elements.
        """
        if isinstance(attn_range, AttnRange):
            result = attn_range.clone()
        else:
            if len(attn_range) < 2:
                raise ValueError(complaint("AttnRange.from_range", "(start, end)", attn_range))
            result = AttnRange(attn_range[0], attn_range[1])
        if check:
            result.check_valid()
        return result

    def to_naive_range(self) -> tuple[int, int]:
        """``(start, end)``."""
        return self._start, self._end

    def clone(self) -> AttnRange:
        """An editable copy."""
        return AttnRange(self._start, self._end)

    def offset(self, offset: int) -> AttnRange:
        """A new range moved by ``offset`` tokens, which may be negative."""
        return AttnRange(self._start + offset, self._end + offset)

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRange:
        """A new range clipped to ``[start, end)``; if nothing is left, an empty one at the clipped start."""
        new_start = self._start if start is None else max(self._start, start)
        new_end = self._end if end is None else min(self._end, end)
        return AttnRange(new_start, max(new_start, new_end))

    def intersect(self, other: AttnRange) -> AttnRange:
        """The common part; for ranges apart from each other, the empty range at the smaller of both ends."""
        end = min(self._end, other._end)
        return AttnRange(min(max(self._start, other._start), end), end)

    def intersect_size(self, other: AttnRange) -> int:
        """Number of common positions."""
        return max(0, min(self._end, other._end) - max(self._start, other._start))

    def union(self, other: AttnRange) -> list[AttnRange]:
        """One range if they overlap or one contains the other, otherwise clones of both in order.

        Ranges that only touch, like ``[0, 3)`` and ``[3, 5)``, stay two.
        """
        if self.is_overlap_with(other) or self.is_subrange_of(other) or other.is_subrange_of(self):
            return [AttnRange(min(self._start, other._start), max(self._end, other._end))]
        return [self.clone(), other.clone()]

    def union_size(self, other: AttnRange) -> int:
        """Number of positions in at least one of both."""
        return self.seqlen + other.seqlen - self.intersect_size(other)

    def diff_by(self, other: AttnRange) -> list[AttnRange]:
        """What is left of ``other`` when ``self`` is taken out: zero, one or two non-empty ranges.

        Mind the order: ``a.diff_by(b)`` is ``b - a``. An empty ``self`` inside ``other`` splits it in two.
        """
        left = (other._start, min(other._end, self._start))
        right = (max(other._start, self._end), other._end)
        return [AttnRange(start, end) for start, end in (left, right) if start < end]

    def is_subrange_of(self, other: AttnRange) -> bool:
        """Whether both bounds lie within ``other``; this holds for empty ranges, too."""
        return other._start <= self._start and self._end <= other._end

    def is_overlap_with(self, other: AttnRange) -> bool:
        """Whether there is a common position. Ranges that only touch do not overlap."""
        return max(self._start, other._start) < min(self._end, other._end)

    def is_empty(self) -> bool:
        """Whether ``start == end``."""
        return self._start == self._end

    def is_valid_close(self, start: int | None = None, end: int | None = None) -> bool:
        """Whether ``start <= end``, with bounds of this range in place of those not given."""
        return (self._start if start is None else start) <= (self._end if end is None else end)

    def is_valid_open(self, start: int | None = None, end: int | None = None) -> bool:
        """Whether ``start < end``, with bounds of this range in place of those not given."""
        return (self._start if start is None else start) < (self._end if end is None else end)

    def check_valid(self, start: int | None = None, end: int | None = None) -> None:
        """RangeError unless ``is_valid_close(start, end)``."""
        if not self.is_valid_close(start, end):
            start, end = (self._start if start is None else start), (self._end if end is None else end)
            raise RangeError(complaint("AttnRange", "start <= end", f"[{start}, {end})"))

    def __len__(self) -> int:
        return self.seqlen

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttnRange):
            return NotImplemented
        return self._start == other._start and self._end == other._end

    def __hash__(self) -> int:
        self._frozen = True
        return hash((self._start, self._end))

    def __reduce__(self) -> tuple[type[AttnRange], tuple[int, int]]:
        return AttnRange, (self._start, self._end)

    def __repr__(self) -> str:
        return f"[{self._start}, {self._end})"
