"""Chunks dealt to ranks so that the work is even and few keys have to travel.

A greedy start gives each chunk, the heaviest first, to the rank where it adds least to what is received, among those that
have room for its work. Rounds of swaps follow: all pairs are weighed at once, and of the best ones so many are done as
have no rank in common. The number of steps is bounded, and all of it is integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import Intervals, difference, merge, stack, unstack
from magi_attention.dist.chunks import Chunks, Ints, spread

FEW = 16
"""Bins that are filled at once; more are filled in groups."""
GROUPED, ALONE = 128, 512
"""Items to deal to groups, and to ranks: of more chunks, neighbours are kept together where they divide."""
MOST = 1024
"""Items that are swapped; with more the start is what is found."""
PRICES = ((300, 0), (0, 1000), (10, 0), (0, 1000))
"""Of exceeding the limit twofold, one after the other: times the mean cost of a bin, and times that of all bins. The work
may exceed the limit meanwhile, but hardly in the end."""
HEAVY = 5
"""Chunks of which a rank takes fewer than this are counted when groups are filled, lest there be too many for it."""
AGAIN = 3
"""How often ranks above the limit are tried with others."""
NEVER = 1 << 61


@dataclass(frozen=True, eq=False)
class Items:
    """Things to place, each one or several chunks.

    Attributes:
        work: (n, w) of each; and beside it whatever else is limited.
        edges: (c + 1,) of stretches of keys that are needed and held as a whole.
        needs, holds: (m, 3) item, first stretch, and one past the last, of keys that it needs from elsewhere and of its
            own; sorted by item, at least one entry for each.
    """

    work: Ints
    edges: Ints
    needs: Ints
    holds: Ints

    def __len__(self) -> int:
        return len(self.work)

    @staticmethod
    def of(chunks: Chunks, some: Ints, item: Ints, work: Ints) -> Items:
        """Chunks ``some``, each part of an ``item``; ``work`` is (n, w) of all chunks."""
        num_items, stride = int(item[-1]) + 1, chunks.stride
        sums = np.zeros((num_items, work.shape[1]), dtype=np.int64)
        np.add.at(sums, item, work[some])
        part_of = np.full(len(chunks), -1, dtype=np.int64)
        part_of[some] = item
        holds = _of_items(chunks.held, part_of, stride)
        needs = difference(_of_items(chunks.needed, part_of, stride), holds)
        tables = [unstack(table, stride) for table in (needs, holds)]
        edges = np.unique(np.concatenate([ranges.ravel() for ranges, _ in tables]))
        return Items(
            sums, edges, *(_complete(np.searchsorted(edges, at), of, num_items) for at, of in tables)
        )

    @cached_property
    def lengths(self) -> Ints:
        """(c,) keys of each stretch."""
        return np.diff(self.edges)

    def over(self, table: Ints) -> NDArray[np.int16]:
        """(n, c) whether ``needs`` or ``holds`` of an item has a stretch."""
        return spread(table[:, 1:], table[:, 0], len(self), len(self.lengths))


def _of_items(table: Intervals, item: Ints, stride: int) -> Intervals:
    """Intervals of chunks, merged as those of items."""
    ranges, chunk = unstack(table, stride)
    of = item[chunk]
    return merge(stack(ranges[of >= 0], of[of >= 0], stride))


def _complete(places: Ints, item: Ints, num_items: int) -> Ints:
    """Item, begin and end; an empty entry for items without one."""
    absent = np.ones(num_items, dtype=bool)
    absent[item] = False
    nothing = np.flatnonzero(absent)
    table = np.column_stack(
        [np.append(item, nothing), np.append(places, np.zeros((len(nothing), 2), np.int64), axis=0)]
    )
    return table[np.argsort(table[:, 0], kind="stable")]


def balanced(chunks: Chunks, room: Ints, slack: float, rounds: int, num_groups: int = 1) -> Ints:
    """(n,) rank of each chunk.

    Args:
        room: (r,) chunks of each rank. slack: how much above the mean its work may be. rounds: of swaps.
        num_groups: of as many neighbouring ranks each, such as nodes, that chunks are dealt to first; 1 for none.
    """
    found, light = np.zeros(len(chunks), dtype=np.int64), np.sort(chunks.work)
    # The heaviest chunk goes somewhere, with others beside it.
    least = int(light[-1] + light[: room.min() - 1].sum())
    limit = max(int((1 + slack) * int(light.sum())) // len(room), least, 1)
    work = np.column_stack([chunks.work, _parts_of_ranks(chunks.work, limit)])
    size, rounds = len(room) // num_groups, rounds if len(room) <= FEW else rounds // 2
    todo = [(np.arange(len(chunks)), _groups(np.arange(len(room)), size))]
    while todo:
        mine, parts = todo.pop()
        rooms, ranks = np.array([(room[part].sum(), len(part)) for part in parts]).T
        total, grouped = work[mine].sum(axis=0), len(parts) < ranks.sum()
        share = total * rooms[:, None] // rooms.sum()
        limits = ranks[:, None] * limit + np.zeros_like(share)
        if grouped:  # leaves some of the slack to the ranks
            limits = np.column_stack([(limits[:, 0] + 3 * share[:, 0]) // 4, np.maximum(limits, share)[:, 1]])
        together = _together(rooms, GROUPED if grouped else ALONE)
        items = Items.of(chunks, mine, np.arange(len(mine)) // together, work[:, : 1 + grouped])
        bins = deal(items, rooms // together, limits[:, : 1 + grouped])
        if len(items) <= MOST:
            bins = Swaps(items, bins, limits[:, : 1 + grouped]).improved(rounds)
        bins = np.repeat(bins, together)
        for number, part in enumerate(parts):
            if len(part) > 1:
                todo.append((mine[bins == number], _groups(part, size)))
            else:
                found[mine[bins == number]] = part[0]
    if len(room) > FEW:
        _even_out(chunks, found, limit, len(room))
    return found


def _parts_of_ranks(work: Ints, limit: int) -> Ints:
    """What chunks take of the limit of a rank that holds nothing else of weight: a half of it, a third, and so on."""
    like = limit // np.maximum(work, 1)
    return np.where(like < HEAVY, np.maximum(limit // np.maximum(like, 1), work), 0)


def _even_out(chunks: Chunks, rank: Ints, limit: int, num_ranks: int) -> None:
    """Swap chunks of ranks above the limit, whose group had no better to offer, with those of ranks with least work."""
    for _ in range(AGAIN):
        loads = np.zeros(num_ranks, dtype=np.int64)
        np.add.at(loads, rank, chunks.work)
        order = np.argsort(loads, kind="stable")
        num_over = np.count_nonzero(loads > limit)
        num_groups = -(-num_over // (FEW // 2))
        heaviest, others = order[num_ranks - num_over :], order[: num_ranks - num_over]
        for group in range(num_groups):
            members = np.append(
                heaviest[group::num_groups], others[: num_groups * FEW - num_over][group::num_groups]
            )
            place = np.full(num_ranks, -1, dtype=np.int64)
            place[members] = np.arange(len(members))
            mine = np.flatnonzero(place[rank] >= 0)
            if len(mine) <= MOST:
                items = Items.of(chunks, mine, np.arange(len(mine)), chunks.work[:, None])
                swaps = Swaps(items, place[rank[mine]], np.full((len(members), 1), limit))
                rank[mine] = members[swaps.improved(len(PRICES))]


def _groups(ranks: Ints, size: int) -> list[Ints]:
    """At most ``FEW`` groups: of one node each, or several if there are more, or of ranks within a node of ``size``."""
    units = ranks.reshape(-1, size) if len(ranks) > size else ranks[:, None]
    count = len(units) if len(units) <= FEW else min(FEW, -(-len(units) // FEW))
    return [part.ravel() for part in np.array_split(units, count)]


def _together(rooms: Ints, most: int) -> int:
    """Chunks that make an item: bins hold whole ones, ``FEW`` or more, and in all ``most`` or fewer if that can be."""
    common, total = int(np.gcd.reduce(rooms)), int(rooms.sum())
    sizes = [
        size
        for size in range(1, common + 1)
        if common % size == 0 and (size == 1 or size * FEW <= rooms.min())
    ]
    return next((size for size in sizes if total <= size * most), sizes[-1])


def deal(items: Items, room: Ints, limit: Ints) -> Ints:
    """(n,) bin of each item: a start.

    Args:
        room: (b,) items that bins take. limit: (b, w) work that they should not exceed.
    """
    needs, holds = _lists(items.needs, len(items)), _lists(items.holds, len(items))
    wants = np.zeros(
        (len(items.lengths), len(room)), dtype=np.int64
    )  # keys that a bin needs and does not hold
    free = np.repeat(items.lengths[:, None], len(room), axis=1)  # keys that it neither needs nor holds
    received, loads, spare = np.zeros(len(room), dtype=np.int64), -limit, room - 1
    loads[room == 0] = NEVER
    order = np.argsort(items.work[:, 0], kind="stable")[::-1]
    # Bins are filled up with the lighter half of the items that are left: the mean of that.
    halves = (len(items) - np.arange(len(items))) // 2 + 1
    filling = (np.cumsum(items.work[order[::-1], 0])[np.minimum(halves, len(items)) - 1] // halves).tolist()
    part, shift = np.maximum(limit[:, 0] >> 8, 1), max(int(items.edges[-1]).bit_length() - 24, 0)
    found = np.empty(len(items), dtype=np.int64)
    for item, light in zip(order.tolist(), filling, strict=True):
        more = np.zeros_like(received)
        for begin, end in needs[item]:
            more += np.add.reduce(free[begin:end])
        for begin, end in holds[item]:
            more -= np.add.reduce(wants[begin:end])
        over = loads + items.work[item]
        over[:, 0] += spare * light
        over = np.maximum.reduce(over, axis=1)
        growth = (more >> shift) * (2 * received + more >> shift)  # of the square of what is received
        cost = (growth << 8) + loads[:, 0] // part  # of equal ones the lightest bin
        cost[over > 0] = NEVER
        choice = int(cost.argmin())
        if cost[choice] == NEVER:
            choice = int(over.argmin())
        found[item] = choice
        received[choice] += more[choice]
        loads[choice] = loads[choice] + items.work[item] if spare[choice] else NEVER
        spare[choice] -= 1
        for begin, end in needs[item]:
            wants[begin:end, choice] += free[begin:end, choice]
            free[begin:end, choice] = 0
        for begin, end in holds[item]:
            free[begin:end, choice] = wants[begin:end, choice] = 0
    return found


def _lists(table: Ints, num_items: int) -> list[list[tuple[int, int]]]:
    """Begins and ends of each item."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(num_items)]
    for item, begin, end in table.tolist():
        if begin < end:
            found[item].append((begin, end))
    return found


