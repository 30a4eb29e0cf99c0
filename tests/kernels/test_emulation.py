"""The emulator that the CUDA kernels are tested with finds what it says it finds, and nvcc has nothing to complain about them."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import emulated
import pytest
import torch
from device import DEVICE, kernel_set, why_missing

from svf_fast.backends import cuda_kernels
from svf_fast.backends.kernel_set import Config, Outputs
from svf_fast.bench import nvcc
from svf_fast.contract import Geometry, Layer

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
    "a product without a fence": "a wgmma without a fence",
    "an operand of another stride": "groups of 8 rows 2048 bytes apart",
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
    with pytest.raises(RuntimeError, match="values must be dense"):
        kernels.elementwise.pack(torch.ones(8, 2)[:, 0])


def library() -> ctypes.CDLL:
    """The emulator beside the kernels."""
    if why_missing("cuda") is not None or DEVICE == "cuda":
        pytest.skip(why_missing("cuda") or "the kernels are not emulated where there is a device")
    return ctypes.CDLL(str(emulated.load()))


def pointwise(dtype: torch.dtype, rank: int, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """y of one picture by the back-to-back kernel, and by float64."""
    generator = torch.Generator().manual_seed(rank)
    x, v, u = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((9, rank), (rank, rank), (16, rank)))
    s = torch.rand(rank, generator=generator)
    picture = x.view(1, 3, 3, rank).permute(0, 3, 1, 2)
    y = torch.empty(1, 16, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    layer = Layer(v.view(rank, rank, 1, 1), s, u, None, None, Geometry())
    precision = "ieee" if dtype == torch.bfloat16 else "tf32x3"
    kernel_set("cuda").back_to_back.forward(picture, layer, s, None, Outputs(y), config, precision)
    exact = (x.double() @ v.double().mT * s.double()) @ u.double().mT
    return y.permute(0, 2, 3, 1).reshape(9, 16), exact


def test_offers_know_the_shared_memory_of_the_kernels() -> None:
    """A device that has one byte less is not offered the kernel."""
    emulator = library()
    for dtype, rank in product((torch.bfloat16, torch.float32), (128, 256)):
        precision = "ieee" if dtype == torch.bfloat16 else "tf32x3"
        *_, config = cuda_kernels.Offers(False).back_to_back_forward(rank, precision, False, True)
        pointwise(dtype, rank, config)
        taken = emulator.emulated_shared_bytes()
        for less in (0, 1):
            offers = cuda_kernels.Offers(False, taken - less)
            assert bool(offers.back_to_back_forward(rank, precision, False, True)) == (less == 0)
            assert bool(offers.back_to_back_backward(rank, precision, False)) == (less == 0)


def test_without_wgmma_its_tile_is_computed_otherwise() -> None:
    emulator = library()
    by_wgmma, other = cuda_kernels.Offers(True).back_to_back_forward(128, "ieee", False, True)
    assert torch.ops.svf_fast_emulated.cuda_has_wgmma()
    taken = []
    try:
        for has_wgmma in (True, False):
            emulator.emulated_set_wgmma(has_wgmma)
            for config in (by_wgmma, other):
                y, exact = pointwise(torch.bfloat16, 128, config)
                taken.append(emulator.emulated_shared_bytes())
                assert torch.linalg.vector_norm(y - exact) < 1e-2 * torch.linalg.vector_norm(exact)
    finally:
        emulator.emulated_set_wgmma(True)
    assert taken[0] > taken[1] == taken[2] == taken[3]
    with pytest.raises(RuntimeError, match="could not be launched"):
        pointwise(torch.bfloat16, 128, by_wgmma._replace(BM=96))


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
