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


def peak_bytes(function: Callable[[], Any]) -> int:
    """Largest number of bytes allocated above the level at the start while `function()` runs, on the current device.

    CPU: from the allocator's events in PyTorch's profiler, scratch inside operations included. CUDA: from the caching allocator.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
