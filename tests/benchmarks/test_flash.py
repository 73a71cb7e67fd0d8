"""The profile of the functions with FlashAttention's names: what it measures, and its targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import flash, hopper, launch, report, run, targets, yardsticks

HOST_CALLS = {"forward without gradients", "forward", "backward"}


@pytest.fixture
def few_calls(monkeypatch):
    monkeypatch.setattr(launch, "CALLS", 2)
    monkeypatch.setattr(launch, "REPEATS", 1)


def test_cells_are_those_of_the_hopper_profiles():
    configs = flash.configurations(flash.DEFAULT_SUBJECTS, 1, 1.0, "bf16")
    *dense, documents = configs
    cells = {(c.mask, c.tokens, c.heads, c.kv_heads, c.head_dim) for c in dense}
    assert cells == {cell for cell in yardsticks.load()["dense"].cells if cell[-1] == 128}
    assert len(dense) == len(cells) == 12
    assert {c.tokens * c.batch for c in dense} == {hopper.TOTAL}
    assert {c.subjects for c in dense} == {("flash_attn", "hopper", "sdpa-flash")}
    assert (documents.mask, documents.tokens, documents.heads, documents.kv_heads) == (
        "varlen_causal", 16384, 32, 8,
    )  # fmt: skip
    assert documents.subjects == ("flash_attn_varlen", "hopper")
    assert all(c.capture and c.bursts for c in dense) and documents.bursts and not documents.capture


def test_profile_runs_dry_on_a_cpu(few_calls, tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--dtype", "fp32", "--rounds", "1", "--limit-seconds", "0.1"]
    subjects = ["--subjects", "flash_attn", "flash_attn_varlen", "blockwise", "sdpa"]
    code = run.main(["--profile", "flash-attn", *arguments, "--shrink", "64", *subjects, "--json", str(path)])
    document = json.loads(path.read_text())
    assert code == 0
    assert len(document["rows"]) == 2 * (12 * 3 + 2)
    assert {row["status"] for row in document["rows"]} == {"ok"}
    assert all("small dk" in row["check"] and "rows dq" in row["check"] for row in document["rows"])
    for name in subjects[1:]:
        assert set(document["costs"][f"host microseconds a call, {name}"]) == HOST_CALLS
    names = [entry["name"] for entry in document["targets"]]
    for direction in ("forward", "backward"):
        assert f"dense d128 {direction}: flash_attn / blockwise, mean of 12 of 12 cells" in names
        assert f"varlen_causal {direction}: flash_attn_varlen / blockwise, mean of 1 of 1 cells" in names


def test_a_subject_of_ours_without_host_times_is_an_incomplete_run(few_calls):
    book = report.Report({}, {})
    assert not flash.conclude(book, torch.device("cpu"), ["flash_attn", "hopper"])
    assert flash.conclude(book, torch.device("cpu"), ["flash_attn", "sdpa-flash"])
    assert "runs on cuda only" in book.costs["host microseconds a call, hopper"]


def test_means_are_held_against_the_flash_kernel_and_the_native_call(monkeypatch):
    seconds = {"flash_attn": 1.0, "hopper": 0.98, "sdpa-flash": 1.7}
    monkeypatch.setattr(launch, "measure_host", lambda *args: {})
    book = report.Report({}, {})
    for tokens in (2048, 8192):
        for direction in ("forward", "backward"):
            for subject, each in seconds.items():
                shape = ("causal", tokens, 16, 4, 128, "bf16", direction, subject)
                row = report.Row(*shape, subject != "sdpa-flash", 100)
                lost = (tokens, subject) == (8192, "sdpa-flash")
                if lost:
                    row.status = "failed"
                else:
                    row.fill({"seconds": each, "seconds_q1": each, "seconds_q3": each, "rounds": 1})
                book.rows.append(row)
    flash.conclude(book, torch.device("cpu"), flash.DEFAULT_SUBJECTS)
    found = {entry["name"]: (round(entry["value"], 4), entry["at_least"]) for entry in book.targets}
    assert found == {
        "dense d128 forward: flash_attn / sdpa-flash, mean of 1 of 2 cells": (1.7, 1.8),
        "dense d128 backward: flash_attn / sdpa-flash, mean of 1 of 2 cells": (1.7, 1.65),
        "dense d128 forward: flash_attn / hopper, mean of 2 of 2 cells": (0.98, 0.97),
        "dense d128 backward: flash_attn / hopper, mean of 2 of 2 cells": (0.98, 0.97),
    }


def test_host_time_of_a_forward_is_at_most_40_microseconds():
    book = report.Report({}, {})
    host = {"flash_attn": {"forward without gradients": 32.0, "forward": 50.0, "backward": 500.0}}
    targets.host_targets(book, host)
    assert [(entry["value"], entry["met"]) for entry in book.targets] == [(1.25, True), (0.8, False)]
