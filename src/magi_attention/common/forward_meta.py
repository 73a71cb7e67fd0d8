"""``AttnForwardMeta``: what an attention forward returns beside the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class AttnForwardMeta:
    """Statistics of the softmax, one object per attention call.

    Attributes:
        lse: natural logarithm of the softmax denominator of every row, fp32, (num_tokens_q, num_heads_q).
            It includes the sink, if there is one; -inf for a row that sees nothing. None if not computed.
        max_logits: largest scaled (and capped) logit over all visible pairs per head, sinks left out, fp32,
            (num_heads_q,); -inf for a head without visible pairs. None unless it was asked for.
    """

    lse: torch.Tensor | None = None
    max_logits: torch.Tensor | None = None
