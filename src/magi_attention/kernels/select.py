"""Which backend runs a call: a table of what each can do, an automatic choice, and the reasons for it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from magi_attention import env
from magi_attention.errors import complaint

BACKENDS = ("triton", "blockwise", "dense")
"""In the order of the automatic choice."""

DESCRIPTIONS = {
    "triton": "portable GPU kernels, and the CPU interpreter when TRITON_INTERPRET=1",
    "blockwise": "torch operations, memory linear in tokens, any device; the default on CPU",
    "dense": "the definition in fp64, quadratic in memory, by name only",
}

MAX_HEAD_DIM = 256

# Looked up once: torch.compile traces the choice, and cannot trace the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Request:
    """What a backend must know to accept a call."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int


def request_of(q: torch.Tensor, v: torch.Tensor) -> Request:
    """The request that these tensors make."""
    return Request(q.device.type, q.dtype, q.shape[-1], v.shape[-1])


def refusal(backend: str, request: Request) -> str | None:
    """Why ``backend`` cannot run ``request``; None when it can."""
    if backend == "triton":
        return _triton_refusal(request)
    return None


def _triton_refusal(request: Request) -> str | None:
    if not _HAS_TRITON:
        return 'Triton is not installed (pip install "magi_attention[gpu]")'
    if request.device_type != "cuda" and not env.triton_interpreter():
        return f"tensors are on {request.device_type}, not on a GPU, and TRITON_INTERPRET is not 1"
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {request.dtype} is not fp16, bf16 or fp32"
    dims = (request.head_dim, request.head_dim_v)
    if max(dims) > MAX_HEAD_DIM or any(d % 8 for d in dims):
        return f"head dimensions {dims} are not multiples of 8 up to {MAX_HEAD_DIM}"
    return None


def choose_backend(request: Request, name: str | None = None) -> str:
    """The backend for ``request``.

    Args:
        name: a backend asked for by name; it runs or the call fails, nothing falls back. None takes the first of
            ``BACKENDS`` that accepts, never "dense", and never Triton's interpreter.

    Raises:
        ValueError: no backend of that name.
        NotImplementedError: the named backend refuses; the message lists what every backend says.
    """
    name = name or env.backend_override()
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(complaint("backend", "one of " + ", ".join(BACKENDS), repr(name)))
        reason = refusal(name, request)
        if reason is not None:
            raise NotImplementedError(f"backend {name!r}: {reason}. The backends say:\n{describe(request)}")
        return name
    if request.device_type == "cuda" and refusal("triton", request) is None:
        return "triton"
    return "blockwise"


def describe(request: Request) -> str:
    """One line per backend: yes, or the reason why not."""
    lines = []
    for backend in BACKENDS:
        reason = refusal(backend, request)
        lines.append(
            f"  {backend:<10} {'yes' if reason is None else 'no: ' + reason}  ({DESCRIPTIONS[backend]})"
        )
    return "\n".join(lines)


def capabilities() -> dict[str, str]:
    """Every backend with a line on where it runs."""
    return dict(DESCRIPTIONS)
