"""The profile of decoding: what it measures, what it refuses, its targets and its table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import caches, decode, report, run, tables
from benchmarks.caches import Caches, Shape, Truth, Work

GIB = 1 << 30
CPU = torch.device("cpu")
SHAPE = Shape(3, 4, 2, 64, copies=2, head_dim=32)
WORKS = {
    "plain": Work(),
    "pages": Work(page=16),
    "queries": Work(queries=4),
    "append": Work(append=True),
    "append to pages": Work(page=16, append=True),
    "window": Work(window=8),
    "first keys": Work(window=8, keep_first=3),
}


def judged(work, dtype=torch.bfloat16, shape=SHAPE, spoil=lambda step, out: out):
    step = Caches(shape, dtype, CPU).steps(work)[-1]
    truth = Truth(step)
    return truth.judge(spoil(step, step.call()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_our_calls_pass_the_check(work, dtype):
    shape = replace(SHAPE, spots=2) if work.window else SHAPE
    verdict = judged(work, dtype, shape)
    assert verdict.ok, verdict.reason
    assert ("new key" in verdict.figures) == work.append


def test_ragged_lengths_pass_and_the_extremes_are_sampled():
    shape = replace(SHAPE, batch=9, ragged=True)
    step = Caches(shape, torch.bfloat16, CPU).steps(Work())[0]
    extremes = {step.lengths.index(end(step.lengths)) for end in (min, max)}
    assert {0, 8, *extremes} == set(step.sampled())
    assert len(set(step.lengths)) > 3 and min(step.lengths) >= 4 and max(step.lengths) <= 64
    assert Truth(step).judge(step.call()).ok


@pytest.mark.parametrize(
    ("work", "spoil"),
    [
        (Work(), lambda step, out: out * 1.05),
        (Work(), lambda step, out: out.index_fill(0, torch.tensor([2]), torch.nan)),
        (Work(), lambda step, out: replace(step, used=step.used - 1).call()),
        (Work(page=16), lambda step, out: replace(step, table=step.table.flip(0)).call()),
        (Work(queries=4), lambda step, out: out.flip(1)),
        (Work(window=8), lambda step, out: replace(step, work=Work(window=7)).call()),
        (Work(window=8, keep_first=3), lambda step, out: replace(step, work=Work(window=8)).call()),
        (Work(append=True), lambda step, out: replace(step, new=None, used=step.used + 1).call()),
    ],
    ids=["scale", "nan", "length", "table", "diagonal", "window", "first keys", "append"],
)
def test_a_spoiled_result_is_refused(work, spoil):
    assert "out" in judged(work, spoil=spoil).reason


def test_a_spoiled_cache_is_refused():
    def not_written(step, out):
        step.k_cache[:, -1] = 0.0
        return out

    def written_elsewhere(step, out):
        step.v_cache[2, 5, 0, 0] += 1.0
        return out

    def not_turned(step, out):
        step.k_cache[:, -1] = step.new.k[:, 0]
        return out

    for spoil, what in ((not_written, "new key"), (not_turned, "new key"), (written_elsewhere, "cache")):
        verdict = judged(Work(append=True), spoil=spoil)
        assert [name for name, e in verdict.figures.items() if e["error"] > e["bound"]] == [what]


def test_calls_go_round_a_gib_of_visible_keys_and_all_fits_in_13_gib():
    for group in decode.GROUPS:
        shape, works = group.shape, [work for work, _ in group.works]
        for work in works:
            row = decode.row_of(shape, work, "bf16")
            assert row.bytes_read * shape.copies * shape.spots >= 0.99 * GIB
        layouts = 1 + any(work.page for work in works)
        peers = 0 if shape.ragged else decode.row_of(shape, works[0], "bf16").bytes_read * shape.spots
        assert shape.copies * (layouts * shape.cache_bytes + peers) <= 13 * GIB


def test_windows_of_a_cache_do_not_overlap():
    group = next(group for group in decode.GROUPS if group.shape.spots > 1)
    lengths = [group.shape.lengths(spot, 2048)[0] for spot in range(group.shape.spots)]
    assert lengths == [131072 - 2048 * n for n in range(8)]


def test_bytes_are_keys_and_values_that_are_seen():
    plain = decode.row_of(Shape(2, 4, 2, 100, copies=1), Work(), "bf16")
    assert plain.bytes_read == 2 * 2 * 100 * 2 * 128 * 2
    window = decode.row_of(Shape(2, 4, 2, 100, copies=1, spots=2), Work(window=8, keep_first=3), "bf16")
    assert window.bytes_read == 2 * 2 * 11 * 2 * 128 * 2
    shape = Shape(5, 4, 2, 100, copies=1, ragged=True)
    assert decode.row_of(shape, Work(), "bf16").bytes_read == 2 * sum(shape.lengths(0, 0)) * 2 * 128 * 2


@pytest.fixture
def dry(monkeypatch, tmp_path):
    """Run the profile with short groups on the CPU; returns the exit code and the JSON document."""

    def go():
        groups = [
            replace(g, shape=replace(g.shape, batch=min(g.shape.batch, 3), copies=2)) for g in decode.GROUPS
        ]
        monkeypatch.setattr(decode, "GROUPS", groups)
        path = tmp_path / "decode.json"
        settings = [
            "--device",
            "cpu",
            "--dtype",
            "bf16",
            "--rounds",
            "2",
            "--shrink",
            "256",
            "--subjects",
            "sdpa",
        ]
        code = run.main(["--profile", "decode", *settings, "--json", str(path)])
        return code, json.loads(path.read_text())

    return go


def test_profile_runs_dry_on_a_cpu(dry, tmp_path):
    code, document = dry()
    assert code == 0
    rows = document["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert all("out" in row["check"] and row["gbps"] > 0 and row["rounds"] == 2 for row in rows)
    assert len([row for row in rows if row["ours"]]) == 12 and len([r for r in rows if not r["ours"]]) == 5
    assert len(document["ratios"]) == 8
    assert len(document["targets"]) == 13
    page = tmp_path / "page.md"
    page.write_text("<!-- table decode -->\n<!-- end decode -->\n")
    tables.main([str(page), str(tmp_path / "decode.json")])
    text = page.read_text()
    assert "| work | subject | keys | shape | us | GB/s | speed/sdpa |" in text
    assert "| one query, window 8, first 10 | kvcache | 512 | 3 x 32/8 d128 |" in text


def test_a_wrong_result_has_no_figure_and_fails_the_run(dry, monkeypatch):
    right = caches.flash_attn_with_kvcache

    def spoiled(q, *args, **settings):
        return right(q, *args, **settings) * (0.9 if q.shape[1] == 4 else 1.0)

    monkeypatch.setattr(caches, "flash_attn_with_kvcache", spoiled)
    code, document = dry()
    assert code == 1
    (wrong,) = [row for row in document["rows"] if row["status"] != "ok"]
    assert wrong["mask"] == "4 queries" and wrong["status"] == "wrong" and "out" in wrong["reason"]
    assert wrong["seconds"] is None and wrong["gbps"] is None
    assert not any("4 queries" in entry["name"] for entry in document["targets"])


def test_a_call_that_raises_fails_the_run_with_its_reason(dry, monkeypatch):
    def broken(*args, **settings):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(caches, "flash_attn_with_kvcache", broken)
    code, document = dry()
    assert code == 1
    ours = [row for row in document["rows"] if row["ours"]]
    assert all(row["status"] == "failed" and "no such kernel" in row["reason"] for row in ours)
    assert all(row["status"] == "ok" for row in document["rows"] if not row["ours"])


def timed(group, microseconds):
    """Rows of a group and of a peer, of which the works take ``microseconds`` in turn and the peer 100."""
    rows = [decode.row_of(group.shape, work, "bf16") for work, _ in group.works]
    rows.append(replace(rows[0], subject="peer", ours=False))
    for row, each in zip(rows, [*microseconds, 100.0], strict=True):
        if each:
            seconds = each * 1e-6
            row.fill({"seconds": seconds, "seconds_q1": seconds, "seconds_q3": seconds, "rounds": 1})
    return rows


def aims(microseconds):
    shape = Shape(1, 32, 8, 4096, copies=1)
    works = [
        (Work(), decode.Aim(microseconds=80.0, gbps=200.0, gain=1.0)),
        (Work(queries=4), decode.Aim(factor=1.05)),
        (Work(append=True), decode.Aim(more=3.0)),
    ]
    group, book = decode.Group(shape, tuple(works)), report.Report({}, {})
    decode.add_targets(book, group, timed(group, microseconds))
    return {entry["name"].split(": ", 1)[1]: (entry["value"], entry["met"]) for entry in book.targets}


def test_targets():
    found = aims([80.0, 83.0, 82.5])
    assert found["80 us / measured"] == (pytest.approx(1.0), True)
    assert found["GB/s"] == (pytest.approx(4096 * 8 * 128 * 4 / 80e3), True)
    assert found["speed / peer"] == (pytest.approx(1.25), True)
    assert found["time of one query / measured"] == (pytest.approx(80 / 83), True)
    assert found["time of one query + 3 us / measured"] == (pytest.approx(83 / 82.5), True)
    assert not any(met for _, met in aims([101.0, 107.0, 105.0]).values())


def test_targets_of_works_without_figures_are_left_out():
    assert aims([None, 80.0, 80.0]) == {}
    assert len(aims([80.0, None, 80.0])) == 4


def test_a_row_without_a_figure_says_so_in_the_table():
    rows = timed(decode.Group(SHAPE, ((Work(), decode.Aim()), (Work(page=16), decode.Aim()))), [50.0, None])
    rows[1].status, rows[1].reason = "failed", "no"
    rows[0].timed = "graph replay, 16 calls"
    assert "50.00 us" in rows[0].line() and "GB/s" in rows[0].line() and "graph replay" in rows[0].line()
    header, lines = report.table_cells(rows)
    assert header == ["work", "subject", "keys", "shape", "us", "GB/s", "speed/peer"]
    assert [line[4:] for line in lines] == [
        ["50.0", f"{rows[0].gbps:.0f}", "2.00"],
        ["FAILED", "–", "–"],
        ["100.0", f"{rows[2].gbps:.0f}", "–"],
    ]
