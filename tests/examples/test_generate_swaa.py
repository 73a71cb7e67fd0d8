"""The SWAA example checks itself, drops keys, says when something is wrong, and refuses wrong arguments in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = [
    "--device",
    "cpu",
    "--layers",
    "2",
    "--prompt",
    "96",
    "--new-tokens",
    "6",
    "--window",
    "16",
    "--keep-first",
    "4",
]
MARKS = ["full", "w16", "w16-k4", "w16-k4-fd", "w16-k4-full[0]"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("examples_generate_swaa", EXAMPLES / "generate_swaa.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("report", None)


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate_swaa.py", *TINY, *options])
    return example.main()


def test_table_has_every_recipe_and_keys_are_dropped(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    file = tmp_path / "table.json"
    assert run(example, monkeypatch, "--json", str(file)) == 0
    summary, text = json.loads(file.read_text()), capsys.readouterr().out
    rows = {row["recipe"]: row for row in summary["rows"]}
    assert list(rows) == MARKS
    assert all(mark in text for mark in MARKS)
    assert text.count("fine") == 4
    assert "TOO MUCH" not in text
    per_key = 2 * 2 * 64 * 4  # keys and values, two heads of 64, fp32
    stored = {mark: row["bytes"] / per_key for mark, row in rows.items()}
    everything = 96 + 6
    assert stored == dict(
        zip(MARKS, [2 * everything, 2 * 15, 2 * 19, 2 * everything, everything + 19], strict=True)
    )
    assert rows["full"]["logits_error"] == 0
    assert rows["w16"]["logits_error"] > 0.01


def test_a_wrong_result_is_an_exit_code(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def one_key_less(model: Any, recipe: Any) -> None:
        window = recipe.sliding_window_size
        enable(model, type(recipe)(**{**recipe.dict(), "sliding_window_size": window and window - 1}))

    enable = example.enable_swaa
    monkeypatch.setattr(example, "enable_swaa", one_key_less)
    assert run(example, monkeypatch) == 1
    assert capsys.readouterr().out.count("TOO MUCH") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "0"], "--window: expected at least 1, got 0"),
        (["--keep-first", "-1"], "--keep-first: expected at least 0, got -1"),
        (["--new-tokens", "1"], "--new-tokens: expected at least 2, got 1"),
        (["--device", "abacus"], "--device: "),
        (["--speed", "9"], "--speed"),
    ],
)
def test_wrong_argument_is_refused_in_one_line(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(example, monkeypatch, *options)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.gpu
def test_runs_on_a_gpu(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available()
    assert run(example, monkeypatch, "--device", "cuda") == 0
