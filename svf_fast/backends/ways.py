"""The exact ways to compute a layer with a set of fused kernels, and which are on offer for a shape; the first is taken where
nothing may be timed.

fused      both matrix products of a pointwise layer in one kernel (rank ≤ 256)
project    the vendor's V-convolution or data gradient, the projection with everything around it in one kernel
epilogue   the vendor's convolution and matrix product, everything element-wise in one kernel behind or before them
merged     the vendor's convolution with U diag(s) Vᵀ multiplied out, where no z has to be kept: orthogonal factors make this the
           cheaper order where V is square
streamed   the max-cosine prior in one kernel
composed   stock operations alone (the `torch` backend)"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_fast.backends.kernel_set import Config, Offers, convolution_precision
from svf_fast.contract import Kept, Layer, Needs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Way(NamedTuple):
    """One exact way to compute a layer's forward or backward, and the tiles of its kernel."""

    path: str
    config: Config | None = None

    def __str__(self) -> str:
        return self.path if self.config is None else f"{self.path} {'x'.join(map(str, self.config))}"


COMPOSED = Way("composed")


class Key(NamedTuple):
    """What a choice depends on, its text the key on disk; `products` is how the kernels multiply (kernel_set.precision)."""

    what: str
    products: str
    about: tuple[Hashable, ...] = ()


# What forward, backward, projection or the prior return.
Results = tuple[Tensor | Kept, ...]
# Decides for a key which of the ways on offer to take; the last argument runs one.
Pick = Callable[[Key, Callable[[], list[Way]], Callable[[Way], Any]], Way]


def first_offer(key: Key, offer: Callable[[], list[Way]], run: Callable[[Way], object]) -> Way:
    """The choice without measuring, the same in every run."""
    return offer()[0]


def forward_ways(offers: Offers, x: Tensor, layer: Layer, keep_z: str, memory_format: torch.memory_format) -> list[Way]:
    """What is offered for a forward; the first is taken where nothing may be measured."""
    ways = projection_ways(offers, x, layer, memory_format)
    if ways == [COMPOSED] or layer.geometry.groups > 1:
        return ways
    if keep_z not in ("exact", "int8"):
        ways.append(Way("merged"))
    if layer.is_pointwise and memory_format is torch.channels_last:
        is_roomy = keep_z == "exact" and layer.geometry.stride == (1, 1)
        fused = offers.back_to_back_forward(
            layer.v.shape[0], convolution_precision(x.dtype), keep_z == "int8", is_roomy
        )
        ways = [*(Way("fused", config) for config in fused), *ways]
    return ways


def projection_ways(offers: Offers, z: Tensor, layer: Layer, memory_format: torch.memory_format) -> list[Way]:
    """What is offered from z on."""
    if not _takes(z):
        return [COMPOSED]
    ways = [Way("epilogue")]
    if memory_format is not torch.channels_last:
        # pixel by pixel a contiguous picture is read slowly, and kernels that can do it spill
        return [COMPOSED, *ways]
    if layer.geometry.groups == 1:
        ways = [Way("project", c) for c in offers.projection_forward(convolution_precision(z.dtype))] + ways
    return ways


def backward_ways(
    offers: Offers, dy: Tensor, layer: Layer, memory_format: torch.memory_format, needs: Needs
) -> list[Way]:
    """What is offered for a backward; the first is taken where nothing may be measured."""
    if not _takes(dy):
        return [COMPOSED]
    ways = [Way("epilogue")]
    if memory_format is not torch.channels_last:
        return [COMPOSED, *ways]
    if layer.geometry.groups > 1 or not (needs.dx or needs.ds):
        return ways
    rank, products = layer.v.shape[0], convolution_precision(dy.dtype)
    ways = [*(Way("project", config) for config in offers.projection_backward(rank, products)), *ways]
    if layer.is_pointwise and needs.dx:
        fused = offers.back_to_back_backward(rank, products, layer.geometry.stride != (1, 1))
        ways = [*(Way("fused", config) for config in fused), *ways]
    return ways


def cosine_ways(query: Tensor) -> list[Way]:
    """What is offered for the prior; the first is taken where nothing may be measured."""
    # pictures are counted on a grid axis of 16 bits
    is_taken = query.dtype in _DTYPES and len(query) < 2**16
    return [Way("streamed"), COMPOSED] if is_taken else [COMPOSED]


def _takes(t: Tensor) -> bool:
    """Whether the kernels compute with tensors like t [N, C, H, W]: pixels are numbered in 32 bits."""
    return t.dtype in _DTYPES and t.numel() > 0 and t.numel() // t.shape[1] < 2**31 - 4096
