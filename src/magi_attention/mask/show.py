"""Masks for people: one line, a text picture, a figure."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.errors import complaint
from magi_attention.mask.bands import INF, Bands, cell_areas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Owners = Sequence[int] | NDArray[Any] | None
_LISTED = 4
_CAPITAL = np.array(list(string.ascii_uppercase))
_SMALL = np.array(list(string.ascii_lowercase))


def describe(bands: Bands, num_rows: int, num_cols: int, area: int) -> str:
    """One line: sizes, area and the first few bands."""
    names = {-INF: "-inf", INF: "inf"}
    listed = ["(" + ", ".join(names.get(x, str(x)) for x in band) + ")" for band in bands[:_LISTED].tolist()]
    if len(bands) > _LISTED:
        listed.append(f"... {len(bands) - _LISTED} more")
    return f"Mask({num_rows} x {num_cols}, area={area}, bands=[{', '.join(listed)}])"


def picture(bands: Bands, num_rows: int, num_cols: int, width: int, owners: Owners = None) -> str:
    """The mask as lines of characters, see ``Mask.show``."""
    if width < 1:
        raise ValueError(complaint("width", "at least 1", width))
    owner = _checked(owners, num_rows)
    if not num_rows or not num_cols:
        return f"({num_rows} x {num_cols}: nothing to show)"
    exact = max(num_rows, num_cols) <= width
    # A character is about twice as high as wide, so a cell of many pairs takes twice as many rows as columns.
    cell_cols = 1 if exact else -(-num_cols // width)
    cell_rows = 1 if exact else max(2 * cell_cols, -(-2 * num_rows // width))
    row_edges, col_edges = _edges(num_rows, cell_rows), _edges(num_cols, cell_cols)
    counts = cell_areas(bands, row_edges, col_edges)
    sizes = np.diff(row_edges)[:, None] * np.diff(col_edges)
    if owner is not None:
        letter = owner[row_edges[:-1], None] % 26
        symbols = np.where(counts == 0, ".", np.where(counts < sizes, _SMALL[letter], _CAPITAL[letter]))
    elif exact:
        digits = np.array(list(".x23456789+"))
        symbols = digits[np.minimum(counts, 10)]
    else:
        symbols = np.where(
            counts == 0, ".", np.where(counts < sizes, "o", np.where(counts == sizes, "x", "+"))
        )
    lines = ["".join(line) for line in symbols.tolist()]
    if not exact:
        lines.append(f"(one character: {cell_rows} rows x {cell_cols} columns)")
    return "\n".join(lines)


def _checked(owners: Owners, num_rows: int) -> NDArray[Any] | None:
    owner = None if owners is None else np.asarray(owners)
    if owner is not None and owner.shape != (num_rows,):
        raise ValueError(complaint("owners shape", f"({num_rows},), one per row", owner.shape))
    return owner


def _edges(size: int, step: int) -> NDArray[np.int64]:
    """0, step, 2 step, ..., size."""
    return np.append(np.arange(0, size, step), size)


def figure(
    bands: Bands,
    num_rows: int,
    num_cols: int,
    owners: Owners = None,
    resolution: int = 256,
) -> Figure:
    """The mask as an image, see ``Mask.figure``. The figure belongs to no window and needs no backend."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    row_edges = _edges(num_rows, max(1, -(-num_rows // resolution))) if num_rows else np.array([0, 1])
    col_edges = _edges(num_cols, max(1, -(-num_cols // resolution))) if num_cols else np.array([0, 1])
    sizes = np.diff(row_edges)[:, None] * np.diff(col_edges)
    shade = np.clip(cell_areas(bands, row_edges, col_edges) / sizes, 0, 1)
    owner = _checked(owners, num_rows)
    if owner is None:
        colours = np.broadcast_to(np.array(colormaps["tab10"](0)[:3]), (len(row_edges) - 1, 3))
    else:
        cell_owner = owner[row_edges[:-1]] if num_rows else np.zeros(1, dtype=np.int64)
        palette = "tab10" if len(owner) == 0 or owner.max() < 10 else "tab20"
        colours = colormaps[palette](cell_owner % 20)[:, :3]
    white = np.ones(3)
    image = white + shade[:, :, None] * (colours[:, None, :] - white)
    drawn = Figure(figsize=(5, 5 * min(max(num_rows / max(num_cols, 1), 0.4), 2.5)), layout="tight")
    axes = drawn.add_subplot()
    axes.imshow(image, extent=(0, col_edges[-1], row_edges[-1], 0), interpolation="nearest", aspect="auto")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    return drawn
