"""Pictures show what is there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from mask_brute import count_of, masks

from magi_attention.mask import Mask


@given(masks())
def test_a_small_picture_is_the_multiplicity(mask):
    if mask.num_rows and mask.num_cols:
        drawn = [[".x23456789+".index(c) for c in line] for line in mask.show().split("\n")]
        assert drawn == count_of(mask).tolist()
    else:
        assert "nothing to show" in mask.show()


def test_a_large_picture_summarises_cells():
    lines = Mask.causal(100_000).show(width=8).split("\n")
    assert lines == [
        "oo......",
        "xxoo....",
        "xxxxoo..",
        "xxxxxxoo",
        "(one character: 25000 rows x 12500 columns)",
    ]
    twice = Mask(np.repeat(Mask.full(1000).bands, 2, axis=0), 1000, 1000)
    assert set("".join(twice.show(width=4).split("\n")[:-1])) == {"+"}


def test_a_tall_picture_stays_within_its_width():
    assert Mask.full(100, 3).show(width=8).split("\n") == ["xxx"] * 4 + [
        "(one character: 25 rows x 1 columns)"
    ]


def test_picture_needs_a_width():
    with pytest.raises(ValueError, match="width"):
        Mask.causal(3).show(width=0)


def test_repr_is_one_readable_line():
    assert repr(Mask.causal(3, 5)) == "Mask(3 x 5, area=12, bands=[(0, 3, 0, 5, -inf, 2)])"
    assert repr(Mask.varlen(range(0, 60, 10), window=(1, 1))).endswith("... 1 more])")


def test_figure_draws_one_cell_per_pair():
    pytest.importorskip("matplotlib")
    mask = Mask.varlen([0, 2, 5], causal=True)
    image = np.asarray(mask.figure().axes[0].images[0].get_array())
    assert image.shape == (5, 5, 3)
    assert ((image < 1).any(axis=2) == mask.to_dense()).all()


def test_figure_colours_rows_by_owner():
    pytest.importorskip("matplotlib")
    image = np.asarray(Mask.full(4).figure(owners=[0, 1, 0, 1]).axes[0].images[0].get_array())
    assert (image[0] == image[2]).all() and (image[0] != image[1]).any()
    with pytest.raises(ValueError, match="owners"):
        Mask.full(4).figure(owners=[0])


def test_figure_of_a_large_or_an_empty_mask():
    pytest.importorskip("matplotlib")
    large = Mask.causal(1_000_000).figure(owners=np.arange(1_000_000) // 250_000, resolution=64)
    assert large.axes[0].images[0].get_array().shape == (64, 64, 3)
    Mask.full(0).figure()


def test_picture_names_the_owners_of_rows():
    assert Mask.causal(4).show(owners=[0, 2, 0, 27]) == "A...\nCC..\nAAA.\nBBBB"
    lines = Mask.causal(100_000).show(width=8, owners=np.arange(100_000) // 50_000).split("\n")
    assert lines[:-1] == ["aa......", "AAaa....", "BBBBbb..", "BBBBBBbb"]
    with pytest.raises(ValueError, match=r"owners shape: expected \(4,\), one per row, got \(3,\)"):
        Mask.full(4).show(owners=[0, 1, 2])
