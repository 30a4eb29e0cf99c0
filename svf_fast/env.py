"""`python -m svf_fast.env`: versions, devices, which backends work here and why others do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import svf_fast
from svf_fast import backends
from svf_fast.backends import native

# Every environment variable that the project reads, and what it means. README.md has the same table.
VARIABLES = {
    "SVF_FAST_BACKEND": "backend chosen at import: auto (default), torch, cpp or triton",
    "SVF_FAST_BUILD_CPP": "while installing: 1 requires the C++ extension, 0 leaves it out, auto (default) builds it where it can",
    "SVF_FAST_BUILD_CUDA": "while installing: the same for its CUDA kernels, which need nvcc and a CUDA build of torch",
    "SVF_FAST_CUDA_ARCHS": "while installing: architectures of the CUDA kernels, 80;90a;100 where nvcc knows them",
    "SVF_FAST_CACHE_DIR": "where the kernels chosen by measurement are remembered: by default svf_fast in the user's cache folder",
}


def report() -> str:
    """What `python -m svf_fast.env` prints."""
    lines = [
        f"svf_fast  {svf_fast.__version__}",
        f"python    {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch     {torch.__version__} (CUDA {torch.version.cuda or 'none'}), {torch.get_num_threads()} threads",
    ]
    for package in ("numpy", "triton", "safetensors", "opencv-python-headless"):
        lines.append(f"{package:<9} {_version(package)}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(
                f"cuda:{i}    {properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
            )
    lines.append(f"backends  in force: {backends.current()}")
    for name in backends.NAMES[1:]:
        for device in devices:
            reason = backends.why_unusable(name, device)
            lines.append(f"  {name:<7} {device:<5} {'works' if reason is None else 'not usable: ' + reason}")
    lines.append(f"extension {native.describe()}")
    lines.append("environment")
    for variable, meaning in VARIABLES.items():
        lines.append(f"  {variable}={os.environ.get(variable, '')}  ({meaning})")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
