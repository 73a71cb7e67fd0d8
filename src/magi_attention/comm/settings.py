"""What the library does, where another one lets environment variables choose. Only the first function reads one."""

from __future__ import annotations

from magi_attention import env


def dsink_all_reduce_op() -> str:
    """What ``calc_attn`` does to gradients of sinks over the ranks, as MAGI_ATTENTION_DSINK_ALL_REDUCE_OP says.

    "none" (the default) leaves each rank the gradient of its rows. With "sum" or "avg" the gradient that arrives in
    ``sink.grad`` is reduced already: another sum of it would multiply it by the number of ranks.

    Raises:
        ValueError: another value.
    """
    return env.dsink_all_reduce_op()


def is_hierarchical_comm_enable() -> bool:
    """False: no variable decides it. On a mesh of two axes, nodes and ranks of each, keys come to a node once."""
    return False


def is_qo_comm_enable() -> bool:
    """False: no variable decides it. Queries and outputs travel where ``DistAttnConfig.strategy`` comes to heads."""
    return False


def is_native_grpcoll_enable() -> bool:
    """False: ranks exchange by ``all_to_all_single``."""
    return False


def is_fwd_high_precision_reduce_enable() -> bool:
    """True: partial outputs are merged in fp32."""
    return True


def is_bwd_high_precision_reduce_enable() -> bool:
    """False: gradients of keys travel in the dtype of the keys; they are summed in fp32."""
    return False


def ffa_fwd_sm_margin_save_for_comm() -> int:
    """0 multiprocessors are left free in the forward."""
    return 0


def ffa_bwd_sm_margin_save_for_comm() -> int:
    """0 multiprocessors are left free in the backward."""
    return 0
