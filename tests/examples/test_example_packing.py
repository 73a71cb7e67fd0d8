"""Packing keeps documents apart and predictable, and the loss curve shows every step."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from magi_attention.kernels.reference.dense import multiplicity

LENGTHS = [7, 1, 12, 4]


def load(name: str) -> ModuleType:
    """A file of the examples as a module that no other test can mistake for its own."""
    file = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # The dataclass decorator looks its module up by name.
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packing() -> ModuleType:
    return load("packing")


@pytest.fixture
def packed(packing: ModuleType):
    rng = np.random.default_rng(0)
    return packing.pack([np.append(packing.END, rng.integers(0, 256, n - 1)) for n in LENGTHS])


def test_every_position_predicts_the_next_token_of_its_document(packing: ModuleType, packed) -> None:
    for begin, end in zip(packed.cu_seqlens, packed.cu_seqlens[1:], strict=False):
        assert packed.inputs[begin] == packing.END
        assert packed.targets[end - 1] == packing.END
        assert packed.targets[begin : end - 1].tolist() == packed.inputs[begin + 1 : end].tolist()
        assert packed.positions[begin:end].tolist() == list(range(end - begin))


def test_long_documents_become_their_definitions(packing: ModuleType) -> None:
    text = b"import os\n\n\ndef f():\n    pass\n\n\n" + b"x" * 50
    assert packing.cut(text, 1000) == [text]
    assert packing.cut(text, 30) == [b"import os", b"def f():\n    pass", b"x" * 30]
    assert packing.cut(b"", 30) == []


def test_steps_are_full_and_use_every_document_before_repeating_one(packing: ModuleType) -> None:
    documents = [bytes([i]) * 5 for i in range(8)]
    steps = packing.packed_steps(documents, 24, np.random.default_rng(1))
    first, second = next(steps), next(steps)
    assert len(first.inputs) == len(second.inputs) == 24
    assert first.num_documents == second.num_documents == 4
    seen = np.concatenate([first.inputs, second.inputs])
    assert sorted(set(seen.tolist())) == [*range(8), packing.END]


def test_blanks_ask_for_hidden_bytes_only(packing: ModuleType, packed) -> None:
    blanked = packing.with_blanks(packed, 0.5, np.random.default_rng(2))
    asked = blanked.targets != packing.IGNORED
    assert asked[1]
    assert (blanked.inputs[asked] == packing.BLANK).all()
    assert (blanked.targets[asked] == packed.inputs[asked]).all()
    assert (blanked.inputs[~asked] == packed.inputs[~asked]).all()
    assert (blanked.targets[asked] != packing.END).all()


@pytest.mark.parametrize("kind", ["varlen", "window", "block-causal"])
def test_mask_shows_what_its_name_says_and_no_other_document(packing: ModuleType, packed, kind: str) -> None:
    window, keep_first, block = 3, 2, 4
    mask = packing.mask_for(kind, packed, window, keep_first, block)
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    at = packed.positions
    row, col = at[:, None], at[None, :]
    inside = {
        "varlen": col <= row,
        "window": (col <= row) & ((row - col <= window) | (col < keep_first)),
        "block-causal": col // block <= row // block,
    }[kind]
    expected = inside & (document[:, None] == document[None, :])
    assert multiplicity(mask.table, len(at), len(at)).tolist() == expected.astype(int).tolist()


def test_loss_curve_lies_inside_its_axes() -> None:
    pytest.importorskip("matplotlib")
    losses = np.linspace(4, 1, 30)
    axes = load("report").loss_figure(losses).axes[0]
    lowest, highest = axes.get_ylim()
    assert lowest == 0
    assert highest > losses.max() / np.log(2)
    assert len(axes.lines[0].get_ydata()) == 30
