"""What the Hopper forward is launched with: a call like an earlier one is prepared by look-up, any other one anew."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from magi_attention.attention import attention
from magi_attention.kernels import ops
from magi_attention.kernels.hopper import launch
from magi_attention.kernels.problem import Problem
from magi_attention.mask import Mask

MASK = Mask.causal(1024)
NAMES = launch.forward_kernel.arg_names


class Kernel:
    """Takes the place of a compiled kernel and of what compiles it: notes each launch, and runs nothing."""

    def __init__(self, names: list[str] = NAMES) -> None:
        self.arg_names = names
        self.launches: list[tuple[str, tuple, dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        how = "directly" if len(grid) == 3 else "looked up by Triton"

        def start(*args: Any, **kwargs: Any) -> Kernel:
            self.launches.append((how, grid, dict(zip(self.arg_names, args, strict=False)) | kwargs))
            return self

        return start


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake, counter = Kernel(), torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(launch, "forward_kernel", fake)
    monkeypatch.setattr(launch, "_num_programs", lambda device, margin: 132 - margin)
    monkeypatch.setattr(launch, "_work_counter", lambda device: counter)
    launch._forward_of.cache_clear()
    yield fake
    launch._forward_of.cache_clear()


def problem(**changes: Any) -> Problem:
    q, k = torch.randn(1, 1024, 8, 64).bfloat16(), torch.randn(1, 1024, 2, 64).bfloat16()
    return dataclasses.replace(Problem(q, k, k.clone(), None, MASK.table, 0.125, 0.0), **changes)


def launched(kernel: Kernel, given: Problem, max_logits: bool = False) -> tuple[str, tuple, dict[str, Any]]:
    count = len(kernel.launches)
    launch.forward(given, max_logits)
    assert len(kernel.launches) == count + 1
    return kernel.launches[-1]


def described(x: Any) -> tuple:
    return x.shape, x.strides, x.block_shape, x.layout, x.padding


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without addresses."""
    shown = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            shown[name] = value.dtype
        elif hasattr(value, "block_shape"):
            shown[name] = described(value)
        else:
            shown[name] = value
    return shown


def test_the_second_launch_goes_past_triton_with_the_same_arguments(kernel):
    first, second = launched(kernel, problem()), launched(kernel, problem())
    assert (first[0], second[0]) == ("looked up by Triton", "directly")
    assert second[1] == (*first[1], 1, 1)
    options = {name: first[2].pop(name) for name in ("num_warps", "maxnreg", "enable_fp_fusion")}
    assert all(options.values()) and plain(first[2]) == plain(second[2])
    assert set(second[2]) == set(NAMES)


def test_without_the_batch_axis_the_launch_is_the_same(kernel):
    given = problem()
    out, lse, _ = launch.forward(given, False)
    packed = dataclasses.replace(given, q=given.q[0], k=given.k[0], v=given.v[0])
    packed_out, packed_lse, _ = launch.forward(packed, False)
    assert (packed_out.shape, packed_lse.shape) == (out.shape[1:], lse.shape[1:])
    assert packed_out.is_contiguous() and packed_lse.is_contiguous()
    batched, unbatched = (arguments for _, _, arguments in kernel.launches)
    for name in ("num_warps", "maxnreg", "enable_fp_fusion"):
        del batched[name]
    assert plain(batched) == plain(unbatched)


HEADS = {"q": 8, "k": 2, "v": 2}
WIDE = torch.randn(1, 1024, 16, 128).bfloat16()
SINK = torch.zeros(8 * 1024 + 1)
# What changes in the problem, and whether Triton must look (and perhaps compile) again.
CHANGES: dict[str, tuple[dict[str, Any], bool]] = {
    "strides of q": ({"q": WIDE[:, :, :8, :64]}, False),
    "strides of k": ({"k": WIDE[:, :, :2, :64]}, False),
    "strides of v": ({"v": WIDE[:, :, :2, :64]}, False),
    "a batch": ({name: WIDE[:, :, :n, :64].repeat(2, 1, 1, 1) for name, n in HEADS.items()}, False),
    "scale": ({"softmax_scale": 0.25}, False),
    "multiprocessors": ({"sm_margin": 131}, False),
    "softcap": ({"softcap": 2.0}, True),
    "a sink": ({"sink": SINK[:-1].view(1, 1024, 8)}, True),
    "dtype": ({name: WIDE[:, :, :n, :64].half() for name, n in HEADS.items()}, True),
    "heads": ({"q": WIDE[:, :, :6, :64].contiguous()}, True),
    "short documents": ({"bands": Mask.varlen(range(0, 1025, 64)).table}, True),
}  # fmt: skip


