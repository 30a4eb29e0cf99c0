"""VGG-16 with BatchNorm (configuration D), split into the stages that few-shot methods call: output stride 8 after
``layer2``, 16 after ``layer3`` and ``layer4``. Knows no file format and no method."""

from torch import nn

from svf_fast.train.backbones.base import STAGES, Backbone, initialise_like_torchvision

CONVOLUTIONS_PER_STAGE = (2, 2, 3, 3, 3)
WIDTH_FACTORS = (1, 2, 4, 8, 8)


def vgg16(*, bn_eps: float = 1e-5, depth: int = 4, width: int = 64) -> Backbone:
    """VGG-16-bn whose pools round up (``ceil_mode``, unlike torchvision's) and whose last pool is left out."""
    stages: dict[str, nn.Module] = {}
    channel_counts: dict[str, int] = {}
    in_channels = 3
    for number, name in enumerate(STAGES[: depth + 1]):
        channels = width * WIDTH_FACTORS[number]
        modules: list[nn.Module] = []
        for _ in range(CONVOLUTIONS_PER_STAGE[number]):
            modules += [
                nn.Conv2d(in_channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels, eps=bn_eps),
                nn.ReLU(inplace=True),
            ]
            in_channels = channels
        if number < 4:
            modules.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
        stages[name] = nn.Sequential(*modules)
        channel_counts[name] = channels
    backbone = Backbone(stages, channel_counts)
    initialise_like_torchvision(backbone)
    return backbone
