"""The emulator that the CUDA kernels are tested with finds what it says it finds, and nvcc has nothing to complain about them."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from device import kernel_set, why_missing

from svf_fast.bench import nvcc

FAULTS = {
    "read but never written": "read but was never written",
    "beyond shared memory": "is beyond its 16384",
    "shared memory unaligned": "is not aligned to 4",
    "read without a barrier": "written by thread 0 without a barrier between",
    "overwritten without a barrier": "read by another without a barrier between",
    "copy not waited for": "before its copy was waited for",
    "copy of too late a group": "before its copy was waited for",
    "lanes apart": "lanes of a warp are at different operations",
    "a thread misses a barrier": "127 of 128 are at a barrier, 1 have ended",
    "global memory of nobody": "outside of every tensor",
    "global memory unaligned": "unaligned to 16",
    "rows in the same banks": "in the same banks",
    "shared memory not as declared": "where the kernel declares 8192",
    "a slot filled before its product": "before its copy was waited for",
    "more arrivals than a barrier waits for": "more arrivals",
    "a barrier that nobody completes": "wait for each other for ever",
}


def said(name: str) -> str:
    """What the emulator says of a kernel in faults.cu."""
    if emulated.why_unusable() is not None:
        pytest.skip(str(emulated.why_unusable()))
    function = ctypes.CDLL(str(emulated.load())).emulated_fault
    function.restype = ctypes.c_char_p
    answer = function(name.encode())
    assert answer is not None
    return bytes(answer).decode()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    assert FAULTS[name] in said(name)


@pytest.mark.parametrize("name", ["none", "none, of a warpgroup"])
def test_nothing_is_found_where_nothing_is_wrong(name: str) -> None:
    assert said(name) == ""


def test_what_a_kernel_cannot_take_is_refused_with_a_sentence() -> None:
    if why_missing("cuda") is not None:
        pytest.skip(str(why_missing("cuda")))
    kernels = kernel_set("cuda")
    with pytest.raises(RuntimeError, match="take float32, bfloat16 and float16"):
        kernels.elementwise.pack(torch.ones(8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="out must have 8 elements of type Float, got 4"):
        torch.ops.svf_fast_emulated.cuda_keep_masked(torch.ones(8), torch.ones(1, dtype=torch.uint8), torch.ones(4))


@pytest.mark.slow
def test_no_kernel_spills(tmp_path: Path) -> None:
    """One architecture; `python -m svf_fast.bench.nvcc` compiles all."""
    if nvcc.why_unusable() is not None:
        pytest.skip(str(nvcc.why_unusable()))
    table = tmp_path / "nvcc.json"
    command = [sys.executable, "-m", "svf_fast.bench.nvcc", "--out", str(table)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SVF_FAST_CUDA_ARCHS": "90a"}
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert {row["arch"] for row in rows} == {"90a"}
    assert all(row["registers"] and row["blocks"] and not row["faults"] for row in rows)


def test_without_nvcc_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "svf_fast.bench.nvcc"], capture_output=True, text=True, env={**os.environ, "PATH": ""}
    )
    assert done.returncode == 0
    assert "there is no nvcc on PATH" in done.stdout
