"""The `torch` backend: the contract composed of stock PyTorch operations. Any device, any dtype; the memory saving
comes from what is kept, not from how it is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svf_fast.backends import composed_cosine
from svf_fast.bits import keep_masked, pack_nonzero
from svf_fast.contract import Geometry, Kept, Layer, Needs, dense, dense_view, fold_left
from svf_fast.quantize import dequantize, levels, quantize
from svf_fast.vendor import convolve, data_gradient, empty, pointwise


class ComposedBackend:
    """Stock convolutions around folded weights: no pass over an activation for s, the frozen affine or the bias."""

    pack_nonzero = staticmethod(pack_nonzero)
    keep_masked = staticmethod(keep_masked)
    max_cosine = staticmethod(composed_cosine.max_cosine)
    max_cosine_backward = staticmethod(composed_cosine.max_cosine_backward)

    def forward(
        self, x: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        z = v_convolution(x, layer, memory_format)
        y, mask = self.project(z, layer, residual, keep_mask, memory_format)
        z_scale = x.new_empty(0, dtype=torch.float32)
        if keep_z == "int8":
            z, z_scale = quantize(z)
        elif keep_z != "exact":
            z = x.new_empty(0)
        return y, Kept(z, z_scale, mask)

    def backward(
        self, dy: Tensor, layer: Layer, kept: Kept, x: Tensor | None, size: Sequence[int],
        memory_format: torch.memory_format, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dx, ds, d = dy.new_empty(0), dy.new_empty(0), dense(dy, memory_format)
        if kept.mask.numel():
            d = self.keep_masked(dense_view(d), kept.mask).as_strided(d.shape, d.stride())
        if needs.dx or needs.ds:
            g = project_gradient(d, layer, memory_format)
            if needs.ds:
                z = kept.z if x is None else v_convolution(x, layer, memory_format)
                ds = singular_value_gradient(z, kept.z_scale, g)
            if needs.dx:
                dx = v_convolution_backward(g, layer, size, memory_format)
        return dx, ds, d if needs.d and kept.mask.numel() else dy.new_empty(0)

    def project(
        self, z: Tensor, layer: Layer, residual: Tensor | None, keep_mask: bool, memory_format: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        groups = z.shape[1] // layer.u.shape[1]
        weight = fold_left(layer.u, groups, layer.s, layer.scale, z.dtype)
        bias = None if layer.shift is None else layer.shift.to(z.dtype)
        if groups == 1:
            y = pointwise(z, weight.flatten(1), memory_format, bias=bias, residual=residual)
        else:
            y = convolve(z, weight, bias, Geometry(groups=groups), memory_format)
            if residual is not None:
                y.add_(residual)
        if layer.relu:
            y.relu_()
        mask = self.pack_nonzero(dense_view(y)) if keep_mask else y.new_empty(0, dtype=torch.uint8)
        return y, mask

    def v_convolution(self, x: Tensor, layer: Layer, memory_format: torch.memory_format) -> Tensor:
        return v_convolution(x, layer, memory_format)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, relu: bool,
        memory_format: torch.memory_format,
    ) -> Tensor:  # fmt: skip
        y = convolve(x, weight, bias, geometry, memory_format)
        if residual is not None:
            y.add_(residual)
        return y.relu_() if relu else y

    def scale_groups(self, x: Tensor, geometry: Geometry, pixels: int) -> int:
        return 1


def v_convolution(x: Tensor, layer: Layer, memory_format: torch.memory_format) -> Tensor:
    """z [N, R, Ho, Wo] in x's dtype."""
    v, geometry = layer.v, layer.geometry
    if not layer.is_pointwise:
        return convolve(x, v.to(x.dtype), None, geometry, memory_format)
    if geometry.stride != (1, 1):
        x = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
    return pointwise(dense(x, memory_format), v.flatten(1).to(x.dtype), memory_format)


def v_convolution_backward(g: Tensor, layer: Layer, size: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """dx of height and width `size`: the data gradient of s ⊙ g, g [N, R, Ho, Wo]. May write into g."""
    # s goes into the smaller of the two
    v, values = layer.v, layer.s.view(-1, 1, 1, 1)
    if g.numel() < v.numel():
        g, weight = g.mul_(values.view(1, -1, 1, 1)), v.to(g.dtype)
    else:
        weight = (v * values).to(g.dtype)
    return data_gradient_of(g, weight, layer, size, memory_format)


def data_gradient_of(
    g: Tensor, weight: Tensor, layer: Layer, size: Sequence[int], memory_format: torch.memory_format
) -> Tensor:
    """The data gradient of a convolution of `layer`'s geometry by `weight` [R, Ci/groups, Kh, Kw]."""
    stride = layer.geometry.stride
    if not layer.is_pointwise:
        return data_gradient(g, weight, layer.geometry, size, memory_format)
    reached = pointwise(g, weight.flatten(1).mT, memory_format)
    if stride == (1, 1):
        return reached
    dx = empty((*reached.shape[:2], *size), g, memory_format).zero_()
    dx[:, :, :: stride[0], :: stride[1]] = reached
    return dx


def project_gradient(d: Tensor, layer: Layer, memory_format: torch.memory_format) -> Tensor:
    """g [N, R, Ho, Wo] = (scale ⊙ u)ᵀ d."""
    groups = layer.geometry.groups
    left = fold_left(layer.u, groups, None, layer.scale, d.dtype)
    if groups == 1:
        return pointwise(d, left.flatten(1).mT, memory_format)
    return data_gradient(d, left, Geometry(groups=groups), d.shape[2:], memory_format)


def singular_value_gradient(z: Tensor, z_scale: Tensor, g: Tensor) -> Tensor:
    """Σ z ⊙ g over pictures and pixels, [R], accumulated in float32 (float64 stays)."""
    accumulate = torch.promote_types(g.dtype, torch.float32)
    # one scale a channel is left for after the sum
    is_scaled_later = len(z_scale) == 1 and z.dtype == torch.int8
    if is_scaled_later:
        z = levels(z, accumulate)
    elif z.dtype == torch.int8:
        z = dequantize(z, z_scale, accumulate)
    if g.is_contiguous() and z.is_contiguous():
        # per-channel dot products; twice as fast as multiply-then-sum where pixels are adjacent
        ds = torch.linalg.vecdot(z.flatten(2).to(accumulate), g.flatten(2).to(accumulate)).sum(0)
    else:
        ds = (z.to(accumulate) * g).sum((0, 2, 3))
    return ds * z_scale[0] if is_scaled_later else ds
