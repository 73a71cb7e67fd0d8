"""One rank of the test over NCCL, on a GPU of its own: 16-bit kernels by the tolerance rule."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from attention_program import Case, compare, inputs, on_all_ranks, slices

from magi_attention import config
from magi_attention.api import calc_attn, dispatch, magi_attn_flex_key
from magi_attention.common import AttnOverlapMode
from magi_attention.config import OverlapConfig
from magi_attention.mask import Mask
from magi_attention.utils import clearup_dist_env, setup_dist_env

DOCUMENTS = Mask.varlen([0, 1, 700, 701, 1500, 2750, 3501], causal=True)
DYNAMIC = OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=None)
BALANCED = config.BalancedDispatchAlg()


def cases(ranks: int) -> dict[str, Case]:
    """Masks, placements and ways to move, in bf16 with heads of 128 if nothing else is said."""
    plain = Case(
        DOCUMENTS, BALANCED, dtype=torch.bfloat16, heads=(8, 4), dims=(128, 128), key={"chunk_size": 128}
    )
    causal = replace(plain, mask=Mask.causal(3001))
    window = replace(plain, mask=Mask.sliding_window(2049, 2049, (300, 0), keep_first=4))
    blocks = slices(*[((i, i + 512), (0, i + 512), 0) for i in range(0, 2560, 512)], size=(2560, 2560))
    found = {
        "documents": plain,
        "documents, sinks": replace(plain, sink=2),
        "documents, all at once": replace(plain, overlap=OverlapConfig(enable=False), sink=1),
        "documents, fp16, heads of 64": replace(plain, dtype=torch.float16, dims=(64, 64), overlap=DYNAMIC),
        "documents, uneven": replace(plain, uneven=True, alg=config.SequentialDispatchAlg()),
        "documents, min-heap": replace(plain, alg=config.MinHeapDispatchAlg(), overlap=DYNAMIC),
        "causal, three stages": replace(causal, overlap=OverlapConfig(degree=3, min_chunk_size=128)),
        "causal, hidden tail": replace(
            causal, overlap=OverlapConfig(degree=2, min_chunk_size=128, hide_tail=True)
        ),
        "causal, multiprocessors left": replace(causal, overlap=OverlapConfig(sm_margin=16), sink=1),
        "causal, softcap": replace(causal, attn={"softcap": 20.0, "return_max_logits": True}),
        "window": replace(window, sink=1),
        "window, zigzag": replace(window, alg=config.ZigzagDispatchAlg(), overlap=DYNAMIC),
        "block causal": replace(plain, mask=blocks, attn={"return_max_logits": True}),
        "full": replace(plain, mask=Mask.full(2000), overlap=OverlapConfig(degree=2, min_chunk_size=128)),
    }
    if 4 % ranks == 0:
        found["heads"] = replace(causal, strategy="heads", sink=2, attn={"return_max_logits": True})
        found["heads, documents"] = replace(plain, strategy="heads", uneven=True)
    return found


def check_graph(group: dist.ProcessGroup, device: int) -> None:
    """A captured call gives what the call itself gives for the tensors that its memory holds at the replay."""
    queries, keys, types = DOCUMENTS.to_slices()
    rows = DOCUMENTS.num_rows
    key = magi_attn_flex_key(queries, keys, types, rows, rows, cp_group_or_mesh=group)
    local = [
        dispatch(torch.randn(rows, heads, 128, device=device, dtype=torch.bfloat16), key)
        for heads in (8, 4, 4)
    ]
    for _ in range(2):
        calc_attn(*local, key)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out, _ = calc_attn(*local, key)
    for x in local:
        x.normal_()
    expected, _ = calc_attn(*local, key)
    graph.replay()
    assert torch.equal(out, expected)


def main() -> None:
    """All cases in one process group, each three times: what they give must be right, and the same bits if asked for.

    With the argument "graph" a captured call instead.
    """
    rank, _, ranks, _, _, group, device, _ = setup_dist_env()
    assert dist.get_backend() == "nccl"
    if sys.argv[1:] == ["graph"]:
        check_graph(group, device)
    for number, (name, case) in enumerate(cases(ranks).items() if len(sys.argv) == 1 else ()):
        given = inputs(case, number, device)
        try:
            compare(case, on_all_ranks(case, given, group), given)
            torch.use_deterministic_algorithms(True)
            one, other = (on_all_ranks(case, given, group) for _ in range(2))
            torch.use_deterministic_algorithms(False)
            assert all(torch.equal(one[n], other[n]) for n in given if n in one), "other bits"
        except Exception as error:
            error.add_note(f"rank {rank} of {ranks}: {name}")
            raise
    clearup_dist_env()
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
