"""The report names exactly the bands that share pairs, the blind rows and the empty bands."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from mask_brute import count, count_of, masks

from magi_attention.mask import Mask
from magi_attention.mask import check as check_room


def shared_pairs(mask):
    cells = [count(band[None], mask.num_rows, mask.num_cols) for band in mask.bands]
    return {
        (a, b): (cells[a] * cells[b])
        for a, b in itertools.combinations(range(len(cells)), 2)
        if (cells[a] * cells[b]).any()
    }


@given(masks(max_bands=7))
def test_check_finds_exactly_the_double_covered_pairs(mask):
    report = mask.check()
    shared = shared_pairs(mask)
    assert [(o.first, o.second) for o in report.overlaps] == sorted(shared)
    for overlap in report.overlaps:
        cells = shared[overlap.first, overlap.second]
        assert cells[overlap.row, overlap.col] == 1
        assert overlap.area == cells.sum()
    multiplicity = count_of(mask)
    assert report.num_overlaps == len(shared)
    assert report.double_covered == (multiplicity * (multiplicity - 1) // 2).sum()
    assert report.ok == bool((multiplicity <= 1).all())


@given(masks())
def test_check_counts_blind_rows_and_empty_bands(mask):
    report = mask.check()
    assert report.uncovered_rows == int((count_of(mask).sum(axis=1) == 0).sum())
    empty = [
        n for n, band in enumerate(mask.bands) if not count(band[None], mask.num_rows, mask.num_cols).any()
    ]
    assert list(report.empty_bands) == empty
    assert (report.num_bands, report.num_rows) == (len(mask.bands), mask.num_rows)


def test_check_works_through_pairs_in_portions(monkeypatch):
    mask = Mask(np.repeat(Mask.causal(4).bands, 9, axis=0), 4, 4)
    whole = mask.check(limit=7)
    monkeypatch.setattr(check_room, "_CHUNK", 5)
    assert mask.check(limit=7) == whole
    assert whole.num_overlaps == 36 and whole.double_covered == 36 * 10
    assert [(o.first, o.second) for o in whole.overlaps] == [(0, n) for n in range(1, 8)]


def test_many_bands_on_the_same_rows_are_swept_by_column():
    n = 20_000
    cols = np.arange(n)
    table = np.stack([0 * cols, 0 * cols + 8, cols, cols + 1, 0 * cols - n, 0 * cols + n], axis=1)
    assert Mask(table, 8, n).check().ok
    assert not list(check_room._meeting_pairs(table))
    table[7, 3] = 9
    report = Mask(table, 8, n).check()
    assert report.num_overlaps == 1 and report.overlaps[0] == (7, 8, 0, 8, 8)


def test_report_reads_well():
    mask = Mask.from_ranges(
        [(0, 3), (1, 3), (2, 2)], [(0, 5), (2, 5), (0, 1)], ["bi_causal", "full", "full"], 4, 5
    )
    assert str(mask.check()) == (
        "3 bands over 4 rows: double cover\n"
        "  1 overlapping pairs of bands share 5 pairs:\n"
        "    bands 0 and 1 share 5, such as (row 1, column 2)\n"
        "  1 rows see nothing\n"
        "  1 bands are empty: 2"
    )
    assert str(Mask.causal(4).check()) == "1 bands over 4 rows: ok"
