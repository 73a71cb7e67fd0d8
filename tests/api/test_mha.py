"""The attention modules: those on the kernels equal those in torch operations."""

from __future__ import annotations

import pytest
import torch

from magi_attention.api import mha


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(7, 7), (4, 9), (9, 4)])
def test_batches(sizes, causal):
    q, kv = draw(2, sizes[0], 4, 8), draw(2, sizes[1], 2, 2, 8)
    expected = mha.CrossAttention(causal, 0.3)(q, kv)
    torch.testing.assert_close(mha.FlashCrossAttention(causal, 0.3)(q, kv), expected)
    torch.testing.assert_close(mha.FlashCrossAttention(not causal, 0.3)(q, kv, causal=causal), expected)
    if sizes[0] == sizes[1]:
        qkv = draw(2, sizes[0], 3, 2, 8)
        torch.testing.assert_close(mha.FlashSelfAttention(causal)(qkv), mha.SelfAttention(causal)(qkv))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_equal_a_padding_mask(causal):
    lengths, qkv = [5, 0, 8], draw(3, 8, 3, 2, 8)
    keep = torch.arange(8) < torch.tensor(lengths)[:, None]
    expected = mha.SelfAttention(causal)(qkv, key_padding_mask=keep)[keep]
    cuts = torch.tensor([0, 5, 5, 13], dtype=torch.int32)
    packed = qkv[keep]
    torch.testing.assert_close(
        mha.FlashSelfAttention(causal)(packed, cu_seqlens=cuts, max_seqlen=8), expected
    )
    cross = mha.FlashCrossAttention(causal)
    found = cross(packed[:, 0], packed[:, 1:], None, cuts, 8, cuts, 8)
    torch.testing.assert_close(found, expected)


def test_dropout_only_while_training():
    module, qkv = mha.FlashSelfAttention(attention_dropout=0.5), draw(1, 9, 3, 2, 8)
    plain = mha.SelfAttention()(qkv)
    assert not torch.allclose(module(qkv), plain)
    torch.testing.assert_close(module.eval()(qkv), plain)


def test_slopes_follow_the_module_and_are_not_saved():
    module = mha.FlashSelfAttention(alibi_slopes=torch.tensor([0.5, 0.1]))
    assert module.state_dict() == {} and module.to("meta").alibi_slopes.device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mha.FlashSelfAttention()(draw(5, 3, 2, 8), cu_seqlens=torch.tensor([0, 5])),
            "max_seqlen: expected",
        ),
        (
            lambda: mha.FlashCrossAttention()(draw(5, 2, 8), draw(5, 2, 2, 8), None, torch.tensor([0, 5]), 5),
            "cu_seqlens_k",
        ),
        (
            lambda: mha.CrossAttention()(draw(1, 5, 3, 8), draw(1, 5, 2, 2, 8)),
            "heads of q: expected a multiple",
        ),
        (lambda: mha.SelfAttention()(draw(1, 5, 2, 2, 8)), "qkv shape: expected"),
    ],
    ids=["max_seqlen", "cu_seqlens_k", "heads", "qkv"],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
