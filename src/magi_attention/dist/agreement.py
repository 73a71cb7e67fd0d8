"""Keys of all ranks against each other: who passes something else fails on every rank, where nobody would return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from magi_attention.dist.group import ranks_of
from magi_attention.dist.key import DistAttnRuntimeKey
from magi_attention.dist.manager import DistAttnRuntimeMgr
from magi_attention.errors import complaint


def agreed(
    make: Callable[[], tuple[DistAttnRuntimeKey, DistAttnRuntimeMgr]], group: dist.ProcessGroup
) -> DistAttnRuntimeKey:
    """The key that ``make`` gives with its manager, once all ranks of ``group`` turned out to have the same.

    Raises:
        ValueError: they do not; the first difference, on every rank. What ``make`` raises, on the rank where it does.
    """
    try:
        key, manager = make()
        mine: dict[str, Any] = key.described() | {"plan": manager.fingerprint}
    except Exception as error:
        _everybody({"refused": f"{type(error).__name__}: {error}"}, group)
        raise
    reports = _everybody(mine, group)
    names = [
        name for name in {**reports[0], **mine} if any(r.get(name) != reports[0].get(name) for r in reports)
    ]
    if not names:
        return key
    ranks = ranks_of(group)
    slices = _everybody(key.slices.tolist(), group) if all("refused" not in r for r in reports) else []
    for rank, report in zip(ranks, reports, strict=True):
        if "refused" in report:
            raise ValueError(
                complaint("keys of the ranks", "one on every rank", f"on rank {rank} {report['refused']}")
            )
    name = names[0]
    other = next(n for n, report in enumerate(reports) if report[name] != reports[0][name])
    pair = [report[name] for report in (reports[0], reports[other])]
    if name == "slices":
        name, pair = _first_slice(slices[0], slices[other])
    got = f"{pair[0]} on rank {ranks[0]} and {pair[1]} on rank {ranks[other]}"
    remedy = "Every rank must make the same keys, in the same order."
    raise ValueError(complaint(f"{name} of the key", "the same on every rank", got, remedy))


def _everybody(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def _first_slice(ours: list[list[int]], theirs: list[list[int]]) -> tuple[str, list[Any]]:
    if len(ours) != len(theirs):
        return "number of slices", [len(ours), len(theirs)]
    number = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    name = f"slice {number} (q_range, k_range, type)"
    return name, [(tuple(x[:2]), tuple(x[2:4]), x[4]) for x in (ours[number], theirs[number])]
