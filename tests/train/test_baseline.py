"""The SVF paper's baseline: published keys, any backbone and size, the same results however memory is saved."""

import re

import pytest
import torch
from torch import Tensor, nn

from svf_fast.memory import kept_bytes
from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import Baseline, build_method
from svf_fast.train.methods.layers import ConcatConvReLU, masked_average, segmentation_loss
from svf_fast.train.tuning import build_strategy

BACKBONES = {
    "resnet": BackboneConfig(width=4, blocks=(1, 2, 1, 1)),
    "resnet to layer 3": BackboneConfig(stem="plain", stride_on="conv1", width=4, blocks=(1, 1, 2), depth=3),
    "vgg": BackboneConfig(architecture="vgg16", width=4),
}


def narrow(name: str = "resnet", **options) -> Baseline:
    config = BACKBONES[name]
    prior_layer = f"layer{config.depth}"
    options = {"head_width": 8, "aspp_dilations": (1, 2, 3), "prior_layer": prior_layer, **options}
    return Baseline(build_backbone(config, seed=1), seed=2, **options)


def episode(batch: int = 2, shots: int = 2, size: int = 33, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """query image, support images, support labels, query label."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(batch, 1 + shots, 3, size, size, dtype=dtype, generator=generator)
    labels = torch.randint(0, 2, (batch, 1 + shots, 1, 1), generator=generator).expand(-1, -1, size, size).clone()
    labels[:, :, size // 4 : 3 * size // 4, size // 3 : size - 4] = 1
    labels[:, :, : size // 6] = 0
    labels[:, :, -3:] = 255
    # copies: bytes kept are counted by storage
    return images[:, 0].clone(), images[:, 1:].clone(), labels[:, 1:].clone(), labels[:, 0].clone()


@pytest.mark.parametrize(("architecture", "middle"), [("resnet", 1536), ("vgg16", 768)])
def test_head_entries_are_the_published_ones(architecture, middle):
    with torch.device("meta"):
        method = Baseline(build_backbone(BackboneConfig(architecture=architecture)))
    aspp = {
        f"ASPP_meta.layer6_{branch}.0.{entry}": [256, 256, kernel, kernel] if entry == "weight" else [256]
        for branch, kernel in enumerate((1, 1, 3, 3, 3))
        for entry in ("weight", "bias")
    }
    assert {name: list(parameter.shape) for name, parameter in method.head_parameters()} == {
        "down_query.0.weight": [256, middle, 1, 1],
        "down_supp.0.weight": [256, middle, 1, 1],
        "init_merge.0.weight": [256, 513, 1, 1],
        **aspp,
        "res1_meta.0.weight": [256, 1280, 1, 1],
        "res2_meta.0.weight": [256, 256, 3, 3],
        "res2_meta.2.weight": [256, 256, 3, 3],
        "cls_meta.0.weight": [256, 256, 3, 3],
        "cls_meta.3.weight": [2, 256, 1, 1],
        "cls_meta.3.bias": [2],
    }
    assert len(method.state_dict()) == {"resnet": 349, "vgg16": 110}[architecture]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("batch", "shots", "size"), [(1, 1, 33), (2, 3, 50), (3, 1, 41)])
def test_logits_have_the_input_size(name, batch, shots, size):
    method = narrow(name).train()
    query_image, support_images, support_labels, query_label = episode(batch, shots, size)
    logits = method(query_image, support_images, support_labels)
    assert logits.shape == (batch, 2, size, size)
    loss = method.loss(logits, query_label)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in method.named_parameters())


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("strategy", ["freeze", "full", "svf"])
@pytest.mark.parametrize("recompute", ["supports", "stages"])
def test_recomputing_changes_neither_loss_nor_gradients(name, strategy, recompute):
    method = narrow(name).double()
    build_strategy(strategy).apply(method)
    method.train()
    results = {}
    for mode in ("none", recompute):
        method.recompute = mode
        method.zero_grad()
        loss = dropped_out_loss(method, seed=11)
        loss.backward()
        trained = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
        results[mode] = {"loss": loss.detach(), **trained}
    for key, expected in results["none"].items():
        torch.testing.assert_close(results[recompute][key], expected, rtol=1e-9, atol=1e-12, msg=key)
    with torch.no_grad():
        assert dropped_out_loss(method, seed=12) != results["none"]["loss"], "dropout was not active"


def dropped_out_loss(method: Baseline, seed: int) -> Tensor:
    query_image, support_images, support_labels, query_label = episode(shots=3, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return method.loss(method(query_image, support_images, support_labels), query_label)


@pytest.mark.parametrize("strategy", ["full", "svf"])
def test_recomputed_supports_keep_their_pictures_only(strategy):
    method = narrow()
    build_strategy(strategy).apply(method)
    method.train()
    kept = {}
    for recompute in ("none", "supports", "stages"):
        method.recompute = recompute
        kept[recompute] = [kept_by(method, shots) for shots in (1, 3)]
    picture_and_mask = 4 * 65 * 65 * 4
    feature_map = 9 * 9 * 4
    added_by_two_shots = kept["supports"][1] - kept["supports"][0]
    # besides them a prototype, a prior and what combines the shots
    assert added_by_two_shots <= 2 * picture_and_mask + 20 * feature_map
    assert kept["stages"][1] < kept["supports"][1] < kept["none"][1]


def kept_by(method: Baseline, shots: int) -> int:
    query_image, support_images, support_labels, query_label = episode(batch=1, shots=shots, size=65)
    return kept_bytes(
        lambda: method.loss(method(query_image, support_images, support_labels), query_label), owned=method
    )


def test_a_frozen_backbone_has_no_graph():
    method = narrow()
    build_strategy("freeze").apply(method)
    query_image, support_images, support_labels, _ = episode()
    query = method.query_features(query_image)
    assert not any(features.requires_grad for features in query)
    shots = method.support_shots(support_images, support_labels, query)
    assert not shots.priors.requires_grad
    assert shots.prototypes.requires_grad


def test_stem_and_layer1_have_no_graph_when_layers_2_to_4_train():
    method = narrow()
    build_strategy("full").apply(method)
    layer1 = method.layer1(method.layer0(episode()[0]))
    assert not layer1.requires_grad


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_layer4_learns_through_the_prior_alone(name):
    method = narrow(name).double().eval()
    build_strategy("full").apply(method)
    query_image, support_images, support_labels, _ = episode(dtype=torch.float64)
    segmentation = method.segment(query_image, support_images, support_labels)
    layer4 = [p for p in method.layer4.parameters() if p.requires_grad]
    (through_prior,) = torch.autograd.grad(segmentation.prior.square().sum(), layer4[:1], retain_graph=True)
    assert through_prior.abs().max() > 0
    others = segmentation.prototype.sum() + segmentation.query.sum()
    assert torch.autograd.grad(others, layer4[:1], allow_unused=True) == (None,)


def test_both_forms_of_the_prior_give_the_same_loss():
    losses = [dropped_out_loss(narrow(cosine=cosine).double(), seed=11) for cosine in ("streaming", "matrix")]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)


def test_shots_are_averaged_or_summed():
    images = episode(shots=1)
    three_times = (images[0], images[1].expand(-1, 3, -1, -1, -1), images[2].expand(-1, 3, -1, -1))
    once = narrow().eval().segment(*images[:3])
    for reduction, factor in (("mean", 1.0), ("sum", 3.0)):
        combined = narrow(shot_reduction=reduction).eval().segment(*three_times)
        torch.testing.assert_close(combined.prior, factor * once.prior)
        torch.testing.assert_close(combined.prototype, factor * once.prototype)


def test_each_query_meets_its_own_supports():
    method = narrow().double().eval()
    query_image, support_images, support_labels, _ = episode(batch=3, shots=2, dtype=torch.float64)
    together = method(query_image, support_images, support_labels)
    for b in range(3):
        one = slice(b, b + 1)
        alone = method(query_image[one], support_images[one].flip(1), support_labels[one].flip(1))
        torch.testing.assert_close(together[one], alone)


def test_batch_norm_stays_on_its_running_statistics():
    method = narrow().train()
    before = {key: tensor.clone() for key, tensor in method.state_dict().items() if "running" in key}
    method(*episode()[:3])
    assert method.cls_meta.training
    assert all(torch.equal(method.state_dict()[key], tensor) for key, tensor in before.items())


def test_a_layer_above_the_priors_is_left_out():
    method = narrow(prior_layer="layer3")
    assert method.stages == ("layer0", "layer1", "layer2", "layer3")
    assert not any(key.startswith("layer4") for key in method.state_dict())


def test_void_pixels_do_not_count_in_the_loss():
    logits = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    label = torch.ones(1, 4, 4, dtype=torch.int64)
    label[:, :2] = 255
    torch.testing.assert_close(segmentation_loss(logits, label), segmentation_loss(logits[:, :, 2:], label[:, 2:]))


def test_a_convolution_of_parts_is_that_of_their_concatenation():
    layer = ConcatConvReLU(3 + 2 + 1, 5).double()
    generator = torch.Generator().manual_seed(1)
    maps, vector, single = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((2, 3, 4, 6), (2, 2, 1, 1), (2, 1, 4, 6))
    )
    concatenated = torch.cat([maps, vector.expand(-1, -1, 4, 6), single], dim=1)
    torch.testing.assert_close(layer(maps, vector, single), nn.Sequential(*layer)(concatenated))


def test_an_empty_support_mask_gives_a_zero_prototype():
    assert torch.equal(masked_average(torch.ones(1, 2, 3, 3), torch.zeros(1, 1, 3, 3)), torch.zeros(1, 2, 1, 1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prior_layer": "layer2"}, "prior_layer is 'layer2', expected one of 'layer4', 'layer3'"),
        ({"shot_reduction": "max"}, "shot_reduction is 'max', expected one of 'mean', 'sum'"),
        ({"recompute": "all"}, "recompute is 'all', expected one of 'none', 'supports', 'stages'"),
        ({"bins": (60, 30)}, "method 'baseline' has no option 'bins'; it has head_width, aspp_dilations,"),
    ],
)
def test_wrong_options_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        build_method("baseline", build_backbone(BACKBONES["resnet"]), **options)


def test_unknown_methods_get_a_sentence():
    with pytest.raises(ValueError, match=r"^method is 'hsnet', expected one of baseline$"):
        build_method("hsnet", build_backbone(BACKBONES["resnet"]))


def test_a_prior_from_a_layer_that_is_not_there_gets_a_sentence():
    with pytest.raises(ValueError, match=r"^prior_layer is 'layer4', but the backbone ends with layer3$"):
        Baseline(build_backbone(BACKBONES["resnet to layer 3"]))


def test_supports_of_another_shape_get_a_sentence():
    query_image, support_images, support_labels, _ = episode(batch=2)
    method = narrow()
    with pytest.raises(ValueError, match=r"^support_images is \[1, 2, 3, 33, 33\], expected \[2, K, 3, S, S\]"):
        method(query_image, support_images[:1], support_labels)
    with pytest.raises(ValueError, match=r"^support_labels is \[2, 1, 33, 33\], expected \[2, 2, 33, 33\]"):
        method(query_image, support_images, support_labels[:, :1])
