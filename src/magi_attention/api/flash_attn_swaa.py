"""The flash_attn functions in the order of flash-attention-SWAA, sliding window attention adaptation.

Each is its namesake of FlashAttention 2 with keep_first and force_fa_decode behind softcap instead of at the end: a call
that gives them, or anything behind softcap, by position means something else than there. By keyword both are the same.
Where what follows them has no default, in ``_flash_attn_forward`` and the backwards, their signature has none either.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

from magi_attention.api import flash_attn_interface as fa2
from magi_attention.api import flash_attn_internals as internals
from magi_attention.api import flash_attn_kvcache as kvcache
from magi_attention.errors import complaint

_OWN = {"keep_first": 0, "force_fa_decode": False}


def _in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with keep_first and force_fa_decode behind softcap."""
    parameters = [p for name, p in inspect.signature(function).parameters.items() if name not in _OWN]
    at = [p.name for p in parameters].index("softcap") + 1
    own = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=type(default).__name__)
        for name, default in _OWN.items()
    ]
    if parameters[at].default is Parameter.empty:
        own = [parameter.replace(default=Parameter.empty) for parameter in own]
    joint = inspect.Signature([*parameters[:at], *own, *parameters[at:]])
    names = [p.name for p in joint.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            expected = f"at most {len(names)} arguments by position"
            raise TypeError(complaint(function.__name__, expected, len(args)))
        return function(**dict(zip(names, args, strict=False)), **kwargs)

    call.__signature__ = joint  # type: ignore[attr-defined]
    call.__module__ = __name__
    call.__doc__ = (
        f"SWAA's ``{function.__name__}``: keep_first and force_fa_decode stand behind softcap.\n\n"
        f"{function.__doc__}"
    )
    return call


flash_attn_func = _in_order(fa2.flash_attn_func)
flash_attn_kvpacked_func = _in_order(fa2.flash_attn_kvpacked_func)
flash_attn_qkvpacked_func = _in_order(fa2.flash_attn_qkvpacked_func)
flash_attn_varlen_func = _in_order(fa2.flash_attn_varlen_func)
flash_attn_varlen_kvpacked_func = _in_order(fa2.flash_attn_varlen_kvpacked_func)
flash_attn_varlen_qkvpacked_func = _in_order(fa2.flash_attn_varlen_qkvpacked_func)
flash_attn_with_kvcache = _in_order(kvcache.flash_attn_with_kvcache)
_flash_attn_forward = _wrapped_flash_attn_forward = _in_order(internals._flash_attn_forward)
_flash_attn_backward = _wrapped_flash_attn_backward = _in_order(internals._flash_attn_backward)
_flash_attn_varlen_forward = _wrapped_flash_attn_varlen_forward = _in_order(
    internals._flash_attn_varlen_forward
)
_flash_attn_varlen_backward = _wrapped_flash_attn_varlen_backward = _in_order(
    internals._flash_attn_varlen_backward
)
