"""The CUDA kernels compiled for the host, with the emulator in place of PTX: one shared library a set of sources, kept in build/."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_KERNELS = _ROOT / "csrc" / "cuda"


@cache
def why_unusable() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    if shutil.which("g++") is None:
        return "needs g++ to compile the CUDA kernels for the emulator"
    return None


def load() -> Path:
    """Compiles what has changed and registers the ops as torch.ops.svf_fast_emulated; the library that holds them."""
    library = _library()
    if isinstance(library, subprocess.CalledProcessError):
        raise RuntimeError(f"the CUDA kernels do not compile for the emulator: {library.stderr}")
    torch.ops.load_library(str(library))
    return library


@cache
def _library() -> Path | subprocess.CalledProcessError:
    """Compiled once, or found not to compile once."""
    try:
        return _compiled()
    except subprocess.CalledProcessError as error:
        return error


def _compiled() -> Path:
    sources = [*sorted(_HERE.glob("*.c*")), *sorted(_KERNELS.glob("*.cu")), _KERNELS / "binding.cpp"]
    shared = [
        *_KERNELS.glob("*.cuh"),
        *_KERNELS.glob("*.h"),
        *_KERNELS.glob("*.inc"),
        *_HERE.glob("*.h"),
        Path(__file__),
    ]
    digest = hashlib.sha256(torch.__version__.encode() + b"".join(p.read_bytes() for p in sorted([*sources, *shared])))
    folder = _ROOT / "build" / "cuda_emulation" / digest.hexdigest()[:16]
    library = folder / "svf_fast_emulated.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # two processes may compile at once: each its own, and the last one counts
        suffix = f"{os.getpid()}"
        objects = [_compile(source, folder / f"{source.name}.{suffix}.o") for source in sources]
        part = library.with_suffix(f".{suffix}.so")
        libraries = Path(torch.__file__).parent / "lib"
        subprocess.run(
            ["g++", "-shared", "-o", part, *objects, f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"], check=True
        )
        os.replace(part, library)
        for path in objects:
            path.unlink()
    return library


def _compile(source: Path, object_file: Path) -> Path:
    include = Path(torch.__file__).parent / "include"
    subprocess.run(
        [
            "g++", "-std=c++20", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DSVF_FAST_EMULATION", "-DSVF_FAST_HAS_SM90A",
            "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{_HERE}", f"-I{_KERNELS}", f"-isystem{include}", "-include", "emulation.h",
            "-x", "c++", "-c", str(source), "-o", str(object_file),
        ],
        check=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return object_file
