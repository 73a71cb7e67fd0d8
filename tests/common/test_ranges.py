"""Rules of a list of ranges, each against sets of positions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common import AttnRange, AttnRanges, RangeError
from magi_attention.common.ranges import check_valid_cu_seqlens, is_valid_cu_seqlens

bounds = st.tuples(st.integers(-3, 25), st.integers(0, 8)).map(lambda x: (x[0], x[0] + x[1]))
naive_lists = st.lists(bounds, max_size=8)
lists = naive_lists.map(AttnRanges.from_ranges)


def make(*pairs: tuple[int, int]) -> AttnRanges:
    return AttnRanges.from_ranges(pairs)


def in_order(ranges: AttnRanges) -> list[int]:
    """Positions with multiplicity, in the order of the list."""
    return [position for r in ranges for position in range(r.start, r.end)]


def positions(ranges: AttnRanges) -> set[int]:
    return set(in_order(ranges))


class TestConstruction:
    def test_no_ranges(self):
        ranges = AttnRanges()
        assert len(ranges) == ranges.size == ranges.total_seqlen == ranges.max_seqlen == 0
        assert ranges.is_empty() and ranges.is_sorted() and ranges.is_merged() and ranges.is_non_overlap()
        assert repr(ranges) == "[[,)]"
        assert ranges.points == [] and ranges.to_naive_ranges() == [] and ranges.chunk(4) == []
        for bound in ("start", "end"):
            with pytest.raises(ValueError, match=bound):
                getattr(ranges, bound)

    def test_from_tuples_lists_and_ranges(self):
        ranges = AttnRanges.from_ranges([(0, 4), [4, 6], AttnRange(6, 9)], check=True)
        assert ranges.to_naive_ranges() == [(0, 4), (4, 6), (6, 9)]
        assert AttnRanges.from_ranges(ranges) == ranges
        with pytest.raises(RangeError):
            make((4, 0))

    def test_from_cu_seqlens(self):
        assert AttnRanges.from_cu_seqlens([0, 4, 10], 10) == make((0, 4), (4, 10))
        assert AttnRanges.from_cu_seqlens([], 0) == AttnRanges()

    @pytest.mark.parametrize(
        "cu_seqlens", [[1, 4, 10], [0, 4, 4, 10], [0, 10, 4], [0, 4, 9], [0, 4, 11], [0]]
    )
    def test_cu_seqlens_must_rise_from_zero_to_the_length(self, cu_seqlens):
        assert not is_valid_cu_seqlens(cu_seqlens, 10)
        with pytest.raises(ValueError, match="cu_seqlens"):
            check_valid_cu_seqlens(cu_seqlens, 10)
        with pytest.raises(ValueError, match="cu_seqlens"):
            AttnRanges.from_cu_seqlens(cu_seqlens, 10)

    def test_valid_cu_seqlens(self):
        assert (
            is_valid_cu_seqlens([0, 4, 10], 10) and is_valid_cu_seqlens([0], 0) and is_valid_cu_seqlens([], 0)
        )
        check_valid_cu_seqlens([0, 4, 10], 10)

    def test_cu_seqlens_round_trip(self):
        assert make((0, 4), (4, 10)).to_cu_seqlens(10) == [0, 4, 10]
        assert AttnRanges().to_cu_seqlens(0) == [0]

    @pytest.mark.parametrize("pairs", [[(0, 4), (5, 10)], [(1, 10)], [(0, 9)], [(4, 10), (0, 4)], []])
    def test_to_cu_seqlens_refuses_gaps(self, pairs):
        ranges = make(*pairs)
        assert not ranges.is_cu_seqlens(10)
        with pytest.raises(ValueError, match="without gaps from 0 to 10"):
            ranges.to_cu_seqlens(10)


class TestList:
    def test_append_insert_extend_pop(self):
        ranges = AttnRanges()
        ranges.append(AttnRange(4, 6), check=True)
        ranges.insert(-99, AttnRange(0, 4))
        ranges.insert(99, AttnRange(6, 7))
        ranges.extend(make((8, 9)), check=True)
        assert ranges == make((0, 4), (4, 6), (6, 7), (8, 9))
        assert ranges.pop() == AttnRange(8, 9) and ranges.pop(0) == AttnRange(0, 4)
        assert ranges == make((4, 6), (6, 7))
        with pytest.raises(IndexError, match="pop from empty AttnRanges"):
            AttnRanges().pop()

    def test_only_ranges_go_in(self):
        ranges = make((0, 4))
        for insert in (ranges.append, lambda x: ranges.insert(0, x), lambda x: ranges.__setitem__(0, x)):
            with pytest.raises(TypeError, match="AttnRange"):
                insert((0, 1))
        with pytest.raises(TypeError, match="AttnRanges"):
            ranges[0:1] = [AttnRange(0, 1)]

    def test_what_goes_in_is_copied(self):
        a, b, c, d = (AttnRange(0, 2) for _ in range(4))
        source = make((0, 2))
        ranges = AttnRanges.from_ranges([a])
        ranges.append(b)
        ranges.insert(0, c)
        ranges.extend(source)
        ranges[0] = d
        ranges[1:2] = source
        for original in (a, b, c, d, source[0]):
            original.end = 9
        assert ranges.max_seqlen == 2

    def test_indexing_and_slices(self):
        ranges = make((0, 4), (4, 6), (6, 9))
        assert ranges[0] == AttnRange(0, 4) and ranges[-1] == AttnRange(6, 9)
        assert ranges[1:] == make((4, 6), (6, 9)) and list(ranges) == [ranges[0], ranges[1], ranges[2]]
        ranges[1] = AttnRange(5, 6)
        ranges[0:1] = make((0, 1), (1, 2))
        assert ranges == make((0, 1), (1, 2), (5, 6), (6, 9))

    def test_slices_and_clones_are_copies(self):
        ranges = make((0, 4), (4, 6))
        ranges[:][0].end = 1
        ranges.clone()[0].end = 1
        assert ranges == make((0, 4), (4, 6))

    def test_equality_minds_the_order(self):
        assert make((0, 4), (4, 6)) != make((4, 6), (0, 4))
        assert make((0, 4)) != [(0, 4)]

    def test_picture(self):
        assert repr(make((0, 4), (4, 6))) == "[[0, 4), [4, 6)]"

    def test_sizes_and_points(self):
        ranges = make((5, 9), (0, 4), (2, 5))
        assert (ranges.total_seqlen, ranges.max_seqlen, ranges.start, ranges.end) == (11, 4, 0, 9)
        assert ranges.points == [0, 2, 4, 5, 9]
        assert ranges.is_valid()
        ranges.check_valid()

    def test_to_tensor_is_int32_pairs(self):
        tensor = make((0, 4), (4, 6)).to_tensor()
        assert tensor.dtype == torch.int32 and tensor.tolist() == [[0, 4], [4, 6]]
        empty = AttnRanges().to_tensor(device="cpu")
        assert empty.dtype == torch.int32 and empty.shape == (0, 2)
        with pytest.raises(ValueError, match="int32"):
            make((0, 2**31)).to_tensor()


class TestKeys:
    def test_equal_lists_are_one_key(self):
        assert {make((0, 4)): "here"}[make((0, 4))] == "here"

    @pytest.mark.parametrize(
        "edit",
        [
            lambda r: r.append(AttnRange(0, 1)),
            lambda r: r.insert(0, AttnRange(0, 1)),
            lambda r: r.extend(AttnRanges()),
            lambda r: r.pop(),
            lambda r: r.__setitem__(0, AttnRange(0, 1)),
            lambda r: r.__setitem__(slice(0, 1), AttnRanges()),
            lambda r: setattr(r[0], "start", 1),
            lambda r: setattr(next(iter(r)), "end", 9),
        ],
    )
    def test_a_key_cannot_be_edited(self, edit):
        key = make((0, 4), (4, 6))
        table = {key: "here"}
        with pytest.raises(TypeError, match="clone"):
            edit(key)
        assert table[make((0, 4), (4, 6))] == "here"

    def test_a_range_taken_out_before_the_hash_cannot_be_edited_after_it(self):
        key = make((0, 4))
        element = key[0]
        hash(key)
        with pytest.raises(TypeError, match="clone"):
            element.end = 9

    @pytest.mark.parametrize(
        "duplicate", [AttnRanges.clone, copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
    )
    def test_copies_of_a_key_are_editable(self, duplicate):
        key = make((0, 4))
        hash(key)
        editable = duplicate(key)
        editable[0].end = 9
        editable.append(AttnRange(9, 10))
        assert key == make((0, 4)) and editable == make((0, 9), (9, 10))


class TestMerge:
    def test_lone_empty_ranges_stay(self):
        assert make((0, 0), (0, 5), (7, 7)).merge() == make((0, 5), (7, 7))

    def test_overlapping_and_touching_ranges_join(self):
        assert make((5, 8), (0, 3), (3, 4), (6, 7)).merge() == make((0, 4), (5, 8))

    def test_split_alignment(self):
        assert make((3, 5), (9, 10)).merge_with_split_alignment(4) == make((0, 12))
        assert make((3, 5), (9, 10)).merge_with_split_alignment() == make((3, 5), (9, 10))
        with pytest.raises(ValueError, match="split_alignment"):
            make((0, 4)).merge_with_split_alignment(0)

    def test_sort_is_stable(self):
        assert make((4, 6), (0, 9), (4, 5), (0, 1)).sort() == make((0, 9), (0, 1), (4, 6), (4, 5))

    def test_predicates(self):
        assert make((0, 4), (2, 6)).is_sorted() and not make((2, 6), (0, 1)).is_sorted()
        assert make((0, 4), (5, 6)).is_merged()
        assert not make((0, 4), (4, 6)).is_merged() and not make((5, 6), (0, 4)).is_merged()
        assert make((4, 6), (0, 4)).is_non_overlap() and not make((0, 4), (9, 10), (3, 6)).is_non_overlap()

    def test_clear_empty_and_truncate(self):
        assert make((3, 3), (0, 2), (1, 1)).clear_empty() == make((0, 2))
        assert make((0, 4), (6, 9), (12, 15)).truncate(2, 8) == make((2, 4), (6, 8))
        assert make((0, 4), (6, 9)).truncate(start=5) == make((6, 9))

    @given(lists)
    def test_merge_keeps_positions_and_is_canonical(self, ranges):
        merged = ranges.merge()
        assert positions(merged) == positions(ranges)
        assert merged.is_merged() and merged.is_sorted() and merged.is_non_overlap()
        assert merged.merge() == merged
        assert ranges.is_merged() == (merged == ranges)

    @given(lists, st.integers(1, 6))
    def test_alignment_covers_whole_blocks(self, ranges, alignment):
        ranges = ranges.clear_empty()
        blocks = {position // alignment for position in positions(ranges)}
        aligned = ranges.merge_with_split_alignment(alignment)
        assert aligned.is_merged()
        assert positions(aligned) == {b * alignment + i for b in blocks for i in range(alignment)}

    @given(lists)
    def test_non_overlap_means_no_position_twice(self, ranges):
        assert ranges.is_non_overlap() == (len(in_order(ranges)) == len(positions(ranges)))


class TestChunk:
    def test_greedy_in_order(self):
        assert make((0, 5), (7, 14)).chunk(4) == [make((0, 4)), make((4, 5), (7, 10)), make((10, 14))]

    def test_overlap_is_refused_unless_unchecked(self):
        with pytest.raises(ValueError, match="disjoint"):
            make((0, 5), (4, 6)).chunk(4)
        assert make((0, 5), (4, 6)).chunk(4, check=False) == [make((0, 4)), make((4, 5), (4, 6))]

    def test_size_must_be_positive(self):
        with pytest.raises(ValueError, match="chunk_size"):
            make((0, 5)).chunk(0)

    @given(lists, st.integers(1, 9))
    def test_pieces_laid_end_to_end_are_the_ranges(self, ranges, chunk_size):
        chunks = ranges.chunk(chunk_size, check=False)
        assert [position for chunk in chunks for position in in_order(chunk)] == in_order(ranges)
        assert all(chunk.total_seqlen == chunk_size for chunk in chunks[:-1])
        assert all(0 < chunk.total_seqlen <= chunk_size for chunk in chunks[-1:])


class TestLocal:
    def test_range(self):
        host = make((5, 10), (15, 20))
        expected = (AttnRange(6, 8), AttnRange(15, 20))
        assert host.make_range_local(AttnRange(16, 18)) == expected
        assert host.make_range_local(AttnRange(16, 18), is_self_merged=True, prefix_offset=[0, 5]) == expected

    def test_ranges_keep_their_order(self):
        host = make((5, 10), (15, 20), (25, 30))
        local = host.make_ranges_local(make((6, 8), (15, 20), (29, 30)))
        assert local == make((1, 3), (5, 10), (14, 15))
        assert host.make_ranges_local(make((29, 30), (6, 8))) == make((14, 15), (1, 3))

    @pytest.mark.parametrize("pair", [(4, 6), (9, 11), (9, 16), (11, 12), (0, 1), (30, 31)])
    def test_a_range_outside_is_refused(self, pair):
        host = make((5, 10), (15, 20))
        with pytest.raises(ValueError, match="range to make local"):
            host.make_range_local(AttnRange(*pair))
        with pytest.raises(ValueError, match="range to make local"):
            host.make_ranges_local(make((5, 6), pair))

    def test_a_false_promise_of_merged_ranges_is_refused(self):
        unmerged, other = make((5, 10), (0, 6)), make((1, 2))
        for call in (unmerged.make_ranges_local, unmerged.find_hole_ranges, unmerged.find_overlap_ranges):
            with pytest.raises(ValueError, match="merge"):
                call(other, is_self_merged=True)
        for call in (other.find_hole_ranges, other.find_overlap_ranges):
            with pytest.raises(ValueError, match="merge"):
                call(unmerged, is_other_merged=True)

    @given(lists, lists)
    def test_local_positions_index_the_sorted_positions(self, host, other):
        sorted_positions = sorted(positions(host))
        inside = AttnRanges.from_ranges(
            piece for r in other for piece in make(r.to_naive_range()).find_overlap_ranges(host)
        )
        local = host.make_ranges_local(inside)
        assert [sorted_positions[i] for i in in_order(local)] == in_order(inside)
        assert [host.make_range_local(r)[0] for r in inside] == list(local)


class TestSets:
    def test_holes(self):
        holes = make((0, 10), (15, 20), (20, 30)).find_hole_ranges(make((5, 10), (25, 30)))
        assert holes == make((0, 5), (15, 25))

    def test_overlaps(self):
        overlaps = make((0, 10), (15, 20), (25, 30)).find_overlap_ranges(make((5, 10), (18, 30)))
        assert overlaps == make((5, 10), (18, 20), (25, 30))

    def test_sizes(self):
        assert make((0, 10), (5, 15), (5, 8)).intersect_size() == 8
        assert make((0, 10)).intersect_size_with(make((5, 15))) == 5
        assert make((0, 10), (5, 15)).union_size() == 15
        assert make((0, 4)).union_size_with(make((2, 6))) == 6

    @given(lists, lists)
    def test_set_laws(self, a, b):
        in_a, in_b = positions(a), positions(b)
        for result, expected in (
            (a.find_hole_ranges(b), in_a - in_b),
            (a.find_overlap_ranges(b), in_a & in_b),
            (a.merge().find_hole_ranges(b.merge(), is_self_merged=True, is_other_merged=True), in_a - in_b),
            (
                a.merge().find_overlap_ranges(b.merge(), is_self_merged=True, is_other_merged=True),
                in_a & in_b,
            ),
        ):
            assert positions(result) == expected
            assert result.is_merged() and result.clear_empty() == result
        assert a.union_size() == len(in_a)
        assert a.union_size_with(b) == len(in_a | in_b)
        assert a.intersect_size_with(b) == len(in_a & in_b)
        assert a.intersect_size() == len(in_order(a)) - len(in_a)

    @given(lists, lists)
    def test_inputs_stay_as_they_were(self, a, b):
        before = a.to_naive_ranges(), b.to_naive_ranges()
        for call in (a.find_hole_ranges, a.find_overlap_ranges, a.union_size_with):
            call(b)
        for call in (a.merge, a.sort, a.clear_empty, a.truncate):
            call()
        assert (a.to_naive_ranges(), b.to_naive_ranges()) == before
