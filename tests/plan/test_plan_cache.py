"""Plans are shared by identity and by content, and follow every change of a table."""

from __future__ import annotations

import threading

import pytest
import torch

from magi_attention.mask import Mask
from magi_attention.plan import cache as module
from magi_attention.plan.cache import PlanCache, PlanKey

CPU = torch.device("cpu")


def key(mask: Mask, **changes) -> PlanKey:
    parts = {"num_rows": mask.num_rows, "num_cols": mask.num_cols, "block_rows": 16, "block_cols": 16}
    return PlanKey(**{**parts, "transposed": False, "device": CPU, **changes})


@pytest.fixture
def builds(monkeypatch):
    """List that grows by one with every plan that is really built."""
    calls = []
    build = module._build

    def counted(table, which):
        calls.append(which)
        return build(table, which)

    monkeypatch.setattr(module, "_build", counted)
    return calls


def test_the_same_table_gives_the_same_plan(builds):
    plans, mask = PlanCache(), Mask.causal(40)
    assert plans.plan_for(mask.table, key(mask)) is plans.plan_for(mask.table, key(mask))
    assert len(builds) == 1


def test_an_identity_hit_does_not_read_the_table(monkeypatch):
    plans, mask = PlanCache(), Mask.causal(40)
    first = plans.plan_for(mask.table, key(mask))
    monkeypatch.setattr(module, "_digest", None)
    assert plans.plan_for(mask.table, key(mask)) is first


def test_equal_content_shares_a_plan(builds):
    plans, mask = PlanCache(), Mask.causal(40)
    assert plans.plan_for(mask.table, key(mask)) is plans.plan_for(mask.table.clone(), key(mask))
    assert len(builds) == 1


@pytest.mark.parametrize(
    "change",
    [{"block_rows": 32}, {"block_cols": 32}, {"transposed": True}, {"num_cols": 50}, {"num_rows": 50}],
)
def test_another_key_is_another_plan(builds, change):
    plans, mask = PlanCache(), Mask.causal(40)
    plans.plan_for(mask.table, key(mask))
    plans.plan_for(mask.table, key(mask, **change))
    assert len(builds) == 2


def test_a_change_in_place_gives_a_new_plan(builds):
    plans, mask = PlanCache(), Mask.causal(40)
    table = mask.table.clone()
    before = plans.plan_for(table, key(mask))
    table[0, 5] = 3
    after = plans.plan_for(table, key(mask))
    assert len(builds) == 2
    assert before.bands[0, 5] == 0 and after.bands[0, 5] == 3


def test_memory_given_to_another_table_does_not_bring_back_an_old_plan():
    plans = PlanCache(max_entries=4)
    for length in range(1, 40):
        mask = Mask.causal(length)
        table = mask.table.clone()
        assert plans.plan_for(table, key(mask)).tiles[:, :2].max() == length
        del table


def test_views_with_the_same_address_have_their_own_plans():
    plans, mask = PlanCache(), Mask.varlen([0, 10, 40], causal=True)
    assert len(plans.plan_for(mask.table, key(mask)).bands) == 2
    assert len(plans.plan_for(mask.table[:1], key(mask)).bands) == 1


def test_inference_tensors_are_planned_by_content(builds):
    plans, mask = PlanCache(), Mask.causal(40)
    with torch.inference_mode():
        table = mask.table.clone()
        first = plans.plan_for(table, key(mask))
        assert plans.plan_for(table, key(mask)) is first
        table[0, 5] = 3
        assert plans.plan_for(table, key(mask)).bands[0, 5] == 3
    assert len(builds) == 2


def test_the_number_of_entries_is_bounded():
    plans = PlanCache(max_entries=6)
    for length in range(1, 30):
        mask = Mask.causal(length)
        plans.plan_for(mask.table, key(mask))
        assert len(plans) <= 6


def test_the_least_recently_used_plan_goes_first(builds):
    plans = PlanCache(max_entries=3)
    a, b, c = Mask.causal(10), Mask.causal(20), Mask.causal(30)
    kept = plans.plan_for(a.table, key(a))
    plans.plan_for(b.table, key(b))
    assert plans.plan_for(a.table, key(a)) is kept
    plans.plan_for(c.table, key(c))
    assert plans.plan_for(a.table, key(a)) is kept
    assert len(builds) == 3
    plans.plan_for(b.table, key(b))
    assert len(builds) == 4


def test_clear_forgets_everything(builds):
    plans, mask = PlanCache(), Mask.causal(40)
    plans.plan_for(mask.table, key(mask))
    plans.clear()
    assert len(plans) == 0
    plans.plan_for(mask.table, key(mask))
    assert len(builds) == 2


def test_threads_share_the_cache():
    plans, wrong = PlanCache(max_entries=8), []

    def ask(seed: int) -> None:
        for step in range(60):
            mask = Mask.causal(1 + (seed * 7 + step) % 25)
            if plans.plan_for(mask.table, key(mask)).tiles[:, :2].max() != mask.num_rows:
                wrong.append(mask)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(plans) <= 8


def test_views_with_the_same_address_and_other_strides_have_their_own_plans():
    plans, mask = PlanCache(), Mask.varlen([0, 10, 40], causal=True)
    wide = torch.zeros(2, 8, dtype=torch.int32)
    wide[:, :6] = mask.table
    narrow = wide.view(-1)[:12].view(2, 6)
    first = plans.plan_for(wide[:, :6], key(mask))
    assert torch.equal(first.bands, mask.table)
    assert not torch.equal(plans.plan_for(narrow, key(mask)).bands, mask.table)
