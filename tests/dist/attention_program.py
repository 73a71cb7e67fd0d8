"""One rank of the test of dispatch, calc_attn and undispatch against one device in fp64."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from magi_attention import config, env
from magi_attention.api import calc_attn, dispatch, magi_attn_flex_key, undispatch
from magi_attention.common import AttnOverlapMode
from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.dist import exchange
from magi_attention.kernels.reference.dense import dense_attention
from magi_attention.mask import Mask
from magi_attention.testing.tolerance import figure
from magi_attention.utils import clearup_dist_env, setup_dist_env

exchange.UNIT = 8  # so that short sequences have several stages, too


@dataclass(frozen=True)
class Case:
    """A mask, and how it is placed and computed. ``key`` holds further arguments of the key."""

    mask: Mask
    alg: config.DispatchAlg = field(default_factory=config.MinHeapDispatchAlg)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    uneven: bool = False
    sink: int = 0
    key: dict[str, Any] = field(default_factory=dict)
    attn: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 8)
    strategy: str = "keys"


def slices(*parts: tuple, size: tuple[int, int]) -> Mask:
    """From (query range, key range, type)."""
    queries, keys, types = zip(*parts, strict=True)
    return Mask.from_ranges(queries, keys, types, *size)


MASKS = {
    "full": Mask.full(53),
    "one token": Mask.causal(1),
    "causal": Mask.causal(131),
    "window": Mask.sliding_window(97, 97, (13, 5)),
    "first keys": Mask.sliding_window(97, 97, (13, 0), keep_first=3),
    "documents": Mask.varlen([0, 1, 40, 40, 90, 143], causal=True),
    "block causal": slices(*[((i, i + 20), (0, i + 20), 0) for i in range(0, 100, 20)], size=(101, 101)),
    "all types": slices(
        *[((i * 20, i * 20 + 25), (i * 15, i * 15 + 27), i) for i in range(4)], size=(89, 89)
    ),
    "bi causal": slices(((0, 61), (0, 67), 3), size=(67, 67)),
    "blind rows": slices(((20, 30), (3, 9), 0), size=(77, 77)),
    "twice": slices(((0, 50), (0, 50), 1), ((0, 50), (10, 40), 0), size=(50, 50)),
    "nothing": Mask([], 37, 37),
}
ALGORITHMS = [
    config.MinHeapDispatchAlg(),
    config.SequentialDispatchAlg(),
    config.ZigzagDispatchAlg(),
    config.RandomSelectDispatchAlg(),
    config.ToppHeapDispatchAlg(top_p=0.5),
    config.BatchToppHeapDispatchAlg(top_p=0.5, num_of_select_chunk=2),
    config.SortedSequentialSelectAlg(),
    config.BalancedDispatchAlg(),
]
EXACT = [config.BSDispatchAlg(), config.BTPDispatchAlg()]
OVERLAPS = [
    OverlapConfig(enable=False),
    OverlapConfig(),
    OverlapConfig(degree=2, min_chunk_size=8),
    OverlapConfig(
        degree=4, min_chunk_size=5, alg=config.UniformOverlapAlg(random_costs=True, random_seed=42)
    ),
    OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=None, min_chunk_size=8),
]


def cases(ranks: int) -> dict[str, Case]:
    """Every mask, algorithm and overlap, even and uneven; sinks, softcap and scales among them."""
    found = {}
    for n, (name, mask) in enumerate(MASKS.items()):
        case = Case(mask, ALGORITHMS[n % len(ALGORITHMS)], OVERLAPS[n % len(OVERLAPS)], sink=n % 3)
        found[name] = replace(case, key={"chunk_size": 5} if n % 2 else {})
        if mask.num_rows >= 4 * ranks:
            uneven = replace(case, uneven=True, overlap=OVERLAPS[(n + 2) % len(OVERLAPS)], sink=(n + 1) % 3)
            found[f"{name}, uneven"] = replace(uneven, key={"chunk_size": 4})
    found["fewer tokens than ranks, uneven"] = Case(Mask.causal(3), uneven=True, sink=1)
    documents = MASKS["documents"]
    for alg in ALGORITHMS:
        found[f"documents, {type(alg).__name__}"] = Case(documents, alg, OVERLAPS[2], key={"chunk_size": 7})
    for alg in EXACT:
        found[f"documents, {type(alg).__name__}"] = Case(documents, alg, key={"chunk_size": 11})
    for overlap in OVERLAPS:
        found[f"window, {overlap}"] = Case(MASKS["window"], overlap=overlap, sink=1)
    for flags in ((True, False, False), (False, True, True), (False, True, False), (False, False, True)):
        names = ("is_same_source", "is_q_permutable", "is_k_permutable")
        arguments = dict(zip(names, flags, strict=True))
        mask = (
            MASKS["causal"]
            if flags[0]
            else slices(((0, 40), (0, 71), 1), ((30, 61), (20, 83), 0), size=(61, 83))
        )
        found[f"sources {flags}"] = Case(mask, sink=1, key=arguments)
        found[f"sources {flags}, uneven"] = Case(mask, uneven=True, key={**arguments, "chunk_size": 3})
    causal = Case(MASKS["causal"])
    found["softcap"] = replace(
        causal, sink=2, attn={"softcap": 2.0, "softmax_scale": 0.5, "return_max_logits": True}
    )
    found["largest logits"] = replace(causal, attn={"return_max_logits": True}, overlap=OVERLAPS[2])
    found["padding asked for"] = replace(causal, key={"pad_size": 29, "chunk_size": 10})
    found["bf16"] = replace(causal, dtype=torch.bfloat16, sink=1, overlap=OVERLAPS[2])
    found["fp32, one head"] = replace(causal, dtype=torch.float32, heads=(1, 1), overlap=OVERLAPS[1])
    return found


def drawn(seed: int) -> Case:
    """Anything: slices that overlap and are empty, of one or two sources, any placement."""
    draw = np.random.default_rng(seed)
    rows, same_source = int(draw.integers(1, 150)), bool(draw.integers(2))
    cols = rows if same_source else int(draw.integers(1, 150))
    parts = [
        (*(sorted(draw.integers(0, size + 1, 2).tolist()) for size in (rows, cols)), int(draw.integers(4)))
        for _ in range(draw.integers(1, 7))
    ]
    sources = {"is_same_source": same_source}
    if not same_source:
        sources["is_q_permutable"] = bool(draw.integers(2))
    return Case(
        slices(*parts, size=(rows, cols)),
        ALGORITHMS[draw.integers(len(ALGORITHMS))],
        OVERLAPS[draw.integers(len(OVERLAPS))],
        sink=int(draw.integers(3)),
        key=sources
        | {"pad_size": int(draw.integers(5))}
        | ({"chunk_size": int(draw.integers(1, 20))} if draw.integers(2) else {}),
        heads=((1, 1), (4, 2), (3, 3))[draw.integers(3)],
    )


def inputs(case: Case, seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """q, k, v, perhaps a sink, and the gradients of out and lse, the same on every rank."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device, dtype)

    rows, cols = case.mask.num_rows, case.mask.num_cols
    heads, kv_heads = case.heads
    dim, dim_v = case.dims
    found = {
        "q": normal(rows, heads, dim),
        "k": normal(cols, kv_heads, dim),
        "v": normal(cols, kv_heads, dim_v),
    }
    if case.sink:
        found["sink"] = normal(case.sink, heads, dtype=torch.promote_types(case.dtype, torch.float32))
    return found | {"dout": normal(rows, heads, dim_v), "dlse": normal(rows, heads, dtype=torch.float64)}


