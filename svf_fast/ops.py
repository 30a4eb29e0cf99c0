"""The fused layer as `torch.library` ops: forward, its backward, fake kernels and autograd. Kept for backward: z (or
int8 z, or x by reference) and one bit an output element where a ReLU follows; nothing that no gradient asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from svf_fast import backends
from svf_fast.bits import packed_bytes
from svf_fast.contract import Geometry, Kept, Layer, Needs, memory_format_of

_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


def _geometry(stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


# Defined by hand, its autograd kernel too: with this many arguments a call that does nothing takes 135 µs through `custom_op`
# and 63 µs so (torch 2.13), and a step has one for each layer.
_library = torch.library.Library("svf_fast", "FRAGMENT")
_library.define(
    "conv2d(Tensor x, Tensor v, Tensor s, Tensor u, Tensor? scale, Tensor? shift, Tensor? residual, bool relu, "
    f"{_GEOMETRY}, str keep_z, bool keep_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _conv2d(
    x: Tensor, v: Tensor, s: Tensor, u: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    relu: bool, stride: Any, padding: Any, dilation: Any, groups: int, keep_z: str, keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, z as `keep_z` says ("none", "exact", "int8", "input": z is rebuilt from x), z's scale, the mask."""
    layer = Layer(v, s, u, scale, shift, _geometry(stride, padding, dilation, groups), relu)
    y, kept = _forward(x, layer, residual, keep_z, keep_mask)
    return y, *kept


def _forward(x: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool) -> tuple[Tensor, Kept]:
    return backends.select(x.device).forward(x, layer, residual, keep_z, keep_mask, memory_format_of(x))


_library.impl("conv2d", _conv2d, "CompositeExplicitAutograd")


@torch.library.register_fake("svf_fast::conv2d", lib=_library)
def _(x, v, s, u, scale, shift, residual, relu, stride, padding, dilation, groups, keep_z, keep_mask):
    geometry = _geometry(stride, padding, dilation, groups)
    size = geometry.output_size(x.shape[2:], v.shape[2:])
    memory_format = memory_format_of(x)
    y = x.new_empty((x.shape[0], u.shape[0], *size)).to(memory_format=memory_format)
    z, z_scale, mask = x.new_empty(0), x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.uint8)
    if keep_z in ("exact", "int8"):
        dtype = torch.int8 if keep_z == "int8" else x.dtype
        z = x.new_empty((x.shape[0], v.shape[0], *size), dtype=dtype).to(memory_format=memory_format)
    if keep_z == "int8":
        groups_of_pixels = backends.select(x.device).scale_groups(x, geometry, x.shape[0] * size[0] * size[1])
        z_scale = x.new_empty(groups_of_pixels, v.shape[0], dtype=torch.float32)
    if keep_mask:
        mask = x.new_empty(packed_bytes(y.numel()), dtype=torch.uint8)
    return y, z, z_scale, mask


_library.define(
    "conv2d_backward(Tensor dy, Tensor? x, Tensor z, Tensor z_scale, Tensor mask, Tensor v, Tensor s, Tensor u, Tensor? scale, "
    f"{_GEOMETRY}, SymInt[2] size, bool channels_last, bool need_dx, bool need_ds, bool need_d) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _conv2d_backward(
    dy: Tensor, x: Tensor | None, z: Tensor, z_scale: Tensor, mask: Tensor, v: Tensor, s: Tensor, u: Tensor,
    scale: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, size: Any, channels_last: bool,
    need_dx: bool, need_ds: bool, need_d: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, ds in s's dtype, and d = dy ⊙ mask (the residual's gradient); empty where not needed or equal to dy."""
    layer = Layer(v, s, u, scale, None, _geometry(stride, padding, dilation, groups))
    return _backward(dy, layer, Kept(z, z_scale, mask), x, list(size), channels_last, Needs(need_dx, need_ds, need_d))


def _backward(
    dy: Tensor, layer: Layer, kept: Kept, x: Tensor | None, size: Sequence[int], channels_last: bool, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    dx, ds, d = backends.select(dy.device).backward(dy, layer, kept, x, size, _format(channels_last), needs)
    return dx, ds.to(layer.s.dtype), d


_library.impl("conv2d_backward", _conv2d_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("svf_fast::conv2d_backward", lib=_library)
def _(
    dy, x, z, z_scale, mask, v, s, u, scale, stride, padding, dilation, groups, size, channels_last,
    need_dx, need_ds, need_d,
):  # fmt: skip
    memory_format = _format(channels_last)
    dx, ds, d = dy.new_empty(0), s.new_empty(0), dy.new_empty(0)
    if need_dx:
        dx = dy.new_empty((dy.shape[0], v.shape[1] * groups, *size)).to(memory_format=memory_format)
    if need_ds:
        ds = torch.empty_like(s)
    if need_d and mask.numel():
        d = dy.new_empty(dy.shape).to(memory_format=memory_format)
    return dx, ds, d


class _Call(NamedTuple):
    """What a call is beside its tensors; `is_direct`: without torch's dispatcher."""

    relu: bool
    geometry: Geometry
    keep_z: str
    keep_mask: bool
    is_direct: bool


