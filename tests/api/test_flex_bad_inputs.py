"""Every mistake is named: what, expected, got; and none of them reaches a kernel."""

from __future__ import annotations

import pytest
import torch

from magi_attention.api import AttnRanges, flex_flash_attn_func
from magi_attention.kernels import ops

ROWS, COLS, HEADS, KV_HEADS, DIM = 8, 10, 4, 2, 16


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object) -> None:
        raise AssertionError("a bad input reached the kernels")

    monkeypatch.setattr(ops, "forward", reached)


def arguments(**changes: object) -> dict:
    """A correct call of the door, changed."""
    return {
        "q": torch.randn(ROWS, HEADS, DIM),
        "k": torch.randn(COLS, KV_HEADS, DIM),
        "v": torch.randn(COLS, KV_HEADS, DIM),
        "q_ranges": torch.tensor([[0, 4], [4, 8]], dtype=torch.int32),
        "k_ranges": torch.tensor([[0, 10], [0, 10]], dtype=torch.int32),
        "attn_type_map": torch.tensor([0, 1], dtype=torch.int32),
    } | changes


def ranges(*pairs: object) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int32)


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


Bad = dict[str, tuple[dict, type[Exception], str]]

TENSORS: Bad = {
    "q_list": ({"q": [[1.0]]}, TypeError, "q: expected Tensor, got list"),
    "q_batched": (
        {"q": shaped(2, ROWS, HEADS, DIM)},
        ValueError,
        r"q shape: .*head_dim\), got \(2, 8, 4, 16\).*Pack",
    ),
    "q_flat": ({"q": shaped(ROWS, HEADS * DIM)}, ValueError, r"q shape: .*got \(8, 64\)"),
    "q_integer": (
        {"q": shaped(ROWS, HEADS, DIM, dtype=torch.int64)},
        TypeError,
        "q dtype: .*got torch.int64",
    ),
    "k_none": ({"k": None}, TypeError, "k: expected Tensor, got NoneType"),
    "k_flat": ({"k": shaped(COLS, DIM)}, ValueError, r"k shape: .*got \(10, 16\)"),
    "k_dtype": (
        {"k": shaped(COLS, KV_HEADS, DIM, dtype=torch.float64)},
        TypeError,
        "k dtype: .*float32, got torch.float64",
    ),
    "k_head_dim": ({"k": shaped(COLS, KV_HEADS, 8)}, ValueError, r"k shape: .*16\), got \(10, 2, 8\)"),
    "k_heads_do_not_divide": (
        {"k": shaped(COLS, 3, DIM)},
        ValueError,
        "heads of q: .*multiple of the 3 heads.*got 4",
    ),
    "k_no_heads": ({"k": shaped(COLS, 0, DIM)}, ValueError, "heads of q: .*multiple of the 0 heads"),
    "k_on_meta": (
        {"k": torch.empty(COLS, KV_HEADS, DIM, device="meta")},
        ValueError,
        "k device: expected cpu, got meta",
    ),
    "v_length": (
        {"v": shaped(COLS - 1, KV_HEADS, DIM)},
        ValueError,
        r"v shape: expected \(10, 2, DV\), got \(9, 2, 16\)",
    ),
    "v_heads": ({"v": shaped(COLS, HEADS, DIM)}, ValueError, r"v shape: .*got \(10, 4, 16\)"),
    "v_dtype": (
        {"v": shaped(COLS, KV_HEADS, DIM, dtype=torch.float16)},
        TypeError,
        "v dtype: .*got torch.float16",
    ),
    "v_no_dim": (
        {"v": shaped(COLS, KV_HEADS, 0)},
        ValueError,
        r"head dimension: expected at least 1, got \(16, 0\)",
    ),
}