def results(out: torch.Tensor, lse: torch.Tensor, leaves: dict[str, torch.Tensor], given: dict) -> dict:
    """out, lse and the gradients of the leaves."""
    dlse = torch.where(lse.isinf(), 0, given["dlse"].to(lse.dtype))
    torch.autograd.backward([out, lse], [given["dout"].to(out.dtype), dlse])
    return {"out": out.detach(), "lse": lse.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def by_formula(
    case: Case, given: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The definition, at ``dtype`` or at the precision of the input."""
    leaves = {
        n: given[n].detach().to(dtype or given[n].dtype, copy=True).requires_grad_()
        for n in ("q", "k", "v", "sink")
        if n in given
    }
    settings = {name: value for name, value in case.attn.items() if name != "return_max_logits"}
    out, lse, top = dense_attention(
        leaves["q"], leaves["k"], leaves["v"], case.mask.table, leaves.get("sink"), dtype=dtype, **settings
    )
    return results(out, lse, leaves, given) | {"max_logits": top}


def on_all_ranks(
    case: Case, given: dict[str, torch.Tensor], group: dist.ProcessGroup, mesh: DeviceMesh | None = None
) -> dict[str, torch.Tensor]:
    """Through a key, padded with NaN."""
    dispatch_config = DispatchConfig(alg=case.alg, uneven_shard=case.uneven)
    queries, keys, types = case.mask.to_slices()
    key = magi_attn_flex_key(
        queries,
        keys,
        types or "full",
        case.mask.num_rows,
        case.mask.num_cols,
        cp_group_or_mesh=mesh or group,
        dist_attn_config=DistAttnConfig(dispatch_config, case.overlap, strategy=case.strategy),
        num_heads_q=case.heads[0],
        num_heads_kv=case.heads[1],
        head_dim=case.dims[0],
        **case.key,
    )
    leaves = {
        name: given[name].detach().clone().requires_grad_()
        for name in ("q", "k", "v", "sink")
        if name in given
    }
    local = [
        dispatch(leaves[name], key, pad_value=torch.nan, role=role)
        for name, role in (("q", "query"), ("k", "key"), ("v", "value"))
    ]
    if not case.uneven and not isinstance(case.alg, config.BSDispatchAlg):
        assert len(local[0]) * group.size() == key.total_seqlen_q == case.mask.num_rows + key.pad_size
    sink = leaves.get("sink")
    out, meta = calc_attn(*local, key, sink=sink, **case.attn)
    assert out.dtype == case.dtype and out.shape == (*local[0].shape[:2], local[2].shape[2])
    found = results(undispatch(out, key), undispatch(meta.lse, key), leaves, given)
    if sink is not None and env.dsink_all_reduce_op() != "sum":
        dist.all_reduce(found["sink"], group=group)
    return found | {"max_logits": meta.max_logits}


def compare(case: Case, ours: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    """Equal in fp64; else by the tolerance rule."""
    exact = by_formula(case, given, torch.float64)
    plain = by_formula(case, given, None)
    for name in ("out", "lse", "q", "k", "v", "sink"):
        if name not in exact:
            continue
        truth = exact[name]
        if case.dtype is torch.float64:
            torch.testing.assert_close(
                ours[name], truth, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )
            continue
        size = truth[truth.isfinite()].abs().max().item()
        found = figure(name, ours[name], truth, plain[name], unit=8 * size)  # logits are rounded, too
        assert found.ok, found
    if case.attn.get("return_max_logits"):
        torch.testing.assert_close(
            ours["max_logits"].double(), exact["max_logits"].double(), rtol=1e-5, atol=1e-5
        )


def main() -> None:
    """All cases in one process group; or, with arguments, every n-th one and those drawn by some seeds, on some nodes."""
    rank, _, ranks, *_, group, _, _ = setup_dist_env()
    every, first, last, *nodes = (int(x) for x in sys.argv[1:]) if len(sys.argv) > 1 else (1, 0, 12)
    mesh = init_device_mesh("cpu", (nodes[0], ranks // nodes[0])) if nodes else None
    chosen = list(cases(ranks).items())[::every] + [
        (f"drawn {seed}", drawn(seed)) for seed in range(first, last)
    ]
    for number, (name, case) in enumerate(chosen):
        given = inputs(case, number)
        try:
            compare(case, on_all_ranks(case, given, group, mesh), given)
        except Exception as error:
            error.add_note(f"rank {rank} of {ranks}: {name}")
            raise
    clearup_dist_env()
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
