"""How the work of a mask is cut: tiles of rows, and for each tile the runs of column blocks that it walks."""

from magi_attention.plan.tiles import TilePlan, build_plan
from magi_attention.plan.tiling import TileConfig, choose_tiles

__all__ = ["TileConfig", "TilePlan", "build_plan", "choose_tiles"]
