"""torch's own convolutions and matrix products, asked for in the way that is fastest on the device. Plain tensors in and
out, dense in the memory format that is named; no autograd.

What is said here about CPU was measured with torch 2.13 (oneDNN 3, MKL) on one and two cores of an AVX2 machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svf_fast.contract import Geometry, dense

# Pixels of a contiguous picture from which on oneDNN's 1x1 convolution beats the matrix product of torch's BLAS: 1.2 to 1.6
# times from 33x33 on, 0.8 times at 17x17.
_WIDE_PICTURE = 1024
# Padding beyond which oneDNN's kernel for contiguous pictures gives way to im2col, 1.3 times slower; its kernel for
# channels_last has no such limit. Dilation 4 of a ResNet's last stage is such a case.
_NARROW_PADDING = 3


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, memory_format: torch.memory_format
) -> Tensor:
    """F.conv2d of a dense x [N, Ci, H, W]."""
    inside = _inside(x, x.shape[2:], weight, geometry, memory_format)
    return dense(F.conv2d(dense(x, inside), weight, bias, *geometry), memory_format)


def data_gradient(
    g: Tensor, weight: Tensor, geometry: Geometry, size: Sequence[int], memory_format: torch.memory_format
) -> Tensor:
    """Gradient of `convolve` with respect to its input of height and width `size`, from g [N, Co, Ho, Wo]."""
    spare = [
        extent - ((out - 1) * stride - 2 * padding + dilation * (taps - 1) + 1)
        for extent, out, taps, stride, padding, dilation in zip(
            size, g.shape[2:], weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    ]
    g = dense(g, _inside(g, size, weight, geometry, memory_format))
    dx = F.conv_transpose2d(
        g, weight, None, geometry.stride, geometry.padding, spare, geometry.groups, geometry.dilation
    )
    return dense(dx, memory_format)


def pointwise(
    x: Tensor,
    weight: Tensor,
    memory_format: torch.memory_format,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """1x1 convolution of a dense x [N, Ci, H, W] with weight [Co, Ci] of any strides, plus bias [Co] and residual, as one
    matrix product.

    torch's transposed 1x1 convolution writes its result twice on CPU, and its layouts change with the thread count.
    """
    batch, channels, height, width = x.shape
    pixels = height * width
    if memory_format is torch.contiguous_format and pixels >= _WIDE_PICTURE and _has_onednn(x):
        # one channel, or a picture one pixel wide, has strides that read as either format: canonical ones read as this
        x = x.view(-1).view(x.shape)
        if bias is None and not weight.is_contiguous() and torch.get_num_threads() > 1:
            # with several threads torch takes oneDNN for this by itself, and nothing need be transposed
            y = F.conv_transpose2d(x, weight.mT[:, :, None, None])
        else:
            y = torch.mkldnn_convolution(x, weight.contiguous()[:, :, None, None], bias, (0, 0), (1, 1), (1, 1), 1)
        y = dense(y, memory_format)
        return y if residual is None else y.add_(residual)
    if x.is_cuda and x.dtype == torch.float32:
        # a convolution obeys torch's TF32 switch of convolutions, which this is; a matrix product has another switch
        y = dense(F.conv2d(x, weight.contiguous()[:, :, None, None], bias), memory_format)
        return y if residual is None else y.add_(residual)
    # written through `out=` into a tensor of its own: a view as an op's output could not be modified in place by users
    y = empty((batch, weight.shape[0], height, width), x, memory_format)
    if bias is not None or residual is not None:
        # what is added goes in first, and the product on top: one pass over y less
        _fill(y, bias, residual)
    beta = 0 if bias is None and residual is None else 1
    if memory_format is torch.channels_last:
        rows, rows_out = (t.permute(0, 2, 3, 1).view(batch * pixels, t.shape[1]) for t in (x, y))
        torch.addmm(rows_out, rows, weight.mT, beta=beta, out=rows_out)
        return y
    planes, planes_out = x.view(batch, channels, pixels), y.view(batch, len(weight), pixels)
    torch.baddbmm(planes_out, weight.expand(batch, *weight.shape), planes, beta=beta, out=planes_out)
    return y


def _fill(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """y = bias + residual, one of which may be absent."""
    if bias is None:
        assert residual is not None
        y.copy_(residual)
    elif residual is None:
        y.copy_(bias.view(1, -1, 1, 1).expand_as(y))
    else:
        torch.add(residual, bias.view(1, -1, 1, 1), out=y)


def empty(shape: Sequence[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An uninitialised tensor of `like`'s dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _inside(
    t: Tensor, size: Sequence[int], weight: Tensor, geometry: Geometry, memory_format: torch.memory_format
) -> torch.memory_format:
    """The memory format to convolve `t` in, the picture being of height and width `size`."""
    if max(geometry.padding) <= _NARROW_PADDING or geometry.groups != 1 or not _has_onednn(t):
        return memory_format
    # only where every output sees the picture: oneDNN has crashed in channels_last on outputs that see padding alone
    is_ordinary = all(
        padding <= dilation * (taps - 1) // 2 and padding < extent
        for padding, dilation, taps, extent in zip(
            geometry.padding, geometry.dilation, weight.shape[2:], size, strict=True
        )
    )
    return torch.channels_last if is_ordinary else memory_format


def _has_onednn(t: Tensor) -> bool:
    mkldnn = torch.backends.mkldnn
    return t.device.type == "cpu" and t.dtype == torch.float32 and mkldnn.is_available() and bool(mkldnn.enabled)
