"""What is measured: our own backends and the other attention implementations that happen to be importable.

| name | what it is | masks |
|---|---|---|
| blockwise, triton, hopper | ours: ``attention(..., backend=name)`` | all |
| flash_attn | ours: ``flash_attn_func`` | one sequence: full, causal, window |
| flash_attn_varlen | ours: ``flash_attn_varlen_func``, boundaries on the device | not blocks, not trees |
| sdpa | torch SDPA, its own choice of kernel | full, causal |
| sdpa-cudnn, sdpa-flash, sdpa-efficient, sdpa-math | torch SDPA held to one kernel | full, causal |
| sdpa-boolmask | torch SDPA with a dense boolean mask | all (quadratic memory) |
| flex | compiled FlexAttention with a block mask | all |
| fa2, fa3, fa4 | ``flash_attn``, ``flash_attn_interface``, ``flash_attn.cute`` | not blocks, not trees |

MagiAttention itself is not in the table: its import name is the name of this package, so both cannot be
imported in one process.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.masks import Workload
from magi_attention.kernels.reference.dense import multiplicity

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Unsupported(Exception):
    """The subject cannot run this configuration; the message is the reason that the report shows."""


@dataclass(frozen=True)
class Subject:
    """One implementation under measurement.

    Attributes:
        name: the name used on the command line and in the report.
        prepare: ``prepare(work, device) -> run``; what a user does once per mask, outside the timing. Raises
            Unsupported.
        layout: "thd" when ``run`` takes and returns (T, H, D) or (B, T, H, D), "bthd" for (B, T, H, D) only, "bhtd"
            for (B, H, T, D).
        ours: whether this is our library.
        per_shape: it compiles anew for every mask and length.
        missing: returns why the subject cannot be used on a device type, or None when it can.
    """

    name: str
    prepare: Callable[[Workload, torch.device], Run]
    layout: str = "thd"
    ours: bool = False
    per_shape: bool = False
    missing: Callable[[str], str | None] = lambda device_type: None

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fresh contiguous copy of (T, H, D) or (B, T, H, D) in this subject's layout."""
        if self.layout == "bhtd":
            return _batched(tensor.detach()).transpose(1, 2).contiguous()
        return (_batched(tensor) if self.layout == "bthd" else tensor).detach().clone()

    def restore(self, tensor: torch.Tensor, batched: bool) -> torch.Tensor:
        """View of a tensor in this subject's layout as (B, T, H, D) when ``batched``, else (T, H, D)."""
        if self.layout == "thd":
            return tensor
        tensor = tensor.transpose(1, 2) if self.layout == "bhtd" else tensor
        return tensor if batched else tensor[0]


def _batched(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 4 else tensor[None]


def _ours(backend: str, device_type: str) -> Subject:
    def prepare(work: Workload, device: torch.device) -> Run:
        from magi_attention import attention

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, work.mask, backend=backend)[0]

        return run

    return Subject(backend, prepare, ours=True, missing=_only_on(device_type))


def _only_on(device_type: str) -> Callable[[str], str | None]:
    return lambda have: None if have == device_type else f"runs on {device_type} only"


def _prepare_flash_attn(work: Workload, device: torch.device) -> Run:
    from magi_attention.api.flash_attn_interface import flash_attn_func

    settings = _window(work, -1)
    if len(work.segments) != 2:
        raise Unsupported("flash_attn_func knows no packed documents")
    return lambda q, k, v: flash_attn_func(q, k, v, **settings)


def _prepare_flash_attn_varlen(work: Workload, device: torch.device) -> Run:
    from magi_attention.api.flash_attn_interface import flash_attn_varlen_func

    # The same boundary tensors in every call: the mask made from them is remembered by their identity.
    settings = _window(work, -1) | _boundaries(work, device)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, **settings)


def _window(work: Workload, open_side: int | None) -> dict[str, Any]:
    """The mask as FlashAttention's arguments; ``open_side`` stands for "no limit on this side"."""
    if not work.varlen:
        raise Unsupported("window kernels do not know this mask")
    sides = (open_side, open_side) if work.window is None else (work.window - 1, 0)
    return {"causal": work.causal, "window_size": sides}


