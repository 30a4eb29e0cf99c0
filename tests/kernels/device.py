"""Where the kernels' tests run: a CUDA device where there is one, else the CPU: Triton's kernels through its interpreter, those in CUDA
C++ through the emulator beside them."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path

import torch

from svf_fast.backends import cuda_kernels
from svf_fast.backends.kernel_set import KernelSet
from svf_fast.kernels import interpreter

sys.path.append(str(Path(__file__).parent.parent / "cuda_emulation"))

import emulated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETS = ("triton", "cuda")
# while tests are collected: before any of them imports Triton
_HAS_TRITON = importlib.util.find_spec("triton") is not None if DEVICE == "cuda" else interpreter.load()


def why_missing(name: str) -> str | None:
    """Why a set of kernels cannot run here, or None."""
    if name == "triton":
        return (
            None
            if _HAS_TRITON
            else "needs Triton; on a CPU nothing may have imported it before its interpreter is loaded"
        )
    if DEVICE == "cuda":
        return cuda_kernels.why_unusable()
    return emulated.why_unusable()


@cache
def kernel_set(name: str) -> KernelSet:
    """A set of kernels that runs on DEVICE."""
    if name == "triton":
        from svf_fast.kernels.backend import TRITON

        return TRITON
    if DEVICE == "cuda":
        return cuda_kernels.native_kernel_set()
    emulated.load()
    return cuda_kernels.kernel_set(torch.ops.svf_fast_emulated, has_wgmma=True)
