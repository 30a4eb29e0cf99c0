"""Tiny methods, an episode, and every tuning strategy as a row of the paper's tables has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from svf_fast.bench.trainable import ROWS
from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import MetaLearner, build_method
from svf_fast.train.tuning import Strategy, build_strategy

RESNET = BackboneConfig(width=4, blocks=(1, 2, 1, 1))
VGG = BackboneConfig(architecture="vgg16", width=4)
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "pfenet": {"bins": (1.0, 0.5)},
    "bam": {"base_classes": 3, "shots": 1},
}
BASE_CLASSES = 3


class Case(NamedTuple):
    """A strategy by name and options."""

    name: str
    options: dict[str, Any]

    def __str__(self) -> str:
        values = {key: "+".join(value) if isinstance(value, tuple) else value for key, value in self.options.items()}
        return " ".join([self.name, *(f"{key}={value}" for key, value in values.items())])

    def build(self) -> Strategy:
        return build_strategy(self.name, **self.options)


CASES = [Case(*case) for case in {str(row[2:]): row[2:] for row in ROWS}.values()]
# VGG-16 has no 1x1 convolution
PAIRS = [
    pytest.param(case, config, id=f"{case} {config.architecture}")
    for config in (RESNET, VGG)
    for case in CASES
    if config is RESNET or "1x1" not in str(case)
]


class Batch(NamedTuple):
    query_images: Tensor
    query_labels: Tensor
    support_images: Tensor
    support_labels: Tensor
    base_labels: Tensor
    categories: Tensor


def tiny_method(name: str = "baseline", config: BackboneConfig = RESNET, **options: Any) -> MetaLearner:
    """With BatchNorms that are not the identity."""
    backbone = build_backbone(config)
    generator = torch.Generator().manual_seed(11)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.6, 1.4),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.6, 1.4),
            ):
                assert tensor is not None
                with torch.no_grad():
                    tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            with torch.no_grad():
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
    prior_layer = "layer4" if config.depth == 4 else "layer3"
    return build_method(name, backbone, head_width=8, prior_layer=prior_layer, **METHOD_OPTIONS[name], **options)


def batch(dtype: torch.dtype = torch.float32) -> Batch:
    """Two episodes of one shot."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(2, 2, 3, 33, 33, generator=generator).to(dtype)
    labels = torch.zeros(2, 2, 33, 33, dtype=torch.int64)
    labels[:, :, 8:25, 6:20] = 1
    base_labels = torch.randint(0, BASE_CLASSES + 1, (2, 33, 33), generator=generator)
    return Batch(images[:, 0], labels[:, 0], images[:, 1:], labels[:, 1:], base_labels, torch.tensor([0, 2]))


def logits(method: MetaLearner, episodes: Batch) -> Tensor:
    return method(episodes.query_images, episodes.support_images, episodes.support_labels)


def stages_of(case: Case) -> tuple[str, ...]:
    return getattr(case.build(), "stages", ())
