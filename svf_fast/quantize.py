"""int8 storage of z: one scale a channel and group of pixels, and subtractive dither from fixed noise, so that the error is
unbiased, independent of z, and the same inputs give the same bits. Only ds reads z: the error never travels down the network."""

from __future__ import annotations

from collections.abc import Sequence
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


def quantize(z: Tensor, group_pixels: int | None = None) -> tuple[Tensor, Tensor]:
    """z [N, R, H, W] floating → q = ⌊z / scale + u⌋ as int8 of the same shape and layout, and scale [groups, R] float32: one group
    of all pixels, or one of every `group_pixels`, in the kernels' way GROUP_PIXELS.

    scale is a channel's largest magnitude in its group over 127; u is the noise.
    """
    work = z.float()
    pixels = z.numel() // z.shape[1]
    if z.numel() == 0:
        return work.to(torch.int8), work.new_zeros(1 if group_pixels is None else 0, z.shape[1])
    if group_pixels is None:
        largest = torch.maximum(work.amax((0, 2, 3)), -work.amin((0, 2, 3))).unsqueeze(0)
    else:
        by_pixel = work.abs().permute(0, 2, 3, 1).reshape(pixels, -1)
        whole = torch.nn.functional.pad(by_pixel, (0, 0, 0, -pixels % group_pixels))
        largest = whole.view(-1, group_pixels, z.shape[1]).amax(1)
    levels_per_unit = torch.where(largest > 0, LEVELS / largest, 0)
    work = work * _of_each(levels_per_unit, z.shape, group_pixels or pixels)
    _add_noise(work, 1)
    return work.floor_().clamp_(-LEVELS, LEVELS).to(torch.int8), largest / LEVELS


def _of_each(of_groups: Tensor, shape: Sequence[int], group_pixels: int) -> Tensor:
    """Values [groups, R] as [N, R, H, W], pixel by pixel."""
    batch, rank, height, width = shape
    pixels = batch * height * width
    each = of_groups if len(of_groups) == 1 else of_groups.repeat_interleave(group_pixels, 0)[:pixels]
    return each.expand(pixels, rank).view(batch, height, width, rank).permute(0, 3, 1, 2)


def levels(q: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` stored, in units of its scale, z / scale ≈ q − u + ½, in `dtype` (float32 or float64).

    Taking the noise out again halves the variance of plain stochastic rounding and leaves the error independent of z.
    """
    work = q.to(dtype)
    _add_noise(work, -1)
    return work.add_(0.5)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """z [N, R, H, W] in `dtype` (float32 or float64) from int8 levels and scales [groups, R]."""
    return levels(q, dtype).mul_(_of_each(scale, q.shape, GROUP_PIXELS))
