"""Which query sees which key: ``Mask``, a union of bands, with its builders and its algebra."""

from magi_attention.mask.bands import INF
from magi_attention.mask.lowering import DeviceMask
from magi_attention.mask.mask import Mask

__all__ = ["INF", "DeviceMask", "Mask"]
