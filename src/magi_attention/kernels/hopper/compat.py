"""The one module that knows how Gluon's names differ between Triton releases (3.6 and newer)."""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "reinterpret",
    "tma_add",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

# Renamed in 3.8; the old names raise from 3.9 on.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait


def _tma_add() -> Any:
    """fp32 reduction of a shared tile into global memory, ``tma_add(desc, coord, src)``: a builtin from 3.8 on."""
    official = getattr(tma, "async_atomic_add", None)
    if official is not None:
        return official
    from triton._C.libtriton import ir

    @builtin
    def tma_add(desc, coord, src, _semantic=None):  # type: ignore[no-untyped-def]
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, src.handle)

    return tma_add


tma_add = _tma_add()


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):  # type: ignore[no-untyped-def]
    """The same shared memory as another dtype, shape or layout: a method that 3.9 renamed."""
    method = getattr(memory, "reinterpret", None) or memory._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)
