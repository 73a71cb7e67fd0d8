"""The benchmark harness: what it records, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import bench, check, masks, overheads, peers, report, run, timing
from magi_attention.kernels.reference.dense import dense_attention, multiplicity

TINY = [
    "--device",
    "cpu",
    "--heads",
    "2",
    "--kv-heads",
    "1",
    "--head-dim",
    "16",
    "--dtype",
    "fp32",
    "--rounds",
    "2",
]


def exact_subject(name: str = "exact", spoil=lambda out: out) -> peers.Subject:
    """The dense definition as a subject of ours, its output passed through ``spoil``."""

    def prepare(work, device):
        return lambda q, k, v: spoil(dense_attention(q, k, v, work.mask.table, dtype=None)[0])

    return peers.Subject(name, prepare, ours=True)


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Run the harness with extra subjects; returns the exit code and the JSON document."""

    def go(arguments: list[str], *subjects: peers.Subject):
        for subject in subjects:
            monkeypatch.setitem(peers.SUBJECTS, subject.name, subject)
        path = tmp_path / "out" / "figures.json"
        code = run.main([*TINY, *arguments, "--json", str(path)])
        return code, json.loads(path.read_text())

    return go


def test_records_environment_rows_ratios_and_means(measure):
    code, document = measure(
        ["--masks", "full", "causal", "--tokens", "256", "--subjects", "exact", "sdpa"], exact_subject()
    )
    assert code == 0
    for name in ("device", "torch", "triton", "numpy", "python", "cuda_driver", "commit", "dirty", "date"):
        assert name in document["environment"]
    assert len(document["rows"]) == 2 * 2 * 2
    for row in document["rows"]:
        assert row["status"] == "ok" and row["rounds"] == 2
        assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
        operations = {"forward": 4, "backward": 10}[row["direction"]] * row["area"] * 2 * 16
        assert row["tflops"] == pytest.approx(operations / row["seconds"] * 1e-12)
        assert {"small out", "small dq", "small dk", "small dv", "rows out", "rows dq"} <= set(row["check"])
    assert {row["area"] for row in document["rows"]} == {256 * 256, 256 * 257 // 2}
    assert [state["mask"] for state in document["states"]] == ["full", "causal"]
    assert len(document["ratios"]) == 4
    assert {mean["direction"] for mean in document["geomeans"]} == {"forward", "backward"}
    assert all(mean["configurations"] == 2 for mean in document["geomeans"])


def test_own_cpu_backend_passes_its_check_on_every_mask(measure):
    pytest.importorskip("magi_attention.kernels.reference.blockwise")
    code, document = measure(["--tokens", "128", "--subjects", "blockwise", "sdpa-boolmask", "--rounds", "1"])
    assert code == 0
    assert {row["mask"] for row in document["rows"]} == set(masks.FAMILIES)
    assert [row for row in document["rows"] if row["status"] != "ok"] == []


def test_functions_with_flash_attentions_names_take_the_masks_they_can_say(measure):
    names = ["flash_attn", "flash_attn_varlen"]
    code, document = measure(["--tokens", "128", "--subjects", *names, "--rounds", "1"])
    done = {
        name: {r["mask"] for r in document["rows"] if (r["subject"], r["status"]) == (name, "ok")}
        for name in names
    }
    assert code == 0
    assert done["flash_attn"] == {"full", "causal", "swa_causal_1024"}
    assert done["flash_attn_varlen"] == done["flash_attn"] | {"varlen_full", "varlen_causal"}
    assert {row["status"] for row in document["rows"]} == {"ok", "unsupported"}


@pytest.mark.parametrize("layout", ["thd", "bthd", "bhtd"])
@pytest.mark.parametrize("shape", [(5, 3, 2), (4, 5, 3, 2)], ids=["packed", "batch"])
def test_a_tensor_comes_back_from_every_layout(layout, shape):
    subject, tensor = peers.Subject("x", lambda work, device: None, layout=layout), torch.randn(shape)
    arranged = subject.arrange(tensor)
    assert arranged.is_contiguous() and arranged.data_ptr() != tensor.data_ptr()
    assert arranged.dim() == (tensor.dim() if layout == "thd" else 4)
    assert torch.equal(subject.restore(arranged, tensor.dim() == 4), tensor)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out * 1.001,
        lambda out: torch.where(torch.arange(len(out))[:, None, None] == len(out) - 1, 0.0, out),
        lambda out: out * torch.nan,
    ],
    ids=["slightly scaled", "last row missing", "not a number"],
)
def test_wrong_output_gets_no_number(measure, capsys, spoil):
    code, document = measure(
        ["--masks", "causal", "--tokens", "256", "--subjects", "spoiled", "sdpa"],
        exact_subject("spoiled", spoil),
    )
    assert code == 1
    by_subject = {(row["subject"], row["direction"]): row for row in document["rows"]}
    for direction in timing.DIRECTIONS:
        row = by_subject["spoiled", direction]
        assert row["status"] == "wrong" and row["seconds"] is None and row["tflops"] is None
        assert "error against fp64" in row["reason"]
        assert by_subject["sdpa", direction]["status"] == "ok"
    assert document["ratios"] == []
    lines = [
        line for line in capsys.readouterr().out.splitlines() if " spoiled " in line and "causal" in line
    ]
    assert any("WRONG" in line for line in lines)
    assert not any("TFLOP/s" in line and "WRONG" in line for line in lines)


