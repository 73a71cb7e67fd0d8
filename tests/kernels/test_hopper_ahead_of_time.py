"""The Hopper kernels compile for sm_90, and the machine code still has the order that makes them fast and safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ahead_of_time import SHARED_MEMORY, run_program
from hopper_variants import SABOTAGE, variants

triton = pytest.importorskip("triton", minversion="3.6")

# The static array of barriers and messages beside what Triton allocates.
STATIC_SHARED = 1024
CONSUMERS = 2
WARPGROUP_ROWS = 64
WARPGROUP_THREADS = 128
# Bytes that ptxas spills with Triton 3.6, and a little more; none where a variant is missing.
MOST_SPILLS: dict[str, int] = {
    "forward 64 bf16 pack1": 40,
    "forward 64 fp16 pack4 softcap sink": 48,
    "forward 64 bf16 pack16 max_logits": 32,
    "forward 64 bf16 pack4 short": 16,
    "forward 128 bf16 pack1": 376,
    "forward 128 fp16 pack4 softcap sink": 392,
    "forward 128 bf16 pack16 max_logits": 272,
    "forward 128 bf16 pack4 short": 32,
    "forward 256 bf16 pack1": 152,
    "forward 256 fp16 pack4 softcap sink": 296,
    "forward 256 bf16 pack16 max_logits": 216,
    "forward 256 bf16 pack4 short": 152,
    "backward 64 bf16 pack1": 176,
    "backward 64 fp16 pack4 softcap short": 1304,
    "backward 64 bf16 pack16 short": 200,
    "backward 128 bf16 pack1": 360,
    "backward 128 fp16 pack4 softcap short": 704,
    "backward 128 bf16 pack16 short": 104,
    "backward 256 bf16 pack1": 128,
    "backward 256 fp16 pack4 softcap short": 312,
    "backward 256 bf16 pack16 short": 112,
    "forward 96 bf16 pack1": 304,
    "forward 128 bf16 pack1 softcap": 376,
    "forward 128 bf16 pack1 sink": 392,
    "forward 128 bf16 pack4 accumulate": 600,
    "forward 256 fp16 pack1 sink accumulate": 336,
    "forward 64 fp16 pack1 dropout alibi": 88,
    "forward 128 bf16 pack4 dropout": 80,
    "forward 128 bf16 pack4 alibi": 88,
    "forward 128 bf16 pack1 short dropout alibi": 32,
    "backward 96 bf16 pack1": 360,
    "backward 64 fp16 pack1 dropout alibi": 384,
    "backward 128 bf16 pack4 short dropout": 456,
    "backward 128 bf16 pack1 alibi": 424,
}
# Loads and stores of spilled registers on the shortest way round the block loop, likewise; of the worst consumer.
MOST_LOCAL: dict[str, int] = {
    "backward 64 bf16 pack1": 10,
    "backward 64 fp16 pack4 softcap short": 302,
    "backward 64 bf16 pack16 short": 8,
    "backward 128 bf16 pack1": 4,
    "backward 128 fp16 pack4 softcap short": 60,
    "backward 128 bf16 pack16 short": 3,
    "backward 256 fp16 pack4 softcap short": 20,
    "forward 128 bf16 pack4 dropout": 2,
    "forward 128 bf16 pack1 short dropout alibi": 2,
    "backward 96 bf16 pack1": 4,
    "backward 64 fp16 pack1 dropout alibi": 52,
    "backward 128 bf16 pack4 short dropout": 8,
    "backward 128 bf16 pack1 alibi": 8,
}
VARIANTS = {str(variant): variant for variant in variants()}
# Matrix instructions that a warpgroup issues for a block; each takes 16 of the summed dimension.
PRODUCTS: dict[str, Callable[[dict[str, int]], int]] = {
    "forward_kernel": lambda c: (c["D"] + c["BLOCK_N"]) // 16,
    # S, dP over the head dimension; dV, dK over the queries; dQ over 128 keys.
    "backward_kernel": lambda c: (2 * c["D"] + 2 * c["BLOCK_Q"] + 128) // 16,
    # S or dP over the head dimension; dV, dK over the queries; two quarters of dQ over 64 keys.
    "backward_wide_kernel": lambda c: (c["D"] + 2 * c["BLOCK_Q"] + 2 * 64) // 16,
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
measured_with_3_6 = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="the bounds are those of Triton 3.6"
)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Figures of each variant and of each sabotage, from a process without the interpreter."""
    return run_program("hopper_compile.py")


