"""Small networks of every kind that fusion meets, and the comparison of a converted network with its original: same
function, same gradient of the input, same gradients of the singular values with and without fusion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from error_ratio import assert_close
from torch import Tensor, nn

import svf_fast
from svf_fast.modules import SVFModule

CHANNELS = 6


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and running statistics that depend on `seed` only; eval mode, float64."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            for tensor in module.parameters(recurse=False):
                fan = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 1
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / fan**0.5)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                assert module.running_mean is not None
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator).double())
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator).double() + 0.5)
    return model


def picture(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = shape or (2, CHANNELS, 7, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flat(out: Any) -> list[Tensor]:
    """The tensors of an output, lists, tuples and dictionaries opened."""
    if isinstance(out, Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, dict) else out) for t in flat(part)]


def run(model: nn.Module, x: Tensor, *arguments: Any, needs_dx: bool = True, **keywords: Any) -> dict[str, Tensor]:
    """Outputs, the gradient of x, and of every singular value, of a fixed scalar; gradients that do not exist are zero."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_dx)
    values = svf_fast.singular_values(model)
    for value in values.values():
        value.grad = None
    # the model may write into its input: a leaf that requires a gradient must not be written to
    outs = flat(model(leaf * 1 if needs_dx else leaf, *arguments, **keywords))
    result = {f"out{i}": t.detach() for i, t in enumerate(outs)}
    if not any(t.requires_grad for t in outs):
        return result
    total = sum((t * torch.arange(t.numel(), dtype=t.dtype).view(t.shape).cos()).sum() for t in outs if t.requires_grad)
    assert isinstance(total, Tensor)
    total.backward()
    if needs_dx:
        result["dx"] = torch.zeros_like(x) if leaf.grad is None else leaf.grad
    for name, value in values.items():
        result[f"ds of {name}"] = torch.zeros_like(value) if value.grad is None else value.grad
    return result


def assert_same_network(
    original: nn.Module,
    x: Tensor | None = None,
    *arguments: Any,
    save: str = "exact",
    change: Callable[[nn.Module], Any] | None = None,
    training: bool = False,
    needs_dx: bool = True,
    **keywords: Any,
) -> nn.Module:
    """Converts with and without fusion, and compares both with the original, with and without a graph.

    `change` is applied to all three after the conversion. Returns the fused model. Singular values are moved off s₀, and the
    original gets the merged weights, so that nothing compares equal by accident.
    """
    x = picture() if x is None else x
    fused = svf_fast.convert(copy.deepcopy(original), save=save)
    unfused = svf_fast.convert(copy.deepcopy(original), save="exact", fuse=False)
    expected = svf_fast.convert(copy.deepcopy(original), save="exact", fuse=False)
    for model in (fused, unfused, expected):
        with torch.no_grad():
            for value in svf_fast.singular_values(model).values():
                value.mul_(torch.linspace(0.8, 1.3, len(value), dtype=value.dtype))
    expected = svf_fast.merge(expected).requires_grad_(False)
    for model in (fused, unfused, expected):
        model.train(training)
        if change is not None:
            change(model)
    for module in expected.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    dtype = x.dtype
    ours = run(fused, x, *arguments, needs_dx=needs_dx, **keywords)
    assert_close(ours, run(unfused, x, *arguments, needs_dx=needs_dx, **keywords), dtype)
    function = {k: v for k, v in ours.items() if not k.startswith("ds of ")}
    assert_close(function, run_plain(expected, x, *arguments, needs_dx=needs_dx, **keywords), dtype)
    with torch.no_grad():
        for _ in range(2):
            plain = flat(fused(x.clone(memory_format=torch.preserve_format), *arguments, **keywords))
            assert_close(
                {f"out{i}": t for i, t in enumerate(plain)},
                {k: v for k, v in ours.items() if k.startswith("out")},
                dtype,
            )
    return fused


