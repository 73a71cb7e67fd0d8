"""Keys of another source than queries, dealt to the ranks whose queries see them. Integers only: equal on every rank."""

from __future__ import annotations

import numpy as np

from magi_attention.common.intervals import Intervals, merge, offsets
from magi_attention.dist.chunks import Ints, cuts_of

MOST = 64
"""Parts of a rank, at most."""


def place_keys(seen: Intervals, stride: int, pieces: list[Intervals], size: int) -> list[Intervals]:
    """Each rank's ranges of keys, ascending, so that few keys have to travel: never more than with ``pieces``.

    Args:
        seen: merged intervals of the keys that ranks' queries see, those of rank r moved by r * ``stride``.
        pieces: of each rank (n, 2) ranges; the rank keeps their number of keys.
        size: keys of a part, the unit that changes ranks; more where a rank would have over ``MOST`` of them.
    """
    most = max(int((piece[:, 1] - piece[:, 0]).max(initial=0)) for piece in pieces)
    size = max(size, -(-most // MOST))
    cuts = [cuts_of(end - begin, size) + begin for piece in pieces for begin, end in piece.tolist()]
    home = np.repeat([rank for rank, piece in enumerate(pieces) for _ in piece], [len(part) for part in cuts])
    parts = np.concatenate([np.zeros((0, 2), dtype=np.int64), *cuts])
    counts = _counts(seen, stride, parts, len(pieces))
    chosen, every = _dealt(counts, parts[:, 1] - parts[:, 0], home), np.arange(len(parts))
    if counts[every, chosen].sum() <= counts[every, home].sum():
        chosen = home
    return [merge(parts[chosen == rank]) for rank in range(len(pieces))]


def _counts(seen: Intervals, stride: int, parts: Intervals, num_ranks: int) -> Ints:
    """(parts, ranks) how many keys of a part the queries of a rank see."""
    edges = parts[:, None, :] + np.arange(num_ranks)[None, :, None] * stride
    # Before the first interval nothing was seen.
    begins = np.concatenate([[-1], seen[:, 0]])
    lengths = np.concatenate([[0], seen[:, 1] - seen[:, 0]])
    before = np.concatenate([[0], offsets(seen)[:-1]])
    last = np.searchsorted(seen[:, 0], edges, side="right")
    below = before[last] + np.minimum(edges - begins[last], lengths[last])
    return below[:, :, 1] - below[:, :, 0]


def _dealt(counts: Ints, sizes: Ints, home: Ints) -> Ints:
    """The rank of each part: the one that sees most of it, parts that gain most over the next best rank first.

    Ranks get as many parts of each size as they had.
    """
    num_parts, num_ranks = counts.shape
    kinds, kind = np.unique(sizes, return_inverse=True)
    room = np.zeros((len(kinds), num_ranks), dtype=np.int64)
    np.add.at(room, (kind, home), 1)
    # Of ranks that see as much, the one that has it.
    liked = 2 * counts
    liked[np.arange(num_parts), home] += 1
    ranked = np.sort(liked, axis=1)
    gain = ranked[:, -1] - ranked[:, -min(2, num_ranks)]
    rank = home.copy()
    for part in np.argsort(-gain, kind="stable").tolist():
        free = room[kind[part]]
        best = int(np.where(free > 0, liked[part], -1).argmax())
        free[best] -= 1
        rank[part] = best
    return rank
