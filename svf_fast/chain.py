"""A chain of fused layers as one op that keeps only its first z and its last mask; everything between is rebuilt in
backward (save="recompute" on a block: 12 of 40 units of work more, a third of the bytes of "exact")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svf_fast import backends
from svf_fast.bits import packed_bytes
from svf_fast.contract import Geometry, Kept, Layer, Needs, memory_format_of
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
    layers = _layers(v, s, u, scale, shift, geometry, relu)
    last = len(layers) - 1
    first_z, y = x.new_empty(0), x
    for i, layer in enumerate(layers):
        is_last = i == last
        y, kept = implementation.forward(
            y, layer, residual if is_last else None, "none" if i else "exact", relu and is_last, memory_format
        )
        if i == 0:
            first_z = kept.z
    return y, first_z, kept.mask


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
    # the ReLU at the end is in the mask already
    layers = _layers(v, s, u, scale, shift, geometry, False)
    sizes = layer_sizes(size, v, [layer.geometry for layer in layers])
    no_scale = dy.new_empty(0, dtype=torch.float32)
    # h behind the first layer; then each layer's z, and the mask below which it lies
    zs, masks = [z], []
    for i, layer in enumerate(layers[:-1]):
        if i == 0:
            h, inner_mask = implementation.project(z, layer, None, True, memory_format)
        else:
            h, kept = implementation.forward(h, layer, None, "exact", True, memory_format)
            zs.append(kept.z)
            inner_mask = kept.mask
        masks.append(inner_mask)
    if len(layers) > 1:
        zs.append(implementation.v_convolution(h, layers[-1], memory_format))
        del h
    masks.append(mask)
    ds: list[Tensor] = []
    residual_gradient, d = dy.new_empty(0), dy
    for i in reversed(range(len(layers))):
        is_last = i == len(layers) - 1
        needs = Needs(need_dx or i > 0, True, need_d and is_last)
        d, ds_i, masked = implementation.backward(
            d, layers[i], Kept(zs.pop(), no_scale, masks.pop()), None, sizes[i], memory_format, needs
        )
        ds.append(ds_i.to(s[i].dtype))
        if is_last:
            residual_gradient = masked
    return d if need_dx else dy.new_empty(0), torch.cat(ds[::-1]), residual_gradient


def _layers(
    v: list[Tensor], s: list[Tensor], u: list[Tensor], scale: list[Tensor], shift: list[Tensor], geometry: list[int],
    relu: bool,
) -> list[Layer]:  # fmt: skip
    """The chain's layers; a ReLU follows each but the last, where `relu` decides."""
    last = len(v) - 1
    return [
        Layer(v[i], s[i], u[i], scale[i], shift[i], layer_geometry, i < last or relu)
        for i, layer_geometry in enumerate(geometries(geometry))
    ]


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
