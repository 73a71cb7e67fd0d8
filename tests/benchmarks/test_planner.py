"""The simulation of plans: its packs, its figures, what it refuses, its table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import planner, tables
from magi_attention.dist.exchange import Exchange, Share
from magi_attention.mask import Mask


def test_packs_are_full_of_documents_no_longer_than_a_quarter():
    found = planner.packs(65536, 3, seed=1)
    for cuts in found:
        lengths = np.diff(cuts)
        assert (cuts[0], cuts[-1]) == (0, 65536) and lengths.min() > 0 and lengths.max() <= 16384
    assert not np.array_equal(found[0], found[1])
    assert all(np.array_equal(*both) for both in zip(found, planner.packs(65536, 3, seed=1), strict=True))


def test_a_run_has_a_line_for_every_algorithm_and_fills_the_page(tmp_path):
    path, page = tmp_path / "planner.json", tmp_path / "page.md"
    assert planner.main(["--ranks", "8", "16", "--packs", "1", "--repeats", "1", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    lines = {(line["ranks"], line["algorithm"]): line for line in document["placements"]}
    assert lines.keys() == {(ranks, name) for ranks in (8, 16) for name in planner.algorithms(ranks)}
    ours, heap = lines[8, "balanced"], lines[8, "min-heap"]
    assert ours["received_mean"] < heap["received_mean"] and ours["between_nodes_mean"] == 0
    for line in lines.values():
        assert line["within_node_mean"] + line["between_nodes_mean"] == pytest.approx(line["received_mean"])
        assert line["between_nodes_once_mean"] <= line["between_nodes_mean"]
    assert {target["name"].split(":")[0] for target in document["targets"]} >= {
        "8 ranks, balanced, received_most"
    }
    page.write_text("<!-- table planner -->\n<!-- end planner -->\n")
    tables.main([str(page), str(path)])
    assert "| 16 | 131072 | balanced, nodes first |" in page.read_text()


@pytest.mark.parametrize("spoiled", ["bands", "send"])
def test_a_wrong_plan_is_refused(spoiled, monkeypatch):
    mask = Mask.causal(4096)
    rows = [np.array([[1024 * rank, 1024 * rank + 1024]]) for rank in range(4)]
    exchange = Exchange(mask.bands, rows, rows)
    planner.check(exchange, rows, seed=0)
    right = Exchange.share

    def wrong(self: Exchange, rank: int) -> Share:
        share = right(self, rank)
        if spoiled == "bands":
            return replace(share, bands=share.bands[:0])
        stages = tuple(replace(stage, send=tuple(part // 2 for part in stage.send)) for stage in share.stages)
        return replace(share, stages=stages)

    monkeypatch.setattr(Exchange, "share", wrong)
    with pytest.raises(RuntimeError, match="WRONG"):
        planner.check(exchange, rows, seed=0)
