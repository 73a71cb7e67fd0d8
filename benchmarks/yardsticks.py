"""Reader of ``yardsticks.json``: how fast the peers were relative to one that every machine has, cell by cell.

A peer that is not installed cannot be raced. What it gained on cuDNN or on FlexAttention when it was measured beside
them can be set against what we gain on the same one in this run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("yardsticks.json")

CellKey = tuple[str, int, int, int, int]
"""mask, tokens, heads, kv_heads, head_dim."""


@dataclass(frozen=True)
class Yardstick:
    """Speeds of peers over the speed of ``relative_to``, by cell and direction."""

    relative_to: str
    cells: dict[CellKey, dict[str, dict[str, float]]]

    def best(self, cell: CellKey, direction: str, names: Sequence[str] | None = None) -> float | None:
        """The fastest of ``names`` in this cell, or None when none was measured.

        Without names every peer counts, ``relative_to`` itself (1.0) among them.
        """
        speeds = self.cells[cell][direction]
        if names is None:
            return max([1.0, *speeds.values()])
        return max((speeds[name] for name in names if name in speeds), default=None)


@functools.cache
def load() -> dict[str, Yardstick]:
    """The yardsticks "dense" and "masks"."""
    document: dict[str, Any] = json.loads(PATH.read_text())
    return {
        name: Yardstick(
            document[name]["relative_to"],
            {
                (c["mask"], c["tokens"], c["heads"], c["kv_heads"], c["head_dim"]): {
                    direction: c[direction] for direction in ("forward", "backward")
                }
                for c in document[name]["cells"]
            },
        )
        for name in ("dense", "masks")
    }