class _Conv2d(torch.autograd.Function):
    """The autograd kernel of `svf_fast::conv2d`, and of direct calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, s: Tensor, u: Tensor, scale: Tensor | None, *rest: Any) -> Any:
        shift, residual, call = rest
        kept: Sequence[Tensor]
        if call.is_direct:
            layer = Layer(v, s, u, scale, shift, call.geometry, call.relu)
            y, kept = _forward(x, layer, residual, call.keep_z, call.keep_mask)
        else:
            arguments = (*rest[:2], call.relu, *call.geometry, call.keep_z, call.keep_mask)
            with _C._AutoDispatchBelowAutograd():
                y, *kept = conv2d(x, v, s, u, scale, *arguments)
            ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if call.keep_z == "input" else None, *kept, v, s, u, scale)
        ctx.call = call
        ctx.size = x.shape[2:]
        ctx.channels_last = memory_format_of(x) is torch.channels_last
        return y if call.is_direct else (y, *kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        x, z, z_scale, mask, v, s, u, scale = ctx.saved_tensors
        need_dx, _, need_ds, _, _, _, need_residual, _ = ctx.needs_input_grad
        geometry: Geometry = ctx.call.geometry
        if ctx.call.is_direct and not torch.is_grad_enabled() and not _is_watched(dy):
            layer, needs = Layer(v, s, u, scale, None, geometry), Needs(need_dx, need_ds, need_residual)
            dx, ds, d = _backward(dy, layer, Kept(z, z_scale, mask), x, ctx.size, ctx.channels_last, needs)
        else:
            dx, ds, d = conv2d_backward(
                dy, x, z, z_scale, mask, v, s, u, scale, *geometry, ctx.size, ctx.channels_last,
                need_dx, need_ds, need_residual,
            )  # fmt: skip
        residual_gradient = (d if mask.numel() else dy) if need_residual else None
        return dx if need_dx else None, None, ds if need_ds else None, None, None, None, residual_gradient, None


def _autograd(*arguments: Any) -> Any:
    relu, stride, padding, dilation, groups, keep_z, keep_mask = arguments[7:]
    call = _Call(relu, Geometry(stride, padding, dilation, groups), keep_z, keep_mask, False)
    return _Conv2d.apply(*arguments[:7], call)


_library.impl("conv2d", _autograd, "Autograd")
conv2d = torch.ops.svf_fast.conv2d.default


def call_conv2d(
    x: Tensor, v: Tensor, s: Tensor, u: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    relu: bool, geometry: Geometry, keep_z: str, keep_mask: bool, needs_graph: bool,
) -> Tensor:  # fmt: skip
    """y of `svf_fast::conv2d`; without torch's dispatcher, which takes up to 65 µs a call, where nothing watches it."""
    if torch.compiler.is_compiling() or _is_watched(x, v, s, u, scale, shift, residual):
        return conv2d(x, v, s, u, scale, shift, residual, relu, *geometry, keep_z, keep_mask)[0]
    if not needs_graph:
        return _forward(x, Layer(v, s, u, scale, shift, geometry, relu), residual, keep_z, keep_mask)[0]
    return _Conv2d.apply(x, v, s, u, scale, shift, residual, _Call(relu, geometry, keep_z, keep_mask, True))


def _is_watched(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call has to be seen by a tracer, a mode, a function transform (batched gradients among them), forward-mode
    differentiation or a tensor subclass."""
    if x.is_meta or type(x) not in _PLAIN:
        return True
    for t in others:
        if t is not None and type(t) not in _PLAIN:
            return True
    return bool(
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _C._functorch.is_legacy_batchedtensor(x)
        or _C._get_tracing_state() is not None
    )


_PLAIN = (Tensor, torch.nn.Parameter)


_NO_DOUBLE_BACKWARD = (
    "double backward through an svf_fast op is not supported: the op keeps too little for a second derivative; "
    "use svf_fast.reference for gradients of gradients"
)


class _Conv2dBackward(torch.autograd.Function):
    """The autograd kernel of `svf_fast::conv2d_backward`: it has no derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with _C._AutoDispatchBelowAutograd():
            return conv2d_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(_NO_DOUBLE_BACKWARD)


_library.impl("conv2d_backward", _Conv2dBackward.apply, "Autograd")
conv2d_backward = torch.ops.svf_fast.conv2d_backward.default


def refuse_double_backward(op: Any) -> None:
    """Makes differentiating through a backward op that is a `custom_op` raise one clear sentence."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(_NO_DOUBLE_BACKWARD)

    op.register_autograd(refuse)
