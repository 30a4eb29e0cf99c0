"""Algorithm 1 as the paper writes it (three modules), the plain formula of the fused op, and the matrix form of the
prior: what the ops are tested and benchmarked against. Plain autograd, any dtype, twice differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svf_fast.decompose import decompose


def svf_conv2d(
    x: Tensor, v: Tensor, s: Tensor, u: Tensor, *, bias: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, residual: Tensor | None = None, activation: str | None = None,
    stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """The formula of `functional.svf_conv2d`, step by step; autograd keeps every intermediate."""
    channel = (1, -1, 1, 1)
    z = F.conv2d(x, v, None, stride, padding, dilation, groups)
    t = z * s.to(z.dtype).view(channel)
    y = F.conv2d(t, u[:, :, None, None], None if bias is None else bias.to(t.dtype), groups=groups)
    if scale is not None:
        y = y * scale.to(y.dtype).view(channel)
    if shift is not None:
        y = y + shift.to(y.dtype).view(channel)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if activation == "relu" else y


class NaiveSVFConv2d(nn.Module):
    """Algorithm 1 of the SVF paper: V-convolution, `mul` by S, 1x1 U-convolution, as three steps under plain autograd.

    Names follow the released layer: `conv_V.weight` [R, Ci, K, K], `vector_S` [1, R, 1, 1], `conv_U.weight` [Co, R, 1, 1],
    `conv_U.bias`. Exact full rank (the released code rounds it down); zero padding and groups=1 only.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(
                f"Algorithm 1 covers groups=1 with zero padding, got groups={conv.groups}, {conv.padding_mode!r}"
            )
        factors = decompose(conv.weight)
        self.conv_V = nn.utils.skip_init(
            nn.Conv2d, conv.in_channels, len(factors.s), conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            bias=False, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        self.vector_S = nn.Parameter(factors.s.to(conv.weight).view(1, -1, 1, 1))
        self.conv_U = nn.utils.skip_init(
            nn.Conv2d, len(factors.s), conv.out_channels, 1, bias=conv.bias is not None, device=conv.weight.device,
            dtype=conv.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            self.conv_V.weight.copy_(factors.v)
            self.conv_U.weight.copy_(factors.u[:, :, None, None])
            if conv.bias is not None and self.conv_U.bias is not None:
                self.conv_U.bias.copy_(conv.bias)
        self.conv_V.requires_grad_(False)
        self.conv_U.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, Ci, H, W] → [N, Co, Ho, Wo]."""
        return self.conv_U(self.conv_V(x).mul(self.vector_S))


def convert_naive(model: nn.Module, prefixes: Sequence[str]) -> nn.Module:
    """Replaces, in place, every Conv2d under the name prefixes by Algorithm 1; BatchNorm under them runs in eval mode,
    frozen. The released form that memory and speed are compared with."""
    for name, module in list(model.named_modules()):
        if not any(name == p or name.startswith(p + ".") for p in prefixes):
            continue
        module.requires_grad_(False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and any(name == p or name.startswith(p + ".") for p in prefixes):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, NaiveSVFConv2d(module))
    return model


def max_cosine_matrix(query: Tensor, support: Tensor, mask: Tensor | None = None, eps: float = 1e-7) -> Tensor:
    """`functional.max_cosine` through the whole cosine matrix [B, Hs·Ws, Hq·Wq], as the released code computes it."""
    if mask is not None:
        support = support * mask
    q, a = query.flatten(2), support.flatten(2).mT  # [B, C, Hq·Wq], [B, Hs·Ws, C]
    norms = a.norm(dim=2, keepdim=True) @ q.norm(dim=1, keepdim=True)
    return ((a @ q) / (norms + eps)).max(1).values
