"""Other packages' import names on this library's functions: ``install()`` for one process, nothing on disk.

    import magi_attention.dropin
    magi_attention.dropin.install()
    from flash_attn import flash_attn_func

The distribution in ``dropin/`` puts the same modules on disk, for programs that cannot be changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from magi_attention.errors import complaint

VERSION = "2.8.3"
"""The release of FlashAttention whose interface this is."""

_FORMS = tuple(
    f"flash_attn_{packed}{form}func" for packed in ("", "varlen_") for form in ("", "kvpacked_", "qkvpacked_")
)
_INTERNALS = tuple(
    f"{prefix}_flash_attn_{packed}{direction}"
    for prefix in ("", "_wrapped")
    for packed in ("", "varlen_")
    for direction in ("forward", "backward")
)
_HELPERS = ("_get_block_size_n", "maybe_contiguous", "round_multiple")
_PADDING = (
    "unpad_input",
    "pad_input",
    "unpad_input_for_concatenated_sequences",
    "index_first_axis",
    "index_put_first_axis",
    "index_first_axis_residual",
    "__getattr__",  # rearrange and repeat, where einops is installed
)
_ROTARY = (
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_torch",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_kv_",
    "rotate_half",
    "RotaryEmbedding",
)
_FA3 = {
    "flash_attn_3": (
        "flash_attn_func",
        "flash_attn_varlen_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_combine",
    ),
    "flash_attn_3_kvcache": ("flash_attn_with_kvcache", "get_scheduler_metadata"),
    "flash_attn_3_internals": _INTERNALS[:2],
}

MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "flash_attn": {"flash_attn_interface": _FORMS, "flash_attn_kvcache": ("flash_attn_with_kvcache",)},
    "flash_attn.flash_attn_interface": {
        "flash_attn_interface": _FORMS,
        "flash_attn_kvcache": ("flash_attn_with_kvcache",),
        "flash_attn_internals": (*_INTERNALS, *_HELPERS),
    },
    "flash_attn.bert_padding": {"bert_padding": _PADDING},
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": {"rotary": (*_ROTARY, "apply_rotary")},
    "flash_attn.modules": {},
    "flash_attn.modules.mha": {
        "alibi": ("get_alibi_slopes",),
        "mha": ("FlashSelfAttention", "FlashCrossAttention", "SelfAttention", "CrossAttention"),
        "mha_layers": ("MHA", "ParallelMHA"),
    },
    "flash_attn.ops": {},
    "flash_attn.ops.triton": {},
    "flash_attn.ops.triton.rotary": {"rotary": ("apply_rotary",)},
    "flash_attn_2_cuda": {"flash_attn_2_cuda": ("fwd", "bwd", "varlen_fwd", "varlen_bwd", "fwd_kvcache")},
    "flash_attn_interface": _FA3,
    "flash_attn_3": {},
    "flash_attn_3.flash_attn_interface": _FA3,
    "extensions": {},
    "extensions.fa2_interface_with_sink": {
        "flash_attn_sink": tuple(name.replace("flash_attn", "fa2") + "_with_sink" for name in _FORMS)
    },
    "extensions.fa3_interface_with_sink": {
        "flash_attn_sink": tuple(
            name.replace("flash_attn", "fa3") + "_with_sink" for name in _FA3["flash_attn_3"][:3]
        )
    },
}
"""Names of each module, by the module of ``magi_attention.api`` that they come from."""

_IN_ORDER_OF_SWAA = ("flash_attn", "flash_attn.flash_attn_interface")


def contents(module: str, swaa: bool = False) -> dict[str, Any]:
    """What ``module`` of another package holds here, by name; in the order of ``api.flash_attn_swaa`` if it has one."""
    found: dict[str, Any] = {}
    for home, names in MODULES[module].items():
        source = importlib.import_module(f"magi_attention.api.{home}")
        found |= {name: getattr(source, name) for name in names}
    if swaa and module in _IN_ORDER_OF_SWAA:
        source = importlib.import_module("magi_attention.api.flash_attn_swaa")
        found |= {name: getattr(source, name) for name in found if hasattr(source, name)}
    if module == "flash_attn":
        found["__version__"] = VERSION
    if module == "flash_attn.flash_attn_interface":
        found["flash_attn_gpu"] = importlib.import_module("magi_attention.api.flash_attn_2_cuda")
    return found


def install(*packages: str, replace: bool = False, swaa: bool = False) -> None:
    """Put modules under these names into ``sys.modules``, for this process only.

    Args:
        packages: top-level names out of ``flash_attn``, ``flash_attn_2_cuda``, ``flash_attn_interface``, ``flash_attn_3``
            and ``extensions``; none is all of them.
        replace: whether a package that can be imported already may be hidden. Modules that others have taken names from
            keep those.
        swaa: whether the functions of ``flash_attn`` have keep_first and force_fa_decode behind softcap, as those of
            flash-attention-SWAA: for programs that give arguments behind it by position.

    Raises:
        ValueError: a name that is none of these. ImportError: another package of this name is there, without ``replace``.
    """
    known = {name.partition(".")[0] for name in MODULES}
    wanted = set(packages) or known
    if not wanted <= known:
        raise ValueError(complaint("packages", f"some of {sorted(known)}", sorted(wanted - known)))
    for package in sorted(wanted):
        if not replace and not _is_ours(package) and _can_be_imported(package):
            remedy = "Call install(..., replace=True), or name the packages that you want."
            raise ImportError(complaint(package, "no package of this name", "one that is installed", remedy))
    for name in MODULES:
        if name.partition(".")[0] in wanted:
            _put(name, swaa)


def uninstall() -> None:
    """Take them out of ``sys.modules`` again."""
    for name in MODULES:
        if _is_ours(name):
            del sys.modules[name]


def _put(name: str, swaa: bool) -> None:
    module = ModuleType(name, f"{name} on magi_attention; see magi_attention.dropin.")
    module.__spec__ = ModuleSpec(name, None, origin=__name__)
    if any(other.startswith(f"{name}.") for other in MODULES):
        module.__path__ = []
    vars(module).update(contents(name, swaa))
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _is_ours(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and spec.origin == __name__


def _can_be_imported(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None
