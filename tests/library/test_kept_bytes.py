"""Bytes kept for backward: z and one bit an output element, counted layer by layer, and a whole backbone against the sum."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import svf_fast
from svf_fast import SVFConv2d, SVFLinear
from svf_fast.memory import kept_bytes, peak_bytes
from svf_fast.reference import NaiveSVFConv2d, convert_naive
from svf_fast.train.backbones import BackboneConfig, build_backbone

ITEM = {torch.float32: 4, torch.bfloat16: 2, torch.float64: 8}


def bits(elements: int) -> int:
    return -(-elements // 8)


def make_layer(save: str, dtype: torch.dtype) -> SVFConv2d:
    return SVFConv2d.from_conv(nn.Conv2d(12, 8, 3, stride=2, padding=1, dtype=dtype), save=save)


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", ITEM, ids=str)
@pytest.mark.parametrize("save", ["exact", "int8", "recompute"])
def test_one_layer_keeps_z_and_bits(save: str, dtype: torch.dtype, activation: str | None, needs_dx: bool) -> None:
    layer = make_layer(save, dtype)
    x = torch.randn(3, 12, 15, 13, dtype=dtype, requires_grad=needs_dx)
    residual = torch.randn(3, 8, 8, 7, dtype=dtype, requires_grad=True)
    pixels = 3 * 8 * 7
    z = {"exact": 8 * pixels * ITEM[dtype], "int8": 8 * pixels + 8 * 4, "recompute": 0}[save]
    mask = bits(8 * pixels) if activation else 0
    kept = kept_bytes(lambda: layer(x, residual=residual, activation=activation), owned=[*layer.parameters(), x])
    assert kept == z + mask


def test_recompute_keeps_the_input_by_reference_and_nothing_else() -> None:
    layer, x = make_layer("recompute", torch.float32), torch.randn(3, 12, 15, 13)
    assert kept_bytes(lambda: layer(x), owned=layer) == x.nbytes


def test_a_folded_norm_adds_one_scale_a_channel() -> None:
    model = svf_fast.convert(nn.Sequential(nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 12, 9, 9)
    assert kept_bytes(lambda: model(x), owned=[*model.parameters(), x]) == 8 * 162 * 4 + bits(8 * 162) + 8 * 4


def test_nothing_is_kept_for_what_does_not_train() -> None:
    layer, x = make_layer("exact", torch.float32), torch.randn(3, 12, 15, 13)
    layer.s.requires_grad_(False)
    owned: list[Tensor] = [*layer.parameters(), x]
    assert kept_bytes(lambda: layer(x), owned=owned) == 0
    x.requires_grad_()
    assert kept_bytes(lambda: layer(x), owned=owned) == 0
    assert kept_bytes(lambda: layer(x, activation="relu"), owned=owned) == bits(8 * 3 * 8 * 7)
    with torch.no_grad():
        assert kept_bytes(lambda: layer(x), owned=owned) == 0


def test_a_layer_keeps_nothing_of_a_larger_tensor_that_its_input_was_cut_from() -> None:
    layer = make_layer("exact", torch.float32)
    large = torch.randn(3, 50, 15, 13)
    assert kept_bytes(lambda: layer(large[:, :12]), owned=layer) == 8 * 3 * 8 * 7 * 4


def test_under_autocast_z_is_kept_in_its_dtype_and_the_factors_are_not_copied() -> None:
    layer, x = make_layer("exact", torch.float32), torch.randn(3, 12, 15, 13)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_bytes(lambda: layer(x, activation="relu"), owned=[*layer.parameters(), x])
    assert kept == 8 * 168 * 2 + bits(8 * 168)


@pytest.mark.parametrize("save", ["exact", "int8", "recompute"])
def test_linear(save: str) -> None:
    layer, x = SVFLinear.from_linear(nn.Linear(20, 6), save=save), torch.randn(5, 7, 20)
    kept = kept_bytes(lambda: layer(x), owned=[*layer.parameters(), x])
    assert kept == {"exact": 35 * 6 * 4, "int8": 35 * 6 + 6 * 4, "recompute": 0}[save]


def test_algorithm_1_keeps_what_the_design_says() -> None:
    """x, z and t of the three modules."""
    layer, x = NaiveSVFConv2d(nn.Conv2d(12, 8, 1, bias=False)), torch.randn(2, 12, 9, 9, requires_grad=True)
    kept = kept_bytes(lambda: layer(x), owned=layer)
    assert kept == (12 + 8 + 8) * 162 * 4


def narrow_backbone(architecture: Any = "resnet") -> tuple[nn.Module, list[str]]:
    options: dict[str, Any] = {"blocks": (1, 2, 2, 1)} if architecture == "resnet" else {}
    model = build_backbone(BackboneConfig(architecture=architecture, width=8, **options)).eval()
    return model, ["layer2", "layer3", "layer4"]


def stages_after_a_frozen_stem(model: Any, image: Tensor) -> Tensor:
    with torch.no_grad():
        features = model.layer1(model.layer0(image))
    return model.layer4(model.layer3(model.layer2(features)))


def z_and_masks(model: nn.Module, image: Tensor, prefixes: list[str], z_item: int) -> int:
    """The arithmetic: every convolution's R channels at its output size, a bit for every element of a ReLU's output, and
    four bytes a channel for every folded norm; with int8 four bytes a singular value."""
    total = 0

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
            nonlocal total
            if isinstance(module, nn.Conv2d):
                rank = min(module.out_channels, module.weight[0].numel())
                total += rank * out[0, 0].numel() * out.shape[0] * z_item + (4 * rank if z_item == 1 else 0)
            elif isinstance(module, nn.ReLU):
                total += bits(out.numel())
            elif isinstance(module, nn.BatchNorm2d):
                total += 4 * module.num_features

        return hook

    handles = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if name.startswith(tuple(prefixes))
    ]
    with torch.no_grad():
        stages_after_a_frozen_stem(model, image)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("architecture", ["resnet", "vgg16"])
@pytest.mark.parametrize("save", ["exact", "int8"])
def test_a_backbone_keeps_the_sum_of_its_layers(save: str, architecture: Any) -> None:
    original, stages = narrow_backbone(architecture)
    image = torch.randn(1, 3, 65, 73)
    expected = z_and_masks(original, image, stages, 4 if save == "exact" else 1)
    model = svf_fast.convert(original, stages, save=save).train()
    kept = kept_bytes(lambda: stages_after_a_frozen_stem(model, image), owned=model)
    # the max-pools of VGG keep their input and indices, as they do in any network
    pooled = sum(isinstance(m, nn.MaxPool2d) for s in stages for m in model.get_submodule(s).modules())
    if pooled == 0:
        assert kept == expected
    else:
        assert expected <= kept


def test_the_order_of_the_ways_to_train() -> None:
    """recompute < int8 or exact < full fine-tuning < Algorithm 1, in bytes kept."""
    original, stages = narrow_backbone()
    image = torch.randn(1, 3, 97, 97)

    def kept(model: nn.Module) -> int:
        return kept_bytes(lambda: stages_after_a_frozen_stem(model, image), owned=model)

    sizes = {
        save: kept(svf_fast.convert(copy.deepcopy(original), stages, save=save))
        for save in ("exact", "int8", "recompute")
    }
    naive = kept(convert_naive(copy.deepcopy(original), stages))
    full = kept(original)
    assert naive > full > sizes["exact"] > sizes["recompute"]
    assert sizes["exact"] > 3 * sizes["int8"]
    assert naive > 5 * sizes["exact"]
    assert naive > 15 * sizes["int8"]
    assert naive > 8 * sizes["recompute"]


def test_recompute_keeps_the_first_z_of_a_block_and_its_last_mask() -> None:
    original, _ = narrow_backbone()
    block: Any = svf_fast.convert(copy.deepcopy(original.get_submodule("layer2.1")), save="recompute")
    x = torch.randn(2, 64, 9, 11, requires_grad=True)
    pixels = 2 * 9 * 11
    kept = kept_bytes(lambda: block(x), owned=[*block.parameters(), x])
    # scales and shifts of three norms: 16, 16 and 64 channels
    assert kept == 16 * pixels * 4 + bits(64 * pixels) + 2 * 4 * (16 + 16 + 64)


def test_the_summary_counts_the_same() -> None:
    """Large weights over a small picture: a count that takes parameters for activations shows."""
    model = svf_fast.convert(nn.Sequential(nn.Conv2d(64, 512, 3, padding=1), nn.BatchNorm2d(512), nn.ReLU()))
    image = torch.randn(1, 64, 12, 12)
    kept = kept_bytes(lambda: model(image), owned=[*model.parameters(), *model.buffers(), image])
    assert kept == 512 * 144 * 4 + bits(512 * 144) + 512 * 4
    assert f": {kept / 2**20:.1f} MiB" in svf_fast.summary(model, (1, 64, 12, 12))


def test_the_meta_device_counts_the_same() -> None:
    original, stages = narrow_backbone()
    model = svf_fast.convert(original, stages)
    image = torch.randn(1, 3, 65, 73)
    expected = kept_bytes(lambda: stages_after_a_frozen_stem(model, image), owned=model)
    meta = copy.deepcopy(model).to("meta")
    assert kept_bytes(lambda: stages_after_a_frozen_stem(meta, image.to("meta")), owned=meta) == expected


def test_kept_bytes_counts_each_storage_once_and_in_full() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert kept_bytes(lambda: x[:10] * x[:10] + x[5:15] * x[:10]) == 4000
    assert kept_bytes(lambda: x * x, owned=[x]) == 0
    assert kept_bytes(lambda: x.exp()) == 4000


def test_peak_bytes_sees_what_is_freed_again() -> None:
    def function() -> Tensor:
        large = torch.ones(250_000)
        return large.sum()

    assert 1_000_000 <= peak_bytes(function) < 1_100_000
