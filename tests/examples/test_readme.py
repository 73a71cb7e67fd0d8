"""The README's Python runs as printed, and the files it points to exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from magi_attention import dropin

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS[:2], ids=("native", "ranges"))
def test_example_runs(block: str) -> None:
    names: dict = {}
    exec(block, names)
    assert names["out"].shape == names["q"].shape
    assert names["meta"].lse.shape == names["q"].shape[:2]


def test_example_in_place_of_flash_attention_runs() -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    names: dict = {}
    try:
        exec(BLOCKS[2], names)
    finally:
        dropin.uninstall()
    assert names["q"].grad.abs().sum() > 0


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_builders_named_in_the_readme_exist() -> None:
    from magi_attention import Mask

    named = set(re.findall(r"`Mask\.(\w+)\(", TEXT))
    assert len(named) > 8
    assert [name for name in named if not callable(getattr(Mask, name, None))] == []