def test_wrong_gradient_gets_no_number(measure):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout / 2

    code, document = measure(
        ["--masks", "causal", "--tokens", "256", "--subjects", "halved"],
        exact_subject("halved", Halved.apply),
    )
    assert code == 1
    assert {row["status"] for row in document["rows"]} == {"wrong"}


def test_error_at_the_full_size_alone_is_caught(measure):
    def spoil(out):
        return out if len(out) <= bench.SMALL_TOKENS["cpu"] else out.roll(1, dims=0)

    code, document = measure(
        ["--masks", "causal", "--tokens", "1024", "--subjects", "large", "--directions", "forward"],
        exact_subject("large", spoil),
    )
    assert code == 1
    assert "rows out" in document["rows"][0]["reason"]


def test_failure_of_a_peer_is_a_row_with_its_reason(measure):
    def prepare(work, device):
        raise torch.OutOfMemoryError("no room")

    code, document = measure(
        [
            "--masks",
            "block_causal",
            "--tokens",
            "256",
            "--subjects",
            "exact",
            "hungry",
            "sdpa",
            "--directions",
            "forward",
        ],
        exact_subject(),
        peers.Subject("hungry", prepare),
    )
    assert code == 0
    rows = {row["subject"]: row for row in document["rows"]}
    assert rows["exact"]["status"] == "ok"
    assert rows["hungry"]["status"] == "failed" and "no room" in rows["hungry"]["reason"]
    assert rows["sdpa"]["status"] == "unsupported" and "full and causal" in rows["sdpa"]["reason"]


def test_failure_of_our_own_subject_sets_the_exit_code(measure):
    def prepare(work, device):
        raise RuntimeError("broken")

    code, _ = measure(
        ["--masks", "full", "--tokens", "64", "--subjects", "ourselves"],
        peers.Subject("ourselves", prepare, ours=True),
    )
    assert code == 1


def test_configurations_after_the_total_budget_are_skipped(measure):
    code, document = measure(
        ["--masks", "full", "--tokens", "64", "--subjects", "exact", "--total-seconds", "0"], exact_subject()
    )
    assert code == 0
    assert {row["status"] for row in document["rows"]} == {"skipped"}


