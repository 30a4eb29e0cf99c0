"""Small few-shot methods and episodes for tests: random weights, few channels, every head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_fast.train.backbones import Backbone, BackboneConfig, build_backbone
from svf_fast.train.methods import BAM, MetaLearner, build_method
from svf_fast.train.methods.bam import BAMOutputs

BASE_CLASSES = 5
BACKBONES = {
    "resnet": BackboneConfig(width=4, blocks=(1, 2, 1, 1)),
    "resnet to layer 3": BackboneConfig(stem="plain", stride_on="conv1", width=4, blocks=(1, 1, 2), depth=3),
    "vgg": BackboneConfig(architecture="vgg16", width=4),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "baseline": {"aspp_dilations": (1, 2, 3)},
    "pfenet": {"bins": (7, 0.8, 2)},
    "bam": {"aspp_dilations": (1, 2, 3), "base_classes": BASE_CLASSES},
}


class Batch(NamedTuple):
    """What a method's losses ask of a training batch."""

    query_images: Tensor
    query_labels: Tensor
    support_images: Tensor
    support_labels: Tensor
    base_labels: Tensor | None
    categories: Tensor | None

    @property
    def episode(self) -> tuple[Tensor, Tensor, Tensor]:
        """``forward``'s arguments."""
        return self.query_images, self.support_images, self.support_labels


class InDouble(BAM):
    """Takes float32 pictures and rounds so little that a batch changes no prediction; to be made ``double()``."""

    def outputs(
        self, query_image: Tensor, support_images: Tensor, support_labels: Tensor, *, categories: Tensor | None = None
    ) -> BAMOutputs:
        return super().outputs(query_image.double(), support_images.double(), support_labels, categories=categories)


def narrow_backbone(name: str = "resnet") -> Backbone:
    return build_backbone(BACKBONES[name], seed=1)


def narrow(method: str = "baseline", backbone: str = "resnet", *, shots: int = 2, **options: Any) -> MetaLearner:
    """The method with eight channels in its head, for ``shots`` supports."""
    if method == "bam":
        options["shots"] = shots
    options = {"head_width": 8, "prior_layer": f"layer{BACKBONES[backbone].depth}", **OPTIONS[method], **options}
    return build_method(method, narrow_backbone(backbone), seed=2, **options)


def batch(episodes: int = 2, shots: int = 2, size: int = 33, dtype: torch.dtype = torch.float32) -> Batch:
    """Noise; of every label the top is background, a square the episode's class, the bottom void."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(episodes, 1 + shots, 3, size, size, dtype=dtype, generator=generator)
    labels = torch.randint(0, 2, (episodes, 1 + shots, 1, 1), generator=generator).expand(-1, -1, size, size).clone()
    labels[:, :, size // 4 : 3 * size // 4, size // 3 : size - 4] = 1
    labels[:, :, : size // 6] = 0
    labels[:, :, -3:] = 255
    base_labels = torch.randint(0, BASE_CLASSES + 1, (episodes, size, size), generator=generator)
    base_labels[:, -3:] = 255
    # copies: bytes kept are counted by storage
    return Batch(
        query_images=images[:, 0].clone(),
        query_labels=labels[:, 0].clone(),
        support_images=images[:, 1:].clone(),
        support_labels=labels[:, 1:].clone(),
        base_labels=base_labels,
        categories=torch.arange(episodes) % BASE_CLASSES,
    )
