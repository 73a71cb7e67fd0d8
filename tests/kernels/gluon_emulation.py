"""Run a warp-specialised Gluon kernel on the CPU: its source in plain Python, one thread a partition and one for the
copy engine, torch for tiles.

What it shows is the arithmetic of the work, and that the partitions agree on it: who loads which block where, who waits
for whom, what is masked, stored and merged. Layouts, fences and races within a partition it does not see. A wait that
nobody ends fails.
"""

from __future__ import annotations

import ast
import random
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_PATIENCE = 20.0
_SLOWNESS = 0.0005
"""Seconds a copy: time for partitions to run ahead of it."""


class Pointer:
    """An element of flat memory, or a tile of them."""

    def __init__(self, memory: torch.Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


def load(pointer: Pointer, mask: Any = True, other: float = 0) -> torch.Tensor:
    at = torch.as_tensor(pointer.at)
    live = torch.as_tensor(mask).expand(at.shape)
    assert bool(((at >= 0) & (at < len(pointer.memory)))[live].all()), "a load beyond the memory"
    found = pointer.memory[torch.where(live, at, 0).long()]
    return torch.where(live, found, torch.as_tensor(other, dtype=found.dtype))


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    at = torch.as_tensor(pointer.at)
    live = torch.as_tensor(mask).expand(at.shape)
    values = torch.as_tensor(value).to(pointer.memory.dtype).expand(at.shape)
    assert bool(((at >= 0) & (at < len(pointer.memory)))[live].all()), "a store beyond the memory"
    pointer.memory[at[live].long()] = values[live]


class Waiting:
    """Phases of all barriers; a wait returns when the phase of its parity is complete, as on the hardware."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.phases: dict[Any, int] = {}
        self.missing: dict[Any, int] = {}

    def wait(self, barrier: Any, parity: Any) -> None:
        with self.condition:
            done = self.condition.wait_for(
                lambda: int(parity) == (self.phases.get(barrier, 0) - 1) & 1, timeout=_PATIENCE
            )
        assert done, f"nobody ends the wait for {barrier}"

    def arrive(self, barrier: Any, _count: int = 1) -> None:
        with self.condition:
            self.phases[barrier] = self.phases.get(barrier, 0) + 1
            self.condition.notify_all()

    def expect(self, barrier: Any, size: int) -> None:
        with self.condition:
            assert self.missing.get(barrier, 0) == 0, "two loads in one phase"
            self.missing[barrier] = size

    def landed(self, barrier: Any, size: int) -> None:
        with self.condition:
            self.missing[barrier] -= size
            is_complete = self.missing[barrier] == 0
        if is_complete:
            self.arrive(barrier)


class Engine:
    """The copy engine: what it is given is done at some time, in any order."""

    def __init__(self) -> None:
        self.condition, self.tasks, self.is_over = threading.Condition(), [], False
        self.thread = threading.Thread(target=self._work)

    def give(self, task: Any) -> None:
        with self.condition:
            self.tasks.append(task)
            self.condition.notify()

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        with self.condition:
            self.is_over = True
            self.condition.notify()
        self.thread.join()

    def _work(self) -> None:
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.tasks or self.is_over)
                if not self.tasks:
                    return
                task = self.tasks.pop(random.randrange(len(self.tasks)))
            task()
            time.sleep(_SLOWNESS)


class Operand:
    """Stages of (rows, 64 * halves) in shared memory, as panels of 64 columns; NaN before it is written."""

    def __init__(self, panels: torch.Tensor) -> None:
        self.panels, self.dtype, self.is_turned = panels, panels.dtype, False

    def index(self, stage: Any) -> Operand:
        return Operand(self.panels[int(stage)])

    def permute(self, _order: tuple[int, int]) -> Operand:
        turned = Operand(self.panels)
        turned.is_turned = not self.is_turned
        return turned

    def load(self, _layout: Any = None) -> torch.Tensor:
        whole = torch.cat(list(self.panels), dim=1)
        return whole.T if self.is_turned else whole

    def store(self, value: torch.Tensor) -> None:
        for panel, part in zip(self.panels, value.split(64, dim=1), strict=True):
            panel.copy_(part)


class Indexed:
    """What has ``index`` alone: boxes of an operand, barriers."""

    def __init__(self, item: Any) -> None:
        self.index = item


class Descriptor:
    """Of a tensor with four axes, in boxes."""

    def __init__(self, x: torch.Tensor, box: list[int]) -> None:
        self.x, self.box, self.dtype, self.layout = x, box, x.dtype, None
        size = box[0] * box[1] * box[2] * box[3] * x.element_size()
        self.block_type = SimpleNamespace(nbytes=size)

    def read(self, at: list[Any]) -> torch.Tensor:
        """(rows, 64), zeros beyond the tensor."""
        page, row, head, dim = map(int, at)
        assert 0 <= page < self.x.shape[0] and row >= 0 and 0 <= head < self.x.shape[2]
        found = torch.zeros(self.box[1], self.box[3], dtype=self.x.dtype)
        part = self.x[page, row : row + self.box[1], head, dim : dim + self.box[3]]
        found[: part.shape[0], : part.shape[1]] = part
        return found


def _product(a: Any, b: Any, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False) -> torch.Tensor:
    a, b = (x.load() if isinstance(x, Operand) else x for x in (a, b))
    product = a.float() @ b.float()
    return acc + product if use_acc else product


def _chosen(pick: Any) -> Any:
    return lambda a, b: pick(torch.as_tensor(a), torch.as_tensor(b))


def _atomic_add(pointer: Pointer, value: int, sem: str = "") -> torch.Tensor:
    before = load(pointer)
    store(pointer, before + value)
    return before


def _same(x: Any) -> Any:
    return x


def _where(condition: Any, a: Any, b: Any) -> torch.Tensor:
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))


def run(path: Path, kernel: str, program: int, programs: int, arguments: dict[str, Any]) -> None:
    """One program of the kernel of this name in the module at ``path``; tensors are ``Pointer``, ``Descriptor``."""
    barriers, failures, engine = Waiting(), [], Engine()

    def specialise(partitions: list[tuple[Any, tuple]], *_options: Any) -> None:
        def guarded(function: Any, given: tuple) -> None:
            try:
                function(*given)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=partition) for partition in partitions]
        engine.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.stop()

    numbers = iter(range(1000))

    def allocate(dtype: Any, shape: list[int], _layout: Any) -> Any:
        if dtype is torch.int64:
            name = next(numbers)
            return Indexed(lambda n: (name, int(n)))
        *stages, rows, dims = shape
        return Operand(torch.full((*stages, dims // 64, rows, 64), torch.nan, dtype=dtype))

    def boxes(memory: Operand, _dtype: Any, shape: list[int], _layout: Any) -> Indexed:
        whole = memory.panels.view(shape[0], shape[2], 64)
        return Indexed(lambda n: whole[int(n)])

    def copy(source: Descriptor, at: list[Any], barrier: Any, into: torch.Tensor) -> None:
        def land() -> None:
            into.copy_(source.read(at))
            barriers.landed(barrier, source.block_type.nbytes)

        engine.give(land)

    layouts = dict.fromkeys(
        ("BlockedLayout", "NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "NVMMASharedLayout"),
        lambda *_args, **_kwargs: None,
    )
    nothing = lambda *_args, **_kwargs: None  # noqa: E731
    gl = SimpleNamespace(
        **layouts, constexpr=_same, load=load, store=store, where=_where, static_range=range, to_tensor=torch.as_tensor,
        minimum=_chosen(torch.minimum), maximum=_chosen(torch.maximum), exp2=torch.exp2, log2=torch.log2,
        arange=lambda a, b, layout=None: torch.arange(a, b), sum=lambda x, axis: x.sum(axis),
        max=lambda x, axis: x.amax(axis), zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        convert_layout=lambda x, layout: x, associative_scan=lambda x, axis, f: x.cumsum(axis), atomic_add=_atomic_add,
        program_id=lambda axis: torch.tensor(program), num_programs=lambda axis: programs,
        allocate_shared_memory=allocate, warp_specialize=specialise,
        **{name: getattr(torch, name) for name in ("int32", "int64", "float32")},
    )  # fmt: skip
    names = {
        "gl": gl,
        "gluon": SimpleNamespace(jit=lambda f=None, **_options: f if f else _same),
        "mbarrier": SimpleNamespace(
            init=nothing, wait=barriers.wait, expect=barriers.expect, MBarrierLayout=nothing
        ),
        "reinterpret": boxes, "tma_load": copy, "warpgroup_mma": _product, "warpgroup_mma_wait": lambda n, deps: deps[0],
        "rounded": lambda x, dtype: x.to(dtype), "tanh": torch.tanh, "raw_base": lambda: 0,
        "raw_wait": lambda at, parity: barriers.wait(int(at), parity), "raw_arrive": lambda at: barriers.arrive(int(at)),
        "LOG2E": 1.4426950408889634, "LN2": 0.6931471805599453, "NAMED_BARRIERS": 8,
        **dict.fromkeys(("fence_async_shared", "named_sync", "raw_init"), nothing),
    }  # fmt: skip
    tree = ast.parse(path.read_text())
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    tree.body = [node for node in tree.body if node not in imports]
    module = ModuleType("emulated")
    vars(module).update(names)
    exec(compile(tree, str(path), "exec", dont_inherit=True), vars(module))
    getattr(module, kernel)(**arguments)
    if failures:
        raise failures[0]


def given(value: Any) -> Any:
    """A launch's argument as the emulated kernel takes it: tensors by their memory from their first element on."""
    if isinstance(value, torch.Tensor):
        size = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
        return Pointer(value.as_strided((size,), (1,)))
    if hasattr(value, "block_shape"):
        return Descriptor(value.base, value.block_shape)
    return value
