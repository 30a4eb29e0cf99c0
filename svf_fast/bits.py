"""Bit-packed ReLU masks: one bit an element, eight to a byte, lowest bit first, in the memory order of the activation.
Stock PyTorch operations only, so that it runs on any device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Multiplying eight bytes that are 0 or 1 by this gathers them as the bits of the top byte.
_GATHER = 0x0102040810204080
_SAME_SIZE_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_bytes(elements: int) -> int:
    """Bytes that the mask of `elements` elements takes."""
    return (elements + 7) // 8


def pack_nonzero(values: Tensor) -> Tensor:
    """Mask of the non-zero elements of a dense 1-D tensor as uint8 [ceil(n / 8)]; NaN counts as non-zero."""
    # a converting copy is three times faster than a comparison on CPU
    flags = values.to(torch.bool, copy=True)
    missing = -values.numel() % 8
    if missing:
        flags = torch.cat([flags, flags.new_zeros(missing)])
    return flags.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


@cache
def _spread_table(device: torch.device) -> Tensor:
    """int64 [256]: the eight bits of the index as eight bytes of 0 or -1."""
    byte = torch.arange(256, dtype=torch.int64, device="cpu").unsqueeze(1)
    spread = -((byte >> torch.arange(8, device="cpu")) & 1).to(torch.int8)  # [256, 8]
    return spread.contiguous().view(torch.int64).reshape(256).to(device)


def keep_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Copy of the dense 1-D tensor `values` with the elements whose bit in `mask` is 0 set to exactly zero.

    A bitwise AND rather than a product: zero stays zero even where `values` is infinite or NaN, as ReLU's own backward has it.
    """
    integers = values.view(_SAME_SIZE_INTEGER[values.element_size()])
    keep = _spread_table(mask.device).index_select(0, mask.int()).view(torch.int8)[: values.numel()]
    # widened by a copy of its own: an AND of mixed widths converts element by element
    return keep.to(integers.dtype, copy=True).bitwise_and_(integers).view(values.dtype)
