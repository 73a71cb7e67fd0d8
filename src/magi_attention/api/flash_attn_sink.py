"""The flash_attn functions with attention sinks, as ``extensions.fa2_interface_with_sink`` and its sibling name them.

Each is its plain namesake with two arguments more, behind the tensors: ``sink``, logits in the softmax's denominator,
of any floating dtype, neither scaled nor capped, differentiable; and ``sink_layout``, "sh" for (s_sink, nheads), the same
for all rows, or "ssh" for one set a row: (batch, seqlen_q, s_sink, nheads), or packed (total_q, s_sink, nheads).
softmax_lse includes the sinks. They are part of the kernels' softmax: no further pass over out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from magi_attention.api import flash_attn_3 as fa3
from magi_attention.api import flash_attn_interface as fa2
from magi_attention.api.flex_arguments import check_sink_layout

_PER_ROW = {False: "4 axes (batch, seqlen_q, s_sink, nheads)", True: "3 axes (total_q, s_sink, nheads)"}
"""Axes of a sink of each row, for batches and for packed sequences."""


def _with_sink(function: Callable[..., Any], name: str, after: str) -> Callable[..., Any]:
    """``function`` with ``sink`` and ``sink_layout`` behind its argument ``after``."""
    signature = inspect.signature(function, eval_str=False)
    given = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    at = [p.name for p in given].index(after) + 1
    extra = [
        inspect.Parameter("sink", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
        inspect.Parameter("sink_layout", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="sh"),
    ]
    joint = inspect.Signature([*given[:at], *extra, *given[at:]])
    is_packed = "varlen" in name

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = joint.bind(*args, **kwargs).arguments
        sink, layout = arguments.pop("sink", None), arguments.pop("sink_layout", "sh")
        check_sink_layout(sink, layout, _PER_ROW[is_packed])
        return function(**arguments, s_aux=sink)

    call.__signature__ = joint  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = name
    call.__module__ = __name__
    call.__doc__ = (
        f"``{function.__name__}`` with ``sink`` and ``sink_layout``: see this module.\n\n{function.__doc__}"
    )
    return call


fa2_func_with_sink = _with_sink(fa2.flash_attn_func, "fa2_func_with_sink", "v")
fa2_kvpacked_func_with_sink = _with_sink(fa2.flash_attn_kvpacked_func, "fa2_kvpacked_func_with_sink", "kv")
fa2_qkvpacked_func_with_sink = _with_sink(
    fa2.flash_attn_qkvpacked_func, "fa2_qkvpacked_func_with_sink", "qkv"
)
fa2_varlen_func_with_sink = _with_sink(
    fa2.flash_attn_varlen_func, "fa2_varlen_func_with_sink", "max_seqlen_k"
)
fa2_varlen_kvpacked_func_with_sink = _with_sink(
    fa2.flash_attn_varlen_kvpacked_func, "fa2_varlen_kvpacked_func_with_sink", "max_seqlen_k"
)
fa2_varlen_qkvpacked_func_with_sink = _with_sink(
    fa2.flash_attn_varlen_qkvpacked_func, "fa2_varlen_qkvpacked_func_with_sink", "max_seqlen"
)
fa3_func_with_sink = _with_sink(fa3.flash_attn_func, "fa3_func_with_sink", "v")
fa3_qkvpacked_func_with_sink = _with_sink(
    fa3.flash_attn_qkvpacked_func, "fa3_qkvpacked_func_with_sink", "qkv"
)
fa3_varlen_func_with_sink = _with_sink(
    fa3.flash_attn_varlen_func, "fa3_varlen_func_with_sink", "max_seqlen_k"
)
