"""int8 storage of z: one scale a channel and group of pixels, and subtractive dither from fixed noise, so that the error is
unbiased, independent of z, and the same inputs give the same bits. Only ds reads z: the error never travels down the network."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from svf_fast.contract import dense_view

LEVELS = 127
# The groups, where there is more than one: this many pixels in N·H·W order, whatever the layout.
GROUP_PIXELS = 64
# A prime length: the noise meets every channel and every layer at another phase.
NOISE_LENGTH = 1_048_573


@cache
def noise(device: torch.device) -> Tensor:
    """u [NOISE_LENGTH], float32 in [0, 1): a hash of the index (C. Wellons' lowbias32), which kernels compute instead of reading."""
    x = torch.arange(NOISE_LENGTH, dtype=torch.int64, device="cpu")
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return ((x >> 8).float() * 2.0**-24).to(device)


def _add_noise(values: Tensor, sign: int) -> None:
    """values += sign · u(i mod NOISE_LENGTH), i the element's index in memory order; dense float values, in place."""
    flat, table = dense_view(values), noise(values.device)
    for start in range(0, flat.numel(), NOISE_LENGTH):
        part = flat[start : start + NOISE_LENGTH]
        part.add_(table[: part.numel()], alpha=sign)


def quantize(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [N, R, H, W] floating → q = ⌊z / scale + u⌋ as int8 of the same shape and layout, and scale [1, R] float32: all pixels
    are one group.

    scale is a channel's largest magnitude over 127; u is the noise.
    """
    work = z.float()
    if z.numel() == 0:
        return work.to(torch.int8), work.new_zeros(1, z.shape[1])
    largest = torch.maximum(work.amax((0, 2, 3)), -work.amin((0, 2, 3)))
    levels_per_unit = torch.where(largest > 0, LEVELS / largest, 0)
    work = work * levels_per_unit.view(1, -1, 1, 1)
    _add_noise(work, 1)
    return work.floor_().clamp_(-LEVELS, LEVELS).to(torch.int8), (largest / LEVELS).unsqueeze(0)


def levels(q: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` stored, in units of its scale, z / scale ≈ q − u + ½, in `dtype` (float32 or float64).

    Taking the noise out again halves the variance of plain stochastic rounding and leaves the error independent of z.
    """
    work = q.to(dtype)
    _add_noise(work, -1)
    return work.add_(0.5)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """z [N, R, H, W] in `dtype` (float32 or float64) from int8 levels and scales [groups, R]."""
    batch, rank, height, width = q.shape
    each = scale if len(scale) == 1 else scale.repeat_interleave(GROUP_PIXELS, 0)[: batch * height * width]
    each = each.expand(batch * height * width, rank).view(batch, height, width, rank).permute(0, 3, 1, 2)
    return levels(q, dtype).mul_(each)
