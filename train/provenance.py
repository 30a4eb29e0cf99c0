"""Where a result comes from: machine, versions, commit. Reads the system only; knows nothing of what was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import cv2
import numpy as np
import torch

import svf_fast


def describe_machine() -> dict[str, str]:
    """What a reader needs to place a figure: processor, cores, threads, system, versions, commit."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "PyTorch threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "OpenCV": cv2.__version__,
        "svf_fast": svf_fast.__version__,
        "commit": commit(),
    }


def describe_device(device: torch.device) -> str:
    """Where a model ran: a GPU's name, else "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def commit() -> str:
    """The source tree's git commit, with a mark when files differ from it; "not a git checkout" elsewhere."""
    folder = Path(__file__).resolve().parent
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "not a git checkout"
    changed = _git(folder, "status", "--porcelain")
    return f"{head} with local changes" if changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
