"""The Python of the documentation runs, and prints what the page shows below it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
from pathlib import Path

import pytest

from magi_attention import config
from magi_attention.api import flex_flash_attn_func, magi_attn_interface

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("context_parallel.md", "flex_flash_attention.md", "masks.md", "numerics.md", "swaa.md")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", flags=re.DOTALL)
EXAMPLES = [(page, *found) for page in PAGES for found in BLOCK.findall((DOCS / page).read_text())]


@pytest.mark.parametrize(
    ("page", "code", "output"), EXAMPLES, ids=[f"{page}-{n}" for n, (page, *_) in enumerate(EXAMPLES)]
)
def test_example_prints_what_the_page_shows(page: str, code: str, output: str) -> None:
    if page == "swaa.md":
        pytest.importorskip("transformers")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    if output:
        assert printed.getvalue().strip() == output.strip()


def test_the_page_names_every_argument() -> None:
    text = (DOCS / "flex_flash_attention.md").read_text()
    assert [
        name for name in inspect.signature(flex_flash_attn_func).parameters if f"`{name}`" not in text
    ] == []


def test_the_page_of_context_parallelism_names_all_there_is() -> None:
    text = (DOCS / "context_parallel.md").read_text()
    algorithms = [
        name for name in config.__all__ if name.endswith("Alg") and name not in ("DispatchAlg", "OverlapAlg")
    ]
    settings = [field.name for field in dataclasses.fields(config.OverlapConfig)]
    functions = [name for name in magi_attn_interface.__all__ if name != "roll_simple"]
    assert [name for name in algorithms + settings + functions if not re.search(rf"\b{name}\b", text)] == []
