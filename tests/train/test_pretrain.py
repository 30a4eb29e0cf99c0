"""What pre-training promises: weights in the backbone's layout, from base classes alone, the same again, in good order."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.data.shapes5i import generate
from svf_fast.train.pretrain import PretrainConfig, Pretrained, pretrain

CLASSES = (8, 10, 16)
BACKBONE = BackboneConfig(stem="plain", dilation="torchvision", width=4, blocks=(1, 1, 1, 1))
CONFIG = PretrainConfig(steps=3, batch=4, crop=32, seed=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("data") / "shapes5i", seed=3, images=120, size=96)


def _pretrain(root: Path, config: PretrainConfig = CONFIG, **options: object) -> Pretrained:
    return pretrain(root, root / "lists" / "fold0_train.txt", CLASSES, BACKBONE, config, **options)


def test_weights_load_into_the_backbone_as_they_are(root: Path) -> None:
    done = _pretrain(root)
    backbone = build_backbone(BACKBONE, seed=0)
    backbone.load_state_dict(done.backbone)
    assert all(torch.isfinite(tensor).all() for tensor in done.backbone.values())
    assert done.crops > done.held_out_crops > 0
    assert 0.0 <= done.held_out_accuracy <= 1.0


def test_the_same_seed_gives_the_same_weights_and_another_one_others(root: Path) -> None:
    first, second, other = _pretrain(root), _pretrain(root), _pretrain(root, replace(CONFIG, seed=6))
    assert all(torch.equal(first.backbone[key], second.backbone[key]) for key in first.backbone)
    assert not torch.equal(first.backbone["layer0.0.weight"], other.backbone["layer0.0.weight"])


def test_the_callers_random_numbers_are_left_alone(root: Path) -> None:
    before = torch.random.get_rng_state()
    _pretrain(root)
    assert torch.equal(before, torch.random.get_rng_state())


def test_batch_norm_statistics_are_those_of_the_final_weights(root: Path) -> None:
    """Plain means over sixteen fresh batches, not the moving averages of training."""
    backbone = build_backbone(BACKBONE, seed=0)
    backbone.load_state_dict(_pretrain(root).backbone)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 16 for norm in norms)
    assert all(float(norm.get_buffer("running_var").std()) > 0 for norm in norms)


def test_the_loss_falls(root: Path) -> None:
    losses: list[float] = []
    steps = replace(CONFIG, steps=60, batch=8)
    done = _pretrain(root, steps, on_step=lambda step, total, loss: losses.append(loss))
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert done.final_loss < losses[0]


def test_a_class_without_pictures_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match="no object crop to train on for class id 2;"):
        pretrain(root, root / "lists" / "fold0_train.txt", (2, 8), BACKBONE, CONFIG)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("batch", 1), ("crop", 8)])
def test_impossible_settings_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: found {value}"):
        PretrainConfig(**{name: value})
