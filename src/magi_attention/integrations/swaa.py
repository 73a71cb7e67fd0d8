"""Sliding window attention adaptation: what a model trained with full attention is to see instead, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from magi_attention.errors import check_count, check_type, complaint

_LAYERS = "Count layers from 0."


@dataclass(frozen=True)
class SWAAConfig:
    """A recipe of sliding window attention adaptation.

    Windows are counted as Hugging Face counts them: with ``sliding_window_size`` w a query sees itself and the w - 1 keys
    before it, which FlashAttention writes ``window_size=(w - 1, 0)``.

    Args:
        sliding_window_size: keys in a window, at least 1; None is full attention everywhere.
        keep_first: this many first keys of each sequence stay visible behind the window, counted from its first token
            that is no padding.
        force_fa_decode: True, or the layers for which it is: a call in which a sequence has exactly one query (a step
            of decoding) sees everything before it.
        non_sliding_layers: layers that keep full attention.

    Raises:
        TypeError, ValueError: sizes or layers that are not integers, or too small.
    """

    sliding_window_size: int | None = None
    keep_first: int = 0
    force_fa_decode: bool | list[int] = False
    non_sliding_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.sliding_window_size is not None:
            check_count("sliding_window_size", self.sliding_window_size)
            if self.sliding_window_size == 0:
                remedy = "A query sees itself in a window of 1; None is full attention."
                raise ValueError(complaint("sliding_window_size", "at least 1, or None", 0, remedy))
        check_count("keep_first", self.keep_first)
        if not isinstance(self.force_fa_decode, bool):
            object.__setattr__(self, "force_fa_decode", _layers("force_fa_decode", self.force_fa_decode))
        object.__setattr__(self, "non_sliding_layers", _layers("non_sliding_layers", self.non_sliding_layers))

    def __hash__(self) -> int:
        return hash(self.mark)

    @property
    def mark(self) -> str:
        """A name for tables and files: "w2048-k10-fd-full[0,2]"; "full" without a window."""
        if self.sliding_window_size is None:
            return "full"
        parts = [f"w{self.sliding_window_size}"]
        if self.keep_first:
            parts.append(f"k{self.keep_first}")
        if self.force_fa_decode:
            parts.append("fd" if self.force_fa_decode is True else f"fd{_listed(self.force_fa_decode)}")
        if self.non_sliding_layers:
            parts.append(f"full{_listed(self.non_sliding_layers)}")
        return "-".join(parts)

    def dict(self) -> dict[str, Any]:
        """The arguments that make it again: ``SWAAConfig(**config.dict()) == config``; of JSON's types."""
        decode = self.force_fa_decode
        return {
            "sliding_window_size": self.sliding_window_size,
            "keep_first": self.keep_first,
            "force_fa_decode": decode if isinstance(decode, bool) else list(decode),
            "non_sliding_layers": list(self.non_sliding_layers),
        }

    def slides(self, layer: int) -> bool:
        """Whether the layer has a window."""
        return self.sliding_window_size is not None and layer not in self.non_sliding_layers

    def decodes_in_full(self, layer: int) -> bool:
        """Whether a single query of the layer sees everything before it."""
        decode = self.force_fa_decode
        return not self.slides(layer) or (decode if isinstance(decode, bool) else layer in decode)

    def check_layers(self, num_layers: int) -> None:
        """ValueError if a layer is named that a model of so many does not have."""
        decode = [] if isinstance(self.force_fa_decode, bool) else self.force_fa_decode
        for name, layers in (("force_fa_decode", decode), ("non_sliding_layers", self.non_sliding_layers)):
            beyond = [layer for layer in layers if layer >= num_layers]
            if beyond:
                raise ValueError(complaint(name, f"layers below {num_layers}", beyond, _LAYERS))


def _layers(name: str, layers: object) -> list[int]:
    """Each layer once, in order."""
    check_type(name, layers, (list, tuple, set, frozenset, range), _LAYERS)
    assert isinstance(layers, Iterable)
    listed = list(layers)
    for layer in listed:
        check_count(f"{name}, a layer", layer)
    return sorted(set(listed))


def _listed(layers: Iterable[int]) -> str:
    return "[" + ",".join(map(str, layers)) + "]"
