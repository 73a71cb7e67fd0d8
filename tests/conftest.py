"""What every test gets: seeds, poisoned memory, two threads, and where a GPU is missing the interpreter or a reason."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch

THREADS = 2

if not torch.cuda.is_available():
    # Then Triton kernels run in the interpreter. Triton reads the switch when it is imported, as Transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.load_profile("default")


def pytest_configure() -> None:
    if torch.get_num_threads() > THREADS:
        torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
        skip = pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), this machine has {num_gpus}")
        for item in items:
            if item.get_closest_marker(marker) and num_gpus < needed:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _fill_with_poison(tensor: torch.Tensor) -> torch.Tensor:
    """NaN for floating point tensors, the smallest integer (the largest, if unsigned), True for bool."""
    value: float | int = float("nan")
    if tensor.dtype == torch.bool:
        value = True
    elif not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        value = torch.iinfo(tensor.dtype).min or torch.iinfo(tensor.dtype).max
    with torch.no_grad():
        return tensor.fill_(value)


def _poisoning(owner: object, *names: str) -> dict[str, Callable[..., torch.Tensor]]:
    def wrap(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: _fill_with_poison(allocate(*args, **kwargs))

    return {name: wrap(getattr(owner, name)) for name in names}


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` and its relatives return, so that a test cannot pass on leftover zeros."""
    functions = _poisoning(torch, "empty", "empty_like", "empty_strided")
    methods = _poisoning(torch.Tensor, "new_empty", "new_empty_strided")
    with mock.patch.multiple(torch, **functions), mock.patch.multiple(torch.Tensor, **methods):
        yield


@pytest.fixture
def poison() -> Callable[..., torch.Tensor]:
    """``poison(*shape, dtype=..., device=...)`` gives a tensor of NaN (integers: of their smallest value)."""

    def make(
        *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        return _fill_with_poison(torch.zeros(shape, dtype=dtype, device=device))

    return make
