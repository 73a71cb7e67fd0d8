"""Hugging Face transformers accepts the drop-in as flash_attention_2, and gets eager attention's results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tiny_models(device, tmp_path):
    pytest.importorskip("transformers")
    # As `pip install ./dropin` leaves it: the modules, and a distribution called flash-attn that owns them.
    shutil.copytree(ROOT / "dropin" / "src", tmp_path, dirs_exist_ok=True)
    metadata = tmp_path / "flash_attn-2.8.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (metadata / "top_level.txt").write_text("flash_attn\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, Path(__file__).with_name("hugging_face.py"), device]
    found = subprocess.run(program, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
