"""int8 storage of z, one scale a channel, unbiased stochastic rounding with a fixed noise table: same input, same bits.
Only ds reads z, so the error never travels down the network (design: dx does not depend on z)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from svf_fast.contract import dense_view

_LEVELS = 127
# A prime length: the noise meets every channel and every layer at another phase.
_NOISE_LENGTH = 1_048_573
_NOISE_SEED = 20221


@cache
def _noise(device: torch.device) -> Tensor:
    """Uniform [0, 1) float32 table, the same on every machine, made once a device."""
    return torch.rand(_NOISE_LENGTH, generator=torch.Generator().manual_seed(_NOISE_SEED)).to(device)


def quantize(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [N, R, H, W] floating → (int8 of the same shape and memory format, float32 scale [R]); z ≈ q · scale."""
    work = z.float()
    largest = torch.maximum(work.amax((0, 2, 3)), -work.amin((0, 2, 3)))
    scale = largest / _LEVELS
    levels_per_unit = torch.where(largest > 0, _LEVELS / largest, 0)
    work = work * levels_per_unit.view(1, -1, 1, 1)
    flat, noise = dense_view(work), _noise(z.device)
    for start in range(0, flat.numel(), _NOISE_LENGTH):
        part = flat[start : start + _NOISE_LENGTH]
        part.add_(noise[: part.numel()]).floor_()
    # rounding of the scaled maximum may reach 128 with noise just under one
    return work.clamp_(-_LEVELS, _LEVELS).to(torch.int8), scale
