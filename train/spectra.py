"""Singular values of a tuned method's converted convolutions, before tuning and after. Knows methods; no run and no file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import svf_fast
from svf_fast.train.methods import MetaLearner

# Relative changes of values below this share of their layer's largest say nothing: little is large there.
NEAR_ZERO = 0.05
TOP = 30  # singular values that the paper's Figure 6 shows


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one convolution, largest first, before tuning and after, in the order they had before."""

    layer: str
    kernel: str  # such as "3×3"
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class MovedValue:
    """A singular value that tuning moved: which one (1 is the largest), from where to where."""

    layer: str
    rank: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """Relative to the value before; -0.1 is a tenth less."""
        return (self.after - self.before) / self.before


def last_convolution(method: MetaLearner, stage: str, kernel: str) -> tuple[str, svf_fast.SVFConv2d] | None:
    """The last converted convolution of a stage whose kernel is "1×1" or "3×3", shortcuts left out, and its name; None where
    the stage has none."""
    found = None
    for name, layer in _converted(method):
        is_shortcut = ".downsample." in name
        if name.startswith(f"{stage}.") and not is_shortcut and "×".join(map(str, layer.kernel_size)) == kernel:
            found = name, layer
    return found


def top_spectra(method: MetaLearner) -> list[Spectrum]:
    """The largest singular values of the last 3×3 and the last 1×1 convolution of layer 3 (Figure 6), as far as there are."""
    spectra: list[Spectrum] = []
    for kernel in ("3×3", "1×1"):
        found = last_convolution(method, "layer3", kernel)
        if found is not None:
            name, layer = found
            before, after = _values(layer)
            spectra.append(Spectrum(name, kernel, before[:TOP].tolist(), after[:TOP].tolist()))
    return spectra


def most_moved(method: MetaLearner, amount: int = 8) -> list[MovedValue]:
    """The singular values of all converted convolutions with the largest relative change; those near zero are left out."""
    moved = [value for name, layer in _converted(method) for value in moved_values(name, layer)]
    return sorted(moved, key=lambda value: -abs(value.change))[:amount]


def moved_values(name: str, layer: svf_fast.SVFConv2d) -> list[MovedValue]:
    """Every singular value of the convolution of that name, largest first, but for those that began below ``NEAR_ZERO`` of
    the largest."""
    before, after = _values(layer)
    return [
        MovedValue(name, int(index) + 1, float(before[index]), float(after[index]))
        for index in np.flatnonzero(before > NEAR_ZERO * before.max())
    ]


def _converted(method: MetaLearner) -> Iterator[tuple[str, svf_fast.SVFConv2d]]:
    """Names and converted convolutions, in the model's order."""
    return ((name, module) for name, module in method.named_modules() if isinstance(module, svf_fast.SVFConv2d))


def _values(layer: svf_fast.SVFConv2d) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(before, after) [R], in the order of falling values before."""
    before = layer.s0.detach().double().cpu().numpy()
    after = layer.singular_values().detach().double().cpu().numpy()
    order = np.argsort(-before, kind="stable")
    return before[order], after[order]