@pytest.mark.parametrize(("change", "another_form"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_not_launched_as_what_came_before(kernel, change, another_form):
    launched(kernel, problem())
    _, grid_before, before = launched(kernel, problem())
    given = problem(**change)
    how, grid, after = launched(kernel, given)
    assert (how == "looked up by Triton") == another_form
    assert grid[0] != grid_before[0] or plain(after) != plain(before)
    for name, descriptor in (("q", "Q_DESC"), ("k", "K_DESC"), ("v", "V_DESC")):
        tensor, strides = getattr(given, name), after[descriptor].strides
        assert after[descriptor].base is tensor and tuple(after[descriptor].shape) == tensor.shape
        assert all(s == t for s, t, n in zip(strides, tensor.stride(), tensor.shape, strict=True) if n > 1)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("how", ["misaligned", "steps of 8 bytes", "repeated heads"])
@pytest.mark.parametrize("batched", [True, False])
def test_what_the_copy_engine_cannot_read_is_copied(kernel, name, how, batched):
    given = problem()
    launched(kernel, given)
    whole = getattr(given, name)
    if how == "misaligned":
        unreadable = torch.empty(whole.numel() + 1, dtype=whole.dtype)[1:].view_as(whole).copy_(whole)
        assert unreadable.is_contiguous() and unreadable.data_ptr() % 16
    elif how == "steps of 8 bytes":
        unreadable = torch.empty(*whole.shape[:3], 68, dtype=whole.dtype)[..., :64].copy_(whole)
    else:
        unreadable = whole[:, :, :1].expand_as(whole)
    given = dataclasses.replace(given, **{name: unreadable})
    if not batched:
        given = dataclasses.replace(given, q=given.q[0], k=given.k[0], v=given.v[0])
    _, _, arguments = launched(kernel, given)
    read = arguments[f"{name.upper()}_DESC"].base
    assert read.data_ptr() % 16 == 0 and read.is_contiguous() and torch.equal(read, unreadable)


def test_a_sink_of_another_alignment_or_with_wide_strides_is_another_form(kernel):
    shape, memory = (1, 1024, 8), torch.zeros(8 * 1024 + 1)
    aligned, misaligned = memory[:-1].view(shape), memory[1:].view(shape)
    assert aligned.data_ptr() % 16 == 0 != misaligned.data_ptr() % 16
    wide = memory[:8].as_strided(shape, (2**31, 0, 1))
    for _ in range(2):
        for sink in (aligned, misaligned, wide):
            launched(kernel, problem(sink=sink))
    assert [how for how, _, _ in kernel.launches] == ["looked up by Triton"] * 3 + ["directly"] * 3


def test_devices_do_not_share_a_form(kernel):
    q, k = problem().q, problem().k
    first, second = (
        launch._forward_of(
            q.shape, q.stride(), k.shape, k.stride(), k.stride(), q.dtype, torch.device("cuda", index), 1,
            False, False, False, False, False, 1.0, 0.0, 0,
        )
        for index in range(2)
    )  # fmt: skip
    assert first.form is not second.form
    assert (first.plan_key.device.index, second.plan_key.device.index) == (0, 1)


@pytest.mark.parametrize(("rows", "heads"), [(0, 2), (8, 0)])
@pytest.mark.parametrize("batched", [True, False])
def test_without_tokens_or_heads_the_portable_kernels_run(kernel, monkeypatch, rows, heads, batched):
    given = problem(q=torch.empty(1, rows, heads, 64), k=torch.empty(1, rows, 2, 64))
    given = dataclasses.replace(given, v=given.k)
    if not batched:
        given = dataclasses.replace(given, q=given.q[0], k=given.k[0], v=given.v[0])
    calls = []

    def forward(portably, need_max_logits):
        calls.append(portably)
        return torch.empty_like(portably.q), portably.q.new_empty(portably.q.shape[:3]), None

    monkeypatch.setattr(launch.portable, "forward", forward)
    out, lse, _ = launch.forward(given, False)
    assert len(calls) == 1 and calls[0].q.dim() == 4 and not kernel.launches
    assert (out.shape, lse.shape) == (given.q.shape, given.q.shape[:-1])


def test_attention_hands_packed_tensors_over_as_they_are(kernel, monkeypatch):
    monkeypatch.setattr(ops, "_implementation", lambda *args: launch)
    given = problem()
    q, k, v = given.q[0], given.k[0], given.v[0]
    with torch.no_grad():
        out, meta = attention(q, k, v, MASK)
    _, _, arguments = kernel.launches[-1]
    assert arguments["Q_DESC"].base is q and arguments["OUT"] is out and arguments["LSE"] is meta.lse
    assert meta.max_logits is None
    out, meta = attention(q.clone().requires_grad_(), k, v, MASK)
    assert out.shape == q.shape and out.requires_grad and meta.lse.shape == q.shape[:2]
    out, meta = attention(q, k, v, MASK, return_max_logits=True)
    assert meta.max_logits.tolist() == [-torch.inf] * 8


def test_an_earlier_result_is_added_to_in_place(kernel):
    lse = torch.zeros(1, 1024, 8)
    given = problem(earlier=(torch.zeros(1, 1024, 8, 64), lse))
    launched(kernel, problem())
    how, _, arguments = launched(kernel, given)
    assert how == "looked up by Triton" and arguments["ACCUMULATE"] and not arguments["STAGED"]
    assert arguments["OUT"] is given.earlier[0] and arguments["LSE"] is lse
    assert launched(kernel, given)[0] == "directly"


def test_an_earlier_lse_off_a_16_byte_step_has_a_kernel_of_its_own(kernel):
    out, loose = torch.zeros(1, 1024, 8, 64), torch.zeros(1 + 1024 * 8)[1:].view(1, 1024, 8)
    launched(kernel, problem(earlier=(out, loose.clone())))
    assert launched(kernel, problem(earlier=(out, loose)))[0] == "looked up by Triton"


BACKWARD = {64: ("delta", "backward", "gather_dq"), 256: ("delta", "backward_wide", "gather_dq")}


@pytest.fixture
def backward_kernels(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> dict[str, Kernel]:
    fakes = {}
    for name in {name for names in BACKWARD.values() for name in names}:
        fakes[name] = Kernel(getattr(launch, f"{name}_kernel").arg_names)
        monkeypatch.setattr(launch, f"{name}_kernel", fakes[name])
    return fakes


def run_backward(given: Problem, dlse: torch.Tensor | None = None) -> None:
    launch.backward(given, given.q, torch.zeros(given.q.shape[:3]), given.q, dlse)


def of_head_dim(head_dim: int) -> Problem:
    q, k = torch.randn(1, 1024, 8, head_dim).bfloat16(), torch.randn(1, 1024, 2, head_dim).bfloat16()
    return problem(q=q, k=k, v=k.clone())


@pytest.mark.parametrize("head_dim", BACKWARD)
def test_the_second_backward_goes_past_triton_with_the_same_arguments(backward_kernels, head_dim):
    for _ in range(2):
        run_backward(of_head_dim(head_dim))
    for name in BACKWARD[head_dim]:
        first, second = backward_kernels[name].launches
        assert (first[0], second[0]) == ("looked up by Triton", "directly")
        assert second[1] == (*first[1], 1, 1)[:3]
        assert set(second[2]) == set(backward_kernels[name].arg_names)
        options = set(first[2]) - set(second[2])
        assert options == ({"num_warps"} | ({"maxnreg", "enable_fp_fusion"} if "backward" in name else set()))
        assert plain({key: first[2][key] for key in second[2]}) == plain(second[2])


def test_another_alignment_or_feature_of_the_row_statistics_is_another_form(backward_kernels):
    memory = torch.zeros(8 * 1024 + 1)
    aligned, misaligned = memory[:-1].view(1, 1024, 8), memory[1:].view(1, 1024, 8)
    for sink, dlse in (
        (None, None),
        (aligned, None),
        (misaligned, None),
        (None, aligned),
        (None, misaligned),
    ):
        for _ in range(2):
            run_backward(problem(sink=sink), dlse)
    hows = [how for how, _, _ in backward_kernels["delta"].launches]
    assert hows == ["looked up by Triton", "directly"] * 5