class Swaps:
    """A placement of items in bins that gets better by swapping two of them.

    What is made smaller is a sum over bins: the cube of the keys to receive, so that the bin with most counts, and a
    price for work above the limit that grows faster than that work.
    """

    def __init__(self, items: Items, bins: Ints, limit: Ints) -> None:
        self.items, self.bin, self.limit = items, bins.copy(), limit
        self.dtype = np.int32 if items.edges[-1] < 1 << 31 else np.int64
        self.lengths = items.lengths.astype(self.dtype)[:, None]
        self.needed, self.held = items.over(items.needs).T.copy(), items.over(items.holds).T.copy()  # (c, n)
        every = np.arange(len(limit))
        self.needs, self.holds = (
            np.stack([table[:, bins == bin_].sum(axis=1, dtype=np.int16) for bin_ in every], axis=1)
            for table in (self.needed, self.held)
        )  # (c, b) how many items of a bin need and hold a stretch
        self.loads = -limit
        np.add.at(self.loads, bins, items.work)
        self.scale = np.maximum(limit.max(axis=0), 1).tolist()
        self.received = self._received(every)
        self.shift = max(int(self.received.max()).bit_length() - 12, 0)
        self.price = 0
        self.mean = int(self._cost(self.received, []).sum()) // len(limit) + 1
        self.change = np.empty((len(items), len(items)), dtype=np.int64)

    def _received(self, bins: Ints) -> Ints:
        missing = (self.needs[:, bins] > 0) & (self.holds[:, bins] == 0)
        return np.add.reduce(missing * self.lengths, axis=0, dtype=np.int64)

    def _cost(self, received: Ints, over: list[Ints]) -> Ints:
        cost = np.minimum(received >> self.shift, (1 << 13) - 1) ** 3
        for each, scale in zip(over, self.scale, strict=False):
            if each.max() > 0:
                parts = np.clip((each << 16) // scale, 0, 1 << 17)
                cost += (parts + (parts * parts >> 12)) * self.price
        return cost

    def _weigh(self, rows: Ints) -> None:
        """``change[rows]``: by how much the cost of their bins changes with each other item in their place."""
        mine = self.bin[rows]
        lacking = (
            self.holds[:, mine] == self.held[:, rows]
        ) * self.lengths  # what is not held without the item
        wanted = (self.needs[:, mine] > self.needed[:, rows]) * lacking
        sums = np.zeros((len(lacking) + 1, len(rows)), dtype=self.dtype)
        others = np.zeros_like(sums)
        np.cumsum(wanted, axis=0, out=sums[1:])
        np.cumsum(lacking - wanted, axis=0, out=others[1:])
        received = sums[-1] - _within(sums, self.items.holds) + _within(others, self.items.needs)
        loads, work = self.loads[mine].T, self.items.work.T
        after = [load - own[rows] + own[:, None] for load, own in zip(loads, work, strict=True)]
        change = self._cost(received.astype(np.int64), after) - self._cost(self.received[mine], list(loads))
        change[mine == self.bin[:, None]] = NEVER
        self.change[rows] = change.T

    def improved(self, rounds: int) -> Ints:
        """(n,) bins after the best swaps, in all ``rounds`` times or until none helps."""
        best, found = (NEVER, NEVER), self.bin
        for number, (one, every) in enumerate(PRICES):
            self.price = ((one + every * len(self.limit)) * self.mean >> 16) + 1
            changed = np.ones(len(self.limit), dtype=bool)
            for _ in range(rounds * (number + 1) // len(PRICES) - rounds * number // len(PRICES)):
                self._weigh(np.flatnonzero(changed[self.bin]))
                changed = self._round()
                if not changed.any():
                    break
            state = int(np.maximum(self.loads, 0).sum()), int(self._cost(self.received, []).sum())
            if state < best:
                best, found = state, self.bin.copy()
        return found

    def _round(self) -> NDArray[np.bool_]:
        """Swap once; which bins have changed."""
        gain = self.change + self.change.T
        partner = gain.argmin(axis=1)
        best = gain[np.arange(len(partner)), partner]
        taken = np.zeros(len(self.limit), dtype=bool)
        for one in np.argsort(best, kind="stable")[: np.count_nonzero(best < 0)].tolist():
            other = int(partner[one])
            here, there = self.bin[one], self.bin[other]
            if not (taken[here] or taken[there]):
                taken[[here, there]] = True
                self._swap(one, other)
        changed = np.flatnonzero(taken)
        self.received[changed] = self._received(changed)
        return taken

    def _swap(self, one: int, other: int) -> None:
        here, there = self.bin[one], self.bin[other]
        for bin_, leaving, coming in ((here, one, other), (there, other, one)):
            self.loads[bin_] += self.items.work[coming] - self.items.work[leaving]
            self.needs[:, bin_] += self.needed[:, coming] - self.needed[:, leaving]
            self.holds[:, bin_] += self.held[:, coming] - self.held[:, leaving]
        self.bin[one], self.bin[other] = there, here


def _within(sums: Ints, table: Ints) -> Ints:
    """(n, r) of prefix sums (c + 1, r) the sums within the stretches of each item."""
    parts = sums[table[:, 2]] - sums[table[:, 1]]
    first = np.flatnonzero(np.diff(table[:, 0], prepend=-1))
    return parts if len(first) == len(table) else np.add.reduceat(parts, first, axis=0)