RANGES: Bad = {
    "no_q_ranges": ({"q_ranges": None}, ValueError, "q_ranges: expected ranges .*got None"),
    "no_k_ranges": ({"k_ranges": None}, ValueError, "k_ranges: expected ranges .*got None"),
    "q_start_after_end": (
        {"q_ranges": ranges([0, 4], [8, 4])},
        ValueError,
        r"q_ranges\[1\]: expected start <= end, got \(8, 4\)",
    ),
    "q_negative": (
        {"q_ranges": ranges([-1, 4], [4, 8])},
        ValueError,
        r"q_ranges\[0\]: expected start >= 0, got \(-1, 4\)",
    ),
    "q_beyond_the_end": (
        {"q_ranges": ranges([0, 4], [4, 9])},
        ValueError,
        r"q_ranges\[1\]: expected end <= 8.*got \(4, 9\)",
    ),
    "k_beyond_the_end": (
        {"k_ranges": ranges([0, 11], [0, 10])},
        ValueError,
        r"k_ranges\[0\]: expected end <= 10.*got \(0, 11\)",
    ),
    "k_list_beyond_the_end": (
        {"k_ranges": [[0, 11], [0, 10]]},
        ValueError,
        r"k_ranges\[0\]: expected end <= 10",
    ),
    "k_attn_ranges_beyond_the_end": (
        {"k_ranges": AttnRanges.from_ranges([(0, 10), (3, 12)])},
        ValueError,
        r"k_ranges\[1\]: expected end <= 10",
    ),
    "q_one_column": (
        {"q_ranges": shaped(2, 1, dtype=torch.int32)},
        ValueError,
        r"q_ranges shape: expected \(n, 2\), got \(2, 1\)",
    ),
    "q_flat_ranges": ({"q_ranges": torch.arange(4)}, ValueError, r"q_ranges shape: .*got \(4,\)"),
    "q_ragged": (
        {"q_ranges": [[0, 4], [4]]},
        ValueError,
        r"q_ranges: expected pairs .*got \[\[0, 4\], \[4\]\]",
    ),
    "q_float": ({"q_ranges": shaped(2, 2)}, TypeError, "q_ranges dtype: expected integers, got float32"),
    "different_lengths": (
        {"k_ranges": ranges([0, 10])},
        ValueError,
        "k_ranges length: expected 2 like q_ranges, got 1",
    ),
    "types_length": (
        {"attn_type_map": torch.tensor([0, 1, 0])},
        ValueError,
        "attn_type_map length: expected 2 like q_ranges, got 3",
    ),
    "type_4": (
        {"attn_type_map": torch.tensor([0, 4])},
        ValueError,
        r"mask type of slice 1: .*bi_causal\), got 4",
    ),
    "type_negative": ({"attn_type_map": torch.tensor([-1, 0])}, ValueError, "mask type of slice 0: .*got -1"),
    "type_name": (
        {"attn_type_map": ["full", "diagonal"]},
        ValueError,
        "mask type of slice 1: .*got diagonal",
    ),
    "type_integer": ({"attn_type_map": 1}, TypeError, "attn_type_map: expected one type per slice, got 1"),
    "k_ranges_elsewhere": (
        {"k_ranges": torch.empty(2, 2, dtype=torch.int32, device="meta")},
        ValueError,
        "k_ranges device: expected cpu like q_ranges, got meta",
    ),
    "all_ranges_elsewhere": (
        {name: torch.empty(2, 2, dtype=torch.int32, device="meta") for name in ("q_ranges", "k_ranges")}
        | {"attn_type_map": None},
        ValueError,
        "q_ranges device: expected cpu .*got meta",
    ),
}

