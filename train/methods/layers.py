"""Small pieces that few-shot heads share: resizing, masked average pooling, convolutions over concatenations that are
never built, and the ASPP. Knows no backbone and no episode."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svf_fast.train.methods.dropout import Dropout2d


# Left out of compiled graphs: TorchInductor (2.13) may read the sums of its backward before they are made, and gradients
# become 0.
@torch.compiler.disable
def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear with aligned corners, as everywhere in PFENet and BAM; the tensor itself when it has that size."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=True)


def masked_average(features: Tensor, mask: Tensor) -> Tensor:
    """Prototype of the masked positions: features [N, C, h, w], mask [N, 1, h, w] -> [N, C, 1, 1]. The small constant
    (PFENet) makes an empty mask give zeros."""
    area = mask.sum(dim=(2, 3), keepdim=True) + 0.0005
    return (features * mask).sum(dim=(2, 3), keepdim=True) / area


def convolve_parts(convolution: nn.Module, parts: Sequence[Tensor], *, size: Sequence[int] | None = None) -> Tensor:
    """``convolution`` (a Conv2d without bias) of the channel concatenation of ``parts``, from slices of its weight;
    with a ``size`` (h, w), each part's output is resized to it."""
    assert isinstance(convolution, nn.Conv2d)
    slices = convolution.weight.split([part.shape[1] for part in parts], dim=1)
    terms = (
        F.conv2d(part, weight, None, convolution.stride, convolution.padding, convolution.dilation)
        for part, weight in zip(parts, slices, strict=True)
    )
    return reduce(torch.add, terms if size is None else (resize(term, size) for term in terms))


class ConcatConvReLU(nn.Sequential):
    """1x1 convolution without bias of a channel concatenation, then ReLU: ``conv(cat[a, b]) = conv_a(a) + conv_b(b)``.

    Summing slices of one weight keeps ``a`` and ``b`` for backward by reference, where a concatenation would keep a
    copy of both. A part of size 1x1 stands for itself expanded over the map, and a part of another size than the
    output's for itself resized: a 1x1 convolution without bias and a resize may change places. State-dict key:
    ``0.weight``, as of a plain Sequential.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.ReLU(inplace=True))

    def forward(
        self,
        *parts: Tensor,
        size: Sequence[int] | None = None,
        before_relu: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """parts [B, C_i, h, w] or [B, C_i, 1, 1] -> [B, out_channels, h, w]; with a ``size`` (h, w), parts of any
        size. ``before_relu`` may change its argument in place."""
        convolution, relu = self
        total = convolve_parts(convolution, parts, size=size)
        return relu(total if before_relu is None else before_relu(total))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling as BAM has it: a pooled branch, a 1x1 and one 3x3 for each dilation, each with
    bias and ReLU, no BatchNorm. Weights start Kaiming normal (fan-in), biases at PyTorch's default."""

    def __init__(self, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.layer6_0 = _biased_conv_relu(channels, kernel=1)
        self.layer6_1 = _biased_conv_relu(channels, kernel=1)
        self.dilated_branches = [f"layer6_{number}" for number in range(2, 2 + len(dilations))]
        for name, dilation in zip(self.dilated_branches, dilations, strict=True):
            self.add_module(name, _biased_conv_relu(channels, kernel=3, dilation=dilation))
        for parameter in self.parameters():
            if parameter.dim() == 4:
                nn.init.kaiming_normal_(parameter)

    def forward(self, features: Tensor) -> list[Tensor]:
        """[B, C, h, w] -> the branches, to be concatenated: first the pooled one [B, C, 1, 1], the others [B, C, h,
        w]."""
        pooled = self.layer6_0(features.mean(dim=(2, 3), keepdim=True))
        dilated = [self.get_submodule(name)(features) for name in self.dilated_branches]
        return [pooled, self.layer6_1(features), *dilated]


def _biased_conv_relu(channels: int, *, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation), nn.ReLU(inplace=True)
    )


def support_mask(label: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels [..., S, S] -> [..., 1, S, S] with 1 on the episode's class; void counts as background in a support."""
    return (label == 1).unsqueeze(-3).to(dtype)


def residual_pair(channels: int) -> nn.Sequential:
    """3x3, ReLU, 3x3, ReLU, without bias: what is added to its own input. Keys ``0.weight``, ``2.weight``."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
    )


def classifier(channels: int) -> nn.Sequential:
    """3x3, ReLU, Dropout2d, 1x1 with bias -> 2 logits. Keys ``0.weight``, ``3.weight``, ``3.bias``."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        # before the ReLU it is the same function, its factors not being negative, and one map less is kept
        Dropout2d(0.1, inplace=True),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, 2, 1),
    )
