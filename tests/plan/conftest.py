"""Without a GPU, Triton kernels run in the interpreter. Triton reads the switch when it defines a kernel."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
