"""The operators behave as PyTorch expects: schemas, tracing, compilation, checkpointing, saved tensors."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from magi_attention.attention import attention
from magi_attention.kernels import ops
from magi_attention.mask import DeviceMask, Mask

SOURCE = Path(__file__).parents[1] / "src"
MASK = Mask.varlen([0, 9, 30], causal=True)
COMPILERS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
    ),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(mask: Mask = MASK, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v and a sink that want gradients."""
    shapes = [(mask.num_rows, 4, 16), (mask.num_cols, 2, 16), (mask.num_cols, 2, 8)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes] + [torch.randn(5, 4)]
    return [x.requires_grad_() for x in tensors]


def model(q, k, v, sink, mask, softcap=2.0):
    """Something around attention: it uses out and lse, and computes before and after."""
    out, meta = attention(q * 1.5, k, v, mask, sink=sink, softcap=softcap)
    return (out * 0.5).sin().sum() + meta.lse.square().sum()


def gradients(function, inputs, *rest):
    return torch.autograd.grad(function(*inputs, *rest), inputs)


def operator_inputs(everything: bool, dtype: torch.dtype) -> tuple[list, list]:
    """Arguments of the forward and of the backward operator; ``everything``: with a sink, dlse, dropout and ALiBi."""
    q, k, v, sink = (x.detach() for x in leaves(dtype=dtype))
    rows = sink.logsumexp(0).to(ops.stats_dtype(dtype)).expand(1, 30, 4).clone() if everything else None
    tensors = [x[None].contiguous().requires_grad_() for x in (q, k, v)]
    modifiers, dropout_p = [None, None, None], 0.0
    if everything:
        num_bands = len(MASK.table)
        slopes, diagonals = torch.rand(1, num_bands, 4), torch.zeros(num_bands, dtype=torch.int32)
        modifiers, dropout_p = [torch.tensor([5, 7]), slopes, diagonals], 0.25
    forward = [
        *tensors,
        None if rows is None else rows.requires_grad_(),
        MASK.table,
        *modifiers,
        0.25,
        1.5,
        dropout_p,
        True,
        False,
        0,
        "blockwise",
    ]
    out, lse, _ = (x.detach() for x in ops.forward(*forward))
    saved = [None if x is None else x.detach() for x in forward[:4]]
    dlse = torch.randn_like(lse) if everything else None
    backward = [torch.randn_like(out), dlse, *saved, out, lse, MASK.table, *modifiers, 0.25, 1.5, dropout_p]
    backward += [False, 0, "blockwise"]
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "utility", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_operators_pass_opcheck(everything, dtype, utility):
    forward, backward = operator_inputs(everything, dtype)
    torch.library.opcheck(torch.ops.magi_attention.forward.default, tuple(forward), test_utils=utility)
    torch.library.opcheck(torch.ops.magi_attention.backward.default, tuple(backward), test_utils=utility)


