"""The `torch` backend: the contract composed of stock PyTorch operations. Any device, any dtype; the memory saving
comes from what is kept, not from how it is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svf_fast.bits import keep_masked, pack_nonzero
from svf_fast.contract import Geometry, dense, dense_view, fold_left
from svf_fast.quantize import levels
from svf_fast.vendor import convolve, data_gradient, empty, pointwise


class ComposedBackend:
    """Stock convolutions around folded weights: no pass over an activation for s, the frozen affine or the bias."""

    def v_convolution(self, x: Tensor, v: Tensor, geometry: Geometry, memory_format: torch.memory_format) -> Tensor:
        if not _is_pointwise(v, geometry):
            return convolve(x, v.to(x.dtype), None, geometry, memory_format)
        if geometry.stride != (1, 1):
            x = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
        return pointwise(dense(x, memory_format), v.flatten(1).to(x.dtype), memory_format)

    def v_convolution_backward(
        self, g: Tensor, s: Tensor, v: Tensor, geometry: Geometry, size: Sequence[int],
        memory_format: torch.memory_format,
    ) -> Tensor:  # fmt: skip
        # s goes into the smaller of the two
        values = s.view(-1, 1, 1, 1)
        if g.numel() < v.numel():
            g, weight = g.mul_(values.view(1, -1, 1, 1)), v.to(g.dtype)
        else:
            weight = (v * values).to(g.dtype)
        if not _is_pointwise(v, geometry):
            return data_gradient(g, weight, geometry, size, memory_format)
        reached = pointwise(g, weight.flatten(1).mT, memory_format)
        if geometry.stride == (1, 1):
            return reached
        dx = empty((*reached.shape[:2], *size), g, memory_format).zero_()
        dx[:, :, :: geometry.stride[0], :: geometry.stride[1]] = reached
        return dx

    def project(
        self, z: Tensor, s: Tensor, u: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
        relu: bool, keep_mask: bool, memory_format: torch.memory_format,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        groups = z.shape[1] // u.shape[1]
        weight = fold_left(u, groups, s, scale, z.dtype)
        bias = None if shift is None else shift.to(z.dtype)
        if groups == 1:
            y = pointwise(z, weight.flatten(1), memory_format, bias=bias, residual=residual)
        else:
            y = convolve(z, weight, bias, Geometry(groups=groups), memory_format)
            if residual is not None:
                y.add_(residual)
        if relu:
            y.relu_()
        mask = pack_nonzero(dense_view(y)) if keep_mask else y.new_empty(0, dtype=torch.uint8)
        return y, mask

    def project_backward(
        self, d: Tensor, z: Tensor, z_scale: Tensor, u: Tensor, scale: Tensor | None, groups: int, need_ds: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        left = fold_left(u, groups, None, scale, d.dtype)
        if groups == 1:
            g = pointwise(d, left.flatten(1).mT, memory_format)
        else:
            g = data_gradient(d, left, Geometry(groups=groups), d.shape[2:], memory_format)
        return g, self._ds(z, z_scale, g) if need_ds else g.new_empty(0)

    def apply_mask(self, dy: Tensor, mask: Tensor) -> Tensor:
        return keep_masked(dense_view(dy), mask).as_strided(dy.shape, dy.stride())

    @staticmethod
    def _ds(z: Tensor, z_scale: Tensor, g: Tensor) -> Tensor:
        """Σ z ⊙ g over pictures and pixels, [R], accumulated in float32 (float64 stays)."""
        accumulate = torch.promote_types(g.dtype, torch.float32)
        if z.dtype == torch.int8:
            z = levels(z, accumulate)
        if g.is_contiguous() and z.is_contiguous():
            # per-channel dot products; twice as fast as multiply-then-sum where pixels are adjacent
            ds = torch.linalg.vecdot(z.flatten(2).to(accumulate), g.flatten(2).to(accumulate)).sum(0)
        else:
            ds = (z.to(accumulate) * g).sum((0, 2, 3))
        return ds * z_scale if z_scale.numel() else ds


def _is_pointwise(v: Tensor, geometry: Geometry) -> bool:
    """Whether the V-convolution is one matrix product over (every stride-th of the) pixels."""
    return v.shape[2:] == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
