"""The `torch` backend: the contract composed of stock PyTorch operations. Any device, any dtype; the memory saving
comes from what is kept, not from how it is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svf_fast.bits import keep_masked, pack_nonzero
from svf_fast.contract import Geometry, dense, dense_view, fold_left
from svf_fast.quantize import levels


class ComposedBackend:
    """Stock convolutions around folded weights: no pass over an activation for s, the frozen affine or the bias."""

    def v_convolution(self, x: Tensor, v: Tensor, geometry: Geometry, memory_format: torch.memory_format) -> Tensor:
        if _is_pointwise(v, geometry):
            return _pointwise(dense(x, memory_format), v.flatten(1).to(x.dtype), None, memory_format)
        z = F.conv2d(dense(x, memory_format), v.to(x.dtype), None, *geometry)
        return dense(z, memory_format)

    def v_convolution_backward(
        self, g: Tensor, s: Tensor, v: Tensor, geometry: Geometry, size: Sequence[int],
        memory_format: torch.memory_format,
    ) -> Tensor:  # fmt: skip
        # s goes into the weight, which is smaller than g
        weight = (v * s.view(-1, 1, 1, 1)).to(g.dtype)
        if _is_pointwise(v, geometry):
            return _pointwise(g, weight.flatten(1).mT, None, memory_format)
        kernel = v.shape[2:]
        spare = [
            extent - ((out - 1) * stride - 2 * padding + dilation * (taps - 1) + 1)
            for extent, out, taps, stride, padding, dilation in zip(
                size, g.shape[2:], kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
            )
        ]
        dx = F.conv_transpose2d(
            g, weight, None, geometry.stride, geometry.padding, spare, geometry.groups, geometry.dilation
        )
        return dense(dx, memory_format)

    def project(
        self, z: Tensor, s: Tensor, u: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
        relu: bool, keep_mask: bool, memory_format: torch.memory_format,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        groups = z.shape[1] // u.shape[1]
        weight = fold_left(u, groups, s, scale, z.dtype)
        bias = None if shift is None else shift.to(z.dtype)
        if groups == 1:
            y = _pointwise(z, weight.flatten(1), bias, memory_format)
        else:
            y = dense(F.conv2d(z, weight, bias, groups=groups), memory_format)
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
            g = _pointwise(d, left.flatten(1).mT, None, memory_format)
        else:
            g = dense(F.conv_transpose2d(d, left, groups=groups), memory_format)
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
            ds = torch.einsum("nrp,nrp->nr", z.flatten(2).to(accumulate), g.flatten(2).to(accumulate)).sum(0)
        else:
            ds = (z.to(accumulate) * g).sum((0, 2, 3))
        return ds * z_scale if z_scale.numel() else ds


def _is_pointwise(v: Tensor, geometry: Geometry) -> bool:
    """Whether the V-convolution is one matrix product over pixels."""
    return v.shape[2:] == (1, 1) and geometry == Geometry(dilation=geometry.dilation)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    """1x1 convolution of a dense x [N, Ci, H, W] with weight [Co, Ci] as a plain matrix product, dense in `memory_format`.

    Measured on CPU: torch's transposed 1x1 convolution writes its result twice, and its layouts change with the thread count.
    """
    batch, channels, height, width = x.shape
    # written through `out=` into a tensor of its own: a view as an op's output could not be modified in place by users
    y = torch.empty(
        (batch, weight.shape[0], height, width), dtype=x.dtype, device=x.device, memory_format=memory_format
    )
    if memory_format is torch.channels_last:
        rows, rows_out = (t.permute(0, 2, 3, 1).view(batch * height * width, t.shape[1]) for t in (x, y))
        if bias is None:
            torch.mm(rows, weight.mT, out=rows_out)
        else:
            torch.addmm(bias, rows, weight.mT, out=rows_out)
        return y
    planes, planes_out = x.view(batch, channels, height * width), y.view(batch, len(weight), height * width)
    weight = weight.expand(batch, *weight.shape)
    if bias is None:
        torch.bmm(weight, planes, out=planes_out)
    else:
        torch.baddbmm(bias.view(1, -1, 1), weight, planes, out=planes_out)
    return y
