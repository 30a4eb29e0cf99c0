"""How much memory a run takes. Reads the system only."""

import resource
import sys

import torch


def begin_peak(device: torch.device) -> None:
    """From here on :func:`peak_memory_mb` counts on a GPU; on a CPU it counts from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """The most that was in use so far, MB (10^6 bytes): of a GPU what PyTorch had allocated, on a CPU the process's
    resident set."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    # Linux counts in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
