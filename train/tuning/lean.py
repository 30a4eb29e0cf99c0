"""Layers of a backbone whose own weights do not train but which a gradient passes: each keeps for backward only what a
gradient that is asked for needs, where PyTorch's own also keep their inputs. Same parameters, same state-dict keys, same
function. Knows no strategy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Geometry(NamedTuple):
    """Of a convolution with zero padding: (height, width) each."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether it says all about ``conv``."""
        return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry":
        if not cls.fits(conv):
            raise ValueError(
                f"a convolution has padding {conv.padding!r} in mode {conv.padding_mode!r}, expected numbers and 'zeros'"
            )
        pairs = (conv.stride, conv.padding, conv.dilation)
        stride, padding, dilation = ((int(each[0]), int(each[1])) for each in pairs)
        return cls(stride, padding, dilation, conv.groups)

    def input_gradient(self, gradient: Tensor, weight: Tensor, input_size: Sequence[int]) -> Tensor:
        """gradient [N, Co, Ho, Wo] of the output -> of the input [N, Ci, *input_size]. As a transposed convolution: PyTorch's
        own ``conv2d_input`` builds an input that is not looked at, at a cost in time."""
        kernel = weight.shape[2:]
        rest = [
            (size + 2 * padding - dilation * (side - 1) - 1) % stride
            for size, side, stride, padding, dilation in zip(
                input_size, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return F.conv_transpose2d(gradient, weight, None, self.stride, self.padding, rest, self.groups, self.dilation)


class FrozenConv2d(nn.Conv2d):
    """A convolution with zero padding whose weight and bias do not train: the gradient to x needs the weight only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [N, Ci, H, W], bias [Co] or None -> [N, Co, Ho, Wo]."""
        return _FrozenConvolution.apply(x, self.weight, bias, Geometry.of(self))


class FixedNorm2d(nn.BatchNorm2d):
    """BatchNorm on its running statistics for good whose weight does not train: keeps nothing, also where its bias
    does."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        # in the statistics' width: rounded to half precision, the difference would cancel badly
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


class MaskedReLU(nn.ReLU):
    """ReLU that keeps one byte an element: where it passes. For layers after it that do not keep its output."""

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        return _MaskedReLU.apply(x)


class TiledMaxPool2d(nn.MaxPool2d):
    """Max-pooling by 2x2 with stride 2 that keeps one byte an output element: which of the four it was. PyTorch's own keeps
    its input, and eight bytes an output element."""

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        return _TiledMaxPool.apply(x, self.ceil_mode)


def keep_less(stage: nn.Module) -> None:
    """Swap the classes of a stage's layers, in place, for those above. Call when ``requires_grad`` is settled."""
    for module in stage.modules():
        is_frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if type(module) is nn.Conv2d and is_frozen and Geometry.fits(module):
            module.__class__ = FrozenConv2d
        elif type(module) is nn.BatchNorm2d and module.affine and not module.weight.requires_grad:
            module.__class__ = FixedNorm2d
    for block in stage.modules():
        convolutions = [child for child in block.children() if isinstance(child, nn.Conv2d)]
        # one that keeps its input keeps the ReLU's output before it, and a mask would come on top: the first of a block reads
        # the widest map, and decides for all
        if not convolutions or isinstance(convolutions[0], FrozenConv2d):
            for child in block.children():
                if type(child) is nn.ReLU:
                    child.__class__ = MaskedReLU
    keep_less_of_pools(stage)


def keep_less_of_pools(stage: nn.Module) -> None:
    """The max-pools alone, for stages whose other layers keep little already."""
    for module in stage.modules():
        if type(module) is nn.MaxPool2d and _is_tiled(module):
            module.__class__ = TiledMaxPool2d


def _is_tiled(pool: nn.MaxPool2d) -> bool:
    """Whether windows of 2x2 lie side by side."""
    options = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return options == (2, 2, 0, 1) and not pool.return_indices


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.input_size, ctx.geometry = x.shape[2:], geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = ctx.geometry.input_gradient(gradient, weight.to(gradient.dtype), ctx.input_size)
        return dx, None, None, None


class _TiledMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ceil_mode: bool) -> Tensor:
        y, winner = F.max_pool2d(x, 2, 2, 0, 1, ceil_mode, return_indices=True)
        width = x.shape[3]
        rows, columns = (torch.arange(0, 2 * n, 2, device=x.device) for n in y.shape[2:])
        # position in the picture, less its window's first -> 0 … 3 within the window; dividing would take much longer
        winner = winner - (rows[:, None] * width + columns)
        winner = torch.where(winner < width, winner, winner - (width - 2))
        ctx.save_for_backward(winner.to(torch.uint8))
        ctx.input_size = x.shape[2:]
        ctx.channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (winner,) = ctx.saved_tensors
        # x's memory format: the pixels' axes are 2 and 3, or 1 and 2
        rows = 2
        if ctx.channels_last:
            gradient, winner, rows = gradient.permute(0, 2, 3, 1), winner.permute(0, 2, 3, 1), 1
        parts = [torch.where(winner == place, gradient, 0) for place in range(4)]
        upper, lower = (torch.stack(pair, rows + 2) for pair in (parts[:2], parts[2:]))
        windows = torch.stack((upper, lower), rows + 1)
        shape = [*gradient.shape]
        shape[rows], shape[rows + 1] = 2 * shape[rows], 2 * shape[rows + 1]
        dx = windows.reshape(shape)
        # a window over the edge has no elements there, and an odd row or column that no window covers gets zeros
        height, width = ctx.input_size
        dx = dx.narrow(rows, 0, min(dx.shape[rows], height)).narrow(rows + 1, 0, min(dx.shape[rows + 1], width))
        missing = (0, 0) * (2 - rows) + (0, width - dx.shape[rows + 1], 0, height - dx.shape[rows])
        dx = F.pad(dx, missing) if any(missing) else dx.contiguous()
        return dx.permute(0, 3, 1, 2) if ctx.channels_last else dx, None


class _MaskedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # a NaN passes, as in PyTorch's own
        ctx.save_for_backward(~(x <= 0))
        return F.relu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (passes,) = ctx.saved_tensors
        # what PyTorch's own backward runs on the output: ten times faster on a CPU than filling by a mask
        return torch.ops.aten.threshold_backward(gradient, passes.to(gradient.dtype), 0)
