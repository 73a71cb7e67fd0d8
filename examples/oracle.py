"""Does a trained model's attention say what the definition says? Output and gradients, against float64."""

from __future__ import annotations

import torch
from model import Decoder, rotation_angles
from packing import Packed

from magi_attention import Mask
from magi_attention.testing import Case, Figure, compare


def compare_with_oracle(model: Decoder, packed: Packed, mask: Mask) -> list[Figure]:
    """The first layer's trained queries, keys, values and sink, through attention and its definition."""
    device = model.embedding.weight.device
    layer = model.layers[0]
    with torch.no_grad():
        x_TC = layer.attention_norm(model.embedding(torch.from_numpy(packed.inputs).to(device)))
        angles_TD = rotation_angles(torch.from_numpy(packed.positions).to(device), model.shape.head_dim)
        q, k, v = layer.attention.project(x_TC, angles_TD)
        sink = layer.attention.sink.detach()
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(q.shape, generator=generator).to(q)
    case = Case(q, k, v, mask, sink=sink, dout=dout)
    return list(compare(case, backend=model.shape.backend, max_logits=False).figures)
