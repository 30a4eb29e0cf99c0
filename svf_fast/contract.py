"""The op contract that every backend implements: geometry, layouts, and what forward hands to backward.

Forward   z = conv(x, v);  y = act((scale ⊙ u ⊙ s) z + shift + residual)
Backward  d = dy ⊙ act';  g = (scale ⊙ u)ᵀ d;  ds = Σ z ⊙ g;  dx = conv_transpose(s ⊙ g, v)

Layout: y, z and dx are dense in x's memory format (contiguous or channels_last); the mask holds one bit an element of y,
in y's memory order, lowest bit first (bits.py); int8 z has one float32 scale a channel and group of pixels (quantize.py).
Whatever one backend keeps, another can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Stride, zero padding and dilation of the V-convolution, each (height, width), and its groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the convolution's output for an input of height and width `size`."""
        height, width = (
            (extent + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for extent, taps, stride, padding, dilation in zip(
                size, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return height, width


class Layer(NamedTuple):
    """One layer as the ops hand it to a backend: factors, singular values, the frozen affine, and what surrounds them."""

    v: Tensor
    s: Tensor
    u: Tensor
    scale: Tensor | None
    shift: Tensor | None
    geometry: Geometry
    relu: bool = False

    @property
    def is_pointwise(self) -> bool:
        """Whether the V-convolution is one matrix product over (every stride-th of the) pixels."""
        return self.v.shape[2:] == (1, 1) and self.geometry.padding == (0, 0) and self.geometry.groups == 1


class Kept(NamedTuple):
    """What forward keeps for backward; empty tensors where nothing is."""

    # [N, R, Ho, Wo] in x's dtype or int8
    z: Tensor
    # [groups of pixels, R] float32 beside int8 z
    z_scale: Tensor
    # one bit an element of y
    mask: Tensor


class Needs(NamedTuple):
    """Which gradients backward is asked for."""

    dx: bool
    ds: bool
    # d = dy ⊙ act', the residual's gradient
    d: bool


class Backend(Protocol):
    """One implementation of the contract. All tensors lie on one device; no autograd runs inside."""

    def forward(
        self, x: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        """y [N, Co, Ho, Wo] and what is kept: z as `keep_z` says ("exact", "int8"; anything else keeps none)."""

    def backward(
        self, dy: Tensor, layer: Layer, kept: Kept, x: Tensor | None, size: Sequence[int],
        memory_format: torch.memory_format, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dx of height and width `size`, ds [R] in at least float32, and d; empty where not needed, d also where it is dy.

        z is rebuilt from `x` where none was kept.
        """

    def project(
        self, z: Tensor, layer: Layer, residual: Tensor | None, keep_mask: bool, memory_format: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        """y and its mask (empty unless `keep_mask`) from a z in full."""

    def v_convolution(self, x: Tensor, layer: Layer, memory_format: torch.memory_format) -> Tensor:
        """z [N, R, Ho, Wo] in x's dtype."""

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, relu: bool,
        memory_format: torch.memory_format,
    ) -> Tensor:  # fmt: skip
        """act(conv(x, weight) + bias + residual) with a merged weight [Co, Ci/groups, Kh, Kw] and bias of x's dtype."""

    def scale_groups(self, x: Tensor, geometry: Geometry, pixels: int) -> int:
        """How many groups of its `pixels` have a scale of their own when the z of `x` is kept as int8."""

    def max_cosine(self, query: Tensor, support: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        """The largest cosine [B, Hq·Wq] and the support position [B, Hq·Wq] (int32) that has it; cosine.py has the formula."""

    def max_cosine_backward(
        self, dvalue: Tensor, query: Tensor, source: Tensor, winners: Tensor, mask: Tensor | None, eps: float,
        size: Sequence[int], is_gathered: bool, need_query: bool, need_support: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """dquery and dsupport, empty where not needed; `source` is the support or, when `is_gathered`, its winning rows."""


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format that outputs made from the 4-D tensor `x` take; sliced tensors count by the order of their strides."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    _, channels, height, width = x.shape
    if channels > 1 and x.stride(1) == 0:
        # one channel expanded: as torch's convolutions see it
        return torch.contiguous_format
    channel_stride = x.stride(1) if channels > 1 else 0
    pixel_stride = x.stride(3) if width > 1 else x.stride(2) if height > 1 else 0
    return torch.channels_last if channel_stride < pixel_stride else torch.contiguous_format


def dense(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`t` itself when it is dense in `memory_format`, else a copy that is."""
    return t.contiguous(memory_format=memory_format)


def dense_view(t: Tensor) -> Tensor:
    """The elements of a dense 4-D tensor, contiguous or channels_last, in memory order, as a 1-D view."""
    return t.view(-1) if t.is_contiguous() else t.permute(0, 2, 3, 1).view(-1)


def fold_left(u: Tensor, groups: int, s: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale ⊙ u ⊙ s as a grouped 1x1 weight [Co, R/groups, 1, 1] of `dtype`; products run in the factors' widest dtype."""
    left = u
    if s is not None:
        left = (left.view(groups, -1, u.shape[1]) * s.view(groups, 1, -1)).view(u.shape)
    if scale is not None:
        # in place where `left` is ours and wide enough
        is_ours = left is not u and torch.promote_types(left.dtype, scale.dtype) == left.dtype
        left = torch.mul(left, scale.view(-1, 1), out=left if is_ours else None)
    return left.to(dtype).view(*u.shape, 1, 1)


def check(condition: Any, message: str, error: type[Exception] = ValueError) -> None:
    """Raises `error(message)` unless `condition` holds."""
    if not condition:
        raise error(message)
