"""``flex_flash_attn_func`` under its documented import path."""

from magi_attention.api.flex_flash_attn import flex_flash_attn_func

__all__ = ["flex_flash_attn_func"]
