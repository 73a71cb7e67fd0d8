"""One rank of the test of the functions around calc_attn; run under torchrun's environment with gloo."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from magi_attention.api import (
    BalancedDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    OverlapConfig,
    calc_attn,
    dispatch,
    dist_attn_runtime_dict_mgr,
    explain_key,
    get_most_recent_key,
    get_position_ids,
    infer_varlen_mask_from_batch,
    magi_attn_flex_dispatch,
    magi_attn_flex_key,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
    roll,
    roll_simple,
    squash_batch_dim,
    undispatch,
)
from magi_attention.attention import attention
from magi_attention.common import AttnRanges
from magi_attention.mask import Mask
from magi_attention.utils import clearup_dist_env, setup_dist_env

LENGTH = 67
BALANCED = DistAttnConfig(DispatchConfig(alg=BalancedDispatchAlg()))
BY_AREA = DistAttnConfig(DispatchConfig(alg=MinHeapDispatchAlg()))
UNEVEN = DistAttnConfig(DispatchConfig(uneven_shard=True, chunk_size=5))


def causal_key(group, length=LENGTH, **arguments):
    return magi_attn_flex_key(
        [(0, length)], [(0, length)], "causal", length, length, cp_group_or_mesh=group, **arguments
    )


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def refused(call: Callable[[], object], message: str) -> None:
    """ValueError with a text that matches."""
    with pytest.raises(ValueError, match=message):
        call()


def attend(key, mask, length=LENGTH, k_length=None, seed=1):
    """calc_attn of drawn tensors against one device, out and gradients."""
    k_length = length if k_length is None else k_length
    given = [
        normal(n, h, 8, seed=seed + n + h).requires_grad_()
        for n, h in ((length, 2), (k_length, 1), (k_length, 1))
    ]
    roles = ("query", "key", "value")
    local = [dispatch(x, key, torch.nan, role=role) for x, role in zip(given, roles, strict=True)]
    out = undispatch(calc_attn(*local, key)[0], key)
    whole = [x.detach().clone().requires_grad_() for x in given]
    truth, _ = attention(*whole, mask, backend="dense")
    for x in (out, truth):
        x.square().sum().backward()
    same(out, truth)
    for ours, theirs in zip(given, whole, strict=True):
        same(ours.grad, theirs.grad)


def check_movement(group, config):
    """Every dtype and shape there and back; position ids say what lies where."""
    key = causal_key(group, dist_attn_config=config)
    ids = get_position_ids(key)
    real = dispatch(torch.arange(LENGTH), key, -1) >= 0
    assert ids.dtype == torch.int64 and ids[real].unique().numel() == len(ids[real])
    assert key.pad_size == 0 or (ids[~real] == LENGTH - 1).all()
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    ):
        for shape in ((LENGTH,), (LENGTH, 3), (LENGTH, 2, 0), (LENGTH, 2, 2)):
            x = (10 * normal(*shape)).to(dtype)
            local = dispatch(x, key, 1)
            assert (
                local.dtype == dtype and torch.equal(local[real], x[ids[real]]) and (local[~real] == 1).all()
            )
            assert torch.equal(undispatch(local, key), x)
    x = normal(LENGTH, 3).requires_grad_()
    weights = normal(LENGTH, 3, seed=9)
    (undispatch(dispatch(x, key).square(), key) * weights).sum().backward()  # the same loss on every rank
    same(x.grad, 2 * x.detach() * weights)
    x.grad = None
    mine = torch.zeros_like(weights)
    mine[dist.get_rank(group) :: group.size()] = weights[dist.get_rank(group) :: group.size()]
    (undispatch(dispatch(x, key).square(), key, is_partial_grad=True) * mine).sum().backward()  # a part of it
    same(x.grad, 2 * x.detach() * weights)


def check_roll(group, config):
    key = causal_key(group, dist_attn_config=config)
    x = normal(LENGTH, 2).requires_grad_()
    weights = normal(LENGTH, 2, seed=3)
    for shift in (0, 1, -1, 8, -30, LENGTH, 2 * LENGTH + 3):
        for function in (roll, roll_simple):
            x.grad = None
            local = dispatch(x, key, 7.0)
            moved = function(local, shift, 0, key)
            (undispatch(moved, key) * weights).sum().backward()
            same(undispatch(moved, key), torch.roll(x, shift, 0))
            same(x.grad, torch.roll(weights, -shift, 0))
        padding = dispatch(torch.ones(LENGTH), key) == 0
        assert (moved[padding] == 7).all()
        turned = roll(local.detach()[None].transpose(1, 2), shift, -1, key)
        assert torch.equal(turned, moved.detach()[None].transpose(1, 2))
    labels = torch.arange(LENGTH)
    assert torch.equal(undispatch(roll(dispatch(labels, key), -1, 0, key), key), torch.roll(labels, -1))


def check_several_masks(group):
    """One placement, many masks; attention to another sequence."""
    first = causal_key(group)
    window = make_varlen_key_for_new_mask_after_dispatch(
        torch.tensor([0, 30, LENGTH]), torch.tensor([0, 30, LENGTH]), first, window_size=(9, 0)
    )
    full = make_flex_key_for_new_mask_after_dispatch(
        AttnRanges.from_ranges([(0, LENGTH)]), AttnRanges.from_ranges([(0, LENGTH)]), "full", window,
        DistAttnConfig(overlap_config=OverlapConfig(degree=2)),
    )  # fmt: skip
    assert full.dist_attn_config.overlap_config.degree == 2 and get_most_recent_key(group) == full
    assert get_most_recent_key() is full and len({first, window, full}) == 3
    x = normal(LENGTH, 2)
    for key in (window, full):
        assert torch.equal(dispatch(x, key, 3.0), dispatch(x, first, 3.0))
        assert torch.equal(get_position_ids(key), get_position_ids(first)) and key.pad_size == first.pad_size
    with torch.inference_mode():  # what is kept for later calls is of use in training, too
        for key in (first, window):
            local = roll(dispatch(normal(LENGTH, 1, 8), key), 1, 0, key)
            undispatch(calc_attn(local, local, local, key)[0], key)
    attend(first, Mask.causal(LENGTH))
    attend(window, Mask.varlen([0, 30, LENGTH], window=(9, 0)))
    attend(full, Mask.full(LENGTH))
    encoder = causal_key(group, length=41, dist_attn_config=UNEVEN if group.size() < 5 else None)
    both = make_flex_key_for_new_mask_after_dispatch(
        [(0, 50)], [(3, 41)], "full", first, key_for_dispatch_k=encoder
    )
    assert torch.equal(dispatch(x[:41], both, role="key"), dispatch(x[:41], encoder))
    attend(both, Mask.from_ranges([(0, 50)], [(3, 41)], "full", LENGTH, 41), k_length=41)
    again = make_flex_key_for_new_mask_after_dispatch([(9, 50)], [(0, 20)], "causal", both)
    attend(again, Mask.from_ranges([(9, 50)], [(0, 20)], "causal", LENGTH, 41), k_length=41)


def check_joint_balance(group):
    """Masks that are uneven in opposite ways: even together only if both were known."""
    half, ranks = LENGTH // 2, group.size()
    front = Mask.from_ranges([(0, half)], [(0, half)], "causal", LENGTH, LENGTH)
    back = Mask.from_ranges([(half, LENGTH)], [(half, LENGTH)], "causal", LENGTH, LENGTH)

    def uneven(key):
        """The largest area of both masks on a rank over the mean."""
        ids = get_position_ids(key)[dispatch(torch.ones(LENGTH), key) > 0]
        sums = torch.zeros(ranks)
        sums[group.rank()] = float(sum(mask.to_dense()[ids].sum() for mask in (front, back)))
        dist.all_reduce(sums, group=group)
        return (sums.max() / sums.mean()).item()

    for config in (BY_AREA, None):
        settings = {"cp_group_or_mesh": group, "chunk_size": 2, "dist_attn_config": config}
        alone = magi_attn_flex_key(*front.to_slices(), LENGTH, LENGTH, **settings)
        key = magi_attn_flex_key(*front.to_slices(), LENGTH, LENGTH, **settings, balance_with=[back])
        assert key != alone and key.balance_with[0].num_rows == key.total_seqlen_q
        other = make_flex_key_for_new_mask_after_dispatch(*back.to_slices(), key)
        assert other.placed_like == key and other.balance_with == ()
        if config is BY_AREA:  # the other counts tiles, of which each chunk has one
            assert uneven(key) < 1.05
            assert ranks == 1 or uneven(alone) > 1.15 * uneven(key)
        assert re.search(r"with the masks that it is balanced with: 1\.[01]", explain_key(key))
        attend(key, front)
        attend(other, back)


def check_explanations(group):
    """What travels and why; whose rows are whose."""
    heads = {"num_heads_q": 12, "num_heads_kv": 12, "head_dim": 64}
    key = causal_key(group, dist_attn_config=DistAttnConfig(strategy="heads"), **heads)
    ranks = group.size()
    text = explain_key(key)
    assert "in use: heads travel; strategy='heads' was asked for" in text
    assert (
        f"rows received by a rank, with 1 / {ranks} of the heads: most {key.total_seqlen_q * (ranks - 1) // ranks}"
        in text
    )
    key = causal_key(group)
    reason = "the key does not know num_heads_q" if ranks > 1 else "there is one rank"
    assert f"in use: keys and values travel; {reason}" in explain_key(key)
    manager = dist_attn_runtime_dict_mgr[key]
    real = dispatch(torch.ones(LENGTH), key) > 0
    assert (manager.owners[get_position_ids(key)[real]] == dist.get_rank(group)).all()
    lines = manager.show(width=LENGTH).split("\n")
    assert lines == [
        "ABCDEFGH"[owner] * (n + 1) + "." * (LENGTH - n - 1) for n, owner in enumerate(manager.owners)
    ]
    pytest.importorskip("matplotlib")
    image = manager.figure().axes[0].images[0].get_array()
    assert len({tuple(row[0]) for row in image.tolist()}) == ranks


def check_documented_calls(group):
    """Examples of the documentation, on few tokens; a batch."""
    config = DistAttnConfig(overlap_config=OverlapConfig(enable=True, degree=2))
    x = normal(64, 16)
    cuts = torch.tensor([0, 32, 64], dtype=torch.int32)
    local, key = magi_attn_varlen_dispatch(
        x, cu_seqlen_q=cuts, cu_seqlen_k=cuts, pad_size=None, chunk_size=4, cp_group_or_mesh=group, causal=False,
        dist_attn_config=config,
    )  # fmt: skip
    q = local.view(-1, 2, 8)
    total = undispatch(calc_attn(q, q, q, key)[0], key)
    whole = x.view(-1, 2, 8)
    same(total, attention(whole, whole, whole, Mask.varlen([0, 32, 64]))[0])
    assert key == magi_attn_varlen_key(cuts, cuts, None, 4, group, False, config)
    local, key = magi_attn_flex_dispatch(
        x, AttnRanges.from_ranges([[0, 32], [32, 64]]), AttnRanges.from_ranges([[0, 32], [0, 64]]), "full", 64, 64, 0, 4,
        group, config, True, True, True, num_heads_q=2, num_heads_kv=2, head_dim=8,
    )  # fmt: skip
    assert torch.equal(undispatch(local, key), x)
    batch = normal(3, 21, 2, 8)
    packed = squash_batch_dim(batch)
    key = magi_attn_varlen_key(*infer_varlen_mask_from_batch(3, 21), cp_group_or_mesh=group, causal=True)
    q = dispatch(packed, key)
    out = undispatch(calc_attn(q, q, q, key)[0], key).view(batch.shape)
    same(out, attention(batch, batch, batch, Mask.causal(21))[0])


def check_layers(group):
    """Two keys in turn, recomputed in the backward; a sink's gradient on request reduced to the mean."""
    keys = causal_key(group), causal_key(group, chunk_size=3, dist_attn_config=DistAttnConfig())
    keys = keys[0], make_flex_key_for_new_mask_after_dispatch([(0, LENGTH)], [(0, LENGTH)], "full", keys[0])
    masks = Mask.causal(LENGTH), Mask.full(LENGTH)
    x, sink = normal(LENGTH, 2, 8).requires_grad_(), normal(2, 2, seed=4).requires_grad_()
    os.environ["MAGI_ATTENTION_DSINK_ALL_REDUCE_OP"] = "avg"

    def layer(x, number):
        return calc_attn(x, x, x, keys[number % 2], sink)[0]

    hidden = dispatch(x, keys[0])
    for number in range(4):
        hidden = checkpoint(layer, hidden, number, use_reentrant=number > 1)
    undispatch(hidden, keys[0]).square().sum().backward()
    del os.environ["MAGI_ATTENTION_DSINK_ALL_REDUCE_OP"]
    whole, logits = x.detach().clone().requires_grad_(), sink.detach().clone().requires_grad_()
    hidden = whole
    for number in range(4):
        hidden = attention(hidden, hidden, hidden, masks[number % 2], sink=logits)[0]
    hidden.square().sum().backward()
    same(x.grad, whole.grad)
    same(sink.grad * group.size(), logits.grad)


