"""The oracle sees every way a call can go wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from magi_attention.mask import Mask
from magi_attention.testing import compare, oracle, random_case


@pytest.mark.parametrize(("with_max", "told"), [(False, "out"), (True, "out +max")])
@pytest.mark.parametrize("rows", [None, [3, 20]], ids=["all rows", "some rows"])
def test_calls_with_and_without_max_logits_are_both_compared(monkeypatch, with_max, told, rows):
    case = random_case(Mask.causal(30))
    assert compare(case, rows=rows).ok
    true = oracle.attention

    def spoiled(*args, **settings):
        out, meta = true(*args, **settings)
        return out * (1.05 if settings.get("return_max_logits", False) == with_max else 1), meta

    monkeypatch.setattr(oracle, "attention", spoiled)
    assert [f.name for f in compare(replace(case, dout=None, dlse=None), rows=rows).figures if not f.ok] == [
        told
    ]


def test_max_logits_are_compared():
    names = [f.name for f in compare(random_case(Mask.causal(30))).figures]
    assert names == ["out", "lse", "dq", "dk", "dv", "out +max", "lse +max", "max_logits +max"]