def run_plain(model: nn.Module, x: Tensor, *arguments: Any, needs_dx: bool, **keywords: Any) -> dict[str, Tensor]:
    """`run` of a model without singular values."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_dx)
    outs = flat(model(leaf * 1 if needs_dx else leaf, *arguments, **keywords))
    result = {f"out{i}": t.detach() for i, t in enumerate(outs)}
    graph = [t for t in outs if t.requires_grad]
    if needs_dx and graph:
        total = sum((t * torch.arange(t.numel(), dtype=t.dtype).view(t.shape).cos()).sum() for t in graph)
        assert isinstance(total, Tensor)
        (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        result["dx"] = torch.zeros_like(x) if gradient is None else gradient
    return result


def notes(model: nn.Module) -> dict[str, str]:
    """What fusion noted on every converted layer."""
    return {n: m.fusion_note for n, m in model.named_modules() if isinstance(m, SVFModule)}


def conv(channels_in: int = CHANNELS, channels_out: int = CHANNELS, kernel: int = 3, **keywords: Any) -> nn.Conv2d:
    keywords = {"padding": kernel // 2, "bias": False, **keywords}
    return nn.Conv2d(channels_in, channels_out, kernel, **keywords)


class TwoConvs(nn.Module):
    """Parts for the forwards of the tests: two conv → BatchNorm and an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = conv(kernel=1), nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)


def forward_of(function: Callable[..., Any], base: type[nn.Module] = TwoConvs) -> nn.Module:
    """A settled module whose class has `function` as its forward."""
    return settle(type(function.__name__, (base,), {"forward": function})())


def add_operator(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x)


def add_its_own_input(self: Any, x: Tensor) -> Tensor:
    h = self.relu(self.bn1(self.conv1(x)))
    return self.relu(self.bn2(self.conv2(h)) + h)


class Bottleneck(nn.Module):
    """As torchvision writes it."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(
            planes, planes, 3, stride=stride, padding=dilation, groups=groups, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = conv(inplanes, planes, stride=stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv(channels_in, channels_out, 1, stride=stride), nn.BatchNorm2d(channels_out))


def bottlenecks() -> nn.Module:
    return nn.Sequential(
        Bottleneck(CHANNELS, 4, 2, shortcut(CHANNELS, 16, 2)),
        Bottleneck(16, 4, groups=2),
        Bottleneck(16, 4, dilation=2),
    )


def basic_blocks() -> nn.Module:
    return nn.Sequential(BasicBlock(CHANNELS, CHANNELS), BasicBlock(CHANNELS, 8, 2, shortcut(CHANNELS, 8, 2)))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((CHANNELS, 8), (8, 8)):
        layers += [conv(channels_in, channels_out, bias=True), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
        layers += [conv(channels_out, channels_out, bias=True), nn.ReLU(inplace=True), nn.MaxPool2d(2, ceil_mode=True)]
    return nn.Sequential(*layers)


class InlineDownsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(stride=2), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(CHANNELS)
        self.short, self.short_bn = conv(kernel=1, stride=2), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(h)) + self.short_bn(self.short(x)))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(CHANNELS), conv()
        self.bn2, self.conv2 = nn.BatchNorm2d(CHANNELS), conv()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.relu(self.bn1(x)))
        return self.conv2(self.relu(self.bn2(h))) + x


class ListOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class DictOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"conv": conv(), "norm": nn.BatchNorm2d(CHANNELS), "act": nn.ReLU()})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["act"](self.parts["norm"](self.parts["conv"](x)))


class Heads(nn.Module):
    """Two outputs, a concatenation, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(), conv(kernel=5)
        self.norm = nn.BatchNorm2d(2 * CHANNELS)
        self.join = conv(2 * CHANNELS, CHANNELS, 1)
        self.classifier = nn.Linear(CHANNELS, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        both = torch.cat([F.relu(self.left(x)), self.right(x).relu()], 1)
        features = torch.relu(self.join(self.norm(both)))
        return {"features": features, "logits": self.classifier(features.mean((2, 3)))}


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "bottlenecks": bottlenecks,
    "basic blocks": basic_blocks,
    "vgg": vgg,
    "inline downsample": InlineDownsample,
    "pre-activation": PreActivation,
    "module list": ListOfLayers,
    "module dict": DictOfLayers,
    "heads": Heads,
}


def submodules(model: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, kind))
