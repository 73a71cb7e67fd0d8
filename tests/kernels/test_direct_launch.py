"""Launches past Triton's Python pass what Triton would pass, and leave to Triton what they do not know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton
from triton import knobs
from triton.backends.nvidia import driver

from magi_attention.kernels.hopper import direct, launch

DEVICE = torch.device("cuda", 0)
SIGNATURE = {
    0: "tensordesc<bf16[64]>",
    1: "*fp32",
    2: "i32",
    3: "tensordesc<bf16[64]>",
    4: "constexpr",
    5: "constexpr",
}
METAS = ["first", "second"]
measured_with_3_6 = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="written against the insides of Triton 3.6"
)


class Compiled:
    """A compiled kernel whose launches are noted: those of ``CudaLauncher.__call__``, or those that go past it."""

    def __init__(self, scratch: int = 0) -> None:
        self.calls: list[tuple] = []
        self.by_triton = 0
        self.function, self.packed_metadata = "function", "metadata"
        self.run = driver.CudaLauncher.__new__(driver.CudaLauncher)
        self.run.__dict__.update(
            num_ctas=1, global_scratch_size=scratch, global_scratch_align=1, profile_scratch_size=0,
            profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False,
            launch=driver.wrap_handle_tensordesc(lambda *args: self.calls.append(args), SIGNATURE, METAS),
        )  # fmt: skip

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any) -> None:
            self.by_triton += 1
            if not self.run.global_scratch_size:
                self.run(*grid, 7, self.function, self.packed_metadata, None, None, None, *args)

        return start


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The tensor maps that are made: (address, what with)."""
    made: list[tuple] = []

    def make(descriptor: Any, meta: str) -> list:
        made.append((descriptor.base.data_ptr(), meta))
        return [made[-1], *descriptor.shape, *descriptor.strides]

    launch._frame.cache_clear()  # tensors of other tests may have been at the same addresses
    monkeypatch.setattr(driver, "make_tensordesc_arg", make)
    monkeypatch.setattr(direct, "current_stream", lambda index: 7)
    return made


def arguments() -> tuple:
    x, y = torch.zeros(4, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
    return launch._framed(x, (1, 64)), torch.zeros(3), 5, launch._framed(y, (1, 64)), None


def numbers(call: tuple) -> tuple:
    return tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in call)


@measured_with_3_6
def test_the_driver_gets_what_triton_would_give_it(maps):
    compiled, given = Compiled(), arguments()
    start = direct.launcher_of(compiled, given, (True,), DEVICE)
    compiled[3, 1, 1](*direct.described(given), True)
    for _ in range(2):
        start((3,), given)
    assert compiled.by_triton == 1
    expected, *calls = compiled.calls
    assert calls == [numbers(expected)] * 2
    assert len(maps) == 2 + 2  # Triton's, and one for each descriptor


@measured_with_3_6
def test_a_tensor_elsewhere_gets_a_map_of_its_own(maps):
    compiled, given = Compiled(), arguments()
    start = direct.launcher_of(compiled, given, (True,), DEVICE)
    start((3, 2), given)
    moved = arguments()
    start((3, 2), moved)
    assert [meta for _, meta in maps] == ["second", "first"] * 2
    assert compiled.calls[0][:3] == (3, 2, 1)
    assert {address for address, _ in maps} == {
        x[1].data_ptr() for x in (given[0], given[3], moved[0], moved[3])
    }


@measured_with_3_6
def test_maps_of_old_addresses_are_forgotten(monkeypatch):
    monkeypatch.setattr(direct, "_MOST_MAPS", 2)
    frame = launch._frame((4, 64), (64, 1), (1, 64), torch.float16)
    kept = [torch.zeros(4, 64).half() for _ in range(5)]
    for x in kept:
        direct._map_of(frame, x, "meta")
    assert 1 <= len(frame.maps) <= 2 and kept[-1].data_ptr() in frame.maps


@measured_with_3_6
def test_a_profilers_hooks_see_the_launch():
    compiled, given = Compiled(), arguments()
    start = direct.launcher_of(compiled, given, (True,), DEVICE)
    hook = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        start((3,), given)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert compiled.by_triton == 1


@pytest.mark.parametrize("how", ["another release", "scratch memory", "unknown insides"])
def test_what_is_not_known_is_left_to_triton(how, monkeypatch):
    compiled: Any = Compiled(scratch=16 if how == "scratch memory" else 0)
    if how == "another release":
        monkeypatch.setattr(triton, "__version__", "9.9.0")
    if how == "unknown insides":
        calls: list[tuple] = []
        compiled = SimpleNamespace()
        compiled = type(
            "Other", (), {"__getitem__": lambda self, grid: lambda *args: calls.append((grid, args))}
        )()
    given = arguments()
    direct.launcher_of(compiled, given, (True,), DEVICE)((3,), given)
    if how != "unknown insides":
        assert compiled.by_triton == 1
        return
    [(grid, passed)] = calls
    assert grid == (3, 1, 1) and passed[1:3] == given[1:3] and passed[-1] is True
    assert passed[0].base is given[0][1] and passed[3].base is given[3][1]


def test_a_dtype_is_part_of_a_frame():
    frames = [launch._frame((4, 64), (64, 1), (1, 64), dtype) for dtype in (torch.float16, torch.bfloat16)]
    assert frames[0] is not frames[1]
