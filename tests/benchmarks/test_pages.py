"""Pictures and tables from result files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report, tables

ROOT = Path(__file__).resolve().parents[2]

WHERE = {
    "device": "a GPU",
    "torch": "2",
    "triton": None,
    "cuda_driver": "5",
    "commit": "c0ffee",
    "date": "2026-01-01T00",
}


@pytest.fixture
def results(tmp_path):
    """A result file with two masks, ours and a peer, and one row without a figure."""
    book = report.Report(WHERE, {}, tmp_path / "some.json")
    for mask in ("full", "causal"):
        for direction in ("forward", "backward"):
            for subject, seconds in (("mine", 1e-3), ("peer", 1.5e-3)):
                row = report.Row(mask, 4096, 32, 8, 128, "bf16", direction, subject, subject == "mine", 1000)
                row.fill({"seconds": seconds, "seconds_q1": seconds, "seconds_q3": seconds, "rounds": 1})
                row.timed = "graph replay, 4 calls"
                book.rows.append(row)
    book.rows.append(
        report.Row(
            "full", 4096, 32, 8, 128, "bf16", "forward", "lost", False, 1000, status="failed", reason="no"
        )
    )
    book.add_target("mine / peer", 1.5, 2.0)
    return tmp_path / "some.json"


def test_page_has_rows_ratios_and_missed_targets_between_its_marks(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n<!-- table some -->\nold\n<!-- end some -->\nafter\n<!-- table other -->\nkept\n<!-- end other -->\n"
    )
    for _ in range(2):  # filling twice is filling once
        tables.main([str(page), str(results)])
    text = page.read_text()
    assert "old" not in text and "kept" in text and text.rstrip().endswith("<!-- end other -->")
    assert "| full | 4096 | 32/8 d128 | forward |" in text and "| 1.50 |" in text and "FAILED" in text
    assert "| mine / peer | 1.500 | 2.00 | no |" in text
    assert text.count("geometric mean forward, mine / peer: 1.500") == 1


def test_a_page_without_the_marks_is_refused(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="<!-- table some -->"):
        tables.main([str(page), str(results)])
    assert page.read_text() == "nothing"


def test_the_page_on_performance_has_marks_for_every_profile():
    page = (ROOT / "docs" / "performance.md").read_text()
    hopper = [f"hopper-{name}" for name in ("dense", "masks", "docs", "features", "launch")]
    for profile in (*hopper, "flash-attn", "decode", "planner"):
        assert tables.fill(page, {profile: "x"})


def test_pictures_have_a_bar_for_every_figure(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    rows = json.loads(results.read_text())["rows"]
    assert {key: len(found) for key, found in plot.figures_of(rows).items()} == {"32-8_d128": 8}
    written = plot.plot_file(results, tmp_path / "figures")
    assert [path.name for path in written] == ["some_32-8_d128.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
