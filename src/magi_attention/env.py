"""The only place that reads the process environment.

| variable | default | meaning |
|---|---|---|
| ``MAGI_ATTENTION_SANITY_CHECK`` | 0 | "1": check CUDA ranges on the host (waits for the GPU), name the bad slice |
| ``MAGI_ATTENTION_BACKEND`` | unset | debugging: the backend to use wherever a caller names none |
| ``TRITON_INTERPRET`` | 0 | Triton's own switch: "1" runs Triton kernels in its CPU interpreter |
"""

from __future__ import annotations

import os


def sanity_check() -> bool:
    """Whether range tensors on a GPU are checked on the host before every call."""
    return os.environ.get("MAGI_ATTENTION_SANITY_CHECK", "0") == "1"


def backend_override() -> str | None:
    """The backend for calls that name none, or None for the automatic choice."""
    return os.environ.get("MAGI_ATTENTION_BACKEND") or None


def triton_interpreter() -> bool:
    """Whether Triton runs kernels in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
