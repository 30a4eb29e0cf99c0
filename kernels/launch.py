"""What the launchers share: tile configurations, strides as the kernels take them, TF32 as torch's switches say.
Knows tensors; no kernel, no layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

Strides = tuple[int, int, int, int]
# Arguments whose value is not compiled in: a new picture size costs no compilation.
PICTURE_SIZES = ("pixels", "plane", "width")


class Config(NamedTuple):
    """Tile sizes and compiler options of one launch: pixels, output channels, contracted channels, the rank's tile."""

    BM: int
    BN: int
    BK: int
    BR: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Outputs(NamedTuple):
    """What forward writes; None where nothing is asked for. z is kept in full or as q (int8) with q_scale."""

    y: Tensor
    mask: Tensor | None = None
    z: Tensor | None = None
    q: Tensor | None = None
    q_scale: Tensor | None = None

    def z_strides(self) -> Strides:
        """Of z or q, whichever is written."""
        kept = self.q if self.z is None else self.z
        return strides_of(self.y if kept is None else kept)


class Gradients(NamedTuple):
    """What backward writes; None where nothing is asked for. `partial` [programs, R] sums up to ds. `y_strides` are those of
    the y that the mask describes, and of d."""

    d: Tensor | None
    partial: Tensor | None
    y_strides: Strides


def strides_of(t: Tensor, step: tuple[int, int] = (1, 1)) -> Strides:
    """Strides (n, h, w, c) of t [N, C, H, W] when every `step`-th pixel is visited."""
    n, c, h, w = t.stride()
    return n, h * step[0], w * step[1], c


def precision(dtype: torch.dtype, is_tf32: bool) -> str:
    """How `tl.dot` multiplies: half precisions exactly ("ieee"); float32 as TF32, else as three TF32 products (error 1e-6), since
    plain float32 has no tensor cores."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if is_tf32 else "tf32x3"


def convolution_precision(dtype: torch.dtype) -> str:
    """`precision` by torch's switch of convolutions, which this layer is."""
    # the switch is asked for float32 alone: it takes microseconds
    return precision(dtype, dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def product_precision(dtype: torch.dtype) -> str:
    """`precision` by torch's switch of matrix products."""
    return precision(dtype, dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32")


def dense_strides(shape: Sequence[int], memory_format: torch.memory_format) -> Strides:
    """Strides (n, h, w, c) of a dense tensor [N, C, H, W]."""
    _, channels, height, width = shape
    if memory_format is torch.channels_last:
        return height * width * channels, width * channels, channels, 1
    return channels * height * width, width, 1, height * width


def is_uniform(pictures: tuple[int, int, int], channels: int, strides: Sequence[Strides]) -> bool:
    """Whether the pixels of (N, H, W) `pictures` are equally far apart in each of the tensors, and what lies between the
    pixels of one tile fits in 32 bits (tiles.rows_of)."""
    batch, height, width = pictures
    return all(
        (height == 1 or h == width * w) and (batch == 1 or n == height * width * w) and channels * c + 512 * w < 2**31
        for n, h, w, c in strides
    )


def has_words(y_strides: Strides, channels: int) -> bool:
    """Whether the mask of a dense y can be read and written in words of 32 channels (tiles.kept_bits)."""
    return y_strides[3] == 1 and channels % 32 == 0


def blocks(total: int, size: int) -> int:
    """How many tiles of `size` cover `total`."""
    return int(triton.cdiv(total, size))
