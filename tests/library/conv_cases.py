"""Random fused-layer problems for the tests: geometries, inputs in many memory layouts, and the float64 reference of the
output and every gradient. Knows the functional layer, no module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from svf_fast import functional, reference
from svf_fast.decompose import decompose


@dataclass(frozen=True)
class ConvCase:
    """One geometry; `rank` is per group, None for full."""

    batch: int = 2
    channels: tuple[int, int] = (6, 8)
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (9, 7)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    rank: int | None = None

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def __str__(self) -> str:
        n, (ci, co), (kh, kw), (h, w) = self.batch, self.channels, self.kernel, self.size
        return (
            f"{n}x{ci}x{h}x{w}-{co}k{kh}x{kw}s{self.stride[0]}{self.stride[1]}p{self.padding[0]}{self.padding[1]}"
            f"d{self.dilation[0]}{self.dilation[1]}g{self.groups}r{self.rank or 'full'}"
        )


CASES = (
    ConvCase(),
    ConvCase(kernel=(1, 1), padding=(0, 0)),
    ConvCase(kernel=(1, 1), padding=(0, 0), stride=(2, 2), size=(7, 8)),
    ConvCase(kernel=(1, 1), padding=(1, 1), size=(3, 3)),
    ConvCase(channels=(12, 3), batch=1, size=(5, 11)),
    ConvCase(channels=(3, 21), kernel=(5, 3), padding=(2, 0), size=(8, 6)),
    ConvCase(stride=(2, 3), size=(10, 9)),
    ConvCase(stride=(3, 3), padding=(0, 0), size=(11, 12)),
    ConvCase(dilation=(2, 2), padding=(2, 2)),
    ConvCase(dilation=(1, 3), padding=(0, 3), stride=(2, 1), size=(9, 9)),
    ConvCase(channels=(8, 12), groups=4),
    ConvCase(channels=(8, 12), groups=4, rank=2, stride=(2, 2)),
    ConvCase(channels=(5, 5), groups=5),
    ConvCase(channels=(4, 8), groups=4, kernel=(1, 1), padding=(0, 0)),
    ConvCase(rank=3),
    ConvCase(rank=1, batch=3),
    ConvCase(channels=(1, 1), batch=1, size=(1, 1)),
    ConvCase(channels=(1, 7), kernel=(1, 1), padding=(0, 0), size=(1, 1)),
    ConvCase(channels=(7, 1), size=(1, 9), batch=1),
    ConvCase(channels=(6, 4), kernel=(3, 1), padding=(1, 0), size=(9, 1)),
    ConvCase(channels=(6, 4), kernel=(3, 3), padding=(0, 0), size=(3, 3)),
    ConvCase(channels=(4, 6), kernel=(4, 2), padding=(3, 1), stride=(4, 2), size=(9, 5)),
    ConvCase(channels=(16, 33), kernel=(1, 1), padding=(0, 0), size=(13, 17), batch=1),
    # where vendor.py asks for oneDNN by name: wide pictures, and padding wider than 3
    ConvCase(channels=(6, 9), kernel=(1, 1), padding=(0, 0), size=(33, 35)),
    ConvCase(channels=(9, 6), kernel=(1, 1), padding=(0, 0), size=(65, 66), stride=(2, 2), batch=1),
    # one channel out: strides that read as either memory format
    ConvCase(channels=(6, 1), kernel=(1, 1), padding=(0, 0), size=(33, 34)),
    ConvCase(channels=(5, 7), padding=(4, 4), dilation=(4, 4), size=(9, 11)),
    ConvCase(channels=(5, 7), padding=(5, 1), dilation=(3, 1), stride=(2, 1), size=(8, 7)),
)

EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "relu"},
    {"bias": True},
    {"scale": True, "shift": True, "activation": "relu"},
    {"residual": True},
    {"bias": True, "scale": True, "shift": True, "residual": True, "activation": "relu"},
    {"bias": True, "scale": True},
    {"bias": True, "residual": True, "activation": "relu"},
    {"shift": True, "activation": "relu"},
)


def random_cases(count: int, seed: int) -> list[ConvCase]:
    """Valid geometries drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    cases: list[ConvCase] = []
    while len(cases) < count:
        groups = (1, 1, 1, 2, 3)[draw(0, 4)]
        case = ConvCase(
            batch=draw(1, 3),
            channels=(groups * draw(1, 9), groups * draw(1, 9)),
            kernel=(draw(1, 4), draw(1, 4)),
            size=(draw(1, 15), draw(1, 15)),
            stride=(draw(1, 3), draw(1, 3)),
            padding=(draw(0, 3), draw(0, 3)),
            dilation=(draw(1, 3), draw(1, 3)),
            groups=groups,
        )
        reach = [
            s + 2 * p - d * (k - 1)
            for s, p, d, k in zip(case.size, case.padding, case.dilation, case.kernel, strict=True)
        ]
        if min(reach) >= 1:
            cases.append(case)
    return cases


