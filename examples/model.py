"""A small decoder over packed documents: RoPE, grouped-query attention with a sink, RMSNorm, SwiGLU.

Shape suffixes: T tokens of the packed sequence, C channels, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magi_attention import Mask, attention
from magi_attention.api import DistAttnRuntimeKey, calc_attn

Sight = Mask | DistAttnRuntimeKey
"""Which token sees which: a mask over all tokens, or the key of one over tokens that are dealt to ranks."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder. ``attention_dtype`` is what q, k and v are rounded to before attention.

    With ``checkpoint`` a layer keeps only its input, and is computed again in the backward.
    """

    vocabulary: int
    attention_dtype: torch.dtype
    backend: str
    checkpoint: bool = False
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


class SelfAttention(nn.Module):
    """Grouped-query attention with a sink: one learnable logit per head that has no value behind it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = nn.Linear(shape.channels, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, bias=False)
        self.output = nn.Linear(shape.channels, shape.channels, bias=False)
        self.sink = nn.Parameter(torch.zeros(1, shape.heads))

    def project(self, x_TC: Tensor, angles_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, D), k (T, K, D), v (T, K, D) in ``attention_dtype``, q and k turned by their positions."""
        heads = self.qkv(x_TC).unflatten(-1, (-1, self.shape.head_dim))
        q, k, v = heads.split([self.shape.heads, self.shape.kv_heads, self.shape.kv_heads], dim=1)
        dtype = self.shape.attention_dtype
        return rotate(q, angles_TD).to(dtype), rotate(k, angles_TD).to(dtype), v.to(dtype)

    def forward(self, x_TC: Tensor, angles_TD: Tensor, sight: Sight) -> Tensor:
        q, k, v = self.project(x_TC, angles_TD)
        if isinstance(sight, Mask):
            backend = self.shape.backend
            out_THD, _ = attention(q, k, v, sight, sink=self.sink, deterministic=True, backend=backend)
        else:
            out_THD, _ = calc_attn(q, k, v, sight, sink=self.sink)
        return self.output(out_THD.flatten(1).to(x_TC.dtype))


class SwiGLU(nn.Module):
    """(silu(x W1) * x W2) W3."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(channels, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x_TC).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.channels)
        self.attention = SelfAttention(shape)
        self.mlp_norm = nn.RMSNorm(shape.channels)
        self.mlp = SwiGLU(shape.channels, 3 * shape.channels)

    def forward(self, x_TC: Tensor, angles_TD: Tensor, sight: Sight) -> Tensor:
        x_TC = x_TC + self.attention(self.attention_norm(x_TC), angles_TD, sight)
        return x_TC + self.mlp(self.mlp_norm(x_TC))


class Decoder(nn.Module):
    """Tokens (T,) and their positions (T,) to logits (T, vocabulary); one mask or key serves every layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.channels)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.channels)
        self.logits = nn.Linear(shape.channels, shape.vocabulary, bias=False)

    def forward(self, inputs_T: Tensor, positions_T: Tensor, sight: Sight) -> Tensor:
        x_TC = self.embedding(inputs_T)
        angles_TD = rotation_angles(positions_T, self.shape.head_dim)
        for layer in self.layers:
            if self.shape.checkpoint:
                x_TC = checkpoint(layer, x_TC, angles_TD, sight, use_reentrant=False)
            else:
                x_TC = layer(x_TC, angles_TD, sight)
        return self.logits(self.norm(x_TC))


def rotation_angles(positions_T: Tensor, head_dim: int) -> Tensor:
    """(T, D / 2) fp32 angles in radians: position * 10000 ** (-2 d / D)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device) / head_dim
    return positions_T[:, None] * 10_000.0**-exponents


def rotate(x_THD: Tensor, angles_TD: Tensor) -> Tensor:
    """Rotary embedding: channel pairs (d, d + D / 2) of every head turn by the angle of their token."""
    cos, sin = angles_TD.cos()[:, None], angles_TD.sin()[:, None]
    a, b = x_THD.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