def check_compiled(group):
    """A compiled program breaks into graphs around these functions, and is the same."""
    key = causal_key(group)
    x, weight = normal(LENGTH, 8).requires_grad_(), normal(8, 16, seed=2)

    def program(x):
        heads = (roll(dispatch(x, key), 1, 0, key) @ weight).view(-1, 2, 8)
        out, meta = calc_attn(heads, heads, heads, key)
        return undispatch(2 * out + meta.lse[..., None], key)

    found = [
        (run(x), *torch.autograd.grad(run(x).square().sum(), x))
        for run in (program, torch.compile(program, backend="aot_eager"))
    ]
    for ours, theirs in zip(*found, strict=True):
        same(ours, theirs)


def check_groups(world):
    """Meshes, and groups of some ranks that work by themselves."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    line = init_device_mesh("cpu", (ranks,))
    key = causal_key(line)
    assert key.cp_mesh is line and key.cp_size == ranks
    attend(key, Mask.causal(LENGTH))
    if ranks % 2:
        return
    square = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("inter", "intra"))
    key = causal_key(square)
    assert key.num_nodes == 2 and key != causal_key(world) and key.cp_ranks == tuple(range(ranks))
    attend(key, Mask.causal(LENGTH))
    assert (key.hops is None) == (ranks == 2)
    crossed = DeviceMesh("cpu", torch.arange(ranks).view(-1, 2).T)
    assert causal_key(crossed).nodes == tuple(tuple(range(n, ranks, 2)) for n in (0, 1))
    assert (causal_key(crossed) == key) == (ranks == 2)
    attend(causal_key(crossed, dist_attn_config=BALANCED), Mask.causal(LENGTH))
    half = square["intra"]
    own = causal_key(half, length=30 + rank // (ranks // 2))
    attend(own, Mask.causal(own.total_seqlen_q - own.pad_size), own.total_seqlen_q - own.pad_size)
    if ranks == 4:
        cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "inter", "intra"))
        for _ in range(2):
            key = causal_key(cube["inter", "intra"])
            assert key.cp_ranks == ((0, 1) if rank < 2 else (2, 3))
            attend(key, Mask.causal(LENGTH))
        refused(lambda: causal_key(cube), "cp_group_or_mesh: expected a mesh of one or two axes, got 3 axes")


def check_disagreement(group):
    """In debug mode everybody raises, with the first difference."""
    rank, ranks = dist.get_rank(group), group.size()
    os.environ["MAGI_ATTENTION_SANITY_CHECK"] = "1"
    causal_key(group, chunk_size=4)
    if ranks > 1:
        last = rank == ranks - 1
        ranges = [(0, 30), (30, 60)], [(0, 31), (0, 60)] if last else [(0, 30), (0, 60)]
        text = rf"slice 0 .*same on every rank, got .*\(0, 30\).* on rank 0 and .*\(0, 31\).* on rank {ranks - 1}"
        refused(lambda: magi_attn_flex_key(*ranges, "full", 67, 67, cp_group_or_mesh=group), text)
        more = [(0, 9), (9, 12)] if last else [(0, 9)]
        refused(
            lambda: magi_attn_flex_key(more, more, "full", 67, 67, cp_group_or_mesh=group),
            "number of slices .* got 1 on rank",
        )
        refused(lambda: causal_key(group, chunk_size=5 + last), "chunk_size of the key: expected the same")
        config = DistAttnConfig(overlap_config=OverlapConfig(degree=2 if last else 1))
        refused(lambda: causal_key(group, dist_attn_config=config), "dist_attn_config of the key")
        masks = [Mask.full(LENGTH) if last else Mask.causal(LENGTH)]
        refused(lambda: causal_key(group, balance_with=masks), "balance_with of the key: expected the same")
        refused(lambda: causal_key(group, length=60 + last), "total_seqlen|pad_size|chunk_size")
        beyond = [(0, 99)] if last else [(0, 9)]
        text = (
            r"q_ranges\[0\]: expected end <= 67" if last else rf"got on rank {ranks - 1} ValueError: q_ranges"
        )
        refused(lambda: magi_attn_flex_key(beyond, beyond, "full", 67, 67, cp_group_or_mesh=group), text)
    attend(causal_key(group, chunk_size=4), Mask.causal(LENGTH))
    del os.environ["MAGI_ATTENTION_SANITY_CHECK"]


def main() -> None:
    """All checks in one process group."""
    *_, group, device, _ = setup_dist_env()
    assert device == torch.device("cpu") and dist.get_backend() == "gloo"
    for config in (None, UNEVEN, DistAttnConfig(DispatchConfig(chunk_size=4))):
        check_movement(group, config)
        check_roll(group, config)
    check_several_masks(group)
    check_joint_balance(group)
    check_explanations(group)
    check_documented_calls(group)
    check_layers(group)
    if group.size() == 2:
        check_compiled(group)
    check_groups(group)
    check_disagreement(group)
    clearup_dist_env()
    assert not dist.is_initialized()
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
