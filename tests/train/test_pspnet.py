"""BAM's base learner: published keys, every layout of its checkpoints, and training of the whole."""

import re

import pytest
import torch
from method_cases import BACKBONES, BASE_CLASSES, narrow_backbone
from torch import nn
from torch.nn import functional as F

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import PSPNet
from svf_fast.train.methods.pspnet import load_base_learner


def narrow_base_learner(backbone: str = "resnet", seed: int = 2) -> PSPNet:
    return PSPNet(narrow_backbone(backbone), classes=BASE_CLASSES, seed=seed)


def images(size: int = 33) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("architecture", "channels"), [("resnet", 2048), ("vgg16", 512)])
def test_head_entries_are_the_published_ones_in_their_order(architecture, channels):
    with torch.device("meta"):
        learner = PSPNet(build_backbone(BackboneConfig(architecture=architecture)), classes=60)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    entries = {}
    for n in range(4):
        entries[f"ppm.features.{n}.1.weight"] = [channels // 4, channels, 1, 1]
        entries |= {f"ppm.features.{n}.2.{entry}": [channels // 4] for entry in norm}
        entries[f"ppm.features.{n}.2.num_batches_tracked"] = []
    entries["cls.0.weight"] = [512, 2 * channels, 3, 3]
    entries |= {f"cls.1.{entry}": [512] for entry in norm}
    entries["cls.1.num_batches_tracked"] = []
    entries["cls.4.weight"] = [61, 512, 1, 1]
    entries["cls.4.bias"] = [61]
    head = {key: list(t.shape) for key, t in learner.state_dict().items() if not key.startswith("layer")}
    assert head == entries
    assert list(head) == list(entries)
    assert len(learner.state_dict()) == {"resnet": 330 + 32, "vgg16": 91 + 32}[architecture]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_whole_learns(backbone):
    learner = narrow_base_learner(backbone).train()
    label = torch.randint(0, BASE_CLASSES + 1, (2, 41, 41), generator=torch.Generator().manual_seed(4))
    label[:, -3:] = 255
    losses = learner.losses(images(41), label)
    losses.total.backward()
    assert list(losses.parts) == ["main"]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learner.parameters())
    tracked = {int(count) for key, count in learner.named_buffers() if key.endswith("num_batches_tracked")}
    assert tracked == {1}
    assert learner(images(50)).shape == (2, BASE_CLASSES + 1, 50, 50)


def test_the_classifier_sees_the_features_and_their_means_over_fields():
    learner = narrow_base_learner().double().eval()
    features = images().double()
    for stage in learner.stages:
        features = learner.get_submodule(stage)(features)
    parts = [features]
    for side, scale in zip((1, 2, 3, 6), learner.ppm.features, strict=True):
        pooled = scale[2](scale[1](F.adaptive_avg_pool2d(features, side)))
        parts.append(F.interpolate(pooled.relu(), size=features.shape[-2:], mode="bilinear", align_corners=True))
    convolution, norm, _, _, decide = learner.cls
    expected = decide(norm(convolution(torch.cat(parts, dim=1))).relu())
    torch.testing.assert_close(learner.segment(images().double()), expected)


def published(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The state in one of the layouts of BAM's code."""
    aliases = {f"encoder.{key.removeprefix('layer')}": t for key, t in state.items() if key.startswith("layer")}
    if layout == "both":
        state = {**state, **aliases}
    elif layout == "encoder alone":
        state = {**aliases, **{key: t for key, t in state.items() if not key.startswith("layer")}}
    return {f"module.{key}": tensor for key, tensor in state.items()} if layout != "ours" else state


@pytest.mark.parametrize("layout", ["ours", "both", "encoder alone"])
@pytest.mark.parametrize("as_file", [True, False])
def test_checkpoints_of_any_layout_fill_it(layout, as_file, tmp_path):
    source = narrow_base_learner(seed=5)
    nn.init.normal_(source.get_parameter("layer4.0.conv2.weight"))
    state = published(source.state_dict(), layout)
    if as_file:
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "base.pth")
    filled = narrow_base_learner()
    load_base_learner(filled, tmp_path / "base.pth" if as_file else state)
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in filled.state_dict().items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("cls.4.bias"), "missing: cls.4.bias"),
        (lambda s: s.pop("layer3.0.conv1.weight"), "missing: layer3.0.conv1.weight"),
        (lambda s: s.update({"head.weight": torch.ones(1)}), "superfluous: head.weight"),
        (lambda s: s.update({"cls.4.bias": torch.ones(3)}), "of another shape: cls.4.bias [3], expected [6]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_gets_a_sentence_and_changes_nothing(change, sentence):
    learner = narrow_base_learner()
    before = {key: tensor.clone() for key, tensor in learner.state_dict().items()}
    state = narrow_base_learner(seed=5).state_dict()
    change(state)
    with pytest.raises(
        ValueError, match=f"^weights in the state dict do not fit the base learner; {re.escape(sentence)}"
    ):
        load_base_learner(learner, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in learner.state_dict().items())


def test_no_classes_get_a_sentence():
    with pytest.raises(ValueError, match=r"^classes is 0, expected the number of base classes, at least 1$"):
        PSPNet(narrow_backbone(), classes=0)
