"""The `triton` backend: layers computed by ways (svf_fast/backends/by_ways.py) with the kernels of this package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import triton
from triton.runtime.errors import OutOfResources, PTXASError

from svf_fast.backends.by_ways import WaysBackend, measured_backend
from svf_fast.backends.kernel_set import KernelSet
from svf_fast.kernels import back_to_back, configs, cosine, elementwise, projection
from svf_fast.kernels.launch import masks_in_words

TRITON = KernelSet(
    "triton", back_to_back, projection, elementwise, cosine, configs, masks_product=masks_in_words, masks_epilogue=masks_in_words
)  # fmt: skip
# What does not compile, or does not fit, on a device is left out there.
# (Triton's passes and the driver raise RuntimeError.)
UNFIT = (OutOfResources, PTXASError, triton.CompilationError, RuntimeError)


def make() -> WaysBackend:
    """The backend of this process's CUDA devices, which are taken to be alike."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return measured_backend(TRITON, f"{triton.__version__} kernels {hashlib.sha256(sources).hexdigest()[:12]}", UNFIT)
