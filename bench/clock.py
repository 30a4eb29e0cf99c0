"""Timing and memory on the device that a benchmark runs on: a CUDA device, or the CPU for a rehearsal. Seconds and bytes; knows
nothing of what is measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from svf_fast.memory import peak_bytes

# Read between runs, so that inputs come from memory and not from the last run's cache (60 MB on an H200).
_FLUSH_BYTES = 256 * 2**20


class CudaClock:
    """Time by events, with a cold L2 cache where that is asked for."""

    device = "cuda"

    def __init__(self) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def seconds(self, work: Callable[[], object], runs: int = 10) -> list[float]:
        """Each run's time on the device, the cache cold. Where the device waits for launches, that is in it: graphs leave it out."""
        marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
        for start, end in marks:
            # read, not written: dirty lines would be written back while the clock runs
            self._flush.amax()
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def graphed(self, work: Callable[[], object]) -> Callable[[], object]:
        """`work` captured in a CUDA graph: its kernels without the time to launch them."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = work()

        def replay(_: Any = kept) -> None:
            graph.replay()

        return replay

    def host_seconds(self, work: Callable[[], object], runs: int = 20) -> float:
        """Time a run that the host takes to queue its work, the device not waited for."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            work()
        taken = (time.perf_counter() - start) / runs
        torch.cuda.synchronize()
        return taken

    def peak(self, work: Callable[[], object]) -> int:
        """Most bytes allocated while `work` runs, above the level before it."""
        return peak_bytes(work, device="cuda")


class RehearsalClock:
    """The same calls on the CPU: shows that they run, says nothing about speed."""

    device = "cpu"

    def seconds(self, work: Callable[[], object], runs: int = 1) -> list[float]:
        """Wall-clock time of one run."""
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start]

    def host_seconds(self, work: Callable[[], object], runs: int = 1) -> float:
        """Wall-clock time of one run."""
        return self.seconds(work)[0]

    def graphed(self, work: Callable[[], object]) -> Callable[[], object]:
        """`work` itself: there are no graphs here."""
        return work

    def peak(self, work: Callable[[], object]) -> int:
        """Most bytes allocated while `work` runs, above the level before it."""
        return peak_bytes(work)


Clock = CudaClock | RehearsalClock


def interleaved(
    clock: Clock, works: Mapping[str, Callable[[], object]], rounds: int = 3, runs: int = 5
) -> dict[str, list[float]]:
    """Seconds of each of `works`, taken in turns after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_number, (name, work) in itertools.product(range(rounds + 1), works.items()):
        taken = clock.seconds(work, runs)
        if round_number:
            seconds[name] += taken
    return seconds


def ceilings(clock: Clock) -> dict[str, float]:
    """The device's own rates: bytes a second of a copy (read plus written), FLOP a second of a bf16 and a TF32 product."""
    size, side = (2**30, 8192) if clock.device == "cuda" else (2**20, 64)
    source, target = (torch.empty(size, dtype=torch.int8, device=clock.device).fill_(n) for n in (1, 2))
    found = {"copy_bytes_per_s": 2 * size / min(clock.seconds(lambda: target.copy_(source)))}
    set_tf32(True)
    for name, dtype in (("bf16_flops_per_s", torch.bfloat16), ("tf32_flops_per_s", torch.float32)):
        product = partial(torch.matmul, *(torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2)))
        clock.seconds(product, 3)
        found[name] = 2 * side**3 / min(clock.seconds(product))
    return found


def set_tf32(is_on: bool) -> None:
    """torch's switches of float32 convolutions and products. The old names: what reads them (the compiler) refuses a mix with the new."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = is_on
