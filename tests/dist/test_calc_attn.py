"""Context parallelism over gloo processes: what the documented functions give equals one device."""

from __future__ import annotations

import pytest
from launch import run


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_one_device(ranks):
    op = {"MAGI_ATTENTION_DSINK_ALL_REDUCE_OP": "sum"} if ranks % 2 else {}
    run("attention_program.py", ranks, **op)


def test_some_cases_on_many_ranks():
    run("attention_program.py", 8, "5", "0", "4")


def test_some_cases_on_two_nodes():
    run("attention_program.py", 4, "9", "0", "2", "2")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_functions_around_it(ranks):
    run("interface_program.py", ranks)


def test_nothing_is_as_long_as_the_sequence():
    run("memory_program.py", 4)


@pytest.mark.parametrize(
    ("ranks", "when", "strategy"), [(3, "forward", "keys"), (2, "backward", "keys"), (2, "backward", "heads")]
)
def test_a_rank_that_ends_early_is_an_error_for_the_others(ranks, when, strategy):
    run("leaving_program.py", ranks, when, strategy)
