"""Counting memory: the bytes that autograd keeps for backward, and the peak while a function runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(function: Callable[[], Any], *, owned: nn.Module | Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward while `function()` builds its graph.

    Each storage counts once, in full; storages of `owned` (a module's parameters and buffers, or tensors such as the input
    that exist anyway) do not count. Works under FakeTensorMode, where nothing is allocated.
    """
    if isinstance(owned, nn.Module):
        owned = [*owned.parameters(), *owned.buffers()]
    known = {t.untyped_storage()._cdata for t in owned}
    # the storages are held, so that no address comes back for another one
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            seen[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    del result
    return sum(storage.nbytes() for storage in seen.values())


def peak_bytes(function: Callable[[], Any], *, before: Callable[[], Any] = lambda: None, device: str = "cpu") -> int:
    """Largest number of bytes in use while `function()` runs, above the level before `before()`, which runs first.

    So `peak_bytes(backward, before=forward)` is the peak during backward, what forward kept included. CPU: from the allocator's
    events in PyTorch's profiler, scratch inside operations included. CUDA: from the caching allocator.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        level = torch.cuda.memory_allocated()
        before()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - level
    mark = "svf_fast.peak_bytes"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        before()
        with torch.profiler.record_function(mark):
            function()
    events = profile.profiler.kineto_results.events()
    start_ns = next(e.start_ns() for e in events if e.name() == mark)
    level = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        if event.start_ns() >= start_ns:
            peak = max(peak, level)
    return peak