@pytest.mark.parametrize("name", list(masks.FAMILIES))
@pytest.mark.parametrize("tokens", [64, 264])
def test_mask_function_and_segments_say_what_the_mask_says(name, tokens):
    work = masks.workload(name, tokens)
    expected = multiplicity(work.mask.table, tokens, tokens)
    assert int(expected.max()) == 1
    assert work.area == int(expected.sum())
    mask_mod = work.mask_mod(torch.device("cpu"))
    rows, cols = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    if mask_mod is not None:
        assert torch.equal(mask_mod(None, None, rows, cols), expected.bool())
    if work.varlen:
        segment = torch.from_numpy(np.repeat(np.arange(len(work.segments) - 1), np.diff(work.segments)))
        seen = segment[:, None] == segment[None, :]
        seen &= (cols <= rows) if work.causal else True
        seen &= (cols > rows - work.window) if work.window else True
        assert torch.equal(seen, expected.bool())


def test_document_counts_are_those_of_the_published_figures():
    counts = [len(masks.document_boundaries(tokens)) - 1 for tokens in (16384, 65536)]
    assert counts == [7, 24]
    for tokens in (16384, 65536):
        lengths = np.diff(masks.document_boundaries(tokens))
        assert lengths.sum() == tokens and lengths.min() > 0 and lengths.max() <= tokens // 4


def test_sampled_rows_hold_both_ends_and_every_early_boundary():
    work = masks.workload("varlen_causal", 4096)
    rows = set(check.sampled_rows(work, seed=0).tolist())
    assert {0, 4095} <= rows <= set(range(4096))
    assert {int(cut) for cut in work.segments[1:7]} - {4096} <= rows


def test_rounds_end_at_the_time_limit_with_one_lap_each():
    laps = []

    def entrant(name):
        def sleepy(q, k, v):
            laps.append(name)
            torch.ones(1).sum()
            return q

        return timing.Entrant(name, sleepy, (torch.ones(1),) * 4)

    entrants = [entrant("a"), entrant("b")]
    timing.race(entrants, timing.WallStopwatch(), ("forward",), rounds=50, limit_seconds=-1.0, warmup=2)
    assert all(len(e.seconds["forward"]) == 1 for e in entrants)
    assert sorted(laps) == ["a", "a", "b", "b"]


def test_order_within_rounds_rotates():
    order = []
    entrants = [
        timing.Entrant(name, lambda q, k, v, name=name: order.append(name) or q, (torch.ones(1),) * 4)
        for name in "abc"
    ]
    timing.race(entrants, timing.WallStopwatch(), ("forward",), rounds=3, limit_seconds=60.0, warmup=0)
    assert "".join(order) == "abcbcacab"


def test_our_own_door_under_a_peers_name_is_not_a_peer(monkeypatch):
    module = type(sys)("flash_attn_interface")
    module.flash_attn_varlen_func = lambda *args, **kwargs: None
    module.flash_attn_varlen_func.__module__ = "magi_attention.api.flash_attn"
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    reason = peers.SUBJECTS["fa3"].missing("cuda")
    assert reason is not None and "our own drop-in" in reason


def test_table_without_rich_shows_every_subject(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    shape = ("causal", 64, 2, 1, 16, "fp32", "forward")
    mine, peer = report.Row(*shape, "mine", True, 100), report.Row(*shape, "peer", False, 100)
    mine.fill({"seconds": 1.0, "seconds_q1": 1.0, "seconds_q3": 1.0, "rounds": 1})
    peer.fill({"seconds": 1.5, "seconds_q1": 1.5, "seconds_q3": 1.5, "rounds": 1})
    lost = report.Row(*shape, "lost", False, 100, status="wrong", reason="error")
    report.print_table([mine, peer, lost])
    text = capsys.readouterr().out
    assert "mine/peer" in text and "1.50" in text and "WRONG" in text
    assert "geometric mean forward mine/peer: 1.500" in text


def test_plan_preset_plans_a_thousand_ranges():
    mask = overheads.many_ranges()
    assert mask.num_rows == mask.num_cols == 65536 and len(mask.bands) == 1000
