"""ResNet-50 and VGG-16 converted: unchanged to 1e-5, wholly fused, and merged back to the original keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from error_ratio import error_ratio
from networks import notes, picture, settle
from torch import nn

import svf_fast
from svf_fast.train.backbones import BackboneConfig, build_backbone

BACKBONES = {
    "resnet50": BackboneConfig(),
    "resnet50 v1": BackboneConfig(stem="plain", stride_on="conv1", depth=3, bn_eps=1.001e-5),
    "vgg16": BackboneConfig(architecture="vgg16"),
}


@pytest.fixture(scope="module", params=list(BACKBONES))
def backbone(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A full-size backbone with settled statistics, and its conversion."""
    torch.set_num_threads(1)
    original = build_backbone(BACKBONES[request.param])
    generator = torch.Generator().manual_seed(0)
    original.eval()
    with torch.no_grad():
        # random statistics near those of a trained network: its float32 rounding must not grow from layer to layer
        for name, module in original.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))  # type: ignore[union-attr]
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)  # type: ignore[union-attr]
                module.weight.fill_(0.25 if name.endswith("bn3") else 1.0)
    stages = [f"layer{n}" for n in (2, 3, 4) if hasattr(original, f"layer{n}")]
    return original, svf_fast.convert(copy.deepcopy(original), stages)


@pytest.mark.slow
def test_a_backbone_is_unchanged(backbone: tuple[nn.Module, nn.Module]) -> None:
    original, converted = backbone
    x = torch.randn(1, 3, 65, 65, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(x)
        assert error_ratio(converted(x), expected) < 1e-5
    assert error_ratio(converted(x), expected) < 1e-5
    assert error_ratio(converted(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


@pytest.mark.slow
def test_every_converted_layer_of_a_backbone_fused(backbone: tuple[nn.Module, nn.Module]) -> None:
    assert all(note.startswith("fused: conv → norm") for note in notes(backbone[1]).values())


@pytest.mark.slow
def test_merging_a_backbone_gives_its_state_back(backbone: tuple[nn.Module, nn.Module]) -> None:
    original, converted = backbone
    merged = svf_fast.merge(copy.deepcopy(converted)).state_dict()
    assert list(merged) == list(original.state_dict())
    for key, value in original.state_dict().items():
        assert error_ratio(merged[key], value) < 1e-6, key


@pytest.mark.parametrize("save", ["exact", "recompute"])
@pytest.mark.parametrize("architecture", ["resnet", "vgg16"])
def test_a_narrow_backbone_is_unchanged(architecture: Any, save: str) -> None:
    options: dict[str, Any] = {"blocks": (1, 2, 1, 1)} if architecture == "resnet" else {}
    original = settle(build_backbone(BackboneConfig(architecture=architecture, width=4, **options)))
    converted = svf_fast.convert(copy.deepcopy(original), save=save)
    x = picture(1, 3, 33, 41)
    assert error_ratio(converted(x), original(x)) < 1e-10
    assert list(svf_fast.merge(converted).state_dict()) == list(original.state_dict())