@dataclass
class Problem:
    """Tensors of one call in one dtype, the gradient that comes back, and the keyword arguments."""

    x: Tensor
    v: Tensor
    s: Tensor
    u: Tensor
    dy: Tensor
    vectors: dict[str, Any] = field(default_factory=dict)
    residual: Tensor | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    def run(self, save: str = "exact", *, function: Any = None) -> dict[str, Tensor]:
        """y, dx, ds and, where there is one, dresidual of `functional.svf_conv2d` (or `function`)."""
        x, s = (t.detach().requires_grad_() for t in (self.x, self.s))
        residual = None if self.residual is None else self.residual.detach().requires_grad_()
        call = function or functional.svf_conv2d
        keywords = self.keywords if function else {**self.keywords, "save": save}
        y = call(x, self.v, s, self.u, residual=residual, **self.vectors, **keywords)
        y.backward(self.dy)
        assert x.grad is not None
        assert s.grad is not None
        out = {"y": y.detach(), "dx": x.grad, "ds": s.grad}
        if residual is not None:
            assert residual.grad is not None
            out["dresidual"] = residual.grad
        return out

    def reference(self, y: Tensor | None = None) -> dict[str, Tensor]:
        """The same in float64 by the plain formula.

        With `y` given the gradients take the ReLU's decisions from it: one element that rounding puts on the other side of
        zero is no error of the gradient's formula, and y itself is compared.
        """
        x, v, s, u, dy = (t.detach().double().contiguous() for t in (self.x, self.v, self.s, self.u, self.dy))
        vectors = {name: vector.double() for name, vector in self.vectors.items()}
        residual = None if self.residual is None else self.residual.detach().double().contiguous()
        double = Problem(x, v, s, u, dy, vectors, residual, dict(self.keywords))
        exact = double.run(function=reference.svf_conv2d)
        if y is None or self.keywords.get("activation") is None:
            return exact
        double.keywords["activation"] = None
        double.dy = double.dy * (y != 0)
        return {**double.run(function=reference.svf_conv2d), "y": exact["y"]}


def make_problem(
    case: ConvCase, dtype: torch.dtype, extras: dict[str, Any], *, memory_format: torch.memory_format, seed: int = 0
) -> Problem:
    """Random tensors of `case`; s is float32 for half precisions, as a trained parameter is."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels_in, channels_out = case.channels
    weight = normal(channels_out, channels_in // case.groups, *case.kernel)
    u, s, v = decompose(weight, groups=case.groups, rank=case.rank)
    x = normal(case.batch, channels_in, *case.size).to(dtype).contiguous(memory_format=memory_format)
    like = torch.nn.functional.conv2d(x.double(), weight, None, case.stride, case.padding, case.dilation, case.groups)
    vector_dtype = torch.promote_types(dtype, torch.float32)
    vectors: dict[str, Any] = {
        name: (normal(channels_out) + 1.5).to(vector_dtype) for name in ("bias", "scale", "shift") if name in extras
    }
    residual = None
    if extras.get("residual"):
        residual = (
            (like.square().sum().sqrt() / max(like.numel(), 1) ** 0.5 * normal(*like.shape))
            .to(dtype)
            .contiguous(memory_format=memory_format)
        )
    return Problem(
        x,
        # as a module has them
        nn.Parameter(v.to(dtype), requires_grad=False),
        s.to(vector_dtype),
        nn.Parameter(u.to(dtype), requires_grad=False),
        normal(*like.shape).to(dtype),
        vectors,
        residual,
        {**case.geometry, "activation": extras.get("activation")},
    )