OPTIONS: Bad = {
    "sink_layout": ({"sink_layout": "hs"}, ValueError, "sink_layout: .*got 'hs'"),
    "sink_layout_shd": (
        {"sink_layout": "shd"},
        NotImplementedError,
        'sink_layout: expected "sh" or "ssh", got "shd"',
    ),
    "sink_sh_has_three_axes": (
        {"sink": shaped(ROWS, 1, HEADS)},
        ValueError,
        r'sink with sink_layout="sh": .*got \(8, 1, 4\)',
    ),
    "sink_ssh_has_two_axes": (
        {"sink": shaped(1, HEADS), "sink_layout": "ssh"},
        ValueError,
        r'sink_layout="ssh": .*got \(1, 4\)',
    ),
    "sink_heads": (
        {"sink": shaped(1, KV_HEADS)},
        ValueError,
        r"sink shape: expected \(s_sink, 4\), got \(1, 2\)",
    ),
    "sink_rows": (
        {"sink": shaped(ROWS + 1, 1, HEADS), "sink_layout": "ssh"},
        ValueError,
        r"sink shape: expected \(8, s_sink, 4\), got \(9, 1, 4\)",
    ),
    "sink_integer": (
        {"sink": shaped(1, HEADS, dtype=torch.int32)},
        TypeError,
        "sink dtype: .*got torch.int32",
    ),
    "sink_list": ({"sink": [0.0] * HEADS}, TypeError, "sink: expected Tensor, got list"),
    "scale_text": ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number, got str"),
    "scale_nan": (
        {"softmax_scale": float("nan")},
        ValueError,
        "softmax_scale: expected a finite number, got nan",
    ),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap: .*positive number, got -1.0"),
    "softcap_none": ({"softcap": None}, TypeError, "softcap: expected a number, got NoneType"),
    "softcap_infinite": ({"softcap": float("inf")}, ValueError, "softcap: expected a finite number, got inf"),
    "sm_margin_negative": ({"sm_margin": -1}, ValueError, "sm_margin: expected at least 0, got -1"),
    "sm_margin_float": ({"sm_margin": 1.5}, TypeError, "sm_margin: expected an integer, got float"),
    "deterministic_integer": ({"deterministic": 1}, TypeError, "deterministic: expected bool, got int"),
    "return_max_logits_none": (
        {"return_max_logits": None},
        TypeError,
        "return_max_logits: expected bool, got NoneType",
    ),
    "max_seqlen_q_float": ({"max_seqlen_q": 4.0}, TypeError, "max_seqlen_q: expected an integer, got float"),
    "max_seqlen_k_negative": ({"max_seqlen_k": -4}, ValueError, "max_seqlen_k: expected at least 0, got -4"),
    "ref_block_size_number": (
        {"ref_block_size": 128},
        TypeError,
        "ref_block_size: expected a pair .*got 128",
    ),
    "ref_block_size_rows": (
        {"ref_block_size": (96, 64)},
        ValueError,
        r"ref_block_size: .*192.*got \(96, 64\)",
    ),
    "ref_block_size_columns": (
        {"ref_block_size": (128, 72)},
        ValueError,
        r"multiple of 16 up to 256\), got \(128, 72\)",
    ),
    "ref_block_size_swapped": (
        {"ref_block_size": (128, 64), "swap_ab": True},
        ValueError,
        r"with swap_ab, got \(128, 64\)",
    ),
    "ref_block_size_packed": (
        {"ref_block_size": (64, 64), "pack_gqa": True, "q": shaped(ROWS, 6, DIM)},
        ValueError,
        "pack_gqa: expected rows that are a multiple of the 3",
    ),
    "sparse_load_alone": ({"sparse_load": True}, ValueError, "sparse_load: expected auto_range_merge=True"),
    "pack_and_cat": (
        {"pack_gqa": True, "cat_gqa": True},
        ValueError,
        "pack_gqa and cat_gqa: expected at most one",
    ),
    "swap_loop_deterministic": (
        {"swap_bwd_qk_loop": True, "deterministic": True},
        ValueError,
        "swap_bwd_qk_loop: expected deterministic=False",
    ),
    "swap_loop_cat": (
        {"swap_bwd_qk_loop": True, "cat_gqa": True},
        ValueError,
        "swap_bwd_qk_loop: expected cat_gqa=False",
    ),
    "dkv_promise_and_swap_loop": (
        {"disable_bwd_dkv_atomic_reduction": True, "swap_bwd_qk_loop": True, "pack_gqa": True},
        ValueError,
        "disable_bwd_dkv_atomic_reduction: expected swap_bwd_qk_loop=False",
    ),
    "dkv_promise_with_groups": (
        {"disable_bwd_dkv_atomic_reduction": True},
        ValueError,
        "disable_bwd_dkv_atomic_reduction: expected pack_gqa=True or",
    ),
    "index_attn": ({"index_attn": True}, NotImplementedError, "index_attn: expected ranges.*Mask.from_dense"),
    "index_attn_indices": (
        {"index_attn_indices": shaped(8, 2, 4, dtype=torch.int32), "q_ranges": None, "k_ranges": None},
        NotImplementedError,
        "index_attn_indices: expected ranges",
    ),
    "both_sources": (
        {"index_attn_indices": shaped(8, 2, 4, dtype=torch.int32)},
        ValueError,
        "mask: expected ranges or .*got both",
    ),
    "q_block_size": ({"q_block_size": 2}, ValueError, "q_block_size: expected 1, got 2"),
    "k_block_size_float": ({"k_block_size": 1.0}, TypeError, "k_block_size: expected an integer, got float"),
    "backend_unknown": ({"backend": "cudnn"}, ValueError, "backend: expected one of .*got 'cudnn'"),
    "backend_refuses": ({"backend": "triton"}, NotImplementedError, "backend 'triton'"),
}


@pytest.mark.parametrize("name", TENSORS | RANGES | OPTIONS)
def test_door_names_the_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # with it, "triton" would run on the CPU
    changes, error, message = (TENSORS | RANGES | OPTIONS)[name]
    with pytest.raises(error, match=message):
        flex_flash_attn_func(**arguments(**changes))


def test_the_unchanged_call_would_run() -> None:
    with pytest.raises(AssertionError, match="reached the kernels"):
        flex_flash_attn_func(**arguments())


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="window_size"):
        flex_flash_attn_func(**arguments(window_size=(3, 0)))


@pytest.mark.parametrize(
    ("later", "keywords", "message"),
    [
        (
            (8, 10, None, None, 0.0, False, 0, False, False, None),
            {},
            "positional arguments: expected at most 14",
        ),
        (
            (None, None, None, 0.0, False, 0, False, False, None, 1),
            {},
            "positional arguments: expected at most 14",
        ),
        ((8, 10), {"max_seqlen_q": 8}, r"max_seqlen_q: expected once; .*\(max_seqlen_q, max_seqlen_k\)"),
        ((8, torch.tensor([0, 1])), {}, "max_seqlen_k: expected an integer, got Tensor"),
        ((None, None), {"sink": None}, "sink: expected once"),
    ],
    ids=("lengths_too_many", "types_too_many", "given_twice", "only_one_length", "sink_twice"),
)
def test_positional_mistakes(later: tuple, keywords: dict, message: str) -> None:
    leading = list(arguments().values())[:5]
    with pytest.raises(TypeError, match=message):
        flex_flash_attn_func(*leading, *later, **keywords)
