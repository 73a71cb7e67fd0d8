"""How a call behaves on the GPU: same bits, no waiting for the device, graphs, compilation, no new kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, MASKS, case_of, on_device

from magi_attention.attention import attention
from magi_attention.mask import DeviceMask, Mask
from magi_attention.mask.lowering import lower_varlen
from magi_attention.testing import Case, assert_matches_oracle, random_case

pytestmark = pytest.mark.gpu

DOCUMENTS = MASKS["documents"]


def leaves_of(case: Case) -> list[torch.Tensor]:
    sinks = [] if case.sink is None else [case.sink]
    return [x.detach().requires_grad_() for x in (case.q, case.k, case.v, *sinks)]


def forward_and_backward(
    leaves: list[torch.Tensor], case: Case, mask: Mask | DeviceMask
) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv and dsink."""
    q, k, v, *sinks = leaves
    out, meta = attention(q, k, v, mask, sink=sinks[0] if sinks else None, deterministic=True)
    grads = torch.autograd.grad([out, meta.lse], leaves, [case.dout, case.dlse])
    return [out.detach(), meta.lse.detach(), *grads]


def with_sink(mask: Mask | DeviceMask, **settings) -> Case:
    return case_of(mask, sink=torch.randn(3, 4, device=DEVICE), **settings)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Everything the test does after ``torch.cuda.set_sync_debug_mode('error')`` is undone afterwards."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["documents", "prefix tree", "covered twice"])
@pytest.mark.parametrize("place", [lambda mask: mask, on_device], ids=["host", "device"])
def test_the_same_bits_every_time(name, place):
    mask = place(MASKS[name])
    case = with_sink(mask, batch=2)
    first = forward_and_backward(leaves_of(case), case, mask)
    for _ in range(19):
        again = forward_and_backward(leaves_of(case), case, mask)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_host_and_device_bands_give_the_same_bits():
    case = with_sink(DOCUMENTS)
    host = forward_and_backward(leaves_of(case), case, DOCUMENTS)
    device = forward_and_backward(leaves_of(case), case, on_device(DOCUMENTS))
    assert all(torch.equal(a, b) for a, b in zip(host, device, strict=True))


@pytest.mark.usefixtures("no_synchronisation")
def test_device_bands_never_wait_for_the_device():
    cuts = torch.tensor([0, 100, 500, 1111], dtype=torch.int32, device=DEVICE)
    case = with_sink(DOCUMENTS)
    leaves = leaves_of(case)
    forward_and_backward(
        leaves, case, DeviceMask(lower_varlen(cuts, None, 1111, 1111, causal=True), 1111, 1111)
    )
    cuts = torch.tensor([0, 7, 900, 1111], dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    table = lower_varlen(cuts, None, 1111, 1111, causal=True)
    got = forward_and_backward(leaves, case, DeviceMask(table, 1111, 1111))
    torch.cuda.set_sync_debug_mode("default")
    want = forward_and_backward(leaves, case, Mask.varlen([0, 7, 900, 1111], causal=True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_captured_graph_follows_the_ranges():
    table = DOCUMENTS.table.to(DEVICE)
    mask = DeviceMask(table, 1111, 1111)
    case = with_sink(mask)
    leaves = leaves_of(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward_and_backward(leaves, case, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(leaves, case, mask)
    for cuts in ([0, 1, 8, 129, 130, 513, 1111], [0, 3, 300, 301, 302, 1000, 1111], [0, 0, 0, 0, 0, 0, 1111]):
        bands = torch.zeros_like(table, device="cpu")
        fresh = Mask.varlen(cuts, causal=True)
        bands[: len(fresh.table)] = fresh.table
        table.copy_(bands)
        with torch.no_grad():
            case.q.normal_()
        graph.replay()
        # Empty bands and all: how many there are decides on the tiles.
        want = forward_and_backward(leaves_of(case), case, Mask(bands.numpy(), 1111, 1111))
        for ours, eager in zip(captured, want, strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_a_host_mask_can_be_captured_after_its_first_call():
    case = with_sink(DOCUMENTS)
    leaves = leaves_of(case)
    want = forward_and_backward(leaves, case, DOCUMENTS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(leaves, case, DOCUMENTS)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(leaves, case, DOCUMENTS)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_a_plan_built_on_one_stream_serves_another():
    case = with_sink(DOCUMENTS)
    want = forward_and_backward(leaves_of(case), case, DOCUMENTS)
    mask = on_device(DOCUMENTS)
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = forward_and_backward(leaves_of(case), case, mask)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("place", [lambda mask: mask, on_device], ids=["host", "device"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(place, dynamic):
    torch._dynamo.reset()
    mask = place(DOCUMENTS)
    case = with_sink(mask)

    def model(q, k, v, sink, mask):
        out, meta = attention(q * 1.5, k, v, mask, sink=sink)
        return (out.float() * 0.5).sin().sum() + meta.lse.square().sum()

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    ours, eager = leaves_of(case), leaves_of(case)
    torch.testing.assert_close(compiled(*ours, mask), model(*eager, mask), rtol=1e-3, atol=1e-3)
    compiled_grads = torch.autograd.grad(compiled(*ours, mask), ours)
    for a, b in zip(compiled_grads, torch.autograd.grad(model(*eager, mask), eager), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def compiled_kernels() -> int:
    """Variants of our Triton kernels that this process has compiled."""
    from triton.runtime import JITFunction

    from magi_attention.kernels.hopper import backward as hopper_backward
    from magi_attention.kernels.hopper import forward as hopper_forward
    from magi_attention.kernels.triton import backward, forward
    from magi_attention.plan import device

    kernels = {
        id(value): value
        for module in (backward, forward, hopper_backward, hopper_forward, device)
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    return sum(len(entry[0]) for kernel in kernels.values() for entry in kernel.device_caches.values())


def test_new_lengths_masks_and_batches_compile_no_new_kernels():
    generator = np.random.default_rng(0)

    def call(tokens: int, documents: int, batch: int | None) -> None:
        cuts = np.sort(generator.integers(0, tokens + 1, documents - 1))
        mask = Mask.varlen([0, *cuts, tokens], causal=True)
        for each in (mask, on_device(mask)):
            case = case_of(each, heads=(4, 2), batch=batch)
            forward_and_backward(leaves_of(case), case, each)

    call(512, 3, None)  # short documents have tiles of their own
    call(2048, 1, None)
    before = compiled_kernels()
    assert before > 0
    for length in generator.integers(1, 3000, 17):
        call(int(length), int(generator.integers(1, 40)), None)
    call(16, 1, 2)
    call(1024, 16, 16)
    call(1, 1, 1)
    assert compiled_kernels() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_tensors_on_a_device_that_is_not_the_current_one(backend):
    case = random_case(Mask.causal(300), heads=(4, 2), head_dim=64, dtype=torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_matches_oracle(case, backend=backend)
