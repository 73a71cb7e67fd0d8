"""Helpers of programs."""

from magi_attention.utils.environment import clearup_dist_env, setup_dist_env

__all__ = ["clearup_dist_env", "setup_dist_env"]
