"""A chain of fused layers as one op that keeps only its first z and its last mask; everything between is rebuilt in
backward (save="recompute" on a block: 12 of 40 units of work more, a third of the bytes of "exact")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svf_fast import backends
from svf_fast.bits import packed_bytes
from svf_fast.contract import Geometry, dense, memory_format_of
from svf_fast.ops import refuse_double_backward

_LAYERS = "Tensor[] v, Tensor[] s, Tensor[] u, Tensor[] scale, Tensor[] shift"


def flatten_geometry(layers: Sequence[Geometry]) -> list[int]:
    """Seven integers a layer, as the ops take them."""
    return [n for g in layers for n in (*g.stride, *g.padding, *g.dilation, g.groups)]


def geometries(flat: Sequence[int]) -> list[Geometry]:
    """The inverse of `flatten_geometry`."""
    rows = [tuple(flat[i : i + 7]) for i in range(0, len(flat), 7)]
    return [Geometry(r[0:2], r[2:4], r[4:6], r[6]) for r in rows]  # type: ignore[arg-type]


def layer_sizes(size: Sequence[int], v: Sequence[Tensor], layers: Sequence[Geometry]) -> list[tuple[int, int]]:
    """Height and width of each layer's input, and of the last output."""
    sizes = [(size[0], size[1])]
    for weight, geometry in zip(v, layers, strict=True):
        sizes.append(geometry.output_size(sizes[-1], weight.shape[2:]))
    return sizes


@torch.library.custom_op(
    "svf_fast::chain",
    mutates_args=(),
    schema=f"(Tensor x, {_LAYERS}, Tensor? residual, bool relu, SymInt[] geometry) -> (Tensor, Tensor, Tensor)",
)
def chain(
    x: Tensor, v: list[Tensor], s: list[Tensor], u: list[Tensor], scale: list[Tensor], shift: list[Tensor],
    residual: Tensor | None, relu: bool, geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the first layer's z, the last layer's mask; a ReLU follows every layer but the last, where `relu` decides."""
    implementation = backends.select(x.device)
    memory_format = memory_format_of(x)
    layers = geometries(geometry)
    last = len(layers) - 1
    first_z, y = x.new_empty(0), x
    for i, (layer, vi, si, ui, ai, bi) in enumerate(zip(layers, v, s, u, scale, shift, strict=True)):
        z = implementation.v_convolution(y, vi, layer, memory_format)
        if i == 0:
            first_z = z
        y, mask = implementation.project(
            z, si, ui, ai, bi, residual if i == last else None, relu or i < last, relu and i == last, memory_format
        )
    return y, first_z, mask


@chain.register_fake
def _(x, v, s, u, scale, shift, residual, relu, geometry):
    memory_format = memory_format_of(x)
    sizes = layer_sizes(x.shape[2:], v, geometries(geometry))
    y = x.new_empty((x.shape[0], u[-1].shape[0], *sizes[-1])).to(memory_format=memory_format)
    z = x.new_empty((x.shape[0], v[0].shape[0], *sizes[1])).to(memory_format=memory_format)
    return y, z, x.new_empty(packed_bytes(y.numel()) if relu else 0, dtype=torch.uint8)


@torch.library.custom_op(
    "svf_fast::chain_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor z, Tensor mask, {_LAYERS}, SymInt[] geometry, SymInt[2] size, bool channels_last, "
    "bool need_dx, bool need_d) -> (Tensor, Tensor, Tensor)",
)
def chain_backward(
    dy: Tensor, z: Tensor, mask: Tensor, v: list[Tensor], s: list[Tensor], u: list[Tensor], scale: list[Tensor],
    shift: list[Tensor], geometry: list[int], size: Any, channels_last: bool, need_dx: bool, need_d: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, every layer's ds behind one another, and d = dy ⊙ mask (empty where not needed or equal to dy)."""
    implementation = backends.select(dy.device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    layers = geometries(geometry)
    sizes = layer_sizes(size, v, layers)
    zs, masks = [z], []
    for i in range(len(layers) - 1):
        h, inner_mask = implementation.project(
            zs[i], s[i], u[i], scale[i], shift[i], None, True, True, memory_format
        )  # fmt: skip
        masks.append(inner_mask)
        zs.append(implementation.v_convolution(h, v[i + 1], layers[i + 1], memory_format))
        del h
    d = dense(dy, memory_format)
    if mask.numel():
        d = implementation.apply_mask(d, mask)
    residual_gradient = d if need_d and mask.numel() else dy.new_empty(0)
    no_scale = dy.new_empty(0)
    ds: list[Tensor] = []
    for i in reversed(range(len(layers))):
        g, ds_i = implementation.project_backward(
            d, zs.pop(), no_scale, u[i], scale[i], layers[i].groups, True, memory_format
        )
        ds.append(ds_i.to(s[i].dtype))
        if i == 0 and not need_dx:
            break
        d = implementation.v_convolution_backward(g, s[i], v[i], layers[i], sizes[i], memory_format)
        if i > 0:
            d = implementation.apply_mask(d, masks.pop())
    return d if need_dx else dy.new_empty(0), torch.cat(ds[::-1]), residual_gradient


@chain_backward.register_fake
def _(dy, z, mask, v, s, u, scale, shift, geometry, size, channels_last, need_dx, need_d):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dx, d = dy.new_empty(0), dy.new_empty(0)
    if need_dx:
        groups = geometries(geometry)[0].groups
        dx = dy.new_empty((dy.shape[0], v[0].shape[1] * groups, *size)).to(memory_format=memory_format)
    if need_d and mask.numel():
        d = dy.new_empty(dy.shape).to(memory_format=memory_format)
    return dx, torch.cat([torch.empty_like(si) for si in s]), d


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, v, s, u, scale, shift, _, _, geometry = inputs
    _, z, mask = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, mask)
    ctx.save_for_backward(z, mask, *v, *s, *u, *scale, *shift)
    ctx.geometry = list(geometry)
    ctx.size = x.shape[2:]
    ctx.channels_last = memory_format_of(x) is torch.channels_last


def _backward(ctx: Any, dy: Tensor | None, *unused: None) -> tuple:
    z, mask, *parameters = ctx.saved_tensors
    count = len(parameters) // 5
    v, s, u, scale, shift = (parameters[i * count : (i + 1) * count] for i in range(5))
    nothing = [None] * count
    if dy is None:
        return None, nothing, nothing, nothing, nothing, nothing, None, None, None
    need_dx, need_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
    dx, ds, d = chain_backward(
        dy, z, mask, v, s, u, scale, shift, ctx.geometry, ctx.size, ctx.channels_last, need_dx, need_residual
    )
    ds_parts: list[Tensor | None] = [
        part if needed else None
        for part, needed in zip(ds.split([len(si) for si in s]), ctx.needs_input_grad[2], strict=True)
    ]
    residual_gradient = (d if mask.numel() else dy) if need_residual else None
    return dx if need_dx else None, nothing, ds_parts, nothing, nothing, nothing, residual_gradient, None, None


chain.register_autograd(_backward, setup_context=_save)
refuse_double_backward(chain_backward)
