"""Ranges on a GPU: no synchronisation, CUDA graphs that follow the content, clamping, the sanity check."""

from __future__ import annotations

import pytest
import torch
from slice_oracle import assert_door_matches, mask_by_definition, tensors

from magi_attention.api import flex_flash_attn_func, flex_mask
from magi_attention.testing import random_case

pytestmark = pytest.mark.gpu

SLICES = [((0, 100), (0, 60), 1), ((50, 180), (60, 200), 2), ((120, 200), (3, 190), 3)]
OTHERS = [((0, 200), (0, 50), 0), ((10, 150), (50, 190), 1), ((150, 150), (0, 9), 0)]


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [
        torch.randn(200, heads, 64, dtype=dtype, device="cuda", requires_grad=True) for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_matches_the_definition(dtype: torch.dtype, home: str) -> None:
    case = random_case(
        mask_by_definition(SLICES, 210, 205),
        heads=(4, 2),
        head_dim=64,
        dtype=dtype,
        device="cuda",
        sink=torch.randn(3, 4, device="cuda"),
    )
    assert_door_matches(case, SLICES, device=home)


def test_ranges_on_either_side_give_the_same_bits() -> None:
    q, k, v = inputs()
    on_host, on_device = (flex_flash_attn_func(q, k, v, *tensors(SLICES, home)) for home in ("cpu", "cuda"))
    torch.testing.assert_close(on_host[0], on_device[0])
    torch.testing.assert_close(on_host[1].lse, on_device[1].lse)


def test_no_synchronisation_once_warm() -> None:
    q, k, v = inputs()
    warm, fresh = tensors(SLICES, "cuda"), tensors(OTHERS, "cuda")
    flex_flash_attn_func(q, k, v, *warm)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ranges in (warm, fresh):
            flex_flash_attn_func(q, k, v, *ranges)[0].sum().backward()
        flex_flash_attn_func(q, k, v, *fresh[:2], "causal", return_max_logits=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_the_content_of_the_ranges() -> None:
    q, k, v = inputs()
    ranges = tensors(SLICES, "cuda")

    def step() -> list[torch.Tensor]:
        out, meta = flex_flash_attn_func(q, k, v, *ranges)
        return [out, meta.lse, *torch.autograd.grad((out.float().square().sum() + meta.lse.sum()), (q, k, v))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for slices in (OTHERS, SLICES):
        for held, new in zip(ranges, tensors(slices, "cuda"), strict=True):
            held.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.clone() for x in captured]
        for ours, want in zip(replayed, step(), strict=True):
            torch.testing.assert_close(ours, want)
    torch.testing.assert_close(replayed[0], flex_flash_attn_func(q, k, v, *tensors(SLICES))[0])


def test_invalid_slices_show_nothing_and_the_sanity_check_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    bad = [*SLICES, ((30, 10), (0, 9), 0), ((0, 9), (0, 9), 7)]
    out = flex_flash_attn_func(q, k, v, *tensors(bad, "cuda"))[0]
    torch.testing.assert_close(out, flex_flash_attn_func(q, k, v, *tensors(SLICES))[0])
    monkeypatch.setenv("MAGI_ATTENTION_SANITY_CHECK", "1")
    with pytest.raises(ValueError, match=r"q_ranges\[3\]: expected start <= end"):
        flex_flash_attn_func(q, k, v, *tensors(bad, "cuda"))


def test_lists_of_types_beside_device_ranges_are_refused() -> None:
    q, k, v = inputs()
    q_ranges, k_ranges, _ = tensors(SLICES, "cuda")
    with pytest.raises(ValueError, match="attn_type_map device: expected cuda:0"):
        flex_flash_attn_func(q, k, v, q_ranges, k_ranges, ["full", "causal", "full"])


def test_each_stream_lowers_its_own_bands() -> None:
    flex_mask.clear_mask_cache()
    ranges = tensors(SLICES, "cuda")
    torch.cuda.synchronize()
    first = flex_mask._device_mask(*ranges, 200, 200)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert flex_mask._device_mask(*ranges, 200, 200) is not first
    assert flex_mask._device_mask(*ranges, 200, 200) is first


def test_compiles_as_one_graph() -> None:
    q, k, v = inputs()
    ranges = tensors(SLICES, "cuda")
    compiled = torch.compile(flex_flash_attn_func, fullgraph=True)
    for function_ranges in (ranges, tensors(OTHERS, "cuda")):
        want = flex_flash_attn_func(q, k, v, *function_ranges)[0]
        torch.testing.assert_close(compiled(q, k, v, *function_ranges)[0], want)
