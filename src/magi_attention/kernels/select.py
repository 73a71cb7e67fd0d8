"""Which backend runs a call: a table of what each can do, an automatic choice, and the reasons for it."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch

from magi_attention import env
from magi_attention.errors import complaint

BACKENDS = ("hopper", "triton", "blockwise", "dense")
"""In the order of the automatic choice."""

DESCRIPTIONS = {
    "hopper": "warp-specialised Gluon kernels for H100 and H200",
    "triton": "portable GPU kernels, and the CPU interpreter when TRITON_INTERPRET=1",
    "blockwise": "torch operations, memory linear in tokens, any device; the default on CPU",
    "dense": "the definition in fp64, quadratic in memory, by name only",
}

MAX_HEAD_DIM = 256
MAX_MODIFIED_HEAD_DIM = 128
"""Of Hopper calls with dropout or ALiBi."""

HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Request:
    """What a backend must know to accept a call."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    capability: tuple[int, int] | None = None
    modifiers: str = ""
    """What changes scores or weights, from ``modifiers_of``."""


@functools.cache
def modifiers_of(dropout: bool, alibi: bool) -> str:
    """``Request.modifiers`` of a call with these."""
    return " and ".join(name for name, is_wanted in (("dropout", dropout), ("ALiBi", alibi)) if is_wanted)


def request_of(q: torch.Tensor, v: torch.Tensor, modifiers: str = "") -> Request:
    """The request that these tensors make."""
    return _request(q.device, q.dtype, q.shape[-1], v.shape[-1], modifiers)


def _request(
    device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int, modifiers: str
) -> Request:
    capability = _capability(device.index) if device.type == "cuda" and torch.version.cuda else None
    return Request(device.type, dtype, head_dim, head_dim_v, capability, modifiers)


@functools.cache
def _capability(device_index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def refusal(backend: str, request: Request) -> str | None:
    """Why ``backend`` cannot run ``request``; None when it can."""
    if backend == "hopper":
        return _hopper_refusal(request)
    if backend == "triton":
        return _triton_refusal(request)
    return None


def _hopper_refusal(request: Request) -> str | None:
    if request.capability != (9, 0):
        return f"the device is {_device_name(request)}, not a Hopper GPU (compute capability 9.0)"
    if not _has_gluon():
        return "Gluon is missing (it comes with Triton 3.6 and newer)"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {request.dtype} is not fp16 or bf16"
    if request.head_dim != request.head_dim_v:
        return f"head dimensions {request.head_dim} of q, k and {request.head_dim_v} of v differ"
    if request.head_dim > MAX_HEAD_DIM or request.head_dim % 8:
        return f"head dimension {request.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    if request.modifiers and request.head_dim > MAX_MODIFIED_HEAD_DIM:
        return f"it has {request.modifiers} up to head dimension {MAX_MODIFIED_HEAD_DIM} only"
    return None


def _has_gluon() -> bool:
    # Asked on a Hopper GPU only: finding the module imports Triton.
    return HAS_TRITON and _find_gluon()


@functools.cache
def _find_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper") is not None


def _device_name(request: Request) -> str:
    if request.capability is None:
        return request.device_type
    return "a GPU of compute capability {}.{}".format(*request.capability)


def runs_on_hopper(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether Hopper kernels run where these tensors are."""
    return request_of(q, v).capability == (9, 0) and _has_gluon()


def _triton_refusal(request: Request) -> str | None:
    if not HAS_TRITON:
        return 'Triton is not installed (pip install "magi_attention[gpu]")'
    if request.device_type != "cuda" and not env.triton_interpreter():
        return f"tensors are on {request.device_type}, not on a GPU, and TRITON_INTERPRET is not 1"
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {request.dtype} is not fp16, bf16 or fp32"
    dims = (request.head_dim, request.head_dim_v)
    if max(dims) > MAX_HEAD_DIM or any(d % 8 for d in dims):
        return f"head dimensions {dims} are not multiples of 8 up to {MAX_HEAD_DIM}"
    return None


def check_backend(name: str) -> None:
    """Raise ValueError unless there is a backend of this name."""
    if name not in BACKENDS:
        raise ValueError(complaint("backend", "one of " + ", ".join(BACKENDS), repr(name)))


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
        check_backend(name)
        reason = refusal(name, request)
        if reason is not None:
            raise NotImplementedError(f"backend {name!r}: {reason}. The backends say:\n{describe(request)}")
        return name
    if request.device_type == "cuda":
        for backend in ("hopper", "triton"):
            if refusal(backend, request) is None:
                return backend
    return "blockwise"


def backend_for(q: torch.Tensor, v: torch.Tensor, name: str | None = None, modifiers: str = "") -> str:
    """``choose_backend(request_of(q, v, modifiers), name)``, at a fraction of the cost for tensors on a GPU."""
    name = name or env.backend_override()
    if q.is_cuda:
        return _backend_on_gpu(q.device, q.dtype, q.shape[-1], v.shape[-1], name, modifiers)
    return choose_backend(request_of(q, v, modifiers), name)


@functools.lru_cache(maxsize=256)
def _backend_on_gpu(
    device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int, name: str | None, modifiers: str
) -> str:
    # Unlike on the CPU, where TRITON_INTERPRET matters, nothing else can change the answer.
    return choose_backend(_request(device, dtype, head_dim, head_dim_v, modifiers), name)


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
