"""Other ways to change the cues in a weight (SVF paper, table 9): few trainable parameters S' beside or inside the weight,
and a fixed random rotation R. All but the last start from the pre-trained function; W is folded to [Co, Ci·K²]."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

import svf_fast
from svf_fast.functional import svf_conv2d
from svf_fast.train.methods import MetaLearner
from svf_fast.train.tuning.base import StageStrategy, convolutions
from svf_fast.train.tuning.lean import FrozenConv2d, Geometry
from svf_fast.train.tuning.singular import converted_layers


class LeftScaledConv2d(FrozenConv2d):
    """S'W with ``s`` [Co]: the frozen convolution, then one factor a channel. Made from a Conv2d in place."""

    s: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x, None)
        y = y * self.s.to(y.dtype)[:, None, None]
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


class RightScaledConv2d(nn.Conv2d):
    """WS' with ``s`` [Ci·K²]: one factor a column of the folded weight. Made from a Conv2d in place; keeps its input."""

    s: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return _RightScaledConvolution.apply(x, self.weight, self.s, self.bias, Geometry.of(self))


class RotatedConv2d(nn.Module):
    """R S' Rᵀ W with ``s`` [Co]: the library's op with ``u`` = R [Co, Co] and ``v`` = Rᵀ W [Co, Ci, K, K]."""

    def __init__(self, conv: nn.Conv2d, rotation: Tensor) -> None:
        super().__init__()
        weight = conv.weight.detach()
        rotated = (rotation.T @ weight.double().flatten(1)).view(weight.shape)
        self.u = nn.Parameter(rotation.to(weight), requires_grad=False)
        self.v = nn.Parameter(torch.empty_like(weight).copy_(rotated), requires_grad=False)
        self.s = nn.Parameter(weight.new_ones(weight.shape[0]))
        self.bias = conv.bias
        self.geometry = Geometry.of(conv)

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        return svf_conv2d(
            x, self.v, self.s, self.u, bias=self.bias, stride=stride, padding=padding, dilation=dilation, groups=groups
        )


@dataclass(frozen=True)
class LeftScaling(StageStrategy):
    """S'W: the output channels are weighted, the cues stay."""

    name = "left_scaling"

    @property
    def trains(self) -> str:
        return f"S' of S'W, one factor an output channel, in {self.layers}"

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        for _, conv in convolutions(method, stages):
            conv.__class__ = LeftScaledConv2d
            conv.s = nn.Parameter(conv.weight.detach().new_ones(conv.out_channels))

    def singular_values(self, method: MetaLearner) -> Iterable[nn.Parameter]:
        return _factors(method, LeftScaledConv2d)


@dataclass(frozen=True)
class RightScaling(StageStrategy):
    """WS': the inputs of the weight are weighted, one by one."""

    name = "right_scaling"

    @property
    def trains(self) -> str:
        return f"S' of WS', one factor a column of the folded weight, in {self.layers}"

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        for _, conv in convolutions(method, stages):
            conv.__class__ = RightScaledConv2d
            conv.s = nn.Parameter(conv.weight.detach().new_ones(conv.weight[0].numel()))

    def singular_values(self, method: MetaLearner) -> Iterable[nn.Parameter]:
        return _factors(method, RightScaledConv2d)


@dataclass(frozen=True)
class RotatedScaling(StageStrategy):
    """R S' Rᵀ W: weights directions that a random rotation R (of ``seed``) chose."""

    seed: int = 0

    name = "rotated_scaling"

    @property
    def trains(self) -> str:
        return f"S' of R S' Rᵀ W, R a fixed random rotation, in {self.layers}"

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for name, conv in list(convolutions(method, stages)):
            method.set_submodule(name, RotatedConv2d(conv, random_rotation(conv.out_channels, generator, conv.weight)))

    def singular_values(self, method: MetaLearner) -> Iterable[nn.Parameter]:
        return _factors(method, RotatedConv2d)


@dataclass(frozen=True)
class RotatedSVF(StageStrategy):
    """U R S Rᵀ Vᵀ: singular value fine-tuning with the subspaces turned by a random rotation R (of ``seed``), which
    destroys the cues: the function is another one from the start. ``train_s=False`` leaves it there."""

    train_s: bool = True
    seed: int = 0

    name = "rotated_svf"

    @property
    def trains(self) -> str:
        expression = f"U R S Rᵀ Vᵀ, R a fixed random rotation, in {self.layers}"
        return f"S of {expression}" if self.train_s else f"nothing; the weights are {expression}"

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        svf_fast.convert(method, list(stages))
        generator = torch.Generator().manual_seed(self.seed)
        for layer in converted_layers(method):
            rotation = random_rotation(layer.rank, generator, layer.u)
            with torch.no_grad():
                layer.u.copy_(layer.u.double() @ rotation)
                layer.v.copy_((rotation.T @ layer.v.double().flatten(1)).view(layer.v.shape))
            layer.s.requires_grad_(self.train_s)


def random_rotation(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """R [size, size] float64 on ``like``'s device: uniformly distributed, orthogonal, determinant +1. On the meta device
    only a shape, and nothing is drawn."""
    if like.is_meta:
        return torch.empty(size, size, dtype=torch.float64, device="meta")
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(gaussian)
    # QR leaves the columns' signs to the routine; with a positive diagonal they are unique (Mezzadri 2007)
    rotation = orthogonal * triangular.diagonal().sign()
    if torch.linalg.slogdet(rotation).sign < 0:
        rotation[:, 0] *= -1
    return rotation.to(like.device)


def _factors(method: MetaLearner, kind: type[nn.Module]) -> list[nn.Parameter]:
    return [module.get_parameter("s") for module in method.modules() if isinstance(module, kind)]


class _RightScaledConvolution(torch.autograd.Function):
    """conv2d(x, W ⊙ s) by columns. Keeps x and the parameters; plain autograd would keep the product, a second copy of
    every weight, at each call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, s: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight, s)
        ctx.geometry = geometry
        return F.conv2d(x, weight * s.view(weight.shape[1:]), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, full_weight, full_s = ctx.saved_tensors
        x, weight, s = (tensor.to(gradient.dtype) for tensor in (x, full_weight, full_s))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.geometry.input_gradient(gradient, weight * s.view(weight.shape[1:]), x.shape[2:])
        # of the composed weight; each column's factor collects it over the output channels
        dweight = conv2d_weight(x, weight.shape, gradient, *ctx.geometry)
        return dx, None, (dweight * full_weight).sum(0, dtype=full_s.dtype).flatten(), None, None
