"""What a run shows: progress, a table, two pictures. Plain text where rich or a terminal is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from magi_attention import Mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Show = Callable[[int, float, float], None]
"""Called after each step with the number of steps done, the loss and the tokens per second."""


def is_fancy() -> bool:
    return sys.stdout.isatty() and find_spec("rich") is not None


@contextmanager
def progress_bar(steps: int) -> Iterator[Show]:
    """A live bar on a terminal; elsewhere a line at every tenth of the way."""
    if not is_fancy():
        yield lambda done, loss, speed: print_progress(steps, done, loss, speed)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}   {task.fields[speed]:,.0f} tokens/s"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"), speed=0.0)
        yield lambda done, loss, speed: progress.update(task, completed=done, loss=loss, speed=speed)


def print_progress(steps: int, done: int, loss: float, speed: float) -> None:
    tenth = max(1, steps // 10)
    if done == 1 or done == steps or done % tenth == 0:
        print(f"step {done:>{len(str(steps))}}/{steps}   loss {loss:.3f}   {speed:,.0f} tokens/s", flush=True)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns, the first one naming the second."""
    if is_fancy():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, show_header=False)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    width = max(len(name) for name, _ in rows)
    print("\n".join(["", title, "-" * len(title), *(f"{name:<{width}}  {value}" for name, value in rows)]))


def print_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A column for each name in the header; all but the first aligned at the right."""
    if is_fancy():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title)
        for n, name in enumerate(header):
            table.add_column(name, justify="right" if n else "left", no_wrap=n == 0)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            f"{x:<{w}}" if n == 0 else f"{x:>{w}}" for n, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    print("\n".join(["", title, "-" * len(title), *lines]))


def save_pictures(losses: Sequence[float], mask: Mask, folder: Path) -> None:
    """Write loss.png and mask.png, or say in one line why there are none."""
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (pip install matplotlib)")
        return
    for name, figure in (("loss.png", loss_figure(losses)), ("mask.png", mask.figure())):
        figure.savefig(folder / name, dpi=120)
        print(f"wrote {folder / name}")


def loss_figure(losses: Sequence[float]) -> Figure:
    """Loss over steps in bits per byte, with a running mean over a twentieth of the steps."""
    from matplotlib.figure import Figure

    bits = np.asarray(losses) / np.log(2)
    steps = np.arange(1, len(bits) + 1)
    span = max(1, len(bits) // 20)
    mean = np.convolve(bits, np.ones(span) / span, mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="bits per predicted byte")
    axes.plot(
        steps, bits, color="0.75", linewidth=1, marker="." if len(bits) < 20 else None, label="each step"
    )
    axes.plot(steps[span - 1 :], mean, color="tab:blue", linewidth=2, label=f"mean of {span}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
