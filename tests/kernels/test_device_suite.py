"""The suite for a GPU machine runs here, tiny and interpreted, so that a lease is not spent on its mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SUITE = Path(__file__).parent.parent.parent / "bench" / "device_suite.py"


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SUITE), "--rehearse", "--out", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all equal to their references" in done.stdout
    (found,) = json.loads((tmp_path / "device_suite_rehearsal.json").read_text(encoding="utf-8"))["rows"]
    assert set(found) == {"checks", "layers", "steps", "prior", "choices"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SUITE)], capture_output=True, text=True)
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr
