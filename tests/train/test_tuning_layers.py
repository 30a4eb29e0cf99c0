"""The layers that tuning strategies put into a backbone: the gradients of plain autograd on the composed weight, and less
kept for backward than by PyTorch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tuning_cases import PAIRS, RESNET, VGG, Case, batch, tiny_method

import svf_fast
from svf_fast.memory import kept_bytes
from svf_fast.train.backbones import BackboneConfig
from svf_fast.train.methods import MetaLearner
from svf_fast.train.tuning import base, build_strategy
from svf_fast.train.tuning.expressions import random_rotation
from svf_fast.train.tuning.lean import (
    FixedNorm2d,
    FrozenConv2d,
    Geometry,
    MaskedReLU,
    TiledMaxPool2d,
    keep_less_of_pools,
)

# 1x1 to more channels and to fewer, 3x3 with a stride and dilated
CONVOLUTIONS = ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.conv3", "layer2.0.downsample.0", "layer3.0.conv2"]


def left(weight: Tensor, layer: Any) -> Tensor:
    return layer.s[:, None, None, None] * weight


def right(weight: Tensor, layer: Any) -> Tensor:
    return (weight.flatten(1) * layer.s).view(weight.shape)


def by_factors(weight: Tensor, layer: Any) -> Tensor:
    return (layer.u @ torch.diag(layer.s) @ layer.v.flatten(1)).view(weight.shape)


def by_scaled_factors(weight: Tensor, layer: Any) -> Tensor:
    return (layer.u @ torch.diag(layer.s0 * layer.s) @ layer.v.flatten(1)).view(weight.shape)


@pytest.mark.parametrize(
    ("case", "compose", "trained"),
    [
        (Case("left_scaling", {}), left, "s"),
        (Case("right_scaling", {}), right, "s"),
        (Case("rotated_scaling", {}), by_factors, "s"),
        (Case("svf", {}), by_factors, "s"),
        (Case("svf", {"parametrization": "scale"}), by_scaled_factors, "s"),
        (Case("svf", {"subspaces": ("U", "S", "V")}), by_factors, "usv"),
        (Case("svf", {"subspaces": ("U",)}), by_factors, "u"),
        (Case("svf", {"subspaces": ("V",)}), by_factors, "v"),
        (Case("rotated_svf", {}), by_factors, "s"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize(
    ("config", "names"), [(RESNET, CONVOLUTIONS), (VGG, ["layer2.0", "layer3.3"])], ids=["resnet", "vgg"]
)
def test_gradients_are_those_of_the_composed_weight(
    case: Case, compose: Callable[[Tensor, Any], Tensor], trained: str, config: BackboneConfig, names: list[str]
) -> None:
    plain = tiny_method(config=config).double()
    method = tiny_method(config=config).double()
    case.build().apply(method)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        conv, layer = plain.get_submodule(name), method.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        # away from the start
        with torch.no_grad():
            s = layer.get_parameter("s")
            s.mul_(1 + 0.3 * torch.randn(s.shape, generator=generator, dtype=torch.float64))
        x = torch.randn(2, conv.in_channels, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        geometry = conv.stride, conv.padding, conv.dilation
        expected = F.conv2d(x, compose(conv.weight.detach(), layer), conv.bias, *geometry)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        direction = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        inputs = [x, *(layer.get_parameter(letter) for letter in trained)]
        found = torch.autograd.grad(y, inputs, direction)
        for gradient, wanted in zip(found, torch.autograd.grad(expected, inputs, direction), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-11)


def gradients(case: Case, config: BackboneConfig, **options: Any) -> dict[str, Tensor]:
    """Of one training loss, every trainable parameter's, away from the start."""
    method = tiny_method(config=config, **options).double()
    case.build().apply(method)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    method.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method.losses(batch(torch.float64)).total.backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def leave_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strategies without what `lean` saves."""
    monkeypatch.setattr(base, "keep_less", lambda stage: None)
    monkeypatch.setattr(base, "keep_less_of_pools", lambda stage: None)
    monkeypatch.setattr("svf_fast.train.tuning.singular.keep_less", lambda stage: None)


@pytest.mark.parametrize(("case", "config"), PAIRS)
def test_keeping_less_changes_no_gradient(case: Case, config: BackboneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = gradients(case, config)
    leave_as_it_is(monkeypatch)
    plain = gradients(case, config)
    assert lean.keys() == plain.keys()
    for name, gradient in lean.items():
        torch.testing.assert_close(
            gradient, plain[name], rtol=1e-8, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("recompute", ["supports", "stages"])
@pytest.mark.parametrize("name", ["bn", "bias", "left_scaling", "right_scaling", "rotated_scaling", "adapter"])
def test_rebuilding_changes_no_gradient(name: str, recompute: str) -> None:
    case = Case(name, {})
    kept, rebuilt = gradients(case, RESNET), gradients(case, RESNET, recompute=recompute)
    for key, gradient in kept.items():
        torch.testing.assert_close(rebuilt[key], gradient, rtol=1e-8, atol=1e-12)


def bytes_kept(case: Case) -> int:
    method = tiny_method()
    case.build().apply(method)
    stages = nn.Sequential(*(method.get_submodule(stage) for stage in method.stages))
    return kept_bytes(lambda: stages(batch().query_images), owned=method)


@pytest.mark.parametrize(
    ("case", "at_most"),
    [
        (Case("full", {}), 0.70),
        (Case("bn", {}), 0.75),
        (Case("bias", {}), 0.20),
        (Case("svf", {"batch_norm": True}), 0.80),
        (Case("svf", {"stages": ("layer3",)}), 0.55),
        (Case("left_scaling", {}), 0.45),
        (Case("right_scaling", {}), 0.70),
        (Case("rotated_scaling", {}), 0.45),
        (Case("adapter", {}), 0.35),
        (Case("full", {"kernel": "3x3"}), 0.45),
    ],
    ids=str,
)
def test_less_is_kept_than_by_stock_layers(case: Case, at_most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = bytes_kept(case)
    leave_as_it_is(monkeypatch)
    assert lean <= at_most * bytes_kept(case)


def test_a_frozen_layer_keeps_what_its_gradient_needs() -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    conv, norm, relu = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6).eval(), nn.ReLU(inplace=True)
    layers = nn.Sequential(conv, norm, relu).requires_grad_(False)
    base.keep_less(layers)
    assert [type(layer) for layer in layers] == [FrozenConv2d, FixedNorm2d, MaskedReLU]
    outputs = 2 * 6 * 6 * 6
    # one byte an element of the ReLU; the folded scale of the norm, four bytes a channel
    assert kept_bytes(lambda: layers(x), owned=layers) == outputs + 4 * 6
    norm.bias.requires_grad_(True)
    assert kept_bytes(lambda: layers(x), owned=layers) == outputs + 4 * 6


def test_the_masked_relu_passes_what_torchs_does() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0, float("nan"), float("inf")], requires_grad=True)
    weights = torch.arange(1.0, 6.0)
    relu = MaskedReLU()
    torch.testing.assert_close(relu(x), F.relu(x), equal_nan=True)
    (found,) = torch.autograd.grad(relu(x), x, weights)
    (expected,) = torch.autograd.grad(F.relu(x), x, weights)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_a_random_rotation_turns_and_does_not_mirror(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        rotation = random_rotation(size, generator, torch.empty(0))
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64))
        assert torch.linalg.det(rotation) == pytest.approx(1)


def rotation_factors(name: str, seed: int) -> dict[str, Tensor]:
    method = tiny_method()
    state = torch.random.get_rng_state()
    build_strategy(name, seed=seed).apply(method)
    assert torch.equal(torch.random.get_rng_state(), state)
    return {key: p for key, p in method.named_parameters() if key.endswith((".u", ".down.weight"))}


@pytest.mark.parametrize("name", ["rotated_scaling", "rotated_svf", "adapter"])
def test_what_is_random_depends_on_its_own_seed_only(name: str) -> None:
    first = rotation_factors(name, 0)
    torch.manual_seed(5)
    again, other = rotation_factors(name, 0), rotation_factors(name, 1)
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    assert not any(torch.equal(other[key], tensor) for key, tensor in first.items())


def test_rotated_subspaces_keep_the_singular_values() -> None:
    plain, method = tiny_method().double(), tiny_method().double()
    build_strategy("rotated_svf").apply(method)
    for name in CONVOLUTIONS:
        weight, layer = plain.get_parameter(f"{name}.weight"), method.get_submodule(name)
        assert isinstance(layer, svf_fast.SVFConv2d)
        identity = torch.eye(layer.rank, dtype=torch.float64)
        torch.testing.assert_close(layer.u.T @ layer.u, identity)
        turned = layer.merged_weight()
        assert (turned - weight).norm() > 0.1 * weight.norm()
        torch.testing.assert_close(
            torch.linalg.svdvals(turned.flatten(1))[: layer.rank],
            torch.linalg.svdvals(weight.flatten(1))[: layer.rank],
        )


def test_an_adapter_is_a_residual_of_two_1x1_convolutions() -> None:
    method: MetaLearner = tiny_method()
    build_strategy("adapter", stages=("layer3",), reduction=4).apply(method)
    adapter = method.get_submodule("layer3.adapter")
    down, up = adapter.get_submodule("down"), adapter.get_submodule("up")
    assert down.get_parameter("weight").shape == (16, 64, 1, 1)
    x = torch.randn(1, 64, 5, 5)
    torch.testing.assert_close(adapter(x), x)
    nn.init.normal_(up.get_parameter("weight"))
    torch.testing.assert_close(adapter(x), x + up(F.relu(down(x))))


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (1, 5), (7, 10)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("ceil_mode", [True, False])
def test_a_tiled_pool_is_torchs_and_keeps_a_byte(size: tuple[int, int], layout: Any, ceil_mode: bool) -> None:
    if min(size) < 2 and not ceil_mode:
        pytest.skip("no window fits")
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=layout)
    # ties
    x[0, 0] = 1.0
    x.requires_grad_()
    stock, ours = nn.MaxPool2d(2, 2, ceil_mode=ceil_mode), nn.MaxPool2d(2, 2, ceil_mode=ceil_mode)
    keep_less_of_pools(ours)
    expected, y = stock(x), ours(x)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (dx,), (wanted,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(dx, wanted, rtol=0, atol=0)
    assert kept_bytes(lambda: ours(x), owned=[x]) == y.numel()
    assert dx.is_contiguous(memory_format=layout)
    several = torch.stack([dy, -dy])
    (batched,) = torch.autograd.grad(ours(x), x, several, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([wanted, -wanted]), rtol=0, atol=0)


def test_a_tuned_vgg_keeps_no_pools_input() -> None:
    method = tiny_method(config=VGG)
    Case("svf", {}).build().apply(method)
    pools = [m for stage in ("layer2", "layer3") for m in method.get_submodule(stage).modules()]
    assert sum(isinstance(pool, TiledMaxPool2d) for pool in pools) == 2


def test_half_precision_is_no_worse_than_twice_batch_norms_own() -> None:
    norm = nn.BatchNorm2d(64).eval()
    # means far from zero, as after a ReLU
    nn.init.normal_(norm.running_mean, 16.0)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    x = (16 + torch.randn(2, 64, 9, 9)).bfloat16()
    exact = F.batch_norm(
        x.double(), norm.running_mean.double(), norm.running_var.double(), norm.weight.double(), norm.bias.double()
    )
    stock = (norm(x).double() - exact).norm()
    norm.__class__ = FixedNorm2d
    assert (norm(x).double() - exact).norm() <= 2 * stock


def test_factors_keep_the_width_of_the_activations() -> None:
    method = tiny_method()
    Case("left_scaling", {}).build().apply(method)
    with torch.autocast("cpu", torch.bfloat16):
        assert method.get_submodule("layer2.0.conv1")(torch.randn(1, 16, 5, 5)).dtype == torch.bfloat16


def test_a_reflecting_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in mode 'reflect', expected numbers and 'zeros'$"):
        Geometry.of(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))


def test_a_second_strategy_is_refused() -> None:
    method = tiny_method()
    Case("svf", {}).build().apply(method)
    with pytest.raises(
        ValueError, match=r"^tuning strategy 'svf' is applied already, expected an untuned method for 'full'$"
    ):
        Case("full", {}).build().apply(method)
