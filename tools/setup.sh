#!/usr/bin/env bash
# Make .venv in the repository root: the pinned torch, then this package in editable mode with everything a
# developer needs. Set PYTHON to choose an interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -x .venv/bin/python ]]; then
    "${PYTHON:-python3}" -m venv .venv
fi
# torch goes first: resolved alone, the pin takes a CPU build wherever the package index offers one.
.venv/bin/python -m pip install -c constraints.txt torch
.venv/bin/python -m pip install -c constraints.txt -e ".[dev]"
