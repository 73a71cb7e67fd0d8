"""Launches of compiled kernels past Triton's Python, which costs several times what the driver does.

In each launch Triton asks the driver about every pointer, encodes every tensor map anew and walks all arguments twice.
Here pointers go as numbers, and a tensor map is kept for each address that a frame was laid on. This is written against
the insides of Triton 3.6; with any other release, or a profiler's hooks, Triton launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver

from magi_attention.kernels.hopper.compat import TensorDescriptor
from magi_attention.plan.cache import current_stream

Launch = Callable[[tuple[int, ...], tuple], None]
"""Takes a grid of at most two axes and the kernel's arguments but for its constants; a descriptor as (frame, tensor)."""

_MOST_MAPS = 256


@dataclass(frozen=True, eq=False)
class Frame:
    """What a descriptor says of a tensor, but for where it is; with the tensor maps of the addresses that it was at."""

    fields: dict[str, Any]
    maps: dict[int, tuple] = field(default_factory=dict)

    def on(self, x: torch.Tensor) -> TensorDescriptor:
        """Descriptor of ``x``, whose dtype, shape and strides are those of the frame."""
        # The constructor would check again, at several times the cost of the launch, what holds for such tensors.
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__ = {"base": x, **self.fields}
        return descriptor


def described(arguments: tuple) -> tuple:
    """The arguments as Triton takes them, with descriptors."""
    return tuple(x[0].on(x[1]) if type(x) is tuple else x for x in arguments)


def launcher_of(compiled: Any, arguments: tuple, constants: tuple, device: torch.device) -> Launch:
    """What launches ``compiled``, a kernel that Triton has launched on ``device`` with arguments like these.

    Args:
        constants: what follows the arguments.
    """

    def by_triton(grid: tuple[int, ...], arguments: tuple) -> None:
        compiled[(*grid, 1, 1)[:3]](*described(arguments), *constants)

    insides = _insides(compiled)
    if insides is None:
        return by_triton
    run, launch, maps_meta = insides
    # As CudaLauncher passes them: no scratch memory, no metadata for hooks, no hooks.
    kind = (run.launch_cooperative_grid, run.launch_pdl)
    options = (*kind, None, None, compiled.packed_metadata, None, None, None)
    function, index = compiled.function, device.index
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    pointers = [n for n, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
    descriptors = [n for n, x in enumerate(arguments) if type(x) is tuple]
    # From the last to the first: each map is longer than the descriptor in whose place it comes.
    with_meta = list(zip(descriptors, maps_meta, strict=True))[::-1]

    def start(grid: tuple[int, ...], arguments: tuple) -> None:
        if hooks[0].calls or hooks[1].calls:
            by_triton(grid, arguments)
            return
        values = list(arguments)
        for n in pointers:
            values[n] = values[n].data_ptr()
        for n, meta in with_meta:
            frame, x = values[n]
            values[n : n + 1] = _map_of(frame, x, meta)
        launch(*(*grid, 1, 1)[:3], current_stream(index), function, *options, *values, *constants)

    return start


def _map_of(frame: Frame, x: torch.Tensor, meta: Any) -> tuple:
    """The tensor map of ``x`` in its frame, shape and strides."""
    maps, address = frame.maps, x.data_ptr()
    found = maps.get(address)
    if found is None:
        if len(maps) >= _MOST_MAPS:
            maps.clear()
        found = maps[address] = tuple(driver.make_tensordesc_arg(frame.on(x), meta))
    return found


def _insides(compiled: Any) -> tuple[Any, Callable[..., None], list] | None:
    """(launcher, its C function, what each tensor map is made with), or None where they are not as in Triton 3.6."""
    run = getattr(compiled, "run", None)
    if run is None or not triton.__version__.startswith("3.6."):
        return None
    if run.num_ctas != 1 or run.global_scratch_size or run.profile_scratch_size:
        return None
    cells = getattr(run.launch, "__closure__", None)
    if cells is None:
        return run, run.launch, []
    names = dict(zip(run.launch.__code__.co_freevars, cells, strict=True))
    return run, names["launcher"].cell_contents, names["tensordesc_meta"].cell_contents
