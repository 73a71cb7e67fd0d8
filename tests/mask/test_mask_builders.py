"""Every named family against a formula on single pairs that knows nothing of bands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mask_brute import count_of, masks, picture

from magi_attention.mask import Mask

lengths = st.lists(st.integers(0, 7), max_size=5)
sides = st.none() | st.integers(-1, 9)


def flash(sq, sk, window, causal, keep_first=0, decode=False):
    """Window attention of one sequence, as a predicate on (i, j)."""
    left, right = (None if side in (None, -1) else side for side in window)
    right = 0 if causal else right
    left = None if decode and sq == 1 else left
    dense = np.zeros((sq, sk), dtype=np.int64)
    for i in range(sq):
        here = i + sk - sq
        for j in range(sk):
            too_far_left = left is not None and j < here - left and j >= keep_first
            too_far_right = right is not None and j > here + right
            dense[i, j] = not too_far_left and not too_far_right
    return dense


def block_diagonal(blocks):
    rows, cols = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    dense = np.zeros((rows, cols), dtype=np.int64)
    i = j = 0
    for block in blocks:
        dense[i : i + block.shape[0], j : j + block.shape[1]] = block
        i, j = i + block.shape[0], j + block.shape[1]
    return dense


@given(st.integers(0, 9), st.integers(0, 9))
def test_full_and_causal(sq, sk):
    assert (count_of(Mask.full(sq, sk)) == 1).all()
    assert Mask.full(sq, sk).area == sq * sk
    assert (count_of(Mask.causal(sq, sk)) == flash(sq, sk, (-1, -1), True)).all()


@given(st.integers(0, 9), st.integers(0, 9), st.tuples(sides, sides), st.booleans(), st.integers(0, 4))
@example(1, 9, (2, 3), False, 1)
@example(9, 2, (0, 0), False, 1)
@example(3, 7, (2**40, 2**40), False, 2)
def test_sliding_window(sq, sk, window, causal, keep_first):
    mask = Mask.sliding_window(sq, sk, window, causal, keep_first)
    assert (count_of(mask) == flash(sq, sk, window, causal, keep_first)).all()


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=5),
    st.tuples(sides, sides),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([list, np.array, torch.tensor]),
)
def test_varlen_is_one_window_per_sequence(pairs, window, causal, keep_first, decode, container):
    cu_q = container([0, *np.cumsum([q for q, _ in pairs]).astype(int).tolist()])
    cu_k = container([0, *np.cumsum([k for _, k in pairs]).astype(int).tolist()])
    mask = Mask.varlen(cu_q, cu_k, causal, window, keep_first, decode)
    wanted = block_diagonal([flash(q, k, window, causal, keep_first, decode) for q, k in pairs])
    assert (mask.num_rows, mask.num_cols) == wanted.shape
    assert (count_of(mask) == wanted).all()


def test_force_fa_decode_frees_single_queries_only():
    mask = Mask.varlen([0, 1, 3], [0, 6, 12], causal=True, window=(1, 0), keep_first=1, force_fa_decode=True)
    assert mask.show() == "xxxxxx......\n......x..xx.\n......x...xx"


def test_a_window_without_first_keys_is_one_band_per_sequence():
    assert len(Mask.varlen([0, 5, 12], causal=True, window=(3, 0)).bands) == 2
    assert len(Mask.varlen([0, 5, 12], causal=True, window=(3, 0), keep_first=1).bands) == 4
    assert len(Mask.varlen([0, 5, 12], causal=True, keep_first=1).bands) == 2


@given(st.integers(0, 12), st.integers(1, 14), st.integers(0, 12))
def test_block_causal(num_rows, block, num_cols):
    wanted = np.zeros((num_rows, num_cols), dtype=np.int64)
    for i in range(num_rows):
        end = min((i // block + 1) * block, num_rows) + num_cols - num_rows
        wanted[i, : max(end, 0)] = 1
    assert (count_of(Mask.block_causal(num_rows, block, num_cols)) == wanted).all()


def test_block_causal_takes_boundaries():
    assert Mask.block_causal(5, [0, 1, 1, 4, 5]).show() == "x....\nxxxx.\nxxxx.\nxxxx.\nxxxxx"
    assert Mask.block_causal(5, torch.tensor([0, 2, 4, 5])) == Mask.block_causal(5, 2)
    with pytest.raises(ValueError, match="boundaries"):
        Mask.block_causal(5, [0, 2, 4])


@given(st.integers(0, 12), st.integers(1, 14), st.integers(0, 12), st.booleans())
def test_chunked(num_rows, chunk, num_cols, causal):
    wanted = np.zeros((num_rows, num_cols), dtype=np.int64)
    for i in range(num_rows):
        here = i + num_cols - num_rows
        for j in range(num_cols):
            wanted[i, j] = here >= 0 and j // chunk == here // chunk and (j <= here or not causal)
    assert (count_of(Mask.chunked(num_rows, chunk, num_cols, causal)) == wanted).all()


@st.composite
def trees(draw):
    sizes = draw(st.lists(st.integers(0, 4), max_size=7))
    return sizes, [draw(st.integers(-1, n - 1)) for n in range(len(sizes))]


@given(trees())
def test_prefix_tree(tree):
    sizes, parents = tree
    node_of = [n for n, size in enumerate(sizes) for _ in range(size)]
    wanted = np.zeros((len(node_of), len(node_of)), dtype=np.int64)
    for i, node in enumerate(node_of):
        ancestors = set()
        up = parents[node]
        while up >= 0:
            ancestors.add(up)
            up = parents[up]
        for j, other in enumerate(node_of):
            wanted[i, j] = other in ancestors or (other == node and j <= i)
    assert (count_of(Mask.prefix_tree(sizes, parents)) == wanted).all()


def test_a_chain_of_nodes_is_causal_with_one_band_per_node():
    mask = Mask.prefix_tree([3, 1, 4], [-1, 0, 1])
    assert (count_of(mask) == np.tri(8)).all()
    assert len(mask.bands) == 3


@given(st.integers(0, 5), lengths)
def test_shared_question_is_a_tree_of_depth_one(question, answers):
    wanted = Mask.prefix_tree([question, *answers], [-1, *[0] * len(answers)])
    assert Mask.shared_question(question, answers) == wanted


@given(st.lists(masks(max_size=5), max_size=4))
def test_block_diagonal_packs_masks(parts):
    assert (count_of(Mask.block_diagonal(parts)) == block_diagonal([count_of(part) for part in parts])).all()


GOLDEN = {
    "causal, more keys": (Mask.causal(2, 5), "xxxx. xxxxx"),
    "causal, more queries": (Mask.causal(5, 2), ".. .. .. x. xx"),
    "window": (Mask.sliding_window(5, window=(1, 0)), "x.... xx... .xx.. ..xx. ...xx"),
    "window, first keys": (
        Mask.sliding_window(5, window=(1, None), causal=True, keep_first=1),
        "x.... xx... xxx.. x.xx. x..xx",
    ),
    "window ahead": (Mask.sliding_window(3, 5, (0, 1)), "..xx. ...xx ....x"),
    "varlen": (Mask.varlen([0, 2, 5]), "xx... xx... ..xxx ..xxx ..xxx"),
    "varlen causal": (Mask.varlen([0, 2, 5], causal=True), "x.... xx... ..x.. ..xx. ..xxx"),
    "block causal": (Mask.block_causal(5, 2), "xx... xx... xxxx. xxxx. xxxxx"),
    "chunked": (Mask.chunked(5, 2), "x.... xx... ..x.. ..xx. ....x"),
    "chunked, more keys": (Mask.chunked(3, 2, 5), "..x.. ..xx. ....x"),
    "prefix tree": (Mask.prefix_tree([2, 1, 2], [-1, 0, 0]), "x.... xx... xxx.. xx.x. xx.xx"),
    "shared question": (Mask.shared_question(2, [1, 2]), "x.... xx... xxx.. xx.x. xx.xx"),
    "block diagonal": (Mask.block_diagonal([Mask.causal(2), Mask.full(1, 3)]), "x.... xx... ..xxx"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_pictures(name):
    mask, lines = GOLDEN[name]
    assert mask.show().split() == lines.split()
    assert (mask.to_dense() == picture(lines)).all()


def test_nothing_is_a_mask_too():
    for mask in (
        Mask.full(0),
        Mask.causal(0, 4),
        Mask.varlen([0]),
        Mask.prefix_tree([], []),
        Mask.chunked(0, 3),
    ):
        assert mask.area == 0 and mask.num_rows == 0 and mask.table.shape == (0, 6)
    assert Mask.block_diagonal([]) == Mask.full(0)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Mask.causal(-1), ValueError, "num_rows"),
        (lambda: Mask.causal(2.5), TypeError, "integer"),
        (lambda: Mask.varlen([0, 3, 2]), ValueError, "cu_seqlens_q"),
        (lambda: Mask.varlen([]), ValueError, "cu_seqlens_q"),
        (lambda: Mask.varlen([0.0, 3.0]), TypeError, "cu_seqlens_q"),
        (lambda: Mask.varlen([0, 3], [0, 1, 3]), ValueError, "cu_seqlens_k length"),
        (lambda: Mask.varlen([[0, 3]]), ValueError, "one dimension"),
        (lambda: Mask.sliding_window(4, window=(-2, 0)), ValueError, "window"),
        (lambda: Mask.sliding_window(4, window=3), ValueError, "window"),
        (lambda: Mask.sliding_window(4, window=(1, 2, 3)), ValueError, "window"),
        (lambda: Mask.sliding_window(4, window=(1, 0), keep_first=-1), ValueError, "keep_first"),
        (lambda: Mask.block_causal(4, 0), ValueError, "block_size"),
        (lambda: Mask.chunked(4, 0), ValueError, "chunk"),
        (lambda: Mask.prefix_tree([1, 2], [-1, 1]), ValueError, r"parents\[1\]"),
        (lambda: Mask.prefix_tree([1, -2], [-1, 0]), ValueError, r"lengths\[1\]"),
        (lambda: Mask.prefix_tree([1, 2], [-1]), ValueError, "parents length"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_million_tokens_in_ten_thousand_documents():
    rng = np.random.default_rng(0)
    cuts = np.concatenate([[0], np.sort(rng.integers(0, 1_000_000, 9_999)), [1_000_000]])
    size = np.diff(cuts)
    assert Mask.varlen(cuts, causal=True).area == int((size * (size + 1) // 2).sum())
    assert Mask.varlen(cuts).area == int((size * size).sum())
    window = Mask.varlen(cuts, causal=True, window=(15, 0), keep_first=4)
    short = np.minimum(size, 16)
    hidden = np.maximum(size - 16, 0)
    first = np.where(hidden > 4, 4 * hidden - 6, hidden * (hidden + 1) // 2)
    assert window.area == int((short * (short + 1) // 2 + 16 * hidden + first).sum())
    report = window.check()
    assert report.ok and report.uncovered_rows == 0
    tree = Mask.prefix_tree(size, np.maximum(np.arange(10_000) - 1, -1))
    assert tree.area == 1_000_000 * 1_000_001 // 2
