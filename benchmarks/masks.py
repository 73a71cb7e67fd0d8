"""The mask families of the benchmark by name: as our masks, as mask functions, as segments and windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from magi_attention.mask import Mask
from magi_attention.mask.bands import areas

BLOCKS = 8
ANSWERS = 8
WINDOW = 1024

# With this seed 16384 tokens hold 7 documents and 65536 tokens hold 24.
DOCUMENT_SEED = 34
DOCUMENT_MEDIAN = 2048

SHORT_SEED = 0
SHORT_LENGTHS = (100, 500)

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """One mask family at one length.

    Attributes:
        name: family name.
        tokens: queries and keys, T.
        mask: our mask over (T, T).
        segments: boundaries (n + 1,) int64 of the documents, blocks or tree nodes; ``(0, T)`` without any.
        causal: whether a row may only look back inside its segment.
        window: keys a row sees at most, itself included; None without a window.
        dense: the family is plain full or plain causal over all tokens.
        varlen: the family is what window kernels call fixed or variable length: independent segments.
    """

    name: str
    tokens: int
    mask: Mask
    segments: np.ndarray
    causal: bool
    window: int | None = None
    varlen: bool = True

    @property
    def dense(self) -> bool:
        return self.varlen and self.window is None and len(self.segments) == 2

    @property
    def area(self) -> int:
        """Visible (query, key) pairs."""
        return int(areas(self.mask.bands).sum())

    def mask_mod(self, device: torch.device) -> MaskMod | None:
        """The family as a function of (batch, head, query, key) indices; None when everything is visible.

        Comparisons are written so that no temporary of (T, T) integers appears, only booleans.
        """
        if self.name == "full":
            return None
        widths = np.diff(self.segments)
        segment = torch.from_numpy(np.repeat(np.arange(len(widths)), widths)).to(device)

        width = self.window

        def causal(b, h, q, kv):
            return kv <= q

        def window(b, h, q, kv):
            return (kv <= q) & (kv > q - width)

        def document(b, h, q, kv):
            return segment[kv] == segment[q]

        def causal_document(b, h, q, kv):
            return (kv <= q) & (segment[kv] == segment[q])

        def block_causal(b, h, q, kv):
            return segment[kv] <= segment[q]

        def prefix_tree(b, h, q, kv):
            return (kv <= q) & ((segment[kv] == 0) | (segment[kv] == segment[q]))

        mods = {
            "causal": causal,
            "varlen_full": document,
            "varlen_causal": causal_document,
            "short_documents": causal_document,
            "swa_causal_1024": window,
            "block_causal": block_causal,
            "prefix_tree_8": prefix_tree,
        }
        return mods[self.name]


def document_boundaries(tokens: int) -> np.ndarray:
    """(n + 1,) int64 boundaries of packed documents: log-normal lengths, none above a quarter of all."""
    draws = np.random.default_rng(DOCUMENT_SEED).normal(np.log(DOCUMENT_MEDIAN), 1.0, size=tokens // 8 + 64)
    lengths = np.clip(np.exp(draws).astype(np.int64), 1, max(1, tokens // 4))
    ends = np.cumsum(lengths)
    return np.concatenate([[0], ends[: np.searchsorted(ends, tokens)], [tokens]])


def short_boundaries(tokens: int) -> np.ndarray:
    """(n + 1,) int64 boundaries of documents of 100 to 500 tokens, uniformly drawn; the last one is cut off."""
    low, high = SHORT_LENGTHS
    ends = np.cumsum(np.random.default_rng(SHORT_SEED).integers(low, high + 1, size=tokens // low + 1))
    return np.concatenate([[0], ends[: np.searchsorted(ends, tokens)], [tokens]])


def _full(tokens: int) -> Workload:
    return Workload("full", tokens, Mask.full(tokens, tokens), np.array([0, tokens]), causal=False)


def _causal(tokens: int) -> Workload:
    return Workload("causal", tokens, Mask.causal(tokens, tokens), np.array([0, tokens]), causal=True)


def _varlen(causal: bool) -> Callable[[int], Workload]:
    name = "varlen_causal" if causal else "varlen_full"

    def build(tokens: int) -> Workload:
        cuts = document_boundaries(tokens)
        return Workload(name, tokens, Mask.varlen(cuts, causal=causal), cuts, causal=causal)

    return build


def _short_documents(tokens: int) -> Workload:
    cuts = short_boundaries(tokens)
    return Workload("short_documents", tokens, Mask.varlen(cuts, causal=True), cuts, causal=True)


def _window(tokens: int) -> Workload:
    # A short sequence keeps the family's shape: the window still leaves a left edge behind it.
    window = min(WINDOW, max(1, tokens // 4))
    mask = Mask.sliding_window(tokens, window=(window - 1, 0), causal=True)
    return Workload("swa_causal_1024", tokens, mask, np.array([0, tokens]), causal=True, window=window)


def _block_causal(tokens: int) -> Workload:
    size = tokens // BLOCKS
    cuts = np.arange(0, tokens + 1, size)
    return Workload("block_causal", tokens, Mask.block_causal(tokens, size), cuts, causal=False, varlen=False)


def _prefix_tree(tokens: int) -> Workload:
    prompt = tokens // 4
    cuts = np.concatenate([[0], np.linspace(prompt, tokens, ANSWERS + 1).astype(np.int64)])
    mask = Mask.shared_question(prompt, np.diff(cuts[1:]).tolist())
    return Workload("prefix_tree_8", tokens, mask, cuts, causal=True, varlen=False)


FAMILIES: dict[str, Callable[[int], Workload]] = {
    "full": _full,
    "causal": _causal,
    "varlen_full": _varlen(causal=False),
    "varlen_causal": _varlen(causal=True),
    "swa_causal_1024": _window,
    "block_causal": _block_causal,
    "prefix_tree_8": _prefix_tree,
}
"""The seven of the published figures."""

OTHERS: dict[str, Callable[[int], Workload]] = {"short_documents": _short_documents}


def workload(name: str, tokens: int) -> Workload:
    """The family ``name`` at ``tokens`` tokens.

    Raises:
        ValueError: unknown name, or a length that eight equal blocks do not fill.
    """
    known = FAMILIES | OTHERS
    if name not in known:
        raise ValueError(f"mask: expected one of {', '.join(known)}, got {name}.")
    if tokens < 4 * BLOCKS or tokens % BLOCKS:
        raise ValueError(f"tokens: expected a multiple of {BLOCKS}, at least {4 * BLOCKS}, got {tokens}.")
    return known[name](tokens)
