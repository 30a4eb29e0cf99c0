"""Tuning strategies train exactly what they say, and start from the same network."""

import re

import pytest
import torch

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import Baseline
from svf_fast.train.tuning import STRATEGIES, build_strategy, trainable_counts

NARROW = BackboneConfig(width=4, blocks=(1, 2, 1, 1))


def narrow_method(config: BackboneConfig = NARROW) -> Baseline:
    prior_layer = "layer4" if config.depth == 4 else "layer3"
    return Baseline(build_backbone(config), head_width=8, prior_layer=prior_layer)


def episode() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(2, 3, 3, 33, 33, generator=generator)
    labels = torch.zeros(2, 2, 33, 33, dtype=torch.int64)
    labels[:, :, 8:25, 6:20] = 1
    return images[:, 0], images[:, 1:], labels


def head_names(method: Baseline) -> set[str]:
    return {name for name, _ in method.named_parameters() if not name.startswith("layer")}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_head_always_trains_and_groups_cover_all_that_trains(name):
    method = narrow_method()
    strategy = build_strategy(name)
    strategy.apply(method)
    groups = strategy.parameter_groups(method, backbone_lr_scale=0.1)
    trainable = {id(p) for p in method.parameters() if p.requires_grad}
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert len(in_groups) == len(set(in_groups))
    assert set(in_groups) == trainable
    parameters = dict(method.named_parameters())
    assert {id(p) for p in groups[0]["params"]} == {id(parameters[name]) for name in head_names(method)}
    assert [(group["name"], group["lr_scale"]) for group in groups] == [("head", 1.0), ("backbone", 0.1)][: len(groups)]
    assert len(groups) == (1 if name == "freeze" else 2)


def test_full_trains_the_convolutions_of_layers_2_to_4():
    method = narrow_method()
    build_strategy("full").apply(method)
    trained = {name for name, p in method.named_parameters() if p.requires_grad} - head_names(method)
    expected = {
        name
        for name, p in method.named_parameters()
        if p.dim() == 4 and name.startswith(("layer2", "layer3", "layer4"))
    }
    assert trained == expected


@pytest.mark.parametrize("depth", [3, 4])
def test_svf_trains_singular_values_of_the_stages_that_are_there(depth):
    method = narrow_method(BackboneConfig(width=4, blocks=(1, 2, 1, 1), depth=depth))
    ranks = sum(
        min(p.shape[0], p[0].numel())
        for name, p in method.named_parameters()
        if p.dim() == 4 and name.startswith(("layer2", "layer3", "layer4"))
    )
    build_strategy("svf").apply(method)
    assert trainable_counts(method)["backbone"] == ranks
    assert all(p.dim() == 1 for name, p in method.named_parameters() if p.requires_grad and name.startswith("layer"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_network_at_step_0_is_the_same(name):
    method = narrow_method().double().eval()
    inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in episode()]
    before = method(*inputs)
    build_strategy(name).apply(method)
    torch.testing.assert_close(method(*inputs), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_step_moves_all_that_trains_and_nothing_else(name):
    method = narrow_method()
    strategy = build_strategy(name)
    strategy.apply(method)
    method.train()
    before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    trainable = {key for key, p in method.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(
        [
            {**group, "lr": 0.1 * group["lr_scale"]}
            for group in strategy.parameter_groups(method, backbone_lr_scale=0.5)
        ],
        lr=0.1,
        weight_decay=1e-2,
    )
    query_image, support_images, support_labels = episode()
    loss = method.loss(method(query_image, support_images, support_labels), support_labels[:, 0])
    loss.backward()
    optimiser.step()
    moved = {key for key, tensor in method.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == trainable


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (BackboneConfig(), {"freeze": 0, "full": 23_232_512, "svf": 12_544}),
        (BackboneConfig(architecture="vgg16"), {"freeze": 0, "full": 14_454_528, "svf": 3_840}),
    ],
    ids=["resnet50", "vgg16"],
)
def test_trainable_parameters_of_the_published_backbones(config, counts):
    method = Baseline(build_backbone(config))
    for name in ("freeze", "full", "svf"):
        build_strategy(name).apply(method)
        assert trainable_counts(method)["backbone"] == counts[name]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("lora", {}, "tuning strategy is 'lora', expected one of freeze, full, svf"),
        ("freeze", {"save": "int8"}, "tuning strategy 'freeze' has no option 'save'; it has none"),
        ("svf", {"rank": 3}, "tuning strategy 'svf' has no option 'rank'; it has stages, save, fuse"),
    ],
)
def test_wrong_names_and_options_get_a_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        build_strategy(name, **options)