@pytest.mark.parametrize("everything", [False, True])
def test_traced_shapes_dtypes_and_strides_are_the_real_ones(everything):
    for operator, arguments in zip(
        (torch.ops.magi_attention.forward.default, torch.ops.magi_attention.backward.default),
        operator_inputs(everything, torch.bfloat16),
        strict=True,
    ):
        real = operator(*arguments)
        meta = [x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
        for ours, traced in zip(real, operator(*meta), strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (traced.shape, traced.dtype, traced.stride())


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(compiler, dynamic):
    inputs = leaves()
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*inputs, MASK), model(*inputs, MASK))
    for ours, eager in zip(gradients(compiled, inputs, MASK), gradients(model, inputs, MASK), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_compiled_without_a_sink_and_with_either_sign_of_the_scale(scale):
    q, k, v, _ = leaves()

    def function(q, k, v):
        return attention(q, k, v, MASK, softmax_scale=scale, return_max_logits=True)

    out, meta = function(q, k, v)
    compiled_out, compiled_meta = torch.compile(function, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled_out, out)
    torch.testing.assert_close(compiled_meta.lse, meta.lse)
    torch.testing.assert_close(compiled_meta.max_logits, meta.max_logits)


def test_new_lengths_and_masks_do_not_compile_again():
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (20, 33, 47, 64, 81, 130, 7):
        cuts = [0, 3, length // 2, length]
        for mask in (
            Mask.varlen(cuts, causal=True),
            Mask.sliding_window(length, window=(4, 0), keep_first=2),
            Mask.prefix_tree([3, 2, length - 5], [-1, 0, 0]),
            DeviceMask(Mask.varlen(cuts).table, length, length),
        ):
            inputs = leaves(mask)
            torch.testing.assert_close(compiled(*inputs, mask), model(*inputs, mask))
    assert counter.frame_count <= 2, "one compilation for each kind of mask object"


def test_one_band_and_many_compile_twice_at_most():
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (20, 33, 47, 64):
        for mask in (Mask.causal(length), Mask.varlen([0, 3, length]), Mask.full(length)):
            compiled(*leaves(mask), mask)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    inputs = leaves()
    plain = gradients(model, inputs, MASK)
    again = [x.detach().clone().requires_grad_() for x in inputs]
    checkpoint(model, *again, MASK, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip(again, plain, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_checkpointing_inside_a_compiled_function():
    inputs = leaves()

    def function(*arguments):
        return checkpoint(model, *arguments, use_reentrant=False)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(gradients(compiled, inputs, MASK), gradients(model, inputs, MASK), strict=True):
        torch.testing.assert_close(ours, eager)


def test_the_first_call_of_a_process_may_be_compiled():
    code = """
import sys, torch
import magi_attention.kernels.ops
assert "triton" not in sys.modules
from magi_attention.attention import attention
from magi_attention.mask import Mask
q = torch.randn(12, 2, 16, requires_grad=True)
mask = Mask.causal(12)
compiled = torch.compile(lambda q: attention(q, q, q, mask)[0], backend="aot_eager", fullgraph=True)
out = compiled(q)
(grad,) = torch.autograd.grad(out.sum(), [q])
eager = attention(q, q, q, mask)[0]
torch.testing.assert_close(out, eager)
torch.testing.assert_close(grad, torch.autograd.grad(eager.sum(), [q])[0])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_interleaved_graphs_do_not_mix():
    other = Mask.sliding_window(17, window=(3, 2))
    first, second = leaves(), leaves(other)
    alone = [gradients(model, first, MASK), gradients(model, second, other)]
    loss_first, loss_second = model(*first, MASK), model(*second, other)
    mixed = [torch.autograd.grad(loss_first, first), torch.autograd.grad(loss_second, second)]
    for a, b in zip(alone, mixed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_graph_that_is_kept_gives_its_gradients_twice():
    inputs = leaves()
    loss = model(*inputs, MASK)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "lse", "mask"])
def test_changing_a_saved_tensor_in_place_raises(which):
    q, k, v, _ = leaves()
    mask = DeviceMask(MASK.table.clone(), MASK.num_rows, MASK.num_cols)
    out, meta = attention(q, k, v, mask)
    loss = out.sum() + meta.lse.sum()
    changed = {"q": q, "k": k, "v": v, "out": out, "lse": meta.lse, "mask": mask.table}[which]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_no_grad_give_the_same_output():
    inputs = leaves()
    want = attention(*inputs[:3], MASK)[0].detach()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out, _ = attention(*inputs[:3], MASK)
        assert torch.equal(out, want) and not out.requires_grad


def test_autocast_leaves_the_inputs_dtype_alone():
    q, k, v, _ = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention(q, k, v, MASK)
    assert out.dtype == torch.float32


def _make_fx(q):
    return make_fx(lambda q: attention(q, q, q, MASK)[0], pre_dispatch=True)(q)


def _fake(q):
    with FakeTensorMode() as mode:
        mask = DeviceMask(mode.from_tensor(MASK.table), MASK.num_rows, MASK.num_cols)
        q = mode.from_tensor(q)
    return attention(q, q, q, mask)


def _profiled(q):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, q, q, MASK)
    assert "magi_attention::forward" in {event.key for event in profile.key_averages()}


class _Subclass(torch.Tensor):
    pass


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _in(mode):
    def call(q):
        with mode():
            attention(q, q, q, MASK)

    return call


def _attention(q):
    return attention(q, q, q, MASK)[0]


LISTENERS = {
    "compiler": lambda q: torch.compile(_attention, backend="eager", fullgraph=True)(q),
    "make_fx": _make_fx,
    "fake tensors": _fake,
    "meta tensors": lambda q: _attention(q.to("meta")),
    "vmap": lambda q: torch.vmap(_attention)(q.expand(2, *q.shape)),
    "functionalize": lambda q: torch.func.functionalize(_attention)(q),
    "torch.jit.trace": lambda q: torch.jit.trace(_attention, q, check_trace=False),
    "dispatch mode": _in(_Mode),
    "function mode": _in(BaseTorchFunctionMode),
    "profiler": _profiled,
    "subclass": lambda q: _attention(q.as_subclass(_Subclass)),
    "lazily negated": lambda q: _attention(torch.complex(q, q).conj().imag),
}


@pytest.mark.parametrize("listener", LISTENERS.values(), ids=LISTENERS)
@pytest.mark.filterwarnings("ignore")  # of what traces
def test_whoever_listens_hears_the_operator(monkeypatch, listener):
    def unheard(*args):
        raise AssertionError("called past the dispatcher")

    monkeypatch.setattr(ops, "_forward_directly", unheard)
    listener(torch.randn(30, 2, 16))


@pytest.mark.parametrize("packed", [True, False])
def test_a_backward_that_is_listened_to_is_the_operator(packed):
    q = torch.randn(*(30, 2, 16) if packed else (2, 30, 2, 16)).requires_grad_()
    out = _attention(q)
    assert type(out.grad_fn).__name__ == "_DirectBackward"
    (quiet,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (heard,) = torch.autograd.grad(out.sum(), q)
    assert "magi_attention::backward" in {event.key for event in profile.key_averages()}
    assert torch.equal(quiet, heard)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("which", ["q", "k and v", "sink", "all"])
def test_gradients_past_the_dispatcher_are_the_operators(monkeypatch, batched, through, which):
    given, results = leaves(), []
    for nobody_listens in (True, False):
        monkeypatch.setattr(ops, "_nobody_listens", lambda answer=nobody_listens: answer)
        q, k, v, sink = (x.detach() for x in given)
        if batched:
            q, k, v = (torch.stack([x, -x]) for x in (q, k, v))
        wanted = {"q": [q], "k and v": [k, v], "sink": [sink], "all": [q, k, v, sink]}[which]
        for leaf in wanted:
            leaf.requires_grad_()
        out, meta = attention(q, k, v, MASK, sink=sink)
        assert ("_Direct" in type(out.grad_fn).__name__) == nobody_listens
        loss = {"out": out, "lse": meta.lse, "both": out.sum() + meta.lse}[through].square().sum()
        results.append(torch.autograd.grad(loss, wanted))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_call_past_the_dispatcher_gives_what_the_operator_gives(monkeypatch, batched, with_sink, mode):
    direct, calls = ops._forward_directly, []
    monkeypatch.setattr(ops, "_forward_directly", lambda *args: (calls.append(args), direct(*args))[1])
    q, k, v, sink = (x.detach() for x in leaves())
    if batched:
        q, k, v = (torch.stack([x, -x]) for x in (q, k, v))
    with mode():
        results = []
        for nobody_listens in (True, False):
            monkeypatch.setattr(ops, "_nobody_listens", lambda answer=nobody_listens: answer)
            out, meta = attention(q, k, v, MASK, sink=sink if with_sink else None, return_max_logits=True)
            results.append((out, meta.lse, meta.max_logits))
    assert len(calls) == 1
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        assert ours.is_inference() == theirs.is_inference() and not ours.requires_grad


def test_a_backend_is_called_on_the_device_of_the_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    entered = []
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext()
    )

    class Elsewhere:
        is_cuda = True

        def __init__(self, index):
            self.device = torch.device("cuda", index)

    with ops._device_of(Elsewhere(0)), ops._device_of(torch.zeros(1)), ops._device_of(Elsewhere(1)):
        assert entered == [torch.device("cuda", 1)]
