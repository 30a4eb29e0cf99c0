"""What the Triton launchers share beyond svf_fast/backends/kernel_set.py: which addresses a kernel may simplify.
Knows strides; no kernel, no layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from svf_fast.backends.kernel_set import Strides, strides_of

# Arguments whose value is not compiled in: a new picture size costs no compilation.
PICTURE_SIZES = ("pixels", "plane", "width")


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


def masks_in_words(y: Tensor) -> bool:
    """`has_words` of a tensor."""
    return has_words(strides_of(y), y.shape[1])
