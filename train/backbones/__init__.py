"""Backbones that few-shot methods stand on: what can be built, and from which options. Knows no method, no dataset."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from svf_fast.train.backbones.base import STAGES, Backbone
from svf_fast.train.backbones.resnet import Dilation, Stem, StrideOn, resnet
from svf_fast.train.backbones.vgg import vgg16
from svf_fast.train.backbones.weights import load_backbone_weights
from svf_fast.train.seeding import seeded_initialisation

__all__ = ["STAGES", "Backbone", "BackboneConfig", "build_backbone", "load_backbone_weights"]

Architecture = Literal["resnet", "vgg16"]
RESNET_ONLY = ("stem", "dilation", "stride_on", "blocks")


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone to build. The defaults are the ResNet-50 with a deep stem of PFENet, BAM and the SVF paper.

    ``blocks`` and ``width`` make it deeper or narrower (width 64 is the full size); ``depth`` is the number of the
    last stage. ``stem``, ``dilation``, ``stride_on`` and ``blocks`` belong to ResNets only. ValueError on anything
    else.
    """

    architecture: Architecture = "resnet"
    stem: Stem = "deep"
    dilation: Dilation = "uniform"
    stride_on: StrideOn = "conv2"
    bn_eps: float = 1e-5
    depth: int = 4
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # configuration files hold lists
        for name, choices in (
            ("architecture", get_args(Architecture)),
            ("stem", get_args(Stem)),
            ("dilation", get_args(Dilation)),
            ("stride_on", get_args(StrideOn)),
            ("depth", (3, 4)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
        if not self.bn_eps > 0:
            raise ValueError(f"bn_eps is {self.bn_eps!r}, expected a number above 0")
        if not (isinstance(self.width, int) and self.width > 0):
            raise ValueError(f"width is {self.width!r}, expected a whole number above 0")
        if len(self.blocks) < self.depth or not all(isinstance(count, int) and count > 0 for count in self.blocks):
            raise ValueError(f"blocks is {self.blocks!r}, expected at least {self.depth} whole numbers above 0")
        if self.architecture == "vgg16":
            for field in fields(self):
                if field.name in RESNET_ONLY and getattr(self, field.name) != field.default:
                    raise ValueError(f"{field.name} is an option of ResNets, but architecture is 'vgg16': leave it out")


def build_backbone(config: BackboneConfig, *, seed: int = 0) -> Backbone:
    """The backbone that ``config`` describes, in float32, with random weights that depend on ``seed`` only."""
    with seeded_initialisation(seed):
        if config.architecture == "vgg16":
            return vgg16(bn_eps=config.bn_eps, depth=config.depth, width=config.width)
        return resnet(
            stem=config.stem,
            dilation=config.dilation,
            stride_on=config.stride_on,
            bn_eps=config.bn_eps,
            depth=config.depth,
            blocks=config.blocks,
            width=config.width,
        )
