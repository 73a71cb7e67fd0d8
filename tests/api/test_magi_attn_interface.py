"""Keys are values, their plans are remembered, and what does not fit is refused in words; on one rank."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

import magi_attention
from magi_attention import api, comm
from magi_attention.api import magi_attn_interface as doors
from magi_attention.attention import attention
from magi_attention.common import AttnMaskType, AttnRange, AttnRanges
from magi_attention.config import (
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    OverlapConfig,
    SequentialDispatchAlg,
)
from magi_attention.dist.key import automatic_chunk_size, padding
from magi_attention.mask import Mask
from magi_attention.utils import clearup_dist_env, setup_dist_env

LENGTH = 40
RANGES = AttnRanges.from_ranges([(0, 16), (16, 40)])


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    yield setup_dist_env()[5]
    clearup_dist_env()


def key_of(group, ranges=RANGES, **arguments):
    defaults = {
        "attn_mask_type": ["causal", AttnMaskType.FULL],
        "total_seqlen_q": LENGTH,
        "total_seqlen_k": LENGTH,
    }
    return api.magi_attn_flex_key(ranges, ranges, cp_group_or_mesh=group, **{**defaults, **arguments})


def test_a_key_is_a_value(group):
    key, again = key_of(group), key_of(group, RANGES.clone())
    assert key == again and hash(key) == hash(again) and key != key_of(group, chunk_size=8)
    assert key != key_of(group, attn_mask_type="full") and key != "key"
    assert key != key_of(group, dist_attn_config=DistAttnConfig(overlap_config=OverlapConfig(degree=2)))
    assert (key.q_ranges, key.k_ranges) == (RANGES, RANGES)
    assert key.attn_mask_type == (AttnMaskType.CAUSAL, AttnMaskType.FULL)
    assert (key.total_seqlen_q, key.total_seqlen_k, key.pad_size, key.chunk_size) == (40, 40, 0, 40)
    assert key.cp_group is group and key.cp_mesh is None and key.cp_size == 1 and not key.uneven_shard
    assert key.dist_attn_config == DistAttnConfig() and "2 slices" in repr(key)
    assert copy.deepcopy([key])[0] is key
    with pytest.raises(TypeError, match="editable"):
        key.q_ranges.append(AttnRange(0, 1))
    with pytest.raises(ValueError, match="read-only"):
        key.slices[0] = 0
    with pytest.raises(AttributeError):
        key.chunk_size = 3


def test_a_key_does_not_follow_later_edits_of_its_ranges(group):
    ranges = RANGES.clone()
    key = key_of(group, ranges)
    ranges[0].end = 12
    assert key.q_ranges == RANGES and key == key_of(group)


def test_padding_is_asked_for_or_as_much_as_shards_need(group):
    assert key_of(group, pad_size=3).total_seqlen_q == 43
    key = key_of(group, pad_size=3, chunk_size=16)
    assert (key.pad_size, key.total_seqlen_q, key.total_seqlen_k) == (8, 48, 48)
    uneven = DistAttnConfig(DispatchConfig(uneven_shard=True, chunk_size=16))
    assert key_of(group, dist_attn_config=uneven).pad_size == 0
    for length in (*range(1, 70), 1000, 4097, 100_000):
        for ranks in (1, 2, 3, 8):
            size = automatic_chunk_size(length, ranks)
            pad = padding(length, ranks, size, 0, False)
            assert (length + pad) % (ranks * size) == 0
            assert pad < max(length / 6, ranks * 8), (length, ranks, size)


def test_varlen_spellings_and_orders(group):
    cuts = torch.tensor([0, 16, 40], dtype=torch.int32)
    key = api.magi_attn_varlen_key(cuts, cuts, 0, 8, group, True, DistAttnConfig())
    assert key == api.magi_attn_varlen_key(
        cu_seqlen_q=cuts, cu_seqlen_k=cuts.long(), chunk_size=8, cp_group_or_mesh=group, causal=True
    )
    assert key.attn_mask_type == (AttnMaskType.CAUSAL,) * 2 and key.q_ranges == RANGES
    window = api.magi_attn_varlen_key(cuts, cuts, cp_group_or_mesh=group, window_size=(3, 0))
    assert len(window.q_ranges) == 4 and api.get_most_recent_key() == window


def test_the_key_made_last_is_the_recent_one(group):
    first, second = key_of(group), key_of(group, chunk_size=8)
    api.dispatch(torch.zeros(LENGTH), first)
    assert api.get_most_recent_key(group) == second
    assert key_of(group) is not first and api.get_most_recent_key() == first
    api.clear_cache(group)
    with pytest.raises(ValueError, match="keys: expected at least one, got none"):
        api.get_most_recent_key()


def test_plans_are_evicted_and_made_again(group, monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", "2")
    first, second = key_of(group), key_of(group, chunk_size=8)
    x = torch.arange(LENGTH)
    api.dispatch(x, first)  # used later than the second
    third = key_of(group, chunk_size=4)
    assert (
        set(api.dist_attn_runtime_dict_mgr.keys(group)) == {first, third}
        and second not in api.dist_attn_runtime_dict_mgr
    )
    for call in (
        lambda: api.dispatch(x, second),
        lambda: api.undispatch(x, second),
        lambda: api.get_position_ids(second),
        lambda: api.roll(x, 1, 0, second),
        lambda: api.calc_attn(x, x, x, second),
        lambda: api.make_flex_key_for_new_mask_after_dispatch(RANGES, RANGES, "full", second),
    ):
        with pytest.raises(
            ValueError, match=r"key: expected a key whose plan is remembered, got Dist.*Make it again"
        ):
            call()
    assert torch.equal(api.dispatch(x, key_of(group, chunk_size=8)), x)
    api.dispatch(x, second)
    monkeypatch.setenv("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", "many")
    with pytest.raises(ValueError, match="DICT_SIZE: expected an integer, got 'many'"):
        key_of(group, chunk_size=5)


def test_a_cache_of_its_own_size(group):
    cache = api.DistAttnRuntimeDictManager(0)
    key = key_of(group)
    cache[key] = api.dist_attn_runtime_dict_mgr[key]
    assert cache.get(key) is None and key not in cache and cache.keys() == []


def test_a_key_of_an_earlier_group_is_foreign(group):
    old = key_of(group)
    clearup_dist_env()
    new = key_of(setup_dist_env()[5])
    assert old != new
    with pytest.raises(ValueError, match="whose plan is remembered"):
        api.dispatch(torch.zeros(LENGTH), old)
    api.dispatch(torch.zeros(LENGTH), new)


def test_managers_under_names_of_their_own(group):
    key = magi_attention.init_dist_attn_runtime_key(RANGES, RANGES, "full", LENGTH, LENGTH, 0, 8, group)
    manager = magi_attention.init_dist_attn_runtime_mgr(RANGES, RANGES, "full", LENGTH, LENGTH, 0, 8, group)
    assert manager.key == key and manager is api.dist_attn_runtime_dict_mgr[key]


def test_masks_that_are_balanced_together_are_part_of_a_key(group):
    key = key_of(group, pad_size=8, balance_with=[Mask.full(40)])
    assert key == key_of(group, pad_size=8, balance_with=(Mask([[0, 40, 0, 40, -99, 99]], 48, 48),))
    assert key not in (key_of(group, pad_size=8), key_of(group, pad_size=8, balance_with=[Mask.causal(40)]))
    cuts = torch.tensor([0, 16, 40])
    local, again = api.magi_attn_varlen_dispatch(
        torch.arange(40), cuts, cuts, cp_group_or_mesh=group, balance_with=[Mask.full(40)]
    )
    assert torch.equal(local, torch.arange(40)) and again.balance_with == (Mask.full(40),)


def test_settings_reach_attention_by_heads(group, monkeypatch):
    given = []

    def watched(*args, **settings):
        given.append((settings["sm_margin"], settings["deterministic"]))
        return attention(*args, **settings)

    monkeypatch.setattr("magi_attention.dist.heads.attention", watched)
    config = DistAttnConfig(overlap_config=OverlapConfig(sm_margin=3), strategy="heads")
    key = key_of(group, dist_attn_config=config, num_heads_q=2, num_heads_kv=2, head_dim=8)
    x = torch.randn(LENGTH, 2, 8)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            api.calc_attn(x, x, x, key)
        finally:
            torch.use_deterministic_algorithms(False)
    assert given == [(3, False), (3, True)]


def test_a_compiled_model(group):
    key = key_of(group, attn_mask_type="full")
    layer = torch.nn.Linear(16, 16)

    def model(x):
        q = layer(api.dispatch(x, key)).view(-1, 2, 8)
        q = q + api.get_position_ids(key)[:, None, None] / LENGTH
        out, meta = api.calc_attn(q, api.roll(q, 1, 0, key), q, key)
        return api.undispatch(out * meta.lse[..., None], key)

    results = []
    for function in (torch.compile(model, backend="eager"), model):  # nothing was called before it is traced
        x = torch.randn(LENGTH, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = function(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(*results)


BAD_KEYS = [
    ({"attn_mask_type": "casual"}, "mask type of slice 0: expected one of .* got casual"),
    ({"attn_mask_type": ["full"]}, "attn_mask_type length: expected 2 like q_ranges, got 1"),
    ({"attn_mask_type": ["full", 7]}, "mask type of slice 1: .* got 7"),
    ({"total_seqlen_q": 39, "total_seqlen_k": 39}, r"q_ranges\[1\]: expected end <= 39"),
    ({"total_seqlen_q": 0, "total_seqlen_k": 0}, "total_seqlen_q: expected at least 1, got 0"),
    ({"total_seqlen_q": 40.0}, "total_seqlen_q: expected an integer, got float"),
    (
        {"total_seqlen_k": 41},
        "total_seqlen_k: expected total_seqlen_q 40 where both have the same source, got 41. Cross",
    ),
    ({"pad_size": -1}, "pad_size: expected at least 0, got -1"),
    ({"pad_size": "8"}, "pad_size: expected an integer, got str"),
    ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
    (
        {"chunk_size": 8, "dist_attn_config": DistAttnConfig(DispatchConfig(chunk_size=4))},
        "expected 4 as in DispatchConfig",
    ),
    ({"dist_attn_config": DispatchConfig()}, "dist_attn_config: expected DistAttnConfig, got DispatchConfig"),
    ({"num_heads_q": 0}, "num_heads_q: expected at least 1, got 0"),
    ({"num_heads_q": 3, "num_heads_kv": 2}, "num_heads_q: expected a multiple of num_heads_kv 2, got 3"),
    ({"head_dim": "64"}, "head_dim: expected an integer, got str"),
    ({"is_same_source": 1}, "is_same_source: expected bool, got int"),
    (
        {"is_k_permutable": False},
        "is_q_permutable and is_k_permutable: expected the same, got True and False",
    ),
    ({"cp_group_or_mesh": None}, "cp_group_or_mesh: expected a ProcessGroup or DeviceMesh, got NoneType"),
    (
        {"cp_group_or_mesh": 64},
        "cp_group_or_mesh: .* got int. num_heads_q, num_heads_kv, head_dim .* by keyword",
    ),
]


HEEDLESS = DistAttnConfig(DispatchConfig(alg=SequentialDispatchAlg()))
BAD_KEYS += [
    ({"balance_with": Mask.full(40)}, "balance_with: expected list or tuple, got Mask. Give a sequence"),
    ({"balance_with": [Mask.full(40), "causal"]}, r"balance_with\[1\]: expected Mask, got str"),
    (
        {"balance_with": [Mask.full(41)], "pad_size": 8},
        r"balance_with\[0\]: expected 40 rows and columns, or 48 with padding, got 41 x 41",
    ),
    ({"balance_with": [Mask.full(40, 39)]}, "expected 40 rows and columns, or 40 .* got 40 x 39"),
    (
        {"balance_with": [Mask.full(40)], "is_same_source": False},
        "balance_with: expected masks of self-attention, got is_same_source=False",
    ),
    (
        {"balance_with": [Mask.full(40)], "is_q_permutable": False, "is_k_permutable": False},
        "balance_with: expected a placement that depends on masks, got is_q_permutable=False",
    ),
    (
        {"balance_with": [Mask.full(40)], "dist_attn_config": HEEDLESS},
        "expected a placement that depends on masks, got SequentialDispatchAlg",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_KEYS, ids=[str(n) for n in range(len(BAD_KEYS))])
def test_keys_that_are_refused(group, arguments, message):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        key_of(
            **{"group": group, **arguments}
        ) if "cp_group_or_mesh" not in arguments else api.magi_attn_flex_key(
            RANGES, RANGES, "full", LENGTH, LENGTH, **arguments
        )


def test_ranges_that_do_not_match(group):
    with pytest.raises(ValueError, match="k_ranges length: expected 2 like q_ranges, got 1"):
        api.magi_attn_flex_key(RANGES, RANGES[:1], "full", LENGTH, LENGTH, cp_group_or_mesh=group)


def test_boundaries_that_are_refused(group):
    cuts = torch.tensor([0, 16, 40])
    for arguments, message in (
        ({"cu_seqlens_q": [0, 40]}, "cu_seqlens_q: expected Tensor, got list"),
        (
            {"cu_seqlens_q": cuts[1:]},
            r"cu_seqlens_q: expected boundaries from 0 that never decrease, got \[16, 40\]",
        ),
        ({"cu_seqlens_q": cuts.flip(0)}, "cu_seqlens_q: expected boundaries"),
        ({"cu_seqlens_q": cuts.float()}, "cu_seqlens_q dtype"),
        ({"cu_seqlens_k": cuts[:2]}, "cu_seqlens_k: expected 3 boundaries like cu_seqlens_q, got 2"),
        ({"cu_seqlens_k": torch.tensor([0, 16, 41])}, "total_seqlen_k: expected total_seqlen_q 40"),
        ({"causal": 1}, "causal: expected bool"),
        ({"causal": True, "window_size": (4, 4)}, r"window_size: expected \(-1, -1\) with causal"),
        ({"window_size": (-2, 0)}, "window_size: expected at least -1"),
        ({"cu_seqlen_q": cuts}, "cu_seqlens_q: expected once, got cu_seqlen_q as well"),
    ):
        given = {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts, "cp_group_or_mesh": group, **arguments}
        with pytest.raises((TypeError, ValueError), match=message):
            api.magi_attn_varlen_key(**given)
    with pytest.raises(TypeError, match="key_for_dispatch: expected DistAttnRuntimeKey, got NoneType"):
        api.make_varlen_key_for_new_mask_after_dispatch(cuts, cuts)


def test_tensors_that_are_refused(group):
    key = key_of(group, num_heads_q=4, num_heads_kv=2, head_dim=8)
    q, k, v = (torch.zeros(LENGTH, h, 8) for h in (4, 2, 2))
    calls = {
        r"x shape: expected \(40, ...\), got \(41, 2\). Padding is added inside": lambda: api.dispatch(
            torch.zeros(41, 2), key
        ),
        "x: expected Tensor, got list": lambda: api.dispatch([0] * 40, key),
        "key: expected DistAttnRuntimeKey, got NoneType. magi_attn_flex_key": lambda: api.dispatch(q, None),
        "pad_value: expected an integer for torch.int64, got 0.5": lambda: api.dispatch(
            torch.arange(40), key, 0.5
        ),
        "pad_value: expected an integer for torch.int64, got nan": lambda: api.dispatch(
            torch.arange(40), key, torch.nan
        ),
        'role: expected "query", "key" or "value", got q': lambda: api.dispatch(q, key, role="q"),
        r"x shape: expected \(40, ...\), got \(39, 4, 8\). These are rows": lambda: api.undispatch(
            q[1:], key
        ),
        "is_partial_grad: expected bool": lambda: api.undispatch(q, key, 1),
        r"q shape: expected \(40, 4, 8\), got \(39, 4, 8\)": lambda: api.calc_attn(q[1:], k, v, key),
        r"q shape: expected \(40, 4, 8\), got \(40, 2, 8\)": lambda: api.calc_attn(k, k, v, key),
        r"q shape: expected \(40, 4, 8\), got \(40, 4, 4\)": lambda: api.calc_attn(
            q[..., :4], k[..., :4], v, key
        ),
        r"k shape: expected \(40, 2, 8\), got \(40, 4, 8\)": lambda: api.calc_attn(q, q, v, key),
        "v dtype: expected torch.float32, got torch.float64": lambda: api.calc_attn(q, k, v.double(), key),
        r"sink shape: expected \(s_sink, 4\), got \(4,\)": lambda: api.calc_attn(
            q, k, v, key, torch.zeros(4)
        ),
        "softcap: expected a number, got str": lambda: api.calc_attn(q, k, v, key, softcap="1"),
        "return_max_logits: expected bool": lambda: api.calc_attn(q, k, v, key, return_max_logits=1),
        r"dim: expected an axis of \(40, 4, 8\), got 3": lambda: api.roll(q, 1, 3, key),
        r"x shape: expected \(40, ...\), got \(4, 40, 8\)": lambda: api.roll(q, 1, 1, key),
        "shift: expected int, got float": lambda: api.roll(q, 1.0, 0, key),
        "cp_group_or_mesh: expected a ProcessGroup": lambda: api.get_most_recent_key(0),
    }
    for message, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_a_new_mask_is_checked_against_the_length_without_padding(group):
    key = key_of(group, pad_size=8)
    with pytest.raises(ValueError, match=r"q_ranges\[0\]: expected end <= 40"):
        api.make_flex_key_for_new_mask_after_dispatch([(0, 48)], [(0, 40)], "full", key)


def test_without_initialisation():
    with pytest.raises(
        ValueError, match=r"an initialised torch.distributed, got none. Call magi_attention.utils"
    ):
        key_of(None)


def test_setting_up_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    found = setup_dist_env(base_seed=3, seed_bias=lambda rank: rank + 4)
    drawn = random.random(), np.random.random(), torch.rand(()).item()
    clearup_dist_env()
    assert found[:5] == (0, 0, 1, 1, 1) and found[7] == 7
    assert found[6] == (torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu"))
    setup_dist_env(base_seed=7)
    setup_dist_env()  # another call finds what is there
    assert (random.random(), np.random.random(), torch.rand(()).item()) == drawn
    clearup_dist_env()
    clearup_dist_env()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"environment: expected MASTER_ADDR and MASTER_PORT .* torchrun"):
        setup_dist_env()


def test_what_a_launcher_says(monkeypatch):
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    found = magi_attention.env.launch()
    assert (found.rank, found.local_rank, found.local_world_size, found.num_nodes) == (5, 1, 4, 2)


def test_reduction_of_sinks_by_name(monkeypatch):
    assert magi_attention.comm.dsink_all_reduce_op() == "none"
    monkeypatch.setenv("MAGI_ATTENTION_DSINK_ALL_REDUCE_OP", "max")
    with pytest.raises(ValueError, match="DSINK_ALL_REDUCE_OP: expected none, sum or avg, got 'max'"):
        comm.dsink_all_reduce_op()
    assert not comm.is_qo_comm_enable() and comm.is_fwd_high_precision_reduce_enable()


def test_documented_orders_of_arguments():
    flex = (
        "q_ranges k_ranges attn_mask_type total_seqlen_q total_seqlen_k pad_size chunk_size cp_group_or_mesh"
    )
    flags = "is_same_source is_q_permutable is_k_permutable"
    varlen = "cu_seqlens_q cu_seqlens_k pad_size chunk_size cp_group_or_mesh causal dist_attn_config"
    documented = {
        "magi_attn_flex_key": f"{flex} dist_attn_config {flags}",
        "magi_attn_flex_dispatch": f"x {flex} dist_attn_config {flags}",
        "magi_attn_varlen_key": varlen,
        "magi_attn_varlen_dispatch": f"x {varlen}",
        "make_flex_key_for_new_mask_after_dispatch": "q_ranges k_ranges attn_mask_type key_for_dispatch dist_attn_config",
        "make_varlen_key_for_new_mask_after_dispatch": "cu_seqlens_q cu_seqlens_k key_for_dispatch causal window_size "
        "dist_attn_config",
        "dispatch": "x key pad_value",
        "undispatch": "x key is_partial_grad",
        "calc_attn": "q k v key sink softmax_scale softcap return_max_logits",
        "roll": "x shift dim key",
        "roll_simple": "x shift dim key",
        "get_position_ids": "key",
        "get_most_recent_key": "cp_group",
        "clear_cache": "cp_group",
        "explain_key": "key",
    }
    assert set(documented) == set(doors.__all__)
    for name, order in documented.items():
        parameters = inspect.signature(getattr(api, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == order.split(), name


def test_docstrings_name_every_argument():
    for name in doors.__all__:
        function = getattr(api, name)
        assert function.__doc__ and "{" not in function.__doc__, name
        if name != "roll_simple":
            missing = [p for p in inspect.signature(function).parameters if p not in function.__doc__]
            assert not missing, (name, missing)


def test_every_exported_name_is_there():
    for name in api.__all__:
        assert getattr(api, name) is not None
    assert api.MinHeapDispatchAlg is MinHeapDispatchAlg
