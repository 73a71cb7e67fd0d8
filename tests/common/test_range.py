"""Rules of one range."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common import AttnRange, RangeError
from magi_attention.common.range import AttnRange as RangeByModule

bounds = st.tuples(st.integers(-12, 12), st.integers(-12, 12)).map(sorted)
ranges = bounds.map(lambda pair: AttnRange(*pair))


def positions(attn_range: AttnRange) -> set[int]:
    return set(range(attn_range.start, attn_range.end))


def pairs(result: list[AttnRange]) -> list[tuple[int, int]]:
    return [r.to_naive_range() for r in result]


def test_documented_import_paths_give_one_class():
    assert RangeByModule is AttnRange


def test_bounds_length_and_picture():
    attn_range = AttnRange(2, 5)
    assert (attn_range.start, attn_range.end, attn_range.seqlen, len(attn_range)) == (2, 5, 3, 3)
    assert attn_range.to_naive_range() == (2, 5)
    assert str(attn_range) == repr(attn_range) == "[2, 5)"


def test_empty_range_is_valid_and_false():
    empty = AttnRange(4, 4)
    assert empty.is_empty() and not empty
    assert empty.is_valid_close() and not empty.is_valid_open()


def test_start_behind_end_is_a_value_error_everywhere():
    assert issubclass(RangeError, ValueError)
    attn_range = AttnRange(2, 5)
    with pytest.raises(RangeError, match="start <= end"):
        AttnRange(3, 2)
    with pytest.raises(RangeError):
        AttnRange.from_range((3, 2))
    with pytest.raises(RangeError):
        attn_range.start = 9
    with pytest.raises(RangeError):
        attn_range.end = 1
    with pytest.raises(RangeError):
        attn_range.check_valid(start=6)
    assert attn_range == AttnRange(2, 5)


def test_bounds_must_be_integers():
    with pytest.raises(TypeError):
        AttnRange(0.5, 2)
    assert type(AttnRange(np.int32(1), np.int64(2)).start) is int


def test_setters_edit():
    attn_range = AttnRange(2, 5)
    attn_range.end = 9
    attn_range.start = -1
    assert attn_range == AttnRange(-1, 9)


def test_from_range_takes_the_first_two_elements():
    assert AttnRange.from_range([1, 4, 7]) == AttnRange.from_range((1, 4), check=True) == AttnRange(1, 4)
    with pytest.raises(ValueError, match="from_range"):
        AttnRange.from_range([1])


def test_from_range_copies():
    original = AttnRange(1, 4)
    AttnRange.from_range(original).end = 9
    assert original.end == 4


def test_validity_with_other_bounds():
    attn_range = AttnRange(2, 5)
    assert attn_range.is_valid_close(start=5) and not attn_range.is_valid_open(start=5)
    assert not attn_range.is_valid_close(end=1)


def test_offset_may_go_negative():
    assert AttnRange(2, 5).offset(-4) == AttnRange(-2, 1)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (10, 12, (10, 10)),
        (0, 2, (3, 3)),
        (4, 6, (4, 6)),
        (None, 6, (3, 6)),
        (5, None, (5, 8)),
        (None, None, (3, 8)),
    ],
)
def test_truncate(start, end, expected):
    assert AttnRange(3, 8).truncate(start, end).to_naive_range() == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"), [((0, 5), (3, 9), (3, 5)), ((0, 3), (5, 9), (3, 3)), ((0, 3), (3, 5), (3, 3))]
)
def test_intersect(a, b, expected):
    assert AttnRange(*a).intersect(AttnRange(*b)).to_naive_range() == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 4), (2, 6), [(0, 6)]),
        ((0, 9), (2, 6), [(0, 9)]),
        ((2, 6), (0, 9), [(0, 9)]),
        ((0, 3), (3, 5), [(0, 3), (3, 5)]),
        ((7, 9), (0, 3), [(7, 9), (0, 3)]),
        ((0, 0), (3, 5), [(0, 0), (3, 5)]),
    ],
)
def test_union(a, b, expected):
    assert pairs(AttnRange(*a).union(AttnRange(*b))) == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((2, 4), (0, 10), [(0, 2), (4, 10)]),
        ((0, 10), (2, 4), []),
        ((5, 5), (0, 10), [(0, 5), (5, 10)]),
        ((0, 4), (2, 10), [(4, 10)]),
        ((20, 30), (2, 10), [(2, 10)]),
    ],
)
def test_diff_by_takes_self_out_of_other(a, b, expected):
    assert pairs(AttnRange(*a).diff_by(AttnRange(*b))) == expected


def test_subrange_compares_bounds_of_empty_ranges_too():
    assert not AttnRange(5, 5).is_subrange_of(AttnRange(0, 3))
    assert AttnRange(2, 2).is_subrange_of(AttnRange(0, 3))
    assert AttnRange(0, 3).is_subrange_of(AttnRange(0, 3))


def test_touching_ranges_do_not_overlap():
    assert not AttnRange(0, 3).is_overlap_with(AttnRange(3, 5))
    assert AttnRange(0, 4).is_overlap_with(AttnRange(3, 5))


def test_equality_is_by_value_and_among_ranges():
    assert AttnRange(1, 2) == AttnRange(1, 2) != AttnRange(1, 3)
    assert AttnRange(1, 2) != (1, 2)
    assert hash(AttnRange(1, 2)) == hash((1, 2))


def test_a_dictionary_key_cannot_be_edited():
    key = AttnRange(1, 4)
    table = {key: "here"}
    with pytest.raises(TypeError, match="clone"):
        key.start = 2
    with pytest.raises(TypeError, match="clone"):
        key.end = 2
    assert table[AttnRange(1, 4)] == "here"


@pytest.mark.parametrize(
    "duplicate", [AttnRange.clone, copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
)
def test_copies_of_a_key_are_editable(duplicate):
    key = AttnRange(1, 4)
    hash(key)
    editable = duplicate(key)
    editable.start = 2
    assert (key.start, editable.start) == (1, 2)


@given(ranges, ranges)
def test_set_laws(a, b):
    in_a, in_b = positions(a), positions(b)
    assert positions(a.intersect(b)) == in_a & in_b
    assert a.intersect_size(b) == len(in_a & in_b)
    assert a.union_size(b) == len(in_a | in_b)
    assert set().union(*map(positions, a.union(b))) == in_a | in_b
    assert set().union(*map(positions, a.diff_by(b))) == in_b - in_a
    assert a.is_overlap_with(b) == bool(in_a & in_b)
    assert positions(a.truncate(b.start, b.end)) == in_a & in_b


@given(ranges, ranges)
def test_subrange_is_antisymmetric_and_implies_subset(a, b):
    if a.is_subrange_of(b):
        assert positions(a) <= positions(b)
        assert not b.is_subrange_of(a) or a == b
