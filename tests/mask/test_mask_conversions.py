"""Slices, boolean matrices and predicates become the same pairs, and bands become slices again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_brute import count_of, masks, picture
from numpy.typing import NDArray

from magi_attention.common import AttnMaskType, AttnRanges
from magi_attention.mask import Mask
from magi_attention.mask import bands as algebra
from magi_attention.mask import dense as dense_room

NAMES = ["full", "causal", "inv_causal", "bi_causal"]


@st.composite
def slice_lists(draw, size=9, max_slices=4):
    def ranges():
        return tuple(sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))))

    count = draw(st.integers(0, max_slices))
    return (
        [ranges() for _ in range(count)],
        [ranges() for _ in range(count)],
        [draw(st.integers(0, 3)) for _ in range(count)],
    )


def typed(q_ranges, k_ranges, types, num_rows, num_cols) -> NDArray[np.int64]:
    """The rule of each type on local indices."""
    total = np.zeros((num_rows, num_cols), dtype=np.int64)
    for (q0, q1), (k0, k1), code in zip(q_ranges, k_ranges, types, strict=True):
        for i in range(q1 - q0):
            for j in range(k1 - k0):
                below = j <= i + (k1 - k0) - (q1 - q0)
                above = j >= i
                total[q0 + i, k0 + j] += (True, below, above, below and above)[code]
    return total


@given(slice_lists())
def test_from_ranges_is_the_union_of_typed_rectangles(slices):
    mask = Mask.from_ranges(*slices, num_rows=9, num_cols=9)
    assert (count_of(mask) == typed(*slices, 9, 9)).all()
    assert len(mask.bands) == len(slices[0])


@pytest.mark.parametrize(
    ("code", "sizes", "lines"),
    [
        (0, (2, 5), "xxxxx xxxxx"),
        (1, (5, 2), ".. .. .. x. xx"),
        (1, (2, 5), "xxxx. xxxxx"),
        (1, (3, 3), "x.. xx. xxx"),
        (2, (5, 2), "xx .x .. .. .."),
        (2, (2, 5), "xxxxx .xxxx"),
        (2, (3, 3), "xxx .xx ..x"),
        (3, (5, 2), ".. .. .. .. .."),
        (3, (2, 5), "xxxx. .xxxx"),
        (3, (3, 3), "x.. .x. ..x"),
    ],
)
def test_golden_types(code, sizes, lines):
    sq, sk = sizes
    mask = Mask.from_ranges([(0, sq)], [(0, sk)], [NAMES[code]])
    assert (mask.to_dense() == picture(lines)).all()


def test_from_ranges_takes_every_spelling():
    q, k = [(0, 4), (4, 6)], [(0, 4), (0, 6)]
    wanted = Mask.from_ranges(q, k, [1, 2])
    for ranges in (
        AttnRanges.from_ranges,
        np.array,
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.int32),
    ):
        assert Mask.from_ranges(ranges(q), ranges(k), [1, 2]) == wanted
    members = [AttnMaskType.CAUSAL, AttnMaskType.INVCAUSAL]
    for types in (
        ("causal", "inv_causal"),
        members,
        np.array([1, 2]),
        torch.tensor([1, 2]),
        [np.int64(1), 2],
    ):
        assert Mask.from_ranges(q, k, types) == wanted
    for one in (1, "causal", AttnMaskType.CAUSAL, torch.tensor(1), np.int32(1)):
        assert Mask.from_ranges(q, k, one) == Mask.from_ranges(q, k, [1, 1])
    assert Mask.from_ranges(q, k) == Mask.from_ranges(q, k, "full")
    sized = Mask.from_ranges(q, k, num_rows=10, num_cols=7)
    assert (sized.num_rows, sized.num_cols) == (10, 7)
    assert Mask.from_ranges([], []) == Mask.full(0)


@pytest.mark.parametrize(
    ("q", "k", "types", "sizes", "error", "words"),
    [
        ([(0, 2), (3, 1)], [(0, 2)] * 2, 0, {}, ValueError, r"q_ranges\[1\]: expected start <= end"),
        ([(0, 2)], [(-1, 2)], 0, {}, ValueError, r"k_ranges\[0\]: expected start >= 0"),
        ([(0, 2), (2, 5)], [(0, 2)] * 2, 0, {"num_rows": 4}, ValueError, r"q_ranges\[1\]: expected end <= 4"),
        ([(0, 2)] * 2, [(0, 2), (0, 9)], 0, {"num_cols": 8}, ValueError, r"k_ranges\[1\]: expected end <= 8"),
        ([(0, 2)], [(0, 2)] * 2, 0, {}, ValueError, "k_ranges length"),
        ([(0, 2)] * 2, [(0, 2)] * 2, [0], {}, ValueError, "attn_type_map length"),
        ([(0, 2)] * 2, [(0, 2)] * 2, [0, 4], {}, ValueError, "slice 1"),
        ([(0, 2)] * 2, [(0, 2)] * 2, torch.tensor([-1, 0]), {}, ValueError, "slice 0"),
        ([(0, 2)], [(0, 2)], "diagonal", {}, ValueError, "slice 0"),
        ([(0, 2, 3)], [(0, 2)], 0, {}, ValueError, "q_ranges shape"),
        ([(0, 2.5)], [(0, 2)], 0, {}, TypeError, "q_ranges dtype"),
    ],
)
def test_bad_slices_are_refused_by_number(q, k, types, sizes, error, words):
    with pytest.raises(error, match=words):
        Mask.from_ranges(q, k, types, **sizes)


@given(masks())
def test_to_slices_covers_the_same_pairs_with_at_most_three_slices_per_band(mask):
    q, k, types = mask.to_slices()
    assert isinstance(q, AttnRanges) and all(isinstance(item, AttnMaskType) for item in types)
    back = Mask.from_ranges(q, k, types, mask.num_rows, mask.num_cols)
    assert (count_of(back) == count_of(mask)).all()
    assert len(types) <= 3 * len(mask.bands)


@given(slice_lists())
def test_a_slice_comes_back_as_one_slice(slices):
    mask = Mask.from_ranges(*slices, num_rows=9, num_cols=9)
    full, causal = Mask.full(9), Mask.causal(9)
    assert len(full.to_slices()[2]) == len(causal.to_slices()[2]) == 1
    for number in range(len(slices[0])):
        one = Mask(mask.bands[number : number + 1], 9, 9)
        assert len(one.to_slices()[2]) == int(one.area > 0)


@pytest.mark.parametrize(
    ("window", "wanted"),
    [
        ((2, 3), [((5, 7), (5, 10), 1), ((7, 12), (5, 15), 3), ((12, 15), (10, 15), 2)]),
        ((-1, 0), [((5, 15), (5, 15), 1)]),
        ((0, 0), [((5, 15), (5, 15), 3)]),
        ((100, 100), [((5, 15), (5, 15), 0)]),
        ((2, 0), [((5, 7), (5, 7), 1), ((7, 15), (5, 15), 3)]),
        ((3, -1), [((5, 8), (5, 15), 0), ((8, 15), (5, 15), 2)]),
        ((8, 8), [((5, 7), (5, 15), 1), ((7, 13), (5, 15), 0), ((13, 15), (5, 15), 2)]),
    ],
)
def test_golden_slices_of_windows(window, wanted):
    q, k, types = Mask.sliding_window(10, window=window).shift(5, 5).to_slices()
    found = zip(q.to_naive_ranges(), k.to_naive_ranges(), (t.to_int_type() for t in types), strict=True)
    assert [(tuple(a), tuple(b), c) for a, b, c in found] == wanted


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32), st.floats(0, 1))
def test_from_dense_is_exact_for_any_matrix(num_rows, num_cols, seed, density):
    dense = np.random.default_rng(seed).random((num_rows, num_cols)) < density
    for source in (dense, torch.from_numpy(dense), np.asfortranarray(dense)):
        mask = Mask.from_dense(source)
        assert (count_of(mask) == dense).all()
        assert (mask.num_rows, mask.num_cols) == dense.shape


@given(masks())
def test_from_dense_to_dense_round_trip(mask):
    dense = mask.to_dense()
    assert (dense == (count_of(mask) > 0)).all()
    assert (Mask.from_dense(dense).to_dense() == dense).all()


@given(masks(max_bands=1))
def test_one_band_comes_back_as_the_same_band(mask):
    assert Mask.from_dense(mask.to_dense()) == mask


@pytest.mark.parametrize(
    ("mask", "num_bands"),
    [
        (Mask.causal(33), 1),
        (Mask.sliding_window(33, window=(5, 0)), 1),
        (Mask.sliding_window(33, 47, window=(5, 3)), 1),
        (Mask.varlen([0, 7, 8, 9, 20, 33]), 5),
        (Mask.varlen([0, 7, 12, 20, 33], causal=True), 4),
        (Mask.chunked(33, 8), 5),
    ],
)
def test_regular_matrices_come_back_as_few_bands(mask, num_bands):
    back = Mask.from_dense(mask.to_dense())
    assert (count_of(back) == count_of(mask)).all()
    assert len(back.bands) <= num_bands


def fewest_bands(steps):
    """Fewest pieces of a chain, by trying every cut: left steps are 0..01..1, right steps 1..10..0."""

    def is_band(piece):
        left, right = [step[0] for step in piece], [step[1] for step in piece]
        return left == sorted(left) and right == sorted(right, reverse=True)

    best = [0, *[len(steps) + 2] * (len(steps) + 1)]
    for end in range(1, len(steps) + 2):
        for begin in range(end):
            if is_band(steps[begin : end - 1]):
                best[end] = min(best[end], best[begin] + 1)
    return best[-1]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=9))
def test_one_chain_is_cut_into_the_fewest_bands(steps):
    left = np.cumsum([0, *[step[0] for step in steps]])
    right = 20 + np.cumsum([0, *[step[1] for step in steps]])
    cols = np.arange(32)
    dense = (cols >= left[:, None]) & (cols < right[:, None])
    mask = Mask.from_dense(dense)
    assert (count_of(mask) == dense).all()
    assert len(mask.bands) == fewest_bands(steps)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(np.zeros(3, bool), ValueError), (np.zeros((3, 3)), TypeError), (torch.ones(2, 2), TypeError)],
)
def test_from_dense_refuses_other_things(bad, error):
    with pytest.raises(error, match="dense mask"):
        Mask.from_dense(bad)


def test_from_flex_evaluates_the_predicate(monkeypatch):
    document = torch.tensor([0] * 5 + [1] * 9 + [2] * 7)

    def packed_causal(b, h, q_idx, kv_idx):
        return (document[q_idx] == document[kv_idx]) & (q_idx >= kv_idx)

    # Small blocks, so that bands must continue from one block of rows to the next.
    monkeypatch.setattr(dense_room, "_BLOCK_ELEMENTS", 64)
    mask = Mask.from_flex(packed_causal, 21)
    assert mask == Mask.varlen([0, 5, 14, 21], causal=True)
    prefix = Mask.from_flex(lambda b, h, q, k: (k < 3) | (q >= k), 7, 9)
    assert prefix.to_dense().tolist() == [[k < 3 or q >= k for k in range(9)] for q in range(7)]
    assert Mask.from_flex(lambda b, h, q, k: q.new_ones((), dtype=torch.bool), 4, 6) == Mask.full(4, 6)
    assert Mask.from_flex(packed_causal, 0, 5) == Mask.full(0, 5)


def test_from_dense_continues_bands_across_blocks(monkeypatch):
    monkeypatch.setattr(dense_room, "_BLOCK_ELEMENTS", 16)
    assert Mask.from_dense(np.tri(13, dtype=bool)) == Mask.causal(13)


@pytest.mark.parametrize("axis", [0, 1])
def test_from_flex_refuses_a_predicate_of_batch_or_head(axis):
    def by_batch_or_head(*indices):
        return indices[2] >= indices[3] + indices[axis]

    with pytest.raises(ValueError, match="every batch entry and head"):
        Mask.from_flex(by_batch_or_head, 4, batch=2, num_heads=2)
    assert Mask.from_flex(by_batch_or_head, 4) == Mask.causal(4)


def test_from_flex_refuses_scores():
    with pytest.raises(TypeError, match="mask_mod result"):
        Mask.from_flex(lambda b, h, q, k: q - k, 4)


def test_slices_of_a_table_with_idle_diagonals_are_full():
    mask = Mask([[0, 4, 0, 4, -3, 3]], 4, 4)
    assert mask.to_slices()[2] == [AttnMaskType.FULL]
    assert (algebra.relax(algebra.compact(mask.bands)) == Mask.full(4).bands).all()
