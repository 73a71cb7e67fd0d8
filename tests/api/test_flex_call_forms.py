"""Ways to call flex_flash_attn_func: paths, older orders, forms of ranges, hints, caches, torch.compile."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

import magi_attention.api as api
from magi_attention.api import AttnForwardMeta, AttnMaskType, AttnRanges, flex_flash_attn_func, flex_mask
from magi_attention.mask import DeviceMask, Mask

Q_RANGES, K_RANGES, TYPES = [[0, 8], [8, 20]], [[0, 8], [0, 20]], [0, 1]
ARRAYS = tuple(np.array(values, dtype=np.int32) for values in (Q_RANGES, K_RANGES, TYPES))
MEMBERS = [AttnMaskType.FULL, AttnMaskType.CAUSAL]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    flex_mask.clear_mask_cache()
    torch.compiler.reset()


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(20, heads, 8, requires_grad=True) for heads in (4, 2, 2))


def int32() -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(values, dtype=torch.int32) for values in (Q_RANGES, K_RANGES, TYPES))


def test_every_documented_path_is_the_same_function() -> None:
    from magi_attention import functional
    from magi_attention.functional import flex_flash_attn

    assert api.flex_flash_attn_func is functional.flex_flash_attn_func is flex_flash_attn.flex_flash_attn_func
    assert [name for name in api.__all__ if not hasattr(api, name)] == []
    assert set(dir(api)) == set(api.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        api.no_such_name  # noqa: B018


def test_importing_the_door_leaves_triton_alone() -> None:
    code = (
        "import sys; from magi_attention.api import flex_flash_attn_func; sys.exit('triton' in sys.modules)"
    )
    environment_path = [*sys.path]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {environment_path!r}; {code}"])
    assert done.returncode == 0


def test_signature_shows_the_newest_form() -> None:
    parameters = inspect.signature(flex_flash_attn_func).parameters
    kinds = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert kinds == ["q", "k", "v", "q_ranges", "k_ranges", "attn_type_map"]


def test_output_and_meta(qkv: tuple[torch.Tensor, ...]) -> None:
    out, meta = flex_flash_attn_func(*qkv, *int32(), return_max_logits=True)
    assert isinstance(meta, AttnForwardMeta)
    assert out.shape == (20, 4, 8) and meta.lse.shape == (20, 4) and meta.max_logits.shape == (4,)


@pytest.mark.parametrize(
    "forms",
    [
        int32(),
        tuple(x.long() for x in int32()),
        (Q_RANGES, K_RANGES, TYPES),
        (Q_RANGES, K_RANGES, ["full", "causal"]),
        (AttnRanges.from_ranges(Q_RANGES), AttnRanges.from_ranges(K_RANGES), MEMBERS),
        ARRAYS,
        (int32()[0], K_RANGES, MEMBERS),
        tuple(torch.stack([x, x], dim=-1)[..., 0] for x in int32()),
    ],
    ids=("int32", "int64", "lists", "names", "attn_ranges", "arrays", "mixed", "strided"),
)
def test_every_form_of_ranges_is_the_same_mask(qkv: tuple[torch.Tensor, ...], forms: tuple) -> None:
    want = flex_flash_attn_func(*qkv, *int32())[0]
    assert torch.equal(flex_flash_attn_func(*qkv, *forms)[0], want)


@pytest.mark.parametrize("kind", ["causal", AttnMaskType.CAUSAL], ids=("name", "member"))
def test_one_type_for_all_slices(qkv: tuple[torch.Tensor, ...], kind: object) -> None:
    want = flex_flash_attn_func(*qkv, *int32()[:2], torch.tensor([1, 1]))[0]
    assert torch.equal(flex_flash_attn_func(*qkv, *int32()[:2], kind)[0], want)


def test_without_types_every_slice_is_full(qkv: tuple[torch.Tensor, ...]) -> None:
    want = flex_flash_attn_func(*qkv, *int32()[:2], torch.tensor([0, 0]))[0]
    assert torch.equal(flex_flash_attn_func(*qkv, *int32()[:2])[0], want)


@pytest.mark.parametrize(
    ("later", "keywords"),
    [
        ((12, 20, int32()[2]), {}),
        ((12, 20, int32()[2], 0.3, 2.0), {"softmax_scale": None, "softcap": 0.0}),
        ((12, 20, int32()[2], None, 0.0, True, 4, True, True), {}),
        ((12, 20), {"attn_type_map": int32()[2]}),
        ((int32()[2], None, None, 0.0, False, 0, False, False, (128, 128)), {}),
    ],
    ids=("lengths_first", "with_scale", "all_of_it", "types_by_keyword", "types_first"),
)
def test_older_positional_orders(qkv: tuple[torch.Tensor, ...], later: tuple, keywords: dict) -> None:
    newest: dict = {"attn_type_map": int32()[2]}
    if "softcap" in keywords:
        newest |= {"softmax_scale": 0.3, "softcap": 2.0}
        keywords = {}
    want = flex_flash_attn_func(*qkv, *int32()[:2], **newest)[0]
    assert torch.equal(flex_flash_attn_func(*qkv, *int32()[:2], *later, **keywords)[0], want)


def test_older_order_with_a_sink_in_fifth_place(qkv: tuple[torch.Tensor, ...]) -> None:
    sink = torch.randn(2, 4)
    want = flex_flash_attn_func(*qkv, *int32(), sink=sink, softmax_scale=0.5)[0]
    assert torch.equal(flex_flash_attn_func(*qkv, *int32(), sink, 0.5)[0], want)


@pytest.mark.parametrize(
    "hints",
    [
        {"deterministic": True, "sm_margin": 8},
        {"disable_fwd_atomic_reduction": True, "max_seqlen_q": 12, "max_seqlen_k": 20},
        {"disable_bwd_dkv_atomic_reduction": True, "pack_gqa": True, "ref_block_size": (64, 128)},
        {"auto_range_merge": True, "sparse_load": True, "cat_gqa": True},
        {"swap_ab": True, "ref_block_size": (16, 64), "swap_bwd_qk_loop": True},
        {"q_block_size": 1, "k_block_size": 1, "index_attn": False, "index_attn_indices": None},
    ],
    ids=lambda hints: "+".join(hints),
)
def test_hints_do_not_change_a_bit(qkv: tuple[torch.Tensor, ...], hints: dict) -> None:
    def run(**settings: object) -> list[torch.Tensor]:
        out, meta = flex_flash_attn_func(*qkv, *int32(), **settings)
        return [out, meta.lse, *torch.autograd.grad(out.square().sum() + meta.lse.sum(), qkv)]

    assert all(map(torch.equal, run(), run(**hints)))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Mask]:
    """Every mask that is built from ranges, in order."""
    masks: list[Mask] = []
    build = Mask.from_ranges

    def recorded(*args: object) -> Mask:
        masks.append(build(*args))
        return masks[-1]

    monkeypatch.setattr(flex_mask.Mask, "from_ranges", recorded)
    return masks


def test_equal_ranges_build_one_mask(qkv: tuple[torch.Tensor, ...], built: list[Mask]) -> None:
    for ranges in (int32(), int32(), ARRAYS):
        flex_flash_attn_func(*qkv, *ranges)
    assert len(built) == 1
    flex_flash_attn_func(*qkv, *int32()[:2])
    assert len(built) == 2


def test_ranges_edited_through_shared_memory_build_another_mask(
    qkv: tuple[torch.Tensor, ...], built: list[Mask]
) -> None:
    array = ARRAYS[1].copy()
    k_ranges = torch.from_numpy(array)
    first = flex_flash_attn_func(*qkv, int32()[0], k_ranges)[0]
    array[0, 1] = 3
    second = flex_flash_attn_func(*qkv, int32()[0], k_ranges)[0]
    assert len(built) == 2 and not torch.equal(first[:8], second[:8])


def test_the_same_ranges_over_other_lengths_build_another_mask(built: list[Mask]) -> None:
    for num_tokens in (20, 21):
        q = torch.randn(num_tokens, 2, 8)
        assert flex_flash_attn_func(q, q, q, *int32())[0].shape[0] == num_tokens
    assert [mask.num_rows for mask in built] == [20, 21]


def test_a_mask_first_seen_in_inference_mode_serves_training(qkv: tuple[torch.Tensor, ...]) -> None:
    with torch.inference_mode():
        flex_flash_attn_func(*qkv, *int32())
    flex_flash_attn_func(*qkv, *int32())[0].sum().backward()
    assert qkv[0].grad is not None


def lowered(q_ranges: torch.Tensor, k_ranges: torch.Tensor, types: object) -> DeviceMask:
    """The path of ranges on a device, which runs on the CPU as well."""
    return flex_mask._device_mask(q_ranges, k_ranges, types, 20, 20)


def test_device_ranges_are_remembered_by_identity_and_version() -> None:
    ranges = int32()
    first = lowered(*ranges)
    assert lowered(*ranges) is first
    assert lowered(*int32()) is not first
    ranges[1][0, 1] = 3
    edited = lowered(*ranges)
    assert edited is not first and edited.table[0, 3] == 3 and first.table[0, 3] == 8
    torch.autograd.graph.increment_version(ranges[0])
    assert lowered(*ranges) is not edited


def test_device_ranges_lower_to_the_bands_of_the_host_mask() -> None:
    for types in (int32()[2], None, "inv_causal", AttnMaskType.BICAUSAL):
        want = Mask.from_ranges(Q_RANGES, K_RANGES, types, 20, 20)
        assert Mask(lowered(*int32()[:2], types).table.numpy(), 20, 20) == want


def test_inference_tensors_are_not_remembered() -> None:
    with torch.inference_mode():
        ranges = int32()
    first = lowered(*ranges)
    assert lowered(*ranges) is not first and not first.table.is_inference()


def test_sanity_check_names_the_slice_of_device_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    q_ranges, k_ranges, types = int32()
    k_ranges[1, 1] = 30
    assert lowered(q_ranges, k_ranges, types).table[1, 3] == 20
    monkeypatch.setenv("MAGI_ATTENTION_SANITY_CHECK", "1")
    with pytest.raises(ValueError, match=r"k_ranges\[1\]: expected end <= 20"):
        lowered(q_ranges, k_ranges, types)


COMPILED_FORMS = {
    "tensors": int32(),
    "lists": (Q_RANGES, K_RANGES, ["full", "causal"]),
    "one_type": (*int32()[:2], "causal"),
    "no_types": (*int32()[:2], None),
}


@pytest.mark.parametrize("form", COMPILED_FORMS)
@pytest.mark.parametrize("layout", [None, "sh", "ssh"])
def test_compiles_as_one_graph_with_the_same_result(
    qkv: tuple[torch.Tensor, ...], form: str, layout: str | None
) -> None:
    sinks = {None: None, "sh": torch.randn(2, 4), "ssh": torch.randn(20, 2, 4)}
    sink = sinks[layout]
    leaves = list(qkv) if sink is None else [*qkv, sink.requires_grad_()]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, meta = flex_flash_attn_func(
            q, k, v, *COMPILED_FORMS[form], sink=sink, sink_layout=layout or "sh", return_max_logits=True
        )
        return out, meta.lse

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out, lse = function(*qkv)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiled_calls_follow_the_content_of_the_ranges(qkv: tuple[torch.Tensor, ...]) -> None:
    compiled = torch.compile(flex_flash_attn_func, fullgraph=True, backend="aot_eager")
    q_ranges, k_ranges, types = int32()
    for end in (8, 3):
        k_ranges[0, 1] = end
        want = flex_flash_attn_func(*qkv, q_ranges, k_ranges, types)[0]
        torch.testing.assert_close(compiled(*qkv, q_ranges, k_ranges, types)[0], want)
