"""Bottleneck ResNets with output stride 8, split into the stages that few-shot methods call. State-dict keys below
``layer1`` … ``layer4`` are torchvision's. Knows no file format and no method."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from svf_fast.train.backbones.base import Backbone, initialise_like_torchvision

EXPANSION = 4
Stem = Literal["deep", "plain"]
Dilation = Literal["uniform", "torchvision"]
StrideOn = Literal["conv1", "conv2"]


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 with a residual (He et al. 2016); children named as torchvision's."""

    def __init__(
        self, in_channels: int, width: int, *, stride: int, dilation: int, stride_on: StrideOn, bn_eps: float
    ) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        stride1, stride2 = (stride, 1) if stride_on == "conv1" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=stride1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=bn_eps)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride2, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=bn_eps)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels, eps=bn_eps)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels, eps=bn_eps),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


def resnet(
    *,
    stem: Stem = "deep",
    dilation: Dilation = "uniform",
    stride_on: StrideOn = "conv2",
    bn_eps: float = 1e-5,
    depth: int = 4,
    blocks: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
) -> Backbone:
    """A ResNet for dense features: the strides of stages 3 and 4 are traded for dilation.

    ``dilation="uniform"`` dilates every 3x3 of stage 3 by 2 and of stage 4 by 4 (PFENet, BAM); ``"torchvision"``
    leaves the first block of each at the rate of the stage before (1 and 2). A ``stride_on="conv1"`` network (ResNet
    v1) sees the same pixels as its strided original only with ``"uniform"``, a ``"conv2"`` network only with
    ``"torchvision"``: the released few-shot code uses ``"uniform"`` on the latter all the same. Either way no stride
    is left in stages 3 and 4.
    """
    layer0, channels = _stem(stem, width, bn_eps)
    stages: dict[str, nn.Module] = {"layer0": layer0}
    channel_counts = {"layer0": channels}
    for number in range(1, depth + 1):
        rate = {3: 2, 4: 4}.get(number, 1)
        first_rate = rate if dilation == "uniform" else max(rate // 2, 1)
        stage_width = width * 2 ** (number - 1)
        stage: list[nn.Module] = []
        for block in range(blocks[number - 1]):
            stage.append(
                Bottleneck(
                    channels,
                    stage_width,
                    stride=2 if number == 2 and block == 0 else 1,
                    dilation=first_rate if block == 0 else rate,
                    stride_on=stride_on,
                    bn_eps=bn_eps,
                )
            )
            channels = stage_width * EXPANSION
        stages[f"layer{number}"] = nn.Sequential(*stage)
        channel_counts[f"layer{number}"] = channels
    backbone = Backbone(stages, channel_counts)
    initialise_like_torchvision(backbone)
    return backbone


def _stem(stem: Stem, width: int, bn_eps: float) -> tuple[nn.Sequential, int]:
    """Stride 4 in all: three 3x3 convolutions (deep) or one 7x7 (plain), then the max-pool."""
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    if stem == "plain":
        convolution = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width, eps=bn_eps), nn.ReLU(inplace=True), pool), width
    modules: list[nn.Module] = []
    in_channels = 3
    for out_channels, stride in ((width, 2), (width, 1), (2 * width, 1)):
        modules += [
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels, eps=bn_eps),
            nn.ReLU(inplace=True),
        ]
        in_channels = out_channels
    return nn.Sequential(*modules, pool), in_channels
