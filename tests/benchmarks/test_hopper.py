"""The profiles of the Hopper kernels: what they measure, their bounds and their targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import (
    ahead,
    features,
    hopper,
    launch,
    masks,
    opinion,
    peers,
    report,
    run,
    targets,
    yardsticks,
)
from magi_attention.kernels.reference.dense import multiplicity
from magi_attention.mask import Mask
from magi_attention.testing import compare, random_case

CPU = ["--device", "cpu", "--dtype", "fp32", "--rounds", "1", "--limit-seconds", "0.1"]


def configurations(profile):
    return hopper.configurations(profile, hopper.PROFILES[profile], 1, 1.0, "bf16")


def test_dense_profile_is_the_grid_of_the_yardsticks_with_16k_tokens_in_all():
    configs = configurations("hopper-dense")
    cells = {(c.mask, c.tokens, c.heads, c.kv_heads, c.head_dim) for c in configs}
    assert cells == set(yardsticks.load()["dense"].cells)
    assert {c.tokens * c.batch for c in configs} == {16384}


def test_mask_profile_is_the_grid_of_the_yardsticks():
    cells = {(c.mask, c.tokens, c.heads, c.kv_heads, c.head_dim) for c in configurations("hopper-masks")}
    assert cells == set(yardsticks.load()["masks"].cells)


def test_short_documents_have_100_to_500_tokens_but_for_the_last():
    cuts = masks.short_boundaries(16384)
    lengths = np.diff(cuts)
    assert cuts[-1] == 16384 and lengths[:-1].min() >= 100 and lengths.max() <= 500 and lengths[-1] > 0


def test_short_documents_agree_with_their_mask_function():
    work = masks.workload("short_documents", 1200)
    rows, cols = torch.arange(1200)[:, None], torch.arange(1200)[None, :]
    seen = work.mask_mod(torch.device("cpu"))(None, None, rows, cols)
    assert torch.equal(seen, multiplicity(work.mask.table, 1200, 1200).bool())


# Tiles are 16 x 16. Of the two bands one has rows 0..7 and the other rows 0..6: tiles are cut at rows 7 and 8.
@pytest.mark.parametrize(
    ("mask", "blocks"),
    [
        (Mask.full(64, 64), 16),
        (Mask.full(65, 64), 20),
        (Mask.causal(64), 10),
        (Mask.varlen([0, 20, 64]), 2 * 2 + 3 * 3),
        (Mask([[0, 16, 0, 8, 0, 0], [0, 16, 0, 8, 1, 1]], 16, 16), 2 + 1),
    ],
    ids=["whole tiles", "one row more", "causal", "documents", "two bands"],
)
def test_rounded_area_counts_whole_tiles(mask, blocks):
    assert hopper.rounded_area(mask.bands, mask.num_rows, 16, 16) == blocks * 16 * 16


def test_bound_of_the_documents_is_the_dense_rate_times_what_rounding_leaves():
    book = report.Report({}, {})
    for mask, seconds in (("full", 1.0), ("short_documents", 0.02)):
        area = masks.workload(mask, 1024).area
        for direction in ("forward", "backward"):
            row = report.Row(mask, 1024, 32, 8, 128, "bf16", direction, "mine", True, area)
            row.fill({"seconds": seconds, "seconds_q1": seconds, "seconds_q3": seconds, "rounds": 1})
            book.rows.append(row)
    shares = hopper.document_bounds(book, "mine", {"forward": (64, 128), "backward": (128, 64)})
    work = masks.workload("short_documents", 1024)
    rounded = hopper.rounded_area(work.mask.bands, 1024, 64, 128)
    assert shares["forward"] == pytest.approx((rounded / 0.02) / (1024 * 1024 / 1.0))
    assert book.costs["bound of short_documents forward"]["tile"] == [64, 128]
    assert 0 < shares["backward"] != shares["forward"]


def test_yardstick_ratios_are_those_of_the_measured_speeds():
    dense, by_mask = yardsticks.load()["dense"], yardsticks.load()["masks"]
    cell = ("causal", 16384, 16, 16, 128)
    assert dense.best(cell, "forward", ("fa3",)) == pytest.approx(669 / 549, abs=1e-4)
    assert dense.best(cell, "backward", ("fa3", "fa4")) == pytest.approx(579 / 523, abs=1e-4)
    assert dense.best(("causal", 8192, 8, 8, 256), "backward") == 1.0
    cell = ("block_causal", 16384, 32, 8, 128)
    assert by_mask.best(cell, "forward", ("fa3",)) is None
    assert by_mask.best(cell, "forward", ("ffa", "fa3")) == pytest.approx(640 / 426, abs=1e-4)


def filled(cells, ours_seconds, peer):
    """A report in which the peer takes one second everywhere and ours what ``ours_seconds(cell, direction)`` says."""
    book = report.Report({}, {})
    for cell in cells:
        for direction in ("forward", "backward"):
            for subject, seconds in (("mine", ours_seconds(cell, direction)), (peer, 1.0)):
                row = report.Row(*cell, "bf16", direction, subject, subject == "mine", 100)
                row.fill({"seconds": seconds, "seconds_q1": seconds, "seconds_q3": seconds, "rounds": 1})
                book.rows.append(row)
    return book


def test_a_run_as_fast_as_the_best_peers_has_means_of_one():
    dense = yardsticks.load()["dense"]
    book = filled(dense.cells, lambda cell, d: 1 / dense.best(cell, d, ("fa3", "fa4")), "sdpa-cudnn")
    targets.dense_targets(book, "mine")
    found = {entry["name"]: entry for entry in book.targets}
    backward = found["dense d128 backward: mine / the best of fa3 and fa4, mean of 12 of 12 cells"]
    assert backward["value"] == pytest.approx(1.0) and not backward["met"] and backward["at_least"] == 1.08
    forward = found["dense d128 forward: mine / fa3, mean of 12 of 12 cells"]
    assert forward["value"] >= 1.0
    assert {entry["at_least"] for entry in book.targets} == {1.05, 1.08, 1.18, 1.26, 1.12, 1.15, 0.97}


def test_one_slow_cell_is_found():
    by_mask = yardsticks.load()["masks"]
    slow = ("swa_causal_1024", 65536, 32, 8, 128)
    book = filled(by_mask.cells, lambda cell, d: 1.0 if (cell, d) == (slow, "backward") else 0.4, "flex")
    targets.mask_targets(book, "mine")
    missed = [entry for entry in book.targets if not entry["met"]]
    assert len(missed) == 2
    assert all("swa_causal_1024 65536 32/8 d128 backward" in entry["name"] for entry in missed)
    assert missed[1]["value"] == pytest.approx(1.0)
    assert missed[0]["value"] == pytest.approx(259 / 391, abs=1e-3)


def test_cells_without_a_figure_are_counted_as_missing():
    dense = yardsticks.load()["dense"]
    cells = [cell for cell in dense.cells if cell[-1] != 128 or cell[1] == 2048]
    book = filled(cells, lambda cell, d: 0.5, "sdpa-cudnn")
    targets.dense_targets(book, "mine")
    assert any("mean of 4 of 12 cells" in entry["name"] for entry in book.targets)


@pytest.mark.parametrize("profile", list(hopper.PROFILES))
def test_profile_runs_dry_on_a_cpu(profile, tmp_path):
    path = tmp_path / "figures.json"
    limits = ["--masks", "causal", "short_documents", "full"]
    subjects = ["--subjects", "blockwise", "sdpa-boolmask"]
    shrink = "64" if profile == "hopper-dense" else "128"
    code = run.main(["--profile", profile, *CPU, *limits, *subjects, "--shrink", shrink, "--json", str(path)])
    document = json.loads(path.read_text())
    assert code == 0
    assert document["rows"] and {row["status"] for row in document["rows"]} == {"ok"}
    assert {row["timed"] for row in document["rows"]} == {"wall clock of one call"}
    if profile == "hopper-dense":
        assert {row["batch"] for row in document["rows"]} == {1, 2, 8}
    if profile == "hopper-docs":
        assert {"forward", "backward"} <= {name.split()[-1] for name in document["costs"]}


def test_a_batch_that_mixes_its_sequences_is_wrong(monkeypatch, tmp_path):
    def prepare(work, device):
        exact = peers.SUBJECTS["sdpa-boolmask"].prepare(work, device)
        return lambda q, k, v: exact(q, k.flip(0), v.flip(0))

    monkeypatch.setitem(peers.SUBJECTS, "mixed", peers.Subject("mixed", prepare, layout="bhtd", ours=True))
    path = tmp_path / "figures.json"
    sizes = ["--masks", "causal", "--tokens", "32", "256", "--shrink", "64"]
    code = run.main(["--profile", "hopper-dense", *CPU, *sizes, "--subjects", "mixed", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert code == 1
    assert {row["status"] for row in rows if row["batch"] > 1} == {"wrong"}
    assert {row["status"] for row in rows if row["batch"] == 1} == {"ok"}


def test_features_are_checked_and_set_against_the_plain_call(tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["--subjects", "blockwise", "--shrink", "256", "--dtype", "bf16", "--json", str(path)]
    code = run.main(["--profile", "hopper-features", *CPU, *arguments])
    document = json.loads(path.read_text())
    assert code == 0
    assert {row["status"] for row in document["rows"]} == {"ok"}
    names = {name.split(",")[0] for name in document["costs"]}
    assert {"softcap forward", "sink backward", "fp16 forward", "deterministic backward"} <= names
    assert "two parts forward" in names
    assert not {"deterministic forward", "two parts backward"} & names
    assert {row["dtype"] for row in document["rows"]} == {"bf16", "fp16"}


def test_a_wrong_feature_gets_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "disagreements", lambda *args, **kwargs: ["dq: far off"])
    book = report.Report({}, {"device": "cpu"})
    features.measure_features(book, "blockwise", "bf16", rounds=1, limit_seconds=0.1, shrink=512)
    rows = {row.subject: row for row in book.rows}
    assert (
        rows["blockwise deterministic"].status == "wrong" and rows["blockwise deterministic"].seconds is None
    )
    assert rows["blockwise softcap"].status == "ok"
    assert not any("deterministic" in name for name in book.costs)


def test_launch_profile_says_what_it_could_not_have(monkeypatch):
    monkeypatch.setattr(launch, "CALLS", 2)
    monkeypatch.setattr(launch, "REPEATS", 1)
    monkeypatch.setattr(launch, "cold_start_seconds", lambda name, device: {"warm cache": {}})
    book = report.Report({}, {})
    assert not launch.measure_launch(book, torch.device("cpu"), ["hopper", "sdpa-cudnn"])
    assert launch.measure_launch(book, torch.device("cpu"), ["blockwise", "sdpa-cudnn"])
    assert "runs on cuda only" in book.costs["host microseconds a call, hopper"]
    assert set(book.costs["host microseconds a call, blockwise"]) == {
        "forward without gradients",
        "forward",
        "backward",
    }


def test_disagreement_is_more_than_both_bounds(monkeypatch):
    case = random_case(Mask.causal(40), dtype=torch.bfloat16)
    figures = compare(case, backend="blockwise")
    assert opinion.disagreements(case, figures, "blockwise", deterministic=True) == []
    true = opinion.results

    def spoiled(case, backend, **settings):
        found = true(case, backend, **settings)
        return {**found, "dk": found["dk"] * 1.1} if settings else found

    monkeypatch.setattr(opinion, "results", spoiled)
    found = opinion.disagreements(case, figures, "blockwise", deterministic=True)
    assert len(found) == 1 and found[0].startswith("dk")


def test_disagreement_in_rows_that_were_not_compared_is_not_judged(monkeypatch):
    case = random_case(Mask.causal(40), dtype=torch.bfloat16)
    figures = compare(case, backend="blockwise", rows=[3, 30])
    true = opinion.results

    def spoiled(case, backend, **settings):
        found = true(case, backend, **settings)
        if settings:
            found["out"][5] += 1
        return found

    monkeypatch.setattr(opinion, "results", spoiled)
    assert opinion.disagreements(case, figures, "blockwise", [3, 30], deterministic=True) == []
    figures = compare(case, backend="blockwise", rows=[3, 5])
    assert len(opinion.disagreements(case, figures, "blockwise", [3, 5], deterministic=True)) == 1


def test_bits_tell_zero_from_minus_zero_and_nan_is_itself():
    nan = torch.tensor([float("nan"), 0.0])
    assert opinion.same_bits(nan, nan.clone())
    assert not opinion.same_bits(nan, torch.tensor([float("nan"), -0.0]))


def test_compilation_ahead_groups_by_what_is_compiled():
    dense = ahead.groups(configurations("hopper-dense"))
    assert sorted(len(group) for group in dense) == [6, 6, 6, 6]
    by_mask = ahead.groups(configurations("hopper-masks"))
    assert len(by_mask) == len(masks.FAMILIES)
    assert all(len({config.mask for config in group}) == 1 for group in by_mask)


def test_compilation_ahead_reports_and_survives_a_failing_process(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("print('ahead: trying'); raise SystemExit('no compiler')")
    ahead.together([[str(broken)]])
    text = capsys.readouterr().out
    assert "ahead: trying" in text and "no compiler" in text
