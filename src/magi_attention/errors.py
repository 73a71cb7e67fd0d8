"""How the library refuses: what was wrong, what was expected, what came, what to do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def complaint(what: str, expected: str, got: object, remedy: str = "") -> str:
    """The one sentence form of every user-facing error."""
    text = f"{what}: expected {expected}, got {got}."
    return f"{text} {remedy}" if remedy else text


def check_type(name: str, value: object, types: type | tuple[type, ...], remedy: str = "") -> None:
    """TypeError unless ``value`` is an instance of ``types``."""
    if not isinstance(value, types):
        names = types.__name__ if isinstance(types, type) else " or ".join(t.__name__ for t in types)
        raise TypeError(complaint(name, names, type(value).__name__, remedy))


def check_tensor(
    name: str,
    tensor: Any,
    *,
    shape: Sequence[int | str | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    remedy: str = "",
) -> None:
    """TypeError / ValueError unless ``tensor`` is a tensor of this shape, dtype and device.

    A string or ``None`` in ``shape`` stands for any size; the string only names the axis in the message.
    """
    check_type(name, tensor, torch.Tensor, remedy)
    if shape is not None:
        fits = tensor.dim() == len(shape) and all(
            want is None or isinstance(want, str) or want == have
            for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = "(" + ", ".join("*" if s is None else str(s) for s in shape) + ")"
            raise ValueError(complaint(f"{name} shape", wanted, tuple(tensor.shape), remedy))
    if dtypes is not None and tensor.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dtypes)
        raise TypeError(complaint(f"{name} dtype", wanted, tensor.dtype, remedy))
    if device is not None and tensor.device != device:
        raise ValueError(complaint(f"{name} device", str(device), tensor.device, remedy))


def check_number(name: str, value: object) -> None:
    """TypeError unless a Python number, ValueError when not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(complaint(name, "a number", type(value).__name__))
    if not -math.inf < value < math.inf:  # unlike math.isfinite, torch.compile can trace it
        raise ValueError(complaint(name, "a finite number", value))


def check_count(name: str, value: object) -> None:
    """TypeError unless an integer, ValueError when negative."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(complaint(name, "an integer", type(value).__name__))
    if value < 0:
        raise ValueError(complaint(name, "at least 0", value))