@pytest.fixture
def found(compiled: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Figures of the variant or sabotage ``name``."""
    assert "error" not in compiled[name], compiled[name]["error"]
    return compiled[name]


@every_variant
def test_the_library_launches_what_the_variant_says(found, name):
    variant = VARIANTS[name]
    assert (found["PACK"], found["SOFTCAP"]) == (variant.group, variant.softcap)
    assert (found.get("HAS_SINK", False), found.get("HAS_MAX", False)) == (variant.sink, variant.max_logits)


@every_variant
def test_products_are_not_serialised(found):
    assert found["warnings"] == []


@every_variant
def test_every_consumer_has_its_products_in_one_loop(found):
    products = PRODUCTS[found["kernel"]](found)
    assert [loop["products"] for loop in found["loops"]] == [products] * CONSUMERS


def exponentials(found: dict[str, Any], votes: int) -> int:
    """Fewest exponentials a thread computes while a product runs: a block's, twice where weights may be redone."""
    columns = found["BLOCK_N"] if "BLOCK_N" in found else found["BLOCK_Q"]
    return WARPGROUP_ROWS * columns // WARPGROUP_THREADS * (2 if votes else 1)


@every_variant
def test_exponentials_are_computed_beside_a_product(found):
    if found["kernel"] == "backward_wide_kernel":
        pytest.skip("its exponentials run beside the products of the other warpgroup")
    for loop in found["loops"]:
        assert loop["overlapped"] >= exponentials(found, loop["votes"])


@pytest.mark.parametrize("name", ["no border"])
def test_a_wait_above_the_exponentials_is_noticed(found):
    assert len(found["loops"]) == CONSUMERS
    assert all(loop["overlapped"] < exponentials(found, loop["votes"]) for loop in found["loops"])


@every_variant
def test_a_branch_that_parts_warps_has_no_barrier(found, name):
    assert found["divergent_barriers"] == []
    assert all(loop["barriers_after_votes"] == 0 for loop in found["loops"])
    if VARIANTS[name].kernel == "forward" and not VARIANTS[name].max_logits:
        assert found["votes"] == CONSUMERS and all(loop["votes"] for loop in found["loops"])


@pytest.mark.parametrize("name", ["barrier in a branch"])
def test_a_barrier_in_a_branch_that_parts_warps_is_noticed(found):
    assert len(found["divergent_barriers"]) == CONSUMERS
    assert all(loop["barriers_after_votes"] > 0 for loop in found["loops"])


@every_variant
def test_registers_move_from_producers_to_consumers(found):
    assert found["CONSUMER_REGS"] in found["taken"] and found["PRODUCER_REGS"] in found["given"]


@every_variant
def test_shared_memory_fits(found):
    assert found["shared"] + STATIC_SHARED <= SHARED_MEMORY


@every_variant
def test_no_size_is_compiled_in(found):
    assert found["specialised"] == []


@measured_with_3_6
@every_variant
def test_spills_stay_as_measured(found, name):
    assert found["spills"] <= MOST_SPILLS.get(name, 0)


@measured_with_3_6
@every_variant
def test_the_block_loop_spills_no_more_than_measured(found, name):
    assert max(loop["local"] for loop in found["loops"]) <= MOST_LOCAL.get(name, 0)


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_compiles_silently(found):
    assert found["warnings"] == []
