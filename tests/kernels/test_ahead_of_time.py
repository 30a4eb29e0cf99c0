"""Every tile configuration on offer compiles for GPUs that are not there: none spills, all fit, every product uses tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_no_configuration_spills(tmp_path: Path) -> None:
    """What z is kept as changes little but the registers: int8, which takes the most, on the two architectures asked for;
    `python -m svf_fast.kernels.aot` compiles the rest."""
    table = tmp_path / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--types", "bf16", "tf32", "fp32", "--keep", "int8", "--arch", "90", "80", "--jobs", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "svf_fast.kernels.aot", *options, str(table)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert {row["arch"] for row in rows} == {80, 90}
    assert all(row["registers"] and not row["faults"] for row in rows)
