"""Other packages' names: in this process, on disk, and the functions below FlashAttention 2's Python."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magi_attention import dropin
from magi_attention.api import flash_attn_2_cuda as extension
from magi_attention.api import flash_attn_interface as fa
from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache

ROOT = Path(__file__).parents[2]
PACKAGES = {name.partition(".")[0] for name in dropin.MODULES}


@pytest.fixture
def installed():
    if any(importlib.util.find_spec(name) for name in PACKAGES):
        pytest.skip("another package of these names is installed")
    dropin.install()
    yield
    dropin.uninstall()


def test_names_in_this_process(installed):
    import flash_attn
    from extensions.fa2_interface_with_sink import fa2_varlen_qkvpacked_func_with_sink
    from flash_attn import flash_attn_func
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, flash_attn_gpu
    from flash_attn_3.flash_attn_interface import flash_attn_combine

    assert flash_attn_func is fa.flash_attn_func
    assert flash_attn.__version__ == dropin.VERSION
    assert flash_attn_gpu.varlen_bwd and flash_attn_combine and _flash_attn_varlen_backward
    assert fa2_varlen_qkvpacked_func_with_sink
    assert importlib.util.find_spec("flash_attn").origin == "magi_attention.dropin"
    from flash_attn.bert_padding import unpad_input
    from flash_attn.layers.rotary import RotaryEmbedding
    from flash_attn.ops.triton.rotary import apply_rotary

    assert unpad_input and RotaryEmbedding and apply_rotary and flash_attn.flash_attn_with_kvcache
    with pytest.raises(ImportError, match="flash_attn_imaginary"):
        from flash_attn import flash_attn_imaginary  # noqa: F401


def test_what_is_installed_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "extensions.py").write_text("mine = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="extensions: expected no package of this name"):
        dropin.install("extensions")
    dropin.install("extensions", replace=True)
    try:
        assert not hasattr(sys.modules["extensions"], "mine")
        dropin.install("extensions")  # what is ours may be put there again
    finally:
        dropin.uninstall()
    import extensions

    assert extensions.mine == 1
    del sys.modules["extensions"]


def test_unknown_packages_are_refused():
    with pytest.raises(ValueError, match="packages: expected some of"):
        dropin.install("numpy")


def test_the_distribution_on_disk_has_the_same_modules():
    source = ROOT / "dropin" / "src"
    found = set()
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).with_suffix("").parts
        found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert found == set(dropin.MODULES)
    program = "\n".join(
        f"import {name}; assert {{*{sorted(dropin.contents(name))!r}}} <= {{*dir({name})}}"
        for name in dropin.MODULES
    )
    paths = os.pathsep.join([str(source), str(ROOT / "src")])
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": paths})


def test_the_extension():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 2, 8, generator=generator).requires_grad_() for _ in range(3))
    expected = fa.flash_attn_func(q, k, v, causal=True)
    into = torch.empty_like(expected)
    out, lse, _, state = extension.fwd(q, k, v, into, None, 0.0, 8**-0.5, True, -1, 0, 0.0, False, None)
    assert out is into and torch.equal(out, expected)
    dout, dq = torch.ones_like(out), torch.empty_like(q)
    tail = (0.0, 8**-0.5, True, -1, 0, 0.0, False, None, state)
    found = extension.bwd(dout, q, k, v, out, lse, dq, None, None, None, *tail)
    for one, other in zip(found[:3], torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(one, other)
    assert found[0] is dq
    cuts = torch.tensor([0, 6, 12], dtype=torch.int32)
    flat = [x.detach().flatten(0, 1) for x in (q, k, v)]
    packed, lse, _, _ = extension.varlen_fwd(
        *flat,
        None,
        cuts,
        cuts,
        None,
        None,
        None,
        None,
        6,
        6,
        0.0,
        8**-0.5,
        False,
        True,
        -1,
        0,
        0.0,
        False,
        None,
    )
    assert torch.equal(packed.view_as(expected), expected)
    found = extension.varlen_bwd(
        dout.flatten(0, 1), *flat, packed, lse, None, None, None, cuts, cuts, None, 6, 6, 0.0, 8**-0.5, False, True,
        -1, 0, 0.0, False, None, None,
    )  # fmt: skip
    torch.testing.assert_close(found[0].view_as(q), dq)


COUNTS = {"fwd": (13, 15), "varlen_fwd": (21, 22, 23), "bwd": (19, 21), "varlen_bwd": (24, 26)}
BEHIND_GEN = {"fwd": 0, "varlen_fwd": 0, "bwd": 1, "varlen_bwd": 1}
"""Arguments behind the generator, in all releases but that of num_splits."""


@pytest.mark.parametrize(("name", "count"), [(name, n) for name in COUNTS for n in COUNTS[name]])
def test_a_generator_is_refused_before_anything_else(name, count):
    arguments = [None] * count
    arguments[-1 - (1 if count == 22 else BEHIND_GEN[name])] = torch.Generator()
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        getattr(extension, name)(*arguments)


@pytest.mark.parametrize("own", [(), (3, True)])
def test_the_extension_has_the_cache(own):
    q, new = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8)
    caches, lengths = torch.randn(2, 2, 20, 2, 8), torch.tensor([3, 17], dtype=torch.int32)
    copies, into = caches.clone(), torch.empty_like(q)
    none = [None] * 6
    out, lse = extension.fwd_kvcache(
        q, *caches, new, new, lengths, *none, into, 8**-0.5, True, 2, 0, 1.5, *own, True, 0
    )  # fmt: skip
    settings = dict(zip(("keep_first", "force_fa_decode"), own, strict=False))
    expected, other = flash_attn_with_kvcache(
        q, *copies, new, new, cache_seqlens=lengths, causal=True, window_size=(2, 0), softcap=1.5,
        return_softmax_lse=True, **settings,
    )  # fmt: skip
    assert (
        out is into and torch.equal(out, expected) and torch.equal(lse, other) and torch.equal(caches, copies)
    )


ALL_COUNTS = {**COUNTS, "fwd_kvcache": (20, 22)}


@pytest.mark.parametrize("name", ALL_COUNTS)
def test_the_extension_counts_its_arguments(name):
    head = sum(
        p.kind is p.POSITIONAL_ONLY for p in inspect.signature(getattr(extension, name)).parameters.values()
    )
    expected = " or ".join(map(str, ALL_COUNTS[name]))
    for count in set(range(head, 30)) - {*ALL_COUNTS[name]}:
        message = f"^{name}: expected {expected} arguments, got {count}. Behind softcap give"
        with pytest.raises(TypeError, match=message):
            getattr(extension, name)(*[None] * count)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'softcap'"):
        getattr(extension, name)(*[None] * (head - 1))
