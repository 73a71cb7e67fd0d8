"""The layers with projections equal the same in PyTorch's own operations; shared out over ranks they equal themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from magi_attention.api.mha_layers import MHA, ParallelMHA
from magi_attention.api.rotary import apply_rotary_emb

EMBED = 32


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer(**settings) -> MHA:
    torch.manual_seed(0)
    return MHA(EMBED, 4, **settings)


def turned(x: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """(b, s, h, 8) with its first 4 channels turned by the formula."""
    angles = torch.arange(x.shape[1])[:, None] / 10000.0 ** (torch.arange(0, 4, 2) / 4)
    return apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved)


def expected(
    module: MHA, x: torch.Tensor, x_kv: torch.Tensor | None = None, rotary: bool = False
) -> torch.Tensor:
    """Self- or cross-attention by the layer's parameters."""
    if module.cross_attn:
        q, kv = module.Wq(x), module.Wkv(x if x_kv is None else x_kv)
    else:
        q, kv = module.Wqkv(x).split([EMBED, module.Wqkv.out_features - EMBED], dim=-1)
    q = q.unflatten(-1, (4, 8))
    k, v = kv.unflatten(-1, (2, module.num_heads_kv, 8)).unbind(2)
    if rotary:
        q, k = turned(q), turned(k)
    k, v = (y.repeat_interleave(4 // module.num_heads_kv, dim=2) for y in (k, v))
    sq, sk = q.shape[1], k.shape[1]
    seen = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq) if module.causal else None
    scale = module.softmax_scale
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=seen, scale=scale)
    return module.out_proj(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("use_flash_attn", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [None, 2, 1])
def test_self_attention_and_its_gradients(heads_kv, causal, use_flash_attn):
    module = layer(num_heads_kv=heads_kv, causal=causal, softmax_scale=0.3, use_flash_attn=use_flash_attn)
    x, dout = draw(2, 7, EMBED).requires_grad_(), draw(2, 7, EMBED)
    outs = module(x), expected(module, x)
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)
    inputs = [x, *module.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, dout) for out in outs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("use_flash_attn", [False, True])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_cross_attention(heads_kv, use_flash_attn):
    module = layer(num_heads_kv=heads_kv, cross_attn=True, use_flash_attn=use_flash_attn, causal=True)
    x, x_kv = draw(2, 5, EMBED), draw(2, 9, EMBED)
    torch.testing.assert_close(module(x, x_kv), expected(module, x, x_kv), atol=1e-5, rtol=1e-4)
    one = layer(cross_attn=True)
    torch.testing.assert_close(one(x, mixer_subset=slice(0, 1)), one(x)[:, :1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads_kv", [4, 2])
def test_rotary_embedding_of_batches_and_of_packed_sequences(heads_kv):
    module = layer(num_heads_kv=heads_kv, causal=True, rotary_emb_dim=4, use_flash_attn=True)
    x = draw(2, 6, EMBED)
    torch.testing.assert_close(module(x), expected(module, x, rotary=True), atol=1e-5, rtol=1e-4)
    packed = torch.cat([x[0, :4], x[1]])
    cuts = torch.tensor([0, 4, 10], dtype=torch.int32)
    out = module(packed, cu_seqlens=cuts, max_seqlen=6)
    one_by_one = torch.cat([module(x[:1, :4])[0], module(x[1:])[0]])
    torch.testing.assert_close(out, one_by_one, atol=1e-5, rtol=1e-4)


def test_padding_equals_packing():
    x, lengths = draw(3, 6, EMBED), [6, 2, 4]
    keep = torch.arange(6) < torch.tensor(lengths)[:, None]
    padded = layer()(x, key_padding_mask=keep)[keep]
    cuts = torch.tensor([0, 6, 8, 12], dtype=torch.int32)
    packed = layer(use_flash_attn=True)(x[keep], cu_seqlens=cuts, max_seqlen=6)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


def test_biases_windows_residuals_and_checkpoints():
    x = draw(2, 9, EMBED)
    plain = layer(causal=True, use_flash_attn=True)(x)
    assert not torch.allclose(layer(causal=True, use_flash_attn=True, use_alibi=True)(x), plain, atol=1e-3)
    windowed = layer(causal=True, use_flash_attn=True, window_size=(2, 0))(x)
    torch.testing.assert_close(windowed[:, :3], plain[:, :3])
    assert not torch.allclose(windowed[:, 5:], plain[:, 5:], atol=1e-3)
    out, residual = layer(causal=True, use_flash_attn=True, return_residual=True)(x)
    assert residual is x and torch.equal(out, plain)
    again = layer(causal=True, use_flash_attn=True, checkpointing=True)
    torch.testing.assert_close(again(x.requires_grad_()), plain)
    again(x).sum().backward()
    assert again.Wqkv.weight.grad is not None


def test_a_convolution_sees_the_past_only():
    module = layer(causal=True, dwconv=True)
    x = draw(1, 8, EMBED)
    changed = x.clone()
    changed[:, 5:] += 1
    ours, theirs = module(x), module(changed)
    torch.testing.assert_close(ours[:, :5], theirs[:, :5])
    assert not torch.allclose(ours[:, 5], theirs[:, 5])
    assert {name for name, _ in module.named_parameters()} >= {
        "Wqkv.weight",
        "dwconv_qkv.weight",
        "out_proj.bias",
    }


def generation(positions: int, **settings) -> SimpleNamespace:
    chosen = {
        "seqlen_offset": 0,
        "batch_size_offset": 0,
        "lengths_per_sample": None,
        "key_value_memory_dict": {},
    }
    return SimpleNamespace(max_seqlen=positions, **{**chosen, **settings})


@pytest.mark.parametrize(
    "settings", [{}, {"num_heads_kv": 2, "rotary_emb_dim": 4}, {"rotary_emb_dim": 8}], ids=str
)
def test_tokens_one_by_one_equal_all_at_once(settings):
    module = layer(causal=True, layer_idx=3, use_flash_attn=True, **settings).eval()
    x, params = draw(2, 9, EMBED), generation(16)
    whole = module(x)
    steps = [module(x[:, :5], inference_params=params)]
    for position in range(5, 9):
        params.seqlen_offset = position
        steps.append(module(x[:, position : position + 1], inference_params=params))
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-4)
    assert params.key_value_memory_dict[3].shape == (2, 16, 2, module.num_heads_kv, 8)


def test_samples_of_different_lengths_and_rows_of_a_larger_cache():
    module = layer(causal=True, layer_idx=0, use_flash_attn=True, rotary_emb_dim=4).eval()
    x, cache = draw(2, 9, EMBED), module.allocate_inference_cache(5, 16)
    whole = module(x)
    params = generation(16, batch_size_offset=2, key_value_memory_dict={0: cache.fill_(torch.nan)})
    module(x[:, :6], inference_params=params)
    params.lengths_per_sample = torch.tensor([9, 9, 3, 6, 9])
    new = torch.stack([x[0, 3:4], x[1, 6:7]])
    out = module(new, inference_params=params)
    torch.testing.assert_close(out[:, 0], torch.stack([whole[0, 3], whole[1, 6]]), atol=1e-5, rtol=1e-4)
    assert cache[[0, 1, 4]].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MHA(30, 4), "embed_dim: expected a multiple of num_heads 4, got 30"),
        (lambda: MHA(32, 4, 3), "num_heads: expected a multiple of num_heads_kv 3"),
        (lambda: MHA(32, 4, use_alibi=True), "use_flash_attn: expected True with window_size or use_alibi"),
        (lambda: MHA(32, 4, cross_attn=True, rotary_emb_dim=8), "rotary_emb_dim: expected 0 with cross_attn"),
        (lambda: layer()(draw(1, 3, EMBED), draw(1, 3, EMBED)), "x_kv: expected None"),
        (lambda: layer()(draw(3, EMBED), cu_seqlens=torch.tensor([0, 3])), "cu_seqlens: expected None"),
        (
            lambda: layer(use_flash_attn=True)(
                draw(1, 3, EMBED), key_padding_mask=torch.ones(1, 3, dtype=torch.bool)
            ),
            "key_padding_mask: expected None",
        ),
        (lambda: layer().eval()(draw(1, 3, EMBED), inference_params=generation(4)), "layer_idx: expected"),
        (
            lambda: layer(dropout=0.5, layer_idx=0)(draw(1, 3, EMBED), inference_params=generation(4)),
            "inference_params: expected a layer in eval mode",
        ),
    ],
)
def test_what_does_not_go_together_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def shared_out(parameters: dict[str, torch.Tensor], heads: tuple[int, int], rank: int, world: int) -> dict:
    """A rank's rows and columns of the parameters (or gradients) of a layer with ``heads``, those of keys evenly."""
    group = heads[0] // heads[1]
    each, left = divmod(heads[1], world)
    first, count = rank * each + min(rank, left), each + (rank < left)
    own = torch.arange(first * group * 8, (first + count) * group * 8)
    keys = heads[0] * 8 + torch.arange(first * 8, (first + count) * 8)
    rows = torch.cat([own, keys, keys + heads[1] * 8])
    part = {name: parameters[name][rows] for name in ("Wqkv.weight", "Wqkv.bias")}
    part["out_proj.weight"] = parameters["out_proj.weight"][:, own]
    return part if rank else part | {"out_proj.bias": parameters["out_proj.bias"]}


