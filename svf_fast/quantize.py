"""int8 storage of z: one scale a channel and subtractive dither from a fixed noise table, so that the error is unbiased,
independent of z, and the same inputs give the same bits. Only ds reads z: the error never travels down the network."""

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
    generator = torch.Generator("cpu").manual_seed(_NOISE_SEED)
    return torch.rand(_NOISE_LENGTH, generator=generator, dtype=torch.float32, device="cpu").to(device)


def _add_noise(values: Tensor, sign: int) -> None:
    """values += sign · u(i mod table length), i the element's index in memory order; dense float values, in place."""
    flat, noise = dense_view(values), _noise(values.device)
    for start in range(0, flat.numel(), _NOISE_LENGTH):
        part = flat[start : start + _NOISE_LENGTH]
        part.add_(noise[: part.numel()], alpha=sign)


def quantize(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [N, R, H, W] floating → q = ⌊z / scale + u⌋ as int8 of the same shape and layout, and scale [R] float32.

    scale is a channel's largest magnitude over 127; u is the noise table.
    """
    work = z.float()
    if z.numel() == 0:
        return work.to(torch.int8), work.new_zeros(z.shape[1])
    largest = torch.maximum(work.amax((0, 2, 3)), -work.amin((0, 2, 3)))
    levels_per_unit = torch.where(largest > 0, _LEVELS / largest, 0)
    work = work * levels_per_unit.view(1, -1, 1, 1)
    _add_noise(work, 1)
    return work.floor_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), largest / _LEVELS


def levels(q: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` stored, in units of its scale, z / scale ≈ q − u + ½, in `dtype` (float32 or float64).

    Taking the noise out again halves the variance of plain stochastic rounding and leaves the error independent of z.
    """
    work = q.to(dtype)
    _add_noise(work, -1)
    return work.add_(0.5)
