"""Tile sizes by table: a pure function of the kernel, the head dimension and the element size. No timing at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """Tile of one kernel: ``block_rows`` owned rows, ``block_cols`` columns a step, and Triton's launch options.

    With ``rows_in_registers`` the owned rows come by the copy engine and stay in registers as operands of the products,
    where they fit.
    """

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int
    rows_in_registers: bool = False

    def __post_init__(self) -> None:
        for name in ("block_rows", "block_cols"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"TileConfig {name}: expected a power of two >= 16, got {size}.")


# kernel -> largest padded head dimension -> tile, for 2-byte elements.
_TRITON_TILES: dict[str, dict[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 4, 3),
        128: TileConfig(128, 128, 8, 3),
        256: TileConfig(128, 64, 8, 2),
    },
    "backward_dq": {
        64: TileConfig(128, 64, 4, 3),
        128: TileConfig(128, 64, 8, 3, rows_in_registers=True),
        256: TileConfig(64, 32, 4, 1),
    },
    "backward_dkdv": {
        64: TileConfig(64, 64, 4, 3),
        128: TileConfig(64, 64, 4, 2),
        256: TileConfig(64, 32, 8, 2),
    },
}

_SMALL_TILE = TileConfig(32, 32, 4, 1)


def choose_tiles(kernel: str, head_dim: int, element_size: int) -> TileConfig:
    """Tile of a Triton kernel ("forward", "backward_dq", "backward_dkdv").

    Args:
        head_dim: the larger of the q/k and the v head dimension, at most 256.
        element_size: bytes of an input element; 4-byte inputs take a small tile that fits shared memory.
    """
    if element_size > 2:
        return _SMALL_TILE
    table = _TRITON_TILES[kernel]
    return table[min(size for size in table if size >= head_dim)]


@dataclass(frozen=True)
class HopperTile:
    """Registers of a thread of the two consumer warpgroups, and of a thread of the producers'."""

    consumer_registers: int
    producer_registers: int

    @property
    def max_registers(self) -> int:
        """Registers a thread at launch: what the partitions give up and take on top of it."""
        return (2 * self.consumer_registers + self.producer_registers) // 3


@dataclass(frozen=True)
class HopperForwardTile(HopperTile):
    """Tile of the Hopper forward: two warpgroups of 64 rows, ``block_cols`` keys a step, a ring of ``num_stages``.

    A row is one query head of one token; heads of a group that share a tile are packed. With two Q buffers the next
    tile's queries arrive early; staged output goes out by the copy engine, 128 columns at a time, else straight from
    registers.
    """

    block_cols: int
    num_stages: int
    num_q_buffers: int
    staged_out: bool

    def block_rows(self, pack: int) -> int:
        """Tokens of a tile in which ``pack`` heads share each token."""
        return 128 // pack


_HOPPER_FORWARD = {
    64: HopperForwardTile(240, 24, 128, 2, 2, True),
    128: HopperForwardTile(240, 24, 128, 2, 2, True),
    256: HopperForwardTile(240, 24, 64, 2, 1, True),
}

# Short documents end inside a block: narrower ones waste less, and a deeper ring hides that each takes the eraser.
_HOPPER_FORWARD_SHORT = {
    64: HopperForwardTile(240, 24, 64, 4, 2, True),
    128: HopperForwardTile(240, 24, 64, 4, 2, True),
    256: _HOPPER_FORWARD[256],
}

_SHORT_RUN = 512


def has_short_runs(num_rows: int, num_bands: int) -> bool:
    """Whether the bands are short documents, as far as their number tells."""
    return num_rows < _SHORT_RUN * num_bands


def hopper_forward_tile(head_dim: int, short_runs: bool) -> HopperForwardTile:
    """Tile of the Hopper forward for a head dimension of at most 256; smaller ones are padded in shared memory."""
    table = _HOPPER_FORWARD_SHORT if short_runs else _HOPPER_FORWARD
    return table[min(size for size in table if size >= head_dim)]


@dataclass(frozen=True)
class HopperBackwardTile(HopperTile):
    """Tile of the Hopper backward: two warpgroups own ``block_keys`` keys and walk ``block_queries`` rows a step.

    A row is one query head of one token, as in the forward. Beyond head dimension 128 ``do_stages`` counts halves of a
    block.
    """

    block_keys: int
    block_queries: int
    q_stages: int
    do_stages: int


_HOPPER_BACKWARD = {
    64: HopperBackwardTile(240, 24, 128, 128, 3, 2),
    128: HopperBackwardTile(240, 24, 128, 64, 3, 2),
    256: HopperBackwardTile(240, 24, 64, 64, 2, 3),
}


def hopper_backward_tile(head_dim: int) -> HopperBackwardTile:
    """Tile of the Hopper backward for a head dimension of at most 256."""
    return _HOPPER_BACKWARD[min(size for size in _HOPPER_BACKWARD if size >= head_dim)]


def packed_heads(group: int, most: int = 16) -> int:
    """Query heads of a K/V head that share a tile: the largest power of two that divides ``group``."""
    return min(group & -group, most)


def packed_heads_backward(group: int, short_runs: bool, alibi: bool) -> int:
    """Query heads that share a Q block of the backward.

    Packing rounds a run to fewer tokens, which pays for short documents; taking the heads one after the other keeps
    fewer of them in L2 at a time, which pays for everything else. With ALiBi the heads of a block would have slopes of
    their own.
    """
    return packed_heads(group) if short_runs and not alibi else 1


def hopper_blocks(
    direction: str, head_dim: int, group: int, short_runs: bool, alibi: bool
) -> tuple[int, int]:
    """(rows of a tile, columns a step) of the Hopper "forward" or "backward", in tokens; the backward's rows are keys.

    Heads of a group that share a tile leave room for fewer tokens of the queries.
    """
    if direction == "forward":
        forward = hopper_forward_tile(head_dim, short_runs)
        return forward.block_rows(packed_heads(group)), forward.block_cols
    backward = hopper_backward_tile(head_dim)
    return backward.block_keys, backward.block_queries // packed_heads_backward(group, short_runs, alibi)
