"""What the Triton launchers share beyond svf_fast/backends/kernel_set.py: launching without looking a kernel up anew, and which
addresses it may simplify. Knows strides; no kernel by name, no layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from svf_fast.backends.kernel_set import Strides, strides_of

# Arguments whose value is not compiled in: a new picture size costs no compilation.
PICTURE_SIZES = ("pixels", "plane", "width")

# Compiled kernels by what Triton specialises them on, and more: sizes too, since a key of less takes longer to make. Forgotten
# all at once where sizes never repeat.
_compiled: dict[tuple[Hashable, ...], Any] = {}
_MOST_REMEMBERED = 4096


def launch(
    kernel: Any, grid: tuple[int, int, int], tensors: Sequence[Tensor | None], numbers: tuple[Any, ...],
    constants: tuple[Any, ...], options: dict[str, int],
) -> None:  # fmt: skip
    """kernel[grid](*tensors, *numbers, *constants, **options), the first tensor not None. Triton finds a compiled kernel in 17 µs
    (H200's host), this in a few."""
    first = tensors[0]
    assert first is not None
    if not first.is_cuda:
        # interpreted, or compiled ahead of time
        kernel[grid](*tensors, *numbers, *constants, **options)
        return
    kinds = tuple([t if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors])
    key = (kernel.fn, first.get_device(), kinds, numbers, constants, *options.values())
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= _MOST_REMEMBERED:
            _compiled.clear()
        _compiled[key] = kernel[grid](*tensors, *numbers, *constants, **options)
    else:
        compiled[grid](*tensors, *numbers, *constants)


@lru_cache(_MOST_REMEMBERED)
def is_uniform(pictures: tuple[int, int, int], channels: int, strides: tuple[Strides, ...]) -> bool:
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