def check_rank(heads: tuple[int, int], sequence_parallel: bool, rank: int, world: int) -> None:
    """Outputs and gradients of a rank against those of the whole layer."""
    embed = heads[0] * 8
    settings = {
        "num_heads_kv": heads[1],
        "causal": True,
        "use_flash_attn": True,
        "use_alibi": True,
        "rotary_emb_dim": 4,
    }
    torch.manual_seed(0)
    whole = MHA(embed, heads[0], **settings)
    part = ParallelMHA(embed, heads[0], dist.group.WORLD, sequence_parallel=sequence_parallel, **settings)
    part.load_state_dict(shared_out(whole.state_dict(), heads, rank, world))
    x, dout = draw(2, 6, embed).requires_grad_(), draw(2, 6, embed)
    own = slice(rank, rank + 1) if sequence_parallel else slice(None)
    mine = x.detach()[own].clone().requires_grad_()
    out, wanted = part(mine), whole(x)
    torch.testing.assert_close(out, wanted[own], atol=1e-5, rtol=1e-4)
    out.backward(dout[own])
    wanted.backward(dout)
    torch.testing.assert_close(mine.grad, x.grad[own], atol=1e-5, rtol=1e-4)
    gradients = shared_out({name: p.grad for name, p in whole.named_parameters()}, heads, rank, world)
    for name, gradient in gradients.items():
        torch.testing.assert_close(part.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-3)
    flat = part(mine.detach().flatten(0, 1), seqlen=6)
    torch.testing.assert_close(flat.unflatten(0, (-1, 6)), out)


def work(rank: int, world: int, path: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    for heads in ((4, 4), (4, 2), (6, 3)):
        for sequence_parallel in (False, True):
            check_rank(heads, sequence_parallel, rank, world)
    with pytest.raises(ValueError, match="num_heads_kv: expected at least one for each of 2 ranks, got 1"):
        ParallelMHA(32, 4, dist.group.WORLD, num_heads_kv=1)
    dist.destroy_process_group()


def test_heads_shared_out_over_ranks_equal_the_whole(tmp_path):
    mp.spawn(work, args=(2, str(tmp_path / "meeting")), nprocs=2)
