"""Packing keeps every token and its gradient, padding puts them back, and mistakes are named."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from magi_attention.api import bert_padding
from magi_attention.api.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.int8, torch.uint8)


def numbered(batch: int, seqlen: int, *rest: int) -> torch.Tensor:
    """Every element different, none zero."""
    shape = (batch, seqlen, *rest)
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


@st.composite
def masks(draw: st.DrawFn, min_batch: int = 1) -> list[list[bool]]:
    batch, seqlen = draw(st.integers(min_batch, 4)), draw(st.integers(1, 6))
    return draw(
        st.lists(st.lists(st.booleans(), min_size=seqlen, max_size=seqlen), min_size=batch, max_size=batch)
    )


@given(masks(), st.sampled_from(MASK_DTYPES), st.lists(st.integers(1, 3), max_size=2))
def test_unpadded_tokens_are_those_of_the_mask_in_order(mask, dtype, rest):
    hidden = numbered(len(mask), len(mask[0]), *rest)
    packed, indices, cu_seqlens, longest, seqused = unpad_input(hidden, torch.tensor(mask, dtype=dtype))
    places = [(b, s) for b, row in enumerate(mask) for s, valid in enumerate(row) if valid]
    lengths = [sum(row) for row in mask]
    assert packed.shape == (len(places), *rest)
    assert all(torch.equal(token, hidden[place]) for token, place in zip(packed, places, strict=True))
    assert indices.tolist() == [b * len(mask[0]) + s for b, s in places] and indices.dtype == torch.int64
    assert cu_seqlens.diff().tolist() == seqused.tolist() == lengths and cu_seqlens[0] == 0
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert longest == max(lengths) and type(longest) is int


@given(masks())
def test_padding_inverts_unpadding(mask):
    valid = torch.tensor(mask)
    hidden = numbered(*valid.shape, 2)
    packed, indices, *_ = unpad_input(hidden, valid)
    assert torch.equal(pad_input(packed, indices, *valid.shape), hidden * valid[..., None])


@given(masks(), st.data())
def test_unused_tokens_are_stored_but_not_counted_as_used(mask, data):
    attended = torch.tensor(mask)
    flags = st.lists(st.booleans(), min_size=attended.numel(), max_size=attended.numel())
    unused = torch.tensor(data.draw(flags)).reshape(attended.shape) & ~attended
    hidden = numbered(*attended.shape)
    *stored, seqused = unpad_input(hidden, attended, unused.long())
    *expected, _ = unpad_input(hidden, attended | unused)
    for got, want in zip(stored, expected, strict=True):
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want
    assert torch.equal(seqused, attended.sum(1, dtype=torch.int32))


def test_a_token_in_both_masks_is_stored_once():
    mask = torch.tensor([[1, 1, 0]])
    packed, _, cu_seqlens, longest, seqused = unpad_input(numbered(1, 3), mask, mask)
    assert (packed.tolist(), cu_seqlens.tolist(), longest, seqused.tolist()) == ([1.0, 2.0], [0, 2], 2, [2])


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 2)])
def test_nothing_to_unpad(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    packed, indices, cu_seqlens, longest, _ = unpad_input(torch.ones(shape), mask)
    assert packed.shape == (0, 2) and longest == 0 and cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert torch.equal(pad_input(packed, indices, *shape[:2]), torch.zeros(shape))


def test_packing_keeps_dtype_and_reads_no_padding(poison: Callable[..., torch.Tensor]) -> None:
    hidden = poison(2, 3, 4, dtype=torch.bfloat16)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    hidden[mask.bool()] = 2.0
    packed, indices, *_ = unpad_input(hidden, mask)
    padded = pad_input(packed, indices, 2, 3)
    assert packed.dtype == padded.dtype == torch.bfloat16
    assert torch.equal(padded, 2 * mask[..., None].expand(2, 3, 4).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_concatenated_sequences_of_a_row_become_sequences(dtype: torch.dtype) -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]], dtype=dtype)
    hidden = numbered(3, 6, 2)
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(hidden, lengths)
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert torch.equal(packed, hidden.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32
    assert longest == 6 and type(longest) is int


@given(st.lists(st.lists(st.integers(1, 3), max_size=2), min_size=1, max_size=4))
def test_concatenated_lengths_are_kept(rows):
    table = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(
        numbered(len(rows), 6), table
    )
    lengths = [length for row in rows for length in row]
    assert cu_seqlens.diff().tolist() == lengths and longest == max(lengths, default=0)
    valid = torch.arange(6) < table.sum(1, keepdim=True)
    assert torch.equal(pad_input(packed, indices, len(rows), 6), numbered(len(rows), 6) * valid)


def test_one_sequence_per_row_is_ordinary_unpadding():
    lengths = torch.tensor([[4, 0, 0, 0, 0], [0, 0, 0, 0, 0], [2, 0, 0, 0, 0]])
    hidden = numbered(3, 5)
    packed, indices, _, longest = unpad_input_for_concatenated_sequences(hidden, lengths)
    ordinary = unpad_input(hidden, torch.arange(5) < lengths[:, :1])
    assert torch.equal(packed, ordinary[0]) and torch.equal(indices, ordinary[1]) and longest == ordinary[3]


def test_gradients():
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    lengths = torch.tensor([[2, 0, 0], [1, 1, 0]])
    hidden = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([5, 0, 3, 1])
    repeated = torch.tensor([3, 0, 3])
    check = torch.autograd.gradcheck
    assert check(lambda x: unpad_input(x, mask)[0], hidden)
    assert check(lambda x: unpad_input_for_concatenated_sequences(x, lengths)[0], hidden)
    assert check(lambda x: pad_input(x, places, 2, 3), rows)
    assert check(lambda x: index_put_first_axis(x, places.int(), 7), rows)
    assert check(lambda x: index_first_axis(x, repeated), rows)
    assert check(lambda x: index_first_axis_residual(x, repeated.int()), rows)


def test_residual_is_the_tensor_itself_and_carries_its_gradient():
    x = torch.randn(4, 2, requires_grad=True)
    taken, residual = index_first_axis_residual(x, torch.tensor([2]))
    assert torch.equal(taken, x[2:3]) and residual.data_ptr() == x.data_ptr()
    (taken.sum() + 3 * residual.sum()).backward()
    assert x.grad.tolist() == [[3, 3], [3, 3], [4, 4], [3, 3]]


@pytest.mark.parametrize("name", ["rearrange", "repeat"])
def test_einops_names_pass_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    einops = types.ModuleType("einops")
    setattr(einops, name, function := object())
    monkeypatch.setitem(sys.modules, "einops", einops)
    assert getattr(bert_padding, name) is function
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError, match=rf"{name}: expected einops.*pip install einops"):
        getattr(bert_padding, name)


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'reduce'"):
        bert_padding.reduce  # noqa: B018
    assert all(hasattr(bert_padding, name) for name in bert_padding.__all__)


def test_import_does_not_need_einops():
    code = (
        "import sys; sys.modules['einops'] = None\n"
        "from magi_attention.api.bert_padding import pad_input, unpad_input"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


HIDDEN = torch.zeros(2, 3, 4)
MASK = torch.ones(2, 3, dtype=torch.int64)
INDICES = torch.tensor([0, 4])
ROWS = torch.zeros(2, 4)

BAD: dict[str, tuple[Callable, tuple, type[Exception], str]] = {
    "hidden_list": (unpad_input, ([[1.0]], MASK), TypeError, "hidden_states: expected Tensor, got list"),
    "hidden_flat": (
        unpad_input,
        (torch.zeros(6), MASK),
        ValueError,
        r"hidden_states shape: expected \(batch, seqlen, \.\.\.\), got \(6,\)",
    ),
    "mask_none": (unpad_input, (HIDDEN, None), TypeError, "attention_mask: expected Tensor, got NoneType"),
    "mask_shape": (
        unpad_input,
        (HIDDEN, MASK.T),
        ValueError,
        r"attention_mask shape: expected \(2, 3\), got \(3, 2\)\. The mask has",
    ),
    "mask_float": (
        unpad_input,
        (HIDDEN, MASK.float()),
        TypeError,
        "attention_mask dtype: .*got torch.float32",
    ),
    "mask_elsewhere": (
        unpad_input,
        (HIDDEN, MASK.to("meta")),
        ValueError,
        "attention_mask device: expected cpu, got meta",
    ),
    "unused_shape": (unpad_input, (HIDDEN, MASK, MASK[:1]), ValueError, r"unused_mask shape: .*got \(1, 3\)"),
    "lengths_bool": (
        unpad_input_for_concatenated_sequences,
        (HIDDEN, MASK.bool()),
        TypeError,
        "attention_mask_in_length dtype: .*got torch.bool",
    ),
    "lengths_too_long": (
        unpad_input_for_concatenated_sequences,
        (HIDDEN, torch.tensor([[1, 0, 0], [2, 2, 0]])),
        ValueError,
        "attention_mask_in_length: expected rows that add up to at most the 3 .*got 4. Give",
    ),
    "lengths_negative": (
        unpad_input_for_concatenated_sequences,
        (HIDDEN, torch.tensor([[3, -1, 0], [2, 0, 0]])),
        ValueError,
        "attention_mask_in_length: expected lengths of at least 0, got -1",
    ),
    "pad_too_many_tokens": (
        pad_input,
        (ROWS, torch.arange(3), 2, 3),
        ValueError,
        r"indices shape: expected \(2\), got \(3,\)",
    ),
    "pad_beyond_the_end": (
        pad_input,
        (ROWS, INDICES, 2, 2),
        ValueError,
        r"indices: expected integers in \[0, 4\), got 4",
    ),
    "pad_batch_float": (
        pad_input,
        (ROWS, INDICES, 2.0, 3),
        TypeError,
        "batch: expected an integer, got float",
    ),
    "pad_seqlen_negative": (pad_input, (ROWS, INDICES, 2, -3), ValueError, "seqlen: .*at least 0, got -3"),
    "pad_scalar": (
        pad_input,
        (torch.tensor(1.0), INDICES, 2, 3),
        ValueError,
        r"hidden_states shape: expected at least one axis, got \(\)",
    ),
    "take_bool": (
        index_first_axis,
        (ROWS, torch.tensor([True, False])),
        TypeError,
        "indices dtype: .*got torch.bool",
    ),
    "take_two_axes": (index_first_axis, (ROWS, MASK), ValueError, r"indices shape: .*got \(2, 3\)"),
    "take_negative": (
        index_first_axis,
        (ROWS, torch.tensor([-1])),
        ValueError,
        r"indices: expected integers in \[0, 2\), got -1",
    ),
    "take_beyond_the_end": (index_first_axis_residual, (ROWS, INDICES), ValueError, r"in \[0, 2\), got 4"),
    "put_dim_none": (
        index_put_first_axis,
        (ROWS, INDICES, None),
        TypeError,
        "first_axis_dim: expected an integer, got NoneType",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name: str) -> None:
    function, arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        function(*arguments)
