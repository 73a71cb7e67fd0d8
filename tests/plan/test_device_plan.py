"""The device builder makes the host builder's plan, whatever path it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from plan_emulation import bands_of, multiplicity, used_tiles, walk

pytest.importorskip("triton")

from magi_attention.mask import INF, Mask
from magi_attention.mask.bands import clip, transpose
from magi_attention.plan import device
from magi_attention.plan.device import build_device_plan
from magi_attention.plan.tiles import TilePlan, build_plan, max_num_tiles
from magi_attention.testing.strategies import masks

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = {
    "causal": Mask.causal(77, 90),
    "documents": Mask.varlen([0, 1, 8, 40, 41, 77], causal=True),
    "window": Mask.varlen([0, 30, 71], window=(5, 3), keep_first=2),
    "covered twice": Mask([[3, 20, 0, 33, -INF, INF]] * 3 + [[0, 33, 9, 9, 0, 0]], 33, 33),
    "nothing": Mask([], 21, 5),
    "one pair": Mask.full(1),
}


def device_plan(mask: Mask, block_rows: int, block_cols: int, transposed: bool = False) -> TilePlan:
    table = mask.table.to(DEVICE)
    plan = build_device_plan(
        table, mask.num_rows, mask.num_cols, block_rows, block_cols, transposed=transposed
    )
    return TilePlan(plan.tiles.cpu(), plan.band_list.cpu(), plan.bands.cpu(), block_rows, block_cols)


def check_same(mask: Mask, block_rows: int, block_cols: int, transposed: bool = False) -> None:
    got = device_plan(mask, block_rows, block_cols, transposed)
    bands = transpose(mask.bands) if transposed else mask.bands
    num_rows = mask.num_cols if transposed else mask.num_rows
    want = build_plan(bands, num_rows, block_rows, block_cols)
    assert torch.equal(got.bands, want.bands)
    assert torch.equal(got.tiles[: want.num_tiles], want.tiles)
    assert (got.tiles[want.num_tiles :] == 0).all()
    assert torch.equal(got.band_list[: len(want.band_list)], want.band_list)
    assert got.num_tiles == max_num_tiles(num_rows, len(bands), block_rows)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_device_plan_is_the_host_plan(name, transposed):
    check_same(MASKS[name], 16, 8, transposed)


@given(masks(max_size=40, max_bands=5))
@settings(max_examples=15)
def test_device_plan_of_random_masks_is_the_host_plan(mask):
    check_same(mask, 8, 16)
    check_same(mask, 16, 4, transposed=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_sorting_replaces_counting_for_many_keys(monkeypatch, transposed):
    monkeypatch.setattr(device, "_MAX_COUNTED", 0)
    check_same(MASKS["documents"], 8, 8, transposed)
    check_same(MASKS["covered twice"], 8, 8, transposed)


def test_bands_that_reach_outside_are_clipped():
    table = torch.tensor([[-9, 99, -3, 50, -2, 2 * INF - 1], [5, 200, 30, 400, -INF, 4]], dtype=torch.int32)
    plan = build_device_plan(table.to(DEVICE), 60, 45, 16, 8)
    inside = Mask(clip(table.numpy().astype("int64"), (0, 60), (0, 45)), 60, 45)
    assert torch.equal(plan.bands.cpu(), build_plan(inside.bands, 60, 16, 8).bands)
    assert (
        walk(TilePlan(*(t.cpu() for t in (plan.tiles, plan.band_list, plan.bands)), 16, 8), 60, 45)[1]
        == multiplicity(inside)
    ).all()


def test_tiles_whose_list_does_not_fit_walk_all_bands_and_cover_exactly(monkeypatch):
    monkeypatch.setattr(device, "_MAX_LIST", 4)
    rows = [[q0, q0 + 30, 0, 50, -INF, q0] for q0 in range(0, 20, 2)]
    mask = Mask(rows, 50, 50)
    plan = device_plan(mask, 16, 8)
    tiles = used_tiles(plan)
    overflown = tiles[tiles[:, 2] == 0]
    assert len(overflown) and len(overflown) < len(tiles), "the case must hold lists of both kinds"
    assert (overflown[:, 3] == len(rows)).all()
    assert len(plan.band_list) == len(rows) + 2 * plan.num_tiles
    owners, count = walk(plan, 50, 50)
    assert (owners == 1).all()
    assert (count == multiplicity(mask)).all()


@given(masks(max_size=40, max_bands=6))
@settings(max_examples=10)
def test_random_masks_are_covered_when_lists_do_not_fit(mask):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_MAX_LIST", 0)
        plan = device_plan(mask, 4, 8)
    owners, count = walk(plan, mask.num_rows, mask.num_cols)
    assert (owners == 1).all()
    assert (count == multiplicity(mask)).all()
    assert all(len(bands_of(plan, tile)) in (tile[3], len(mask.bands)) for tile in used_tiles(plan))


def test_sizes_depend_on_rows_and_number_of_bands_only():
    shapes = set()
    for cuts in ([0, 10, 60, 60, 64], [0, 1, 2, 3, 64], [0, 0, 0, 0, 64]):
        table = Mask.varlen(cuts, causal=True).table
        table = torch.cat([table, torch.zeros(4 - len(table), 6, dtype=torch.int32)]).to(DEVICE)
        plan = build_device_plan(table, 64, 64, 16, 16)
        shapes.add((plan.tiles.shape, plan.band_list.shape, plan.bands.shape))
    assert len(shapes) == 1


@pytest.mark.parametrize("layout", ["slice of a wider table", "transposed"])
def test_tables_of_any_strides(layout):
    mask = MASKS["documents"]
    table = torch.zeros(len(mask.table), 8, dtype=torch.int32, device=DEVICE)[:, :6]
    if layout == "transposed":
        table = torch.zeros(6, len(mask.table), dtype=torch.int32, device=DEVICE).t()
    table.copy_(mask.table)
    plan = build_device_plan(table, mask.num_rows, mask.num_cols, 16, 8)
    assert torch.equal(plan.bands.cpu(), build_plan(mask.bands, mask.num_rows, 16, 8).bands)


class _Recorder:
    """Stands for a kernel and notes which of its tensors do not begin at a multiple of 16 bytes."""

    def __init__(self, kernel, misaligned: set[str], name: str) -> None:
        self.kernel, self.misaligned, self.name = kernel, misaligned, name

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            for at, value in enumerate(args):
                if isinstance(value, torch.Tensor) and value.data_ptr() % 16:
                    self.misaligned.add(f"{self.name} argument {at}")
            return self.kernel[grid](*args, **kwargs)

        return launch


def test_scratch_is_aligned_for_every_number_of_bands(monkeypatch):
    misaligned: set[str] = set()
    for name, kernel in list(vars(device).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(device, name, _Recorder(kernel, misaligned, name))
    for count in range(1, 5):
        device_plan(Mask.varlen(range(0, 11 * count + 1, 11)), 16, 8)
    assert not misaligned
