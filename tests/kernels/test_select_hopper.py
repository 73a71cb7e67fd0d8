"""The Hopper backend is chosen on Hopper GPUs for what its kernels can do, and otherwise says why not."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from magi_attention import Mask, explain
from magi_attention.kernels import select
from magi_attention.kernels.select import BACKENDS, Request, backend_for, choose_backend, describe, refusal

ON_HOPPER = Request("cuda", torch.bfloat16, 128, 128, capability=(9, 0))
ON_CPU = Request("cpu", torch.bfloat16, 128, 128)


def changed(**changes: object) -> Request:
    return dataclasses.replace(ON_HOPPER, **changes)


# Request, what the refusal says, and the backend that runs it instead.
REFUSED = {
    "an A100": (changed(capability=(8, 0)), "a GPU of compute capability 8.0", "triton"),
    "an L40": (changed(capability=(8, 9)), "a GPU of compute capability 8.9", "triton"),
    "a B200": (changed(capability=(10, 0)), "a GPU of compute capability 10.0", "triton"),
    "another maker's GPU": (changed(capability=None), "the device is cuda, not a Hopper GPU", "triton"),
    "a CPU": (ON_CPU, "the device is cpu, not a Hopper GPU", "blockwise"),
    "fp32": (changed(dtype=torch.float32), "dtype torch.float32 is not fp16 or bf16", "triton"),
    "fp64": (changed(dtype=torch.float64), "dtype torch.float64 is not fp16 or bf16", "blockwise"),
    "a narrower v": (changed(head_dim_v=64), "head dimensions 128 of q, k and 64 of v differ", "triton"),
    "a wider v": (changed(head_dim=64), "head dimensions 64 of q, k and 128 of v differ", "triton"),
    "a wide head": (
        changed(head_dim=264, head_dim_v=264),
        "head dimension 264 is not a multiple of 8 up to 256",
        "blockwise",
    ),
    "an odd head": (
        changed(head_dim=100, head_dim_v=100),
        "head dimension 100 is not a multiple of 8",
        "blockwise",
    ),
}
every_refusal = pytest.mark.parametrize(("request_", "reason", "instead"), REFUSED.values(), ids=REFUSED)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGI_ATTENTION_BACKEND", raising=False)
    pytest.importorskip("triton", minversion="3.6")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 64, 96, 128, 192, 256])
def test_is_the_automatic_choice_on_hopper(dtype: torch.dtype, dim: int) -> None:
    request = changed(dtype=dtype, head_dim=dim, head_dim_v=dim)
    assert refusal("hopper", request) is None
    assert choose_backend(request) == "hopper" == choose_backend(request, "hopper")


@every_refusal
def test_a_refusal_names_its_reason(request_: Request, reason: str, instead: str) -> None:
    assert reason in refusal("hopper", request_)


@every_refusal
def test_asked_for_by_name_it_never_falls_back(request_: Request, reason: str, instead: str) -> None:
    with pytest.raises(NotImplementedError, match="backend 'hopper'") as failure:
        choose_backend(request_, "hopper")
    message = str(failure.value)
    assert reason in message and all(f"  {backend}" in message for backend in BACKENDS)


@every_refusal
def test_the_automatic_choice_goes_on_to_the_next_that_accepts(
    request_: Request, reason: str, instead: str
) -> None:
    assert choose_backend(request_) == instead


def test_other_backends_can_be_asked_for_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_backend(ON_HOPPER, name) for name in BACKENDS] == [*BACKENDS]
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", "triton")
    assert choose_backend(ON_HOPPER) == "triton"


def test_the_remembered_choice_follows_device_dims_name_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gpu_tensor(index: int = 0, dtype: torch.dtype = torch.bfloat16, dim: int = 128) -> SimpleNamespace:
        return SimpleNamespace(
            is_cuda=True, device=torch.device("cuda", index), dtype=dtype, shape=(8, 1, dim)
        )

    select._backend_on_gpu.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(select, "_capability", lambda index: [(9, 0), (8, 0)][index])
    q = gpu_tensor()
    for _ in range(2):
        assert backend_for(q, q) == "hopper"
        assert backend_for(gpu_tensor(index=1), gpu_tensor(index=1)) == "triton"
        assert backend_for(gpu_tensor(dtype=torch.float64), q) == "blockwise"
        assert backend_for(q, gpu_tensor(dim=64)) == "triton"
        assert backend_for(q, q, "dense") == "dense"
        with pytest.raises(NotImplementedError, match=r"compute capability 8\.0, not a Hopper"):
            backend_for(gpu_tensor(index=1), q, "hopper")
        with monkeypatch.context() as environment:
            environment.setenv("MAGI_ATTENTION_BACKEND", "triton")
            assert backend_for(q, q) == "triton"
    select._backend_on_gpu.cache_clear()


def test_without_gluon_triton_runs_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_has_gluon", lambda: False)
    assert "Gluon is missing (it comes with Triton 3.6 and newer)" in refusal("hopper", ON_HOPPER)
    assert choose_backend(ON_HOPPER) == "triton"


def test_without_triton_torch_operations_run_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "HAS_TRITON", False)
    assert "Gluon is missing" in refusal("hopper", ON_HOPPER)
    assert choose_backend(ON_HOPPER) == "blockwise"


def test_the_device_is_asked_about_before_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_be_called() -> bool:
        raise AssertionError("looking for Gluon imports Triton")

    monkeypatch.setattr(select, "_has_gluon", must_not_be_called)
    assert "not a Hopper GPU" in refusal("hopper", ON_CPU)


def test_descriptions_put_hopper_first_with_its_verdict() -> None:
    accepted, refused = describe(ON_HOPPER).splitlines()[0], describe(ON_CPU).splitlines()[0]
    assert accepted.split()[:2] == ["hopper", "yes"]
    assert refused.split()[:2] == ["hopper", "no:"] and "the device is cpu" in refused
    assert len(describe(ON_HOPPER).splitlines()) == len(BACKENDS)


def test_explain_says_why_hopper_does_not_run() -> None:
    q = torch.zeros(16, 1, 64, dtype=torch.bfloat16)
    found = explain(q, q, q, Mask.causal(16))
    assert "hopper     no: the device is cpu, not a Hopper GPU" in str(found)
    with pytest.raises(NotImplementedError, match="the device is cpu, not a Hopper GPU"):
        explain(q, q, q, Mask.causal(16), backend="hopper")
