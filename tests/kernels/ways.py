"""A backend that takes the way it is told, and problems on the device that the kernels run on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from conv_cases import Problem

from svf_fast.backends.by_ways import WaysBackend
from svf_fast.backends.kernel_set import KernelSet
from svf_fast.backends.ways import COMPOSED, Way


class Forced:
    """Picks the first offer that `wants` says yes to, else the plain composition; `taken` lists the offers taken."""

    def __init__(self, kernels: KernelSet, wants: Callable[[Way], bool]) -> None:
        self._wants = wants
        self.taken: list[Way] = []
        self.backend = WaysBackend(kernels, self.pick)

    def pick(self, key: Hashable, offer: Callable[[], list[Way]], run: Callable[[Way], object]) -> Way:
        """The wanted way, or COMPOSED."""
        for way in offer():
            if self._wants(way):
                self.taken.append(way)
                return way
        return COMPOSED


def path(kernels: KernelSet, name: str) -> WaysBackend:
    """The backend that takes the first offer of a path."""
    return Forced(kernels, lambda way: way.path == name).backend


def on_device(problem: Problem, device: str) -> Problem:
    """The same problem with its tensors there, strides kept."""

    def move(t: Any) -> Any:
        return t.to(device) if isinstance(t, torch.Tensor) else t

    return replace(
        problem,
        **{name: move(getattr(problem, name)) for name in ("x", "v", "s", "u", "dy", "residual")},
        vectors={name: move(t) for name, t in problem.vectors.items()},
    )
