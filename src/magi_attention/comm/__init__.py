"""How ranks communicate, as other code asks for it under documented names."""

from magi_attention.comm.settings import (
    dsink_all_reduce_op,
    ffa_bwd_sm_margin_save_for_comm,
    ffa_fwd_sm_margin_save_for_comm,
    is_bwd_high_precision_reduce_enable,
    is_fwd_high_precision_reduce_enable,
    is_hierarchical_comm_enable,
    is_native_grpcoll_enable,
    is_qo_comm_enable,
)

__all__ = [
    "dsink_all_reduce_op",
    "ffa_bwd_sm_margin_save_for_comm",
    "ffa_fwd_sm_margin_save_for_comm",
    "is_bwd_high_precision_reduce_enable",
    "is_fwd_high_precision_reduce_enable",
    "is_hierarchical_comm_enable",
    "is_native_grpcoll_enable",
    "is_qo_comm_enable",
]
