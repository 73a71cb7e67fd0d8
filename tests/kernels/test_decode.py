"""The kernels on caches: whatever the door can ask of them, in the interpreter; what they compile to for sm_90."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import SHARED_MEMORY, run_program
from cache_cases import CacheCase, cache_case

from magi_attention.api import flash_attn_cache
from magi_attention.kernels import cache_ops
from magi_attention.kernels.cache_problem import CacheProblem
from magi_attention.kernels.triton import counters, decode_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture(autouse=True)
def _by_name(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", "triton")
    yield
    decode_launch.num_programs_on.cache_clear()


def is_for_kernels(case: CacheCase) -> bool:
    """Chunks and many rows are a matter of other kernels, which the interpreter does not run with odd dimensions."""
    rows = max(map(len, case.queries), default=0) * (case.q.shape[-2] // case.caches[0].shape[2])
    return "attention_chunk" not in case.settings and rows <= flash_attn_cache.MOST_ROWS


def run(case: CacheCase) -> None:
    by_mask = mock.Mock(side_effect=AssertionError("not by the kernels"))
    with mock.patch.object(flash_attn_cache, "_by_mask", by_mask):
        assert all(figure.ok for figure in case.figures()), case.figures()
    case.check_caches()


@pytest.mark.parametrize("seed", range(60))
def test_whatever_goes_together(seed, monkeypatch):
    case = cache_case(seed, dtype=(torch.float32, torch.float16)[seed % 2], device=DEVICE)
    # From one program for everything to more than there are steps of keys.
    monkeypatch.setattr(decode_launch, "_PROGRAMS_ON_CPU", (1, 2, 3, 7, 50)[seed % 5])
    if is_for_kernels(case):
        run(case)


def test_most_seeds_are_for_the_kernels():
    assert sum(is_for_kernels(cache_case(seed)) for seed in range(60)) > 45


@pytest.mark.parametrize("programs", [1, 2, 5, 8, 13, 40])
@pytest.mark.parametrize("most_pieces", [1, 16])
def test_pieces_make_the_whole(programs, most_pieces, monkeypatch):
    monkeypatch.setattr(decode_launch, "_PROGRAMS_ON_CPU", programs)
    monkeypatch.setattr(decode_launch, "MOST_PIECES", most_pieces)
    lengths = torch.tensor([200, 1, 0, 77, 33], dtype=torch.int32)
    q, k, v = (torch.randn(5, n, h, 16) for n, h in ((2, 6), (200, 2), (200, 2)))
    out, lse = decode_launch.decode(CacheProblem(q, k, v, lengths, 0.25))
    for b, length in enumerate(lengths.tolist()):
        scores = torch.einsum("thd,shd->hts", q[b], k[b, :length].repeat_interleave(3, dim=1)) * 0.25
        expected = torch.einsum("hts,shd->thd", scores.softmax(2), v[b, :length].repeat_interleave(3, dim=1))
        torch.testing.assert_close(out[b], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b], scores.logsumexp(2).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_every_tile(rows):
    cut = replace(decode_launch.tiling_of(rows, 99, 16, 4), cols=16)
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((9, 8), (50, 2), (50, 2)))
    lengths = torch.tensor([50, 13], dtype=torch.int32)
    problem = CacheProblem(q, k, v, lengths, 0.3, window=(20, 0))
    found, other = decode_launch.decode(problem, cut), decode_launch.decode(problem)
    for one, two in zip(found, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_what_lies_beyond_the_cache_is_neither_read_nor_written():
    whole = torch.full((9, 4, 1, 16), torch.nan)
    pages = whole[2:6]
    pages[:] = torch.randn(4, 4, 1, 16)
    before = whole.clone()
    table = torch.tensor([[7, -3], [1, 2]], dtype=torch.int32)
    q, new = torch.randn(2, 1, 1, 16), torch.randn(2, 3, 1, 16)
    lengths = torch.tensor([100, 6], dtype=torch.int32)
    cache_ops.append_to_cache(
        pages, pages.clone(), new, new, q, lengths, 0, None, None, None, None, None, None, table, False, True
    )
    # Sequence 0 has no room at all, sequence 1 for two of three.
    before[2 + 2, 2:4] = new[1, :2]
    torch.testing.assert_close(whole, before, rtol=0, atol=0, equal_nan=True)
    out, lse = decode_launch.decode(CacheProblem(q, pages, pages, lengths, 1.0, block_table=table))
    assert out.isfinite().all() and lse.isfinite().all()


def test_operators_keep_their_schemas():
    cache = torch.randn(3, 8, 1, 16)
    q, new = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 1, 16)
    lengths, angles = torch.tensor([3, 5], dtype=torch.int32), torch.randn(9, 4)
    tests = ("test_schema", "test_faketensor")
    append = (cache, cache.clone(), new, new, q, lengths, 0)
    for tables in ((None, None), (angles, angles)):
        arguments = (*append, *tables, None, None, None, None, None, False, True)
        torch.library.opcheck(cache_ops.append_to_cache, arguments, test_utils=tests)
    arguments = (q, cache, cache, lengths, 0, 0, *[None] * 7, 0.25, 0.0, -1, 0, 0, False, 0)
    torch.library.opcheck(cache_ops.attend_to_cache, arguments, test_utils=tests)


def test_counters_run_out_and_are_never_shared():
    reserve = counters._Reserve(torch.zeros(10, dtype=torch.int32))
    first, second = reserve.take(4), reserve.take(6)
    assert first is not None and second is not None
    first += 1
    assert not second.any() and reserve.take(1) is None


def test_counters_begin_where_triton_needs_no_other_kernel(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setitem(counters._reserves, device, counters._Reserve(torch.zeros(40, dtype=torch.int32)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    found = [counters.zeroed(count, device) for count in (1, 9, 3)]
    assert [x.storage_offset() % 4 for x in found] == [0, 0, 0] and [len(x) for x in found] == [4, 12, 4]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return run_program("decode_compile.py")


# Bytes that ptxas spilled when the tiles were chosen, and a quarter more.
MOST_SPILLS = {"decode 32 256": 30, "decode 64 128": 10, "decode 64 256": 440, "decode 128 256": 190}


def test_compiled_kernels_fit_and_copy_ahead(compiled):
    for name, found in compiled.items():
        assert found["shared"] <= SHARED_MEMORY
        assert found["spills"] <= MOST_SPILLS.get(name, 0), (name, found)
        if name.startswith("decode"):
            assert found["products"] > 0 and found["copies"] > 0 and found["narrow_copies"] == 0, (
                name,
                found,
            )
