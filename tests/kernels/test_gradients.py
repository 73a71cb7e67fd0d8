"""Gradients against finite differences, and the memory that they take."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MASKS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from magi_attention.attention import attention
from magi_attention.mask import INF, Mask
from magi_attention.testing import random_case

SMALL = {
    "causal": Mask.causal(5, 6),
    "covered twice": Mask([[0, 4, 0, 5, -INF, 1], [1, 3, 0, 4, -2, INF]], 5, 5),
    "blind rows": Mask([[2, 4, 1, 3, -INF, INF]], 6, 5),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("softcap", [0.0, 1.3])
@pytest.mark.parametrize("sink_shape", [None, (2, 2), "per row"])
@pytest.mark.parametrize("backend", ["blockwise", "dense"])
def test_gradcheck_of_out_and_lse(name, softcap, sink_shape, backend):
    mask = SMALL[name]
    shape = (mask.num_rows, 3, 2) if sink_shape == "per row" else sink_shape
    sink = None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    case = random_case(mask, heads=(2, 1), head_dim=(3, 2), dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]

    def function(q, k, v, sink):
        out, meta = attention(q, k, v, mask, sink=sink, softcap=softcap, softmax_scale=0.7, backend=backend)
        return out, meta.lse.masked_fill(meta.lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(function, (*leaves, sink), fast_mode=False)


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def _largest(num_tokens: int) -> int:
    mask = Mask.causal(num_tokens)
    case = random_case(mask, heads=(2, 1), head_dim=16)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    with _LargestTensor() as largest:
        out, meta = attention(*leaves, mask, sink=torch.zeros(1, 2), backend="blockwise")
        torch.autograd.grad([out, meta.lse], leaves, [case.dout, case.dlse])
    return largest.numel


def test_memory_is_linear_in_tokens():
    few, many = _largest(2048), _largest(4096)
    assert many <= 2 * few
    assert many < 4096 * 4096 // 8


def test_no_gradient_is_computed_for_inputs_that_need_none():
    mask = MASKS["causal"]
    case = random_case(mask)
    v = case.v.requires_grad_()
    out, _ = attention(case.q, case.k, v, mask)
    (dv,) = torch.autograd.grad(out, [v], case.dout)
    assert case.q.grad is None and dv.shape == v.shape


def test_second_derivatives_are_refused():
    mask = MASKS["causal"]
    case = random_case(mask)
    q = case.q.requires_grad_()
    out, _ = attention(q, case.k, case.v, mask)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(torch.autograd.grad(out, [q], case.dout, create_graph=True)[0].sum(), [q])