def _boundaries(work: Workload, device: torch.device) -> dict[str, Any]:
    """The documents as FlashAttention's arguments, on the device."""
    cuts = torch.from_numpy(work.segments).to(device, torch.int32)
    longest = int(np.diff(work.segments).max())
    return {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _sdpa(name: str, backend: SDPBackend | None = None) -> Subject:
    def prepare(work: Workload, device: torch.device) -> Run:
        if not work.dense:
            raise Unsupported("SDPA without a dense mask knows full and causal only")

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=work.causal, enable_gqa=q.shape[1] != k.shape[1]
                )

        return run

    gpu_only = backend not in (None, SDPBackend.MATH)
    return Subject(name, prepare, layout="bhtd", missing=_only_on("cuda") if gpu_only else _always)


def _always(device_type: str) -> None:
    return None


def _prepare_boolmask(work: Workload, device: torch.device) -> Run:
    visible = multiplicity(work.mask.table.to(device), work.tokens, work.tokens) > 0

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=visible[None, None], enable_gqa=q.shape[1] != k.shape[1]
        )

    return run


def _prepare_flex(work: Workload, device: torch.device) -> Run:
    import torch._functorch.config as functorch_settings
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Every mask is its own graph: without a reset the recompilation limit sends later ones to the eager path.
    torch._dynamo.reset()
    # Bursts repeat the backward of one forward: its saved tensors must not be given away as scratch memory.
    functorch_settings.donated_buffer = False
    mask_mod = work.mask_mod(device)
    block_mask = None
    if mask_mod is not None:
        block_mask = create_block_mask(mask_mod, None, None, work.tokens, work.tokens, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    return run


def _flash_module(name: str) -> Any:
    """The peer's module. Raises ImportError, also when a door of ours answers to its name."""
    module = importlib.import_module(name)
    if not hasattr(module, "flash_attn_varlen_func"):
        raise ImportError(f"{name} has no flash_attn_varlen_func")
    owner = module.flash_attn_varlen_func.__module__
    if owner.split(".")[0] == "magi_attention":
        raise ImportError(f"{name} is our own drop-in")
    return module


def _flash(name: str, module_name: str, open_window: int | None) -> Subject:
    """A FlashAttention generation; ``open_window`` is its word for "no limit on this side"."""

    def missing(device_type: str) -> str | None:
        if device_type != "cuda":
            return "runs on cuda only"
        try:
            _flash_module(module_name)
        except Exception as error:  # an extension built for another torch fails in many ways
            return f"not importable: {first_line(error)}"
        return None

    def prepare(work: Workload, device: torch.device) -> Run:
        settings = _window(work, open_window)
        module = _flash_module(module_name)
        if len(work.segments) == 2:
            return lambda q, k, v: _first(
                module.flash_attn_func(_batched(q), _batched(k), _batched(v), **settings)
            ).view_as(q)
        settings |= _boundaries(work, device)
        return lambda q, k, v: _first(module.flash_attn_varlen_func(q, k, v, **settings))

    return Subject(name, prepare, missing=missing)


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def first_line(error: BaseException) -> str:
    """One line for the report."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        _ours("blockwise", "cpu"),
        _ours("triton", "cuda"),
        _ours("hopper", "cuda"),
        Subject("flash_attn", _prepare_flash_attn, layout="bthd", ours=True),
        Subject("flash_attn_varlen", _prepare_flash_attn_varlen, ours=True),
        _sdpa("sdpa"),
        _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        _sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        _sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
        _sdpa("sdpa-math", SDPBackend.MATH),
        Subject("sdpa-boolmask", _prepare_boolmask, layout="bhtd"),
        Subject("flex", _prepare_flex, layout="bhtd", per_shape=True, missing=_only_on("cuda")),
        _flash("fa2", "flash_attn", open_window=-1),
        _flash("fa3", "flash_attn_interface", open_window=-1),
        _flash("fa4", "flash_attn.cute", open_window=None),
    )
}
"""Every subject by name. Tests add their own."""


def default_subjects(device_type: str) -> list[str]:
    """What runs when the command line names nothing."""
    if device_type == "cpu":
        return ["blockwise", "sdpa"]
    names = ["triton", "flex", "sdpa-cudnn", "sdpa-flash", "fa2", "fa3", "fa4"]
    return [name for name in names if SUBJECTS[name].missing(device_type) is None]
