"""One rank of the runtime's test; run under torchrun's environment with gloo. Arguments are numbers of nodes to try."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from shard_checks import check_shards
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.attention import attention
from magi_attention.config import (
    BalancedDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    RandomSelectDispatchAlg,
)
from magi_attention.dist import exchange
from magi_attention.dist.chunks import cut
from magi_attention.dist.exchange import Exchange
from magi_attention.dist.heads import HeadWork, attend_by_heads, can_split
from magi_attention.dist.placement import place
from magi_attention.dist.runtime import Work, attend
from magi_attention.dist.shard import Shards
from magi_attention.mask import Mask

exchange.UNIT = 8  # so that short sequences have several stages, too
CASES = [
    (Mask.varlen([0, 30, 31, 200, 401], causal=True), MinHeapDispatchAlg(), 1, 0.0),
    (Mask.varlen([0, 90, 401], causal=True, window=(60, 0), keep_first=3), BalancedDispatchAlg(), 2, 3.0),
    (Mask.full(300), RandomSelectDispatchAlg(), 3, 0.0),
    (
        Mask([[0, 300, 50, 200, -100, 60], [250, 300, 0, 300, -400, 400]], 300, 300),
        MinHeapDispatchAlg(),
        2,
        0.0,
    ),
]


def ways(
    mask: Mask, parts: list[np.ndarray], degree: int, heads: tuple[int, int], mesh: DeviceMesh | None
) -> Iterator[Callable]:
    """Everything that attends from own rows."""
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    nodes = None if mesh is None else mesh.mesh.numpy()
    hops = None if mesh is None else (mesh.get_group(0), mesh.get_group(1))
    for number, hides_tail in ((degree, False), (degree, True), (0, False)):
        exchange = Exchange(mask.bands, parts, parts, number, OverlapConfig(min_chunk_size=8), nodes)
        work = Work.of(exchange.share(rank), device, None, hops=hops, hides_tail=hides_tail)
        yield partial(attend, work=work)
    if mesh is None and can_split(*heads, ranks):
        shards = Shards(mask.num_rows, parts, rank)
        yield partial(attend_by_heads, work=HeadWork(mask, shards, shards))


def main() -> None:
    """Compare with one device; every rank for its own rows, and for the sum of gradients that all have."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    places = torch.arange(ranks)  # neighbours on different nodes
    meshes = [DeviceMesh("cpu", places.view(-1, int(nodes)).T) for nodes in sys.argv[1:]] or [None]
    for number, (mask, alg, degree, softcap) in enumerate(CASES):
        torch.manual_seed(number)
        q, k, v = (
            torch.randn(mask.num_rows, h, d, dtype=torch.float64) for h, d in ((4, 16), (2, 16), (2, 8))
        )
        sink = torch.randn(2, 4, dtype=torch.float64) if number % 2 else None
        dout, dlse = (
            torch.randn(mask.num_rows, 4, 8, dtype=torch.float64),
            torch.randn(mask.num_rows, 4, dtype=torch.float64),
        )
        chunks = cut(mask.bands, mask.num_rows, mask.num_cols, 16)
        parts = [chunks.rows[part] for part in place(alg, chunks, ranks)]
        rows = torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in parts[rank]]))
        whole = [x.clone().requires_grad_() for x in (q, k, v)] + (
            [sink.clone().requires_grad_()] if number % 2 else []
        )
        settings = {"softcap": softcap, "return_max_logits": True}
        out, meta = attention(*whole[:3], mask, sink=whole[3] if number % 2 else None, **settings)
        torch.autograd.backward([out, meta.lse], [dout, torch.where(meta.lse.isinf(), 0.0, dlse)])
        for way in (way for mesh in meshes for way in ways(mask, parts, degree, (4, 2), mesh)):
            gradients = []
            for _ in range(2 if meshes[0] else 1):
                own = [x[rows].clone().requires_grad_() for x in (q, k, v)] + (
                    [sink.clone().requires_grad_()] if number % 2 else []
                )
                found, lse, top = way(*own[:3], sink=own[3] if number % 2 else None, **settings)
                torch.autograd.backward([found, lse], [dout[rows], torch.where(lse.isinf(), 0.0, dlse[rows])])
                gradients.append([x.grad.clone() for x in own])
            assert all(map(torch.equal, gradients[0], gradients[-1]))
            torch.testing.assert_close(found, out[rows], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(lse, meta.lse[rows], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(top, meta.max_logits)
            for ours, theirs in zip(own[:3], whole[:3], strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad[rows], rtol=1e-8, atol=1e-8)
            if number % 2:
                dist.all_reduce(own[3].grad)
                torch.testing.assert_close(own[3].grad, whole[3].grad, rtol=1e-8, atol=1e-8)
    check_shards()
    dist.destroy_process_group()
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
