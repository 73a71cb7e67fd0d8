"""One rank's part of the test of dispatch and undispatch, in a process group that is there."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from magi_attention.dist.shard import Shards, dispatch, undispatch


def check_shards() -> None:
    """Round trips are identities, gradients are those of the definition, padding holds what it is told."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    length, padded, size = 53, 60, 5
    begins = np.random.default_rng(0).permutation(np.arange(0, padded, size))
    # Uneven: the first rank has more.
    cuts = [0, *(len(begins) - np.arange(ranks - 1)[::-1] - 1 if ranks > 1 else []), len(begins)]
    ranges = [np.array([(b, b + size) for b in begins[cuts[n] : cuts[n + 1]]]) for n in range(ranks)]
    shards = Shards(length, ranges, rank)
    x = torch.randn(
        length, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    local = dispatch(x, shards, pad_value=torch.nan)
    own = np.concatenate([np.arange(a, b) for a, b in ranges[rank]])
    real = torch.from_numpy(own < length)
    assert torch.equal(local[real], x[torch.from_numpy(own)[real]]) and local[~real].isnan().all()
    assert torch.equal(undispatch(local.detach(), shards), x)

    weights = torch.randn(length, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = undispatch(dispatch(x, shards).square(), shards)
    (whole * weights).sum().backward()  # the same loss on every rank
    torch.testing.assert_close(x.grad, 2 * x.detach() * weights)
    x.grad = None
    share = torch.zeros(length, 3, dtype=torch.float64)
    share[rank::ranks] = weights[rank::ranks]  # a part of the loss on each rank
    whole = undispatch(dispatch(x, shards).square(), shards, is_partial_grad=True)
    (whole * share).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * weights)
    integers = torch.arange(length)
    assert torch.equal(undispatch(dispatch(integers, shards), shards), integers)
