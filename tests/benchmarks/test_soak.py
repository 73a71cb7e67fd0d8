"""The soak: a seed is a case for good, wrong results and hangs are told."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import soak
from magi_attention.testing import oracle

ROOT = Path(__file__).resolve().parents[2]

CPU = ["--device", "cpu", "--backend", "blockwise", "--max-tokens", "40"]


def bits(case):
    return [
        x for x in (case.q, case.k, case.v, case.sink, case.dout, case.dlse, case.mask.table) if x is not None
    ]


@pytest.mark.parametrize("seed", [0, 17, 33])
def test_a_seed_is_always_the_same_case(seed):
    first, again = (soak.case_of(seed, torch.device("cpu"), 60) for _ in range(2))
    assert type(first.mask) is type(again.mask) and first.softcap == again.softcap
    assert first.q.stride() == again.q.stride()
    for x, y in zip(bits(first), bits(again), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def test_shards_part_the_seeds_and_hold_whole_specialisations():
    shards = [soak.seeds_of(300, 10, (index, 7)) for index in range(7)]
    assert sorted(itertools.chain(*shards)) == list(range(10, 310))
    classes = [{seed % len(soak.SPECIALISATIONS) for seed in shard} for shard in shards]
    assert sum(map(len, classes)) == len(soak.SPECIALISATIONS)


def test_specialisations_have_every_value_of_every_feature():
    specs = soak.SPECIALISATIONS
    assert {s.head_dim for s in specs} == {64, 96, 128, 192, 256}
    assert {s.group for s in specs} == {1, 2, 3, 4, 6, 8}
    for head_dim in (64, 96, 128, 192, 256):
        some = [s for s in specs if s.head_dim == head_dim]
        assert {s.dtype for s in some} == {torch.bfloat16, torch.float16}
        assert {s.softcap for s in some} == {s.sink for s in some} == {True, False}


def test_cases_differ_in_what_the_soak_is_for():
    cases = [soak.case_of(seed, torch.device("cpu"), 120) for seed in range(200)]
    assert {case.q.dim() for case in cases} == {3, 4}
    assert any(case.mask.num_rows != case.mask.num_cols for case in cases)
    assert any(len(case.mask.table) == 0 for case in cases)
    assert any(not case.q.is_contiguous() for case in cases)
    assert any(torch.isnan(case.k).any() for case in cases)
    assert {case.sink.dim() for case in cases if case.sink is not None} == {2, 3}
    assert {type(case.mask).__name__ for case in cases} == {"Mask", "DeviceMask"}


def test_exact_results_pass():
    assert soak.main([*CPU, "--cases", "12"]) == 0


def test_a_wrong_result_is_told_with_its_seed(monkeypatch, capsys):
    true = oracle.attention

    def spoiled(q, k, v, mask, **settings):
        out, meta = true(q, k, v, mask, **settings)
        return out * 1.05, meta

    monkeypatch.setattr(oracle, "attention", spoiled)
    assert soak.main([*CPU, "--seed", "7", "--max-tokens", "90"]) == soak.BROKEN
    text = capsys.readouterr().out
    assert "BROKEN seed 7" in text and "broken seeds [7]" in text and "out" in text


@pytest.mark.parametrize(
    ("seed", "spoils"),
    [
        (0, lambda settings: settings.get("return_max_logits", False)),
        (6, lambda settings: settings.get("deterministic", False)),
    ],
)
def test_other_settings_are_looked_at_too(monkeypatch, seed, spoils):
    true = oracle.attention

    def spoiled(*args, **settings):
        out, meta = true(*args, **settings)
        return out * (1.05 if spoils(settings) else 1.0), meta

    monkeypatch.setattr(oracle, "attention", spoiled)
    assert soak.main([*CPU, "--seed", str(seed), "--max-tokens", "90"]) == soak.BROKEN


def test_columns_in_parts_are_looked_at_too(monkeypatch, capsys):
    monkeypatch.setattr(
        oracle, "accumulate", lambda out, lse, *args, **settings: out.new_zeros(out.shape[-2])
    )
    assert soak.main([*CPU, "--seed", "5", "--max-tokens", "90"]) == soak.BROKEN
    assert "in parts" in capsys.readouterr().out


@pytest.mark.parametrize(("spoiled_draws", "code"), [(1, 0), (9, soak.BROKEN)])
def test_bad_luck_does_not_come_twice(monkeypatch, spoiled_draws, code):
    true, calls = soak.fault_of, []

    def spoiled(*args):
        calls.append(args)
        return ("out: 2.01", 2.01) if len(calls) <= spoiled_draws else true(*args)

    monkeypatch.setattr(soak, "fault_of", spoiled)
    assert soak.main([*CPU, "--seed", "7", "--max-tokens", "90"]) == code
    assert len(calls) == (1 + soak.OTHER_DRAWS if code == 0 else 2)
    assert not torch.equal(calls[0][0].q.nan_to_num(), calls[1][0].q.nan_to_num())
    assert calls[0][0].q.shape == calls[1][0].q.shape and str(calls[0][0].mask) == str(calls[1][0].mask)


@pytest.mark.parametrize(("spoil", "code"), [(1.0, 0), (4.0, soak.BROKEN)])
def test_what_the_rounding_of_out_leaves_in_gradients_of_zero_is_no_fault(monkeypatch, spoil, code):
    true = oracle.attention

    def as_another_backend(q, *args, backend=None, **settings):
        if backend != "blockwise" and q.requires_grad:
            q.register_hook(lambda gradient: gradient * spoil)
        return true(q, *args, backend="blockwise", **settings)

    monkeypatch.setattr(oracle, "attention", as_another_backend)
    one_key_with_dropout = 4299
    args = ["--device", "cpu", "--backend", "another", "--seed", str(one_key_with_dropout)]
    assert soak.main(args) == code


def test_a_call_that_raises_is_broken(monkeypatch, capsys):
    def fails(*args, **settings):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(oracle, "attention", fails)
    assert soak.main([*CPU, "--cases", "3"]) == soak.BROKEN
    assert "illegal memory access" in capsys.readouterr().out


def test_a_soak_that_ran_nothing_does_not_pass():
    assert (
        soak.main(["--device", "cpu", "--backend", "hopper", "--cases", "2", "--max-tokens", "20"])
        == soak.IDLE
    )


def test_repeats_of_the_same_bits_pass_and_other_bits_do_not(monkeypatch, capsys):
    arguments = [*CPU, "--repeat", "--repeats", "3", "--seed", "4"]
    assert soak.main(arguments) == 0
    true, count = soak.results, []

    def drifting(case, backend, **settings):
        count.append(1)
        found = true(case, backend, **settings)
        return {**found, "dv": found["dv"] + len(count) * 1e-3} if settings else found

    monkeypatch.setattr(soak, "results", drifting)
    assert soak.main(arguments) == soak.BROKEN
    assert "differs in deterministic dv" in capsys.readouterr().out


def test_a_hang_ends_the_process_with_its_seed_and_stacks():
    script = (
        f"import sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'src')!r}]\n"
        "from benchmarks import soak\n"
        "with soak.Watchdog(0.2).over(4711):\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == soak.HUNG
    assert "HANG seed 4711" in done.stderr and "most recent call first" in done.stderr
