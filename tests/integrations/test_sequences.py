"""Bands of padded and packed batches show what the definition says, pair by pair; recipes say what they are."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from magi_attention.integrations.sequences import Sight, batch_mask, left_padding, stored_columns
from magi_attention.integrations.swaa import SWAAConfig
from magi_attention.kernels.reference.dense import multiplicity

BATCHES = {
    "left padding": [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]],
    "right padding": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0, 1, 0]],
    "packed": [[1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 2, 2, 2, 2, 3, 3]],
    "packed and padded": [[0, 1, 1, 0, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2, 0, 0]],
    "a row of padding": [[0] * 8, [1] * 8],
    "no batch": np.zeros((0, 8)),
}


def brute_force(numbers: np.ndarray, num_rows: int, num_cols: int, sight: Sight) -> np.ndarray:
    """(batch * num_rows, batch * num_cols) from the definition, one pair at a time."""
    batch, length = numbers.shape
    seen = np.zeros((batch, num_rows, batch, num_cols), dtype=int)
    for b, i, j in itertools.product(range(batch), range(num_rows), range(length)):
        at = length - num_rows + i
        if not sight.causal and length != num_rows:
            seen[b, i, b, j] = numbers[b, j] != 0
            continue
        if numbers[b, at] == 0 or numbers[b, at] != numbers[b, j]:
            continue
        mine = numbers[b] == numbers[b, at]
        left = sight.left
        if left < 0 or (sight.force_fa_decode and mine[length - num_rows :].sum() == 1):
            left = length
        near = j >= at - left or j - mine.argmax() < sight.keep_first
        seen[b, i, b, j] = near and (sight.right < 0 or j <= at + sight.right)
    return seen.reshape(batch * num_rows, batch * num_cols)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize(
    "sight",
    [
        Sight(),
        Sight(left=0),
        Sight(left=2, keep_first=2),
        Sight(left=1, keep_first=3, force_fa_decode=True),
        Sight(causal=False, left=-1, right=-1),
        Sight(causal=False, left=2, right=2, keep_first=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("beyond", [0, 2])
def test_bands_are_the_definition(name: str, num_rows: int, sight: Sight, beyond: int) -> None:
    numbers = np.array(BATCHES[name], dtype=np.int64)
    mask = batch_mask(numbers, num_rows, 8 + beyond, sight)
    found = multiplicity(mask.table, mask.num_rows, mask.num_cols).numpy()
    assert found.tolist() == brute_force(numbers, num_rows, 8 + beyond, sight).tolist()


@pytest.mark.parametrize(
    "sight", [Sight(left=2, keep_first=2), Sight(left=0, keep_first=0), Sight(left=1)], ids=str
)
@pytest.mark.parametrize("num_rows", [1, 2])
def test_stored_columns_show_what_all_columns_show(sight: Sight, num_rows: int) -> None:
    numbers = np.array([[0, 0] + [1] * 10, [1] * 12], dtype=np.int64)
    head, past = sight.keep_first + 2, 12 - num_rows
    num_cols = head + sight.left + num_rows
    kept = [*range(head), *range(past - sight.left, 12)]
    assert len(kept) == num_cols
    stored = stored_columns(numbers, num_rows, num_cols, sight)
    assert stored is not None
    found = batch_mask(stored, num_rows, num_cols, sight)
    every = brute_force(numbers, num_rows, 12, sight).reshape(2, num_rows, 2, 12)
    expected = every[:, :, :, kept].reshape(2 * num_rows, 2 * num_cols)
    assert every.sum() == expected.sum()
    assert multiplicity(found.table, found.num_rows, found.num_cols).tolist() == expected.tolist()


def test_columns_that_no_cache_can_have_stored_are_refused() -> None:
    numbers = np.ones((1, 12), dtype=np.int64)
    assert stored_columns(numbers, 1, 6, Sight(left=2, keep_first=2)) is None
    assert stored_columns(numbers, 1, 5, Sight(left=2, keep_first=2, force_fa_decode=True)) is None
    assert stored_columns(numbers, 1, 5, Sight()) is None


def test_recipes_have_marks_and_come_back_from_json() -> None:
    recipes = {
        "full": SWAAConfig(),
        "w8": SWAAConfig(8),
        "w2048-k10": SWAAConfig(2048, 10),
        "w2048-k10-fd": SWAAConfig(2048, 10, True),
        "w2048-k10-fd[1,3]-full[0,2]": SWAAConfig(2048, 10, [3, 1], [2, 0, 2]),
    }
    for mark, recipe in recipes.items():
        assert recipe.mark == mark
        assert SWAAConfig(**json.loads(json.dumps(recipe.dict()))) == recipe
    assert len({hash(recipe) for recipe in recipes.values()}) == len(recipes)


def test_recipes_say_what_each_layer_does() -> None:
    recipe = SWAAConfig(8, 0, [1, 2], [0])
    assert [recipe.slides(layer) for layer in range(4)] == [False, True, True, True]
    assert [recipe.decodes_in_full(layer) for layer in range(4)] == [True, True, True, False]
    assert not any(SWAAConfig(None, 4).slides(layer) for layer in range(4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"sliding_window_size": 0},
            ValueError,
            "sliding_window_size: expected at least 1, or None, got 0. ",
        ),
        ({"sliding_window_size": -4}, ValueError, "sliding_window_size: expected at least 0, got -4"),
        ({"sliding_window_size": 2.0}, TypeError, "sliding_window_size: expected an integer, got float"),
        ({"keep_first": -1}, ValueError, "keep_first: expected at least 0, got -1"),
        ({"keep_first": True}, TypeError, "keep_first: expected an integer, got bool"),
        ({"force_fa_decode": 1}, TypeError, "force_fa_decode: expected list or tuple or set .*, got int"),
        ({"force_fa_decode": [-1]}, ValueError, "force_fa_decode, a layer: expected at least 0, got -1"),
        (
            {"non_sliding_layers": ["0"]},
            TypeError,
            "non_sliding_layers, a layer: expected an integer, got str",
        ),
        ({"non_sliding_layers": None}, TypeError, "non_sliding_layers: expected list .*, got NoneType"),
    ],
)
def test_wrong_recipes_are_refused(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        SWAAConfig(**arguments)


def test_padding_on_the_left_alone_is_told_from_anything_else() -> None:
    numbers = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert left_padding(numbers, 2, 5).tolist() == [2, 0]
    others = {
        "keys are missing": (numbers, 2, 4),
        "a query is padding": (numbers, 4, 5),
        "padding on the right": (numbers[:, ::-1], 1, 5),
        "two sequences": (np.array([[0, 1, 1, 2, 2]]), 1, 5),
        "nothing but padding": (np.zeros((1, 5), dtype=int), 1, 5),
    }
    assert {name: left_padding(*given) for name, given in others.items()} == dict.fromkeys(others)
