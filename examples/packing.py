"""Documents of very different lengths, packed into one sequence, and the masks that keep them apart."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magi_attention import Mask

Ints = NDArray[np.int64]

END = 256
"""The token between documents: the first input and the last target of each one. 0..255 are the bytes."""
BLANK = 257
"""The input token at a byte that the model has to fill in (block-causal training)."""
VOCABULARY = 258
IGNORED = -100
"""The target at a position without a prediction, as ``torch.nn.functional.cross_entropy`` spells it."""

MASKS = ("varlen", "window", "block-causal")
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Packed:
    """One training step's documents, one after the other.

    ``inputs``, ``targets`` and ``positions`` are (tokens,); ``positions`` restarts at 0 with every document.
    ``cu_seqlens`` is (documents + 1,): document d holds the tokens ``cu_seqlens[d] : cu_seqlens[d + 1]``.
    """

    inputs: Ints
    targets: Ints
    positions: Ints
    cu_seqlens: Ints

    @property
    def num_documents(self) -> int:
        return len(self.cu_seqlens) - 1


def read_documents(longest: int) -> list[bytes]:
    """The ``*.py`` files of the running Python's standard library, in a fixed order; long ones in pieces."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = (
        file
        for file in sorted(folder.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(file.relative_to(folder).parts)
    )
    return [piece for file in files for piece in cut(file.read_bytes(), longest)]


def cut(text: bytes, longest: int) -> list[bytes]:
    """The text if it fits; else its top-level definitions (two empty lines part them), shortened."""
    if len(text) <= longest:
        return [text] if text else []
    return [definition[:longest] for definition in text.split(b"\n\n\n") if definition]


def packed_steps(documents: list[bytes], tokens: int, rng: np.random.Generator) -> Iterator[Packed]:
    """Endless steps of exactly ``tokens`` tokens; every document comes once before any comes again.

    A step's last document loses what has no room.
    """
    waiting: list[int] = []
    while True:
        inputs: list[Ints] = []
        room = tokens
        while room > 0:
            waiting = waiting or rng.permutation(len(documents)).tolist()
            text = np.frombuffer(documents[waiting.pop()], dtype=np.uint8).astype(np.int64)
            inputs.append(np.concatenate([[END], text])[:room])
            room -= len(inputs[-1])
        yield pack(inputs)


def pack(inputs: list[Ints]) -> Packed:
    """Join documents, each with its opening END; the target is the next byte, and END after the last one."""
    lengths = np.array([len(document) for document in inputs])
    joined = np.concatenate(inputs)
    return Packed(
        inputs=joined,
        targets=np.append(joined[1:], END),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]),
    )


def with_blanks(packed: Packed, fraction: float, rng: np.random.Generator) -> Packed:
    """Blank out a random ``fraction`` of the bytes; the model has to say what they were, and nothing else.

    Under a block-causal mask a position sees the rest of its block, so the next byte would be no question.
    """
    blank = (rng.random(len(packed.inputs)) < fraction) & (packed.inputs != END)
    blank[1] = True  # The first byte of the first document: a step without any blank would have no loss.
    return replace(
        packed,
        inputs=np.where(blank, BLANK, packed.inputs),
        targets=np.where(blank, packed.inputs, IGNORED),
    )


def mask_for(kind: str, packed: Packed, window: int, keep_first: int, block: int) -> Mask:
    """Which token of the packed sequence sees which: never one of another document.

    - ``varlen``: every earlier token of its document, and itself.
    - ``window``: the ``window`` tokens before it, itself, and the first ``keep_first`` of its document.
    - ``block-causal``: its own block of ``block`` tokens, whole, and every earlier block of its document.
    """
    if kind == "varlen":
        return Mask.varlen(packed.cu_seqlens, causal=True)
    if kind == "window":
        return Mask.varlen(packed.cu_seqlens, causal=True, window=(window, 0), keep_first=keep_first)
    lengths = np.diff(packed.cu_seqlens).tolist()
    return Mask.block_diagonal([Mask.block_causal(length, block) for length in lengths])
