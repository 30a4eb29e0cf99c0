"""The SVF paper's baseline: published keys and how it combines shots; and the layers that heads share."""

import pytest
import torch
from method_cases import batch, narrow
from torch import nn

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import Baseline
from svf_fast.train.methods.layers import ConcatConvReLU, masked_average, resize
from svf_fast.train.methods.losses import segmentation_loss
from svf_fast.train.tuning import build_strategy


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


def test_shots_are_averaged_or_summed():
    query_image, support_images, support_labels = batch(shots=1).episode
    three_times = query_image, support_images.expand(-1, 3, -1, -1, -1), support_labels.expand(-1, 3, -1, -1)
    once = narrow().eval().segment(query_image, support_images, support_labels)
    for reduction, factor in (("mean", 1.0), ("sum", 3.0)):
        combined = narrow(shot_reduction=reduction).eval().segment(*three_times)
        torch.testing.assert_close(combined.prior, factor * once.prior)
        torch.testing.assert_close(combined.prototype, factor * once.prototype)


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


@pytest.mark.parametrize("size", [(5, 5), (9, 7), (2, 3)])
def test_a_convolution_of_resized_parts_is_that_of_their_concatenation(size):
    layer = ConcatConvReLU(3 + 2, 5).double()
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(2, c, s, s, dtype=torch.float64, generator=generator) for c, s in ((3, 5), (2, 3))]
    concatenated = torch.cat([resize(part, size) for part in parts], dim=1)
    torch.testing.assert_close(layer(*parts, size=size), nn.Sequential(*layer)(concatenated))


def test_an_empty_support_mask_gives_a_zero_prototype():
    assert torch.equal(masked_average(torch.ones(1, 2, 3, 3), torch.zeros(1, 1, 3, 3)), torch.zeros(1, 2, 1, 1))


def test_down_query_may_stay_at_its_start_as_in_the_released_code():
    method = narrow("baseline", train_down_query=False)
    build_strategy("freeze").apply(method)
    assert not any(name.startswith("down_query") for name, _ in method.head_parameters())
    assert not any(parameter.requires_grad for parameter in method.down_query.parameters())
    method.losses(batch()).total.backward()
    assert all(parameter.grad is None for parameter in method.down_query.parameters())
