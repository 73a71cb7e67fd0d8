"""Bands are closed under every operation, and each operation means what it says pair by pair."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_brute import count, count_of, indices, masks, selections

from magi_attention.mask import INF, Mask
from magi_attention.mask import bands as algebra

sizes = st.integers(0, 6)


@given(masks())
def test_area_is_the_number_of_covered_pairs(mask):
    per_band = [count(band[None], mask.num_rows, mask.num_cols).sum() for band in mask.bands]
    assert algebra.areas(mask.bands).tolist() == per_band
    assert mask.area == sum(per_band)


def test_area_of_the_largest_mask_does_not_overflow():
    n = INF // 2 - 1
    assert Mask.causal(n).area == n * (n + 1) // 2
    assert Mask.full(n).area == n * n
    assert Mask(np.repeat(Mask.full(n).bands, 40, axis=0), n, n).area == 40 * n * n


@given(masks())
def test_tighten_keeps_the_pairs_and_leaves_no_idle_row_or_column(mask):
    for band, tight in zip(mask.bands, algebra.tighten(mask.bands), strict=True):
        before = count(band[None], mask.num_rows, mask.num_cols)
        assert (count(tight[None], mask.num_rows, mask.num_cols) == before).all()
        rows, cols = np.nonzero(before.any(axis=1))[0], np.nonzero(before.any(axis=0))[0]
        if len(rows):
            assert tight[:4].tolist() == [rows[0], rows[-1] + 1, cols[0], cols[-1] + 1]
        else:
            assert tight.tolist() == [0, 0, 0, 0, -INF, INF]


@given(masks())
def test_transpose_transposes(mask):
    assert (count_of(mask.transpose()) == count_of(mask).T).all()
    assert mask.transpose().transpose() == mask


@given(masks(), sizes, sizes)
def test_shift_moves_every_pair(mask, rows, cols):
    assert (count_of(mask.shift(rows, cols)) == np.pad(count_of(mask), ((rows, 0), (cols, 0)))).all()
    assert mask.shift(rows, cols).shift(-rows, -cols) == mask


@given(masks(), st.tuples(sizes, sizes), st.tuples(sizes, sizes))
def test_clip_hides_the_outside(mask, rows, cols):
    wanted = np.zeros((mask.num_rows, mask.num_cols), dtype=np.int64)
    inside = np.s_[rows[0] : max(rows), cols[0] : max(cols)]
    rows, cols = (rows[0], max(rows)), (cols[0], max(cols))
    wanted[inside] = count_of(mask)[inside]
    assert (count_of(mask.clip(rows, cols)) == wanted).all()
    assert mask.clip() == mask


@given(masks(max_bands=4), masks(max_bands=4))
def test_intersect_keeps_common_pairs(a, b):
    n = min(len(a.bands), len(b.bands))
    rows, cols = max(a.num_rows, b.num_rows), max(a.num_cols, b.num_cols)
    for first, second, both in zip(
        a.bands, b.bands, algebra.intersect(a.bands[:n], b.bands[:n]), strict=False
    ):
        wanted = count(first[None], rows, cols) * count(second[None], rows, cols)
        assert (count(both[None], rows, cols) == wanted).all()


@given(masks(), st.data())
def test_localise_is_dense_indexing(mask, data):
    rows = data.draw(selections(mask.num_rows))
    cols = data.draw(selections(mask.num_cols))
    local = mask.localise(rows, cols)
    wanted = count_of(mask)[np.ix_(indices(rows), indices(cols))]
    assert (local.num_rows, local.num_cols) == wanted.shape
    assert (count_of(local) == wanted).all()


def test_localise_joins_ranges_that_continue_each_other():
    local = Mask.causal(12).localise([(0, 4), (4, 4), (4, 12)], [(0, 6), (6, 12)])
    assert local == Mask.causal(12)
    assert len(local.bands) == 1


@pytest.mark.parametrize("ranges", [[(0, 3), (2, 4)], [(-1, 2)], [(3, 9)], [(4, 2)]])
def test_localise_refuses_ranges_that_overlap_or_leave_the_mask(ranges):
    with pytest.raises(ValueError, match="row_ranges"):
        Mask.causal(5).localise(ranges, [(0, 5)])


@given(masks(), st.randoms())
def test_equality_ignores_order_slack_and_empty_bands(mask, random):
    table = [*mask.bands.tolist(), [0, 0, 0, 0, 5, 5]]
    random.shuffle(table)
    slack = np.array(table)
    slack[:, 4] = np.where(slack[:, 4] < -mask.num_rows, -INF, slack[:, 4])
    other = Mask(algebra.tighten(slack) if random.random() < 0.5 else slack, mask.num_rows, mask.num_cols)
    assert other == mask and hash(other) == hash(mask) and other.fingerprint() == mask.fingerprint()
    assert (other.canonical().bands == mask.canonical().bands).all()
    assert (count_of(mask.canonical()) == count_of(mask)).all()


@given(masks(max_size=6, max_bands=2), masks(max_size=6, max_bands=2))
def test_equal_masks_show_the_same(a, b):
    if a == b:
        assert (count_of(a) == count_of(b)).all()
    if count_of(a).shape != count_of(b).shape or (count_of(a) != count_of(b)).any():
        assert a != b


def test_equality_distinguishes_size_and_type():
    assert Mask.full(3) != Mask(Mask.full(3).bands, 3, 4)
    assert Mask.full(3) != 3
    assert Mask.causal(3) != Mask.full(3)


@given(masks(), st.data())
def test_cell_areas_count_the_pairs_of_each_cell(mask, data):
    if not mask.num_rows or not mask.num_cols:
        return
    edges = [
        np.array(sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))}))
        for size in (mask.num_rows, mask.num_cols)
    ]
    summed = np.add.reduceat(np.add.reduceat(count_of(mask), edges[0][:-1], axis=0), edges[1][:-1], axis=1)
    assert (algebra.cell_areas(mask.bands, *edges) == summed).all()


@given(st.data())
def test_overlapping_intervals_pairs_what_shares_a_token(data):
    cuts = np.array(selections_of_nine(data), dtype=np.int64).reshape(-1, 2)
    intervals = np.array(data.draw(st.lists(st.tuples(sizes, sizes), max_size=4)), dtype=np.int64).reshape(
        -1, 2
    )
    found = algebra.overlapping_intervals(intervals[:, 0], intervals[:, 1], cuts)
    wanted = [
        (a, b)
        for a, (begin, end) in enumerate(intervals)
        for b, (first, last) in enumerate(cuts)
        if max(begin, first) < min(end, last)
    ]
    assert list(zip(*found, strict=True)) == wanted


def selections_of_nine(data):
    return sorted(piece for piece in data.draw(selections(9)) if piece[0] < piece[1])


@given(masks())
def test_row_intervals_are_the_visible_columns(mask):
    left, right = algebra.row_intervals(mask.bands, np.arange(mask.num_rows))
    cols = np.arange(mask.num_cols)
    for n, band in enumerate(mask.bands):
        shown = (cols >= left[n][:, None]) & (cols < right[n][:, None])
        assert (shown == (count(band[None], mask.num_rows, mask.num_cols) > 0)).all()


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_complete(clone):
    mask = Mask.varlen([0, 3, 8], causal=True, window=(2, 0), keep_first=1)
    other = clone(mask)
    assert other == mask
    assert torch.equal(other.table, mask.table) and other.table.dtype == torch.int32
    with pytest.raises(ValueError, match="read-only"):
        other.bands[0, 0] = 7


def test_mask_is_immutable_and_does_not_alias_its_input():
    table = np.array([[0, 3, 0, 3, -INF, 0]])
    mask = Mask(table, 3, 3)
    table[0, 1] = 1
    assert mask == Mask.causal(3)
    with pytest.raises(AttributeError):
        mask.num_rows = 4


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ([[0, 4, 0, 3, -INF, INF]], ValueError),
        ([[-1, 3, 0, 3, -INF, INF]], ValueError),
        ([[0, 3, 0, 4, -INF, INF]], ValueError),
        ([[0, 3, 0, 3]] * 3, ValueError),
        ([[0, 3, 0, 3, -INF, 0.5]], TypeError),
    ],
)
def test_bad_bands_are_refused(table, error):
    with pytest.raises(error, match=r"band.*expected"):
        Mask(table, 3, 3)


@pytest.mark.parametrize("size", [-1, INF])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="num_rows"):
        Mask([], size, 3)


def test_a_mask_is_a_plain_object_to_the_compiler():
    mask = Mask.causal(6)

    def weigh(mask, x):
        return x * mask.table[:, 1].sum() + mask.num_rows + mask.num_cols

    compiled = torch.compile(weigh, backend="eager", fullgraph=True)
    x = torch.ones(3)
    assert torch.equal(compiled(mask, x), weigh(mask, x))
