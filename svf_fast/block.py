"""Running a chain of fused modules as one op that keeps its first z only (save="recompute"). What `fuse` puts into the
forward of a block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from svf_fast.chain import chain, flatten_geometry, layer_sizes
from svf_fast.frozen_norm import FrozenAffine
from svf_fast.functional import autocast_dtype
from svf_fast.modules import SVFConv2d


def run_chain(
    convs: Sequence[SVFConv2d],
    norms: Sequence[FrozenAffine | None],
    x: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """conv → norm → ReLU for every layer but the last; there conv → norm → (+ residual) → `activation`.

    x [N, Ci, H, W] → [N, Co, Ho, Wo]. Equal to calling the modules one after the other, which is what happens where there
    is nothing to save: without a graph, or where more than singular values train.
    """
    last = len(convs) - 1
    if not _can_chain(convs, norms, x, residual):
        for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
            if i == last:
                return conv(x, norm=norm, residual=residual, activation=activation)
            x = conv(x, norm=norm, activation="relu")
    autocast = autocast_dtype(x)
    if autocast is not None:
        x, residual = x.to(autocast), None if residual is None else residual.to(autocast)
    affines = [_affine(conv, norm) for conv, norm in zip(convs, norms, strict=True)]
    values = [conv.checked_singular_values() for conv in convs]
    return chain(
        convs[0].pad(x, convs[0].plan()[1]), [conv.v for conv in convs], values, [conv.u for conv in convs],
        [scale for scale, _ in affines], [shift for _, shift in affines], residual, activation == "relu",
        flatten_geometry([conv.plan()[0] for conv in convs]),
    )[0]  # fmt: skip


def _can_chain(
    convs: Sequence[SVFConv2d], norms: Sequence[FrozenAffine | None], x: Tensor, residual: Tensor | None
) -> bool:
    """Whether this call builds a graph in which only singular values train, with shapes and dtypes that the op takes."""
    if not torch.is_grad_enabled() or x.ndim != 4:
        return False
    frozen: list[Tensor | None] = [t for conv in convs for t in (conv.u, conv.v, conv.bias)]
    frozen += [t for norm in norms if norm is not None for t in (norm.weight, norm.bias)]
    if any(t is not None and t.requires_grad for t in frozen) or any(any(conv.plan()[1]) for conv in convs[1:]):
        return False
    sizes = layer_sizes(
        convs[0].check_input(x), [conv.v for conv in convs[1:]], [conv.plan()[0] for conv in convs[1:]]
    )  # fmt: skip
    follow_on = all(a.out_channels == b.in_channels for a, b in itertools.pairwise(convs))
    if not follow_on or min(min(size) for size in sizes) < 1:
        return False
    if residual is not None and (
        not isinstance(residual, Tensor)
        or residual.shape != (x.shape[0], convs[-1].out_channels, *sizes[-1])
        or residual.dtype != (autocast_dtype(x) or x.dtype)
        or residual.device != x.device
    ):
        return False
    return any(t is not None and t.requires_grad for t in (x, residual, *(conv.s for conv in convs)))


def _affine(conv: SVFConv2d, norm: FrozenAffine | None) -> tuple[Tensor, Tensor]:
    """Scale and shift [Co] after the projection, the convolution's bias folded in."""
    if norm is None:
        scale = torch.ones(conv.out_channels, dtype=torch.float32, device=conv.u.device)
        return scale, torch.zeros_like(scale) if conv.bias is None else conv.bias
    scale, shift = norm.scale_and_shift()
    return scale, shift if conv.bias is None else shift + conv.bias * scale
