"""A backend over a set of fused kernels: the contract computed in the way that is picked for each shape (ways.py has what is on
offer). Knows the kernels by kernel_set.py alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from svf_fast.backends import composed_cosine
from svf_fast.backends.composed import ComposedBackend, data_gradient_of, v_convolution
from svf_fast.backends.kernel_set import (
    Cosine,
    Gradients,
    KernelSet,
    Outputs,
    blocks,
    convolution_precision,
    dense_strides,
    product_precision,
)
from svf_fast.backends.measured import Measured, device_seconds
from svf_fast.backends.streamed_cosine import cosine_at
from svf_fast.backends.ways import (
    COMPOSED,
    Key,
    Pick,
    Way,
    backward_ways,
    cosine_ways,
    forward_ways,
    projection_ways,
)
from svf_fast.bits import packed_bytes
from svf_fast.choice import Chooser
from svf_fast.contract import Geometry, Kept, Layer, Needs, dense, fold_left
from svf_fast.quantize import GROUP_PIXELS, noise, quantize
from svf_fast.vendor import convolve, empty, pointwise


class WaysBackend:
    """The kernels of a set in the way that `pick` decides for each shape."""

    def __init__(self, kernels: KernelSet, pick: Pick) -> None:
        self._kernels = kernels
        self._way = pick
        self._composed = ComposedBackend()

    def scale_groups(self, x: Tensor, geometry: Geometry, pixels: int) -> int:
        return blocks(pixels, GROUP_PIXELS)

    def v_convolution(self, x: Tensor, layer: Layer, memory_format: torch.memory_format) -> Tensor:
        return v_convolution(x, layer, memory_format)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, relu: bool,
        memory_format: torch.memory_format,
    ) -> Tensor:  # fmt: skip
        return self._composed.convolve(x, weight, bias, geometry, residual, relu, memory_format)

    def forward(
        self, x: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        def run(way: Way) -> tuple[Tensor, Kept]:
            return self.run_forward(way, x, layer, residual, keep_z, keep_mask, memory_format)

        residual_strides = None if residual is None else residual.stride()
        about = (layer.scale is None, layer.shift is None, residual_strides, layer.relu, keep_z, keep_mask)
        key = _key("forward", x, layer, memory_format, *about)
        with _device_of(x):
            return run(
                self._way(key, partial(forward_ways, self._kernels.offers, x, layer, keep_z, memory_format), run)
            )

    def backward(
        self, dy: Tensor, layer: Layer, kept: Kept, x: Tensor | None, size: Sequence[int],
        memory_format: torch.memory_format, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if needs.ds and x is not None:
            kept = kept._replace(z=v_convolution(x, layer, memory_format))

        def run(way: Way) -> tuple[Tensor, Tensor, Tensor]:
            return self.run_backward(way, dy, layer, kept, size, memory_format, needs)

        about = (
            layer.scale is None,
            tuple(size),
            kept.z.dtype,
            kept.z_scale.shape[0] == 1,
            kept.mask.numel() > 0,
            needs,
        )
        key = _key("backward", dy, layer, memory_format, *about)
        with _device_of(dy):
            return run(
                self._way(key, partial(backward_ways, self._kernels.offers, dy, layer, memory_format, needs), run)
            )

    def project(
        self, z: Tensor, layer: Layer, residual: Tensor | None, keep_mask: bool, memory_format: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        def run(way: Way) -> tuple[Tensor, Tensor]:
            y, kept = self._projected(way, z, layer, residual, "none", keep_mask, memory_format)
            return y, kept.mask

        about = (layer.scale is None, layer.shift is None, residual is None, layer.relu, keep_mask)
        key = _key("project", z, layer, memory_format, *about)
        with _device_of(z):
            return run(self._way(key, partial(projection_ways, self._kernels.offers, z, layer, memory_format), run))

    def max_cosine(self, query: Tensor, support: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        def run(way: Way) -> tuple[Tensor, Tensor]:
            return self._cosine(way).max_cosine(query, support, mask, eps)

        def run_checked(way: Way) -> tuple[Tensor, Tensor, Tensor]:
            value, winner = run(way)
            return value, winner, cosine_at(query, support, mask, eps, winner)

        key = _cosine_key("max_cosine", query, support, mask is None)
        with _device_of(query):
            return run(self._way(key, partial(cosine_ways, query), run_checked))

    def max_cosine_backward(
        self, dvalue: Tensor, query: Tensor, source: Tensor, winners: Tensor, mask: Tensor | None, eps: float,
        size: Sequence[int], is_gathered: bool, need_query: bool, need_support: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        def run(way: Way) -> tuple[Tensor, Tensor]:
            return self._cosine(way).max_cosine_backward(
                dvalue, query, source, winners, mask, eps, size, is_gathered, need_query, need_support
            )

        # how many rows won is another number every time
        about = (mask is None, tuple(size), is_gathered, need_query, need_support)
        key = _cosine_key("max_cosine_backward", query, query, *about)
        with _device_of(query):
            return run(self._way(key, partial(cosine_ways, query), run))

    def _cosine(self, way: Way) -> Cosine:
        return composed_cosine if way == COMPOSED else self._kernels.cosine

    def run_forward(
        self, way: Way, x: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        """`forward` in one way of `forward_ways`, or COMPOSED."""
        if way.path in ("fused", "merged"):
            size = layer.geometry.output_size(x.shape[2:], layer.v.shape[2:])
            if way.path == "merged":
                y = convolve(x, _merged_weight(layer, x.dtype), None, layer.geometry, memory_format)
                return self._finished(y, None, layer._replace(scale=None), residual, keep_z, keep_mask)
            y = empty((x.shape[0], layer.u.shape[0], *size), x, memory_format)
            out = self._outputs(y, layer.v.shape[0], keep_z, keep_mask, memory_format)
            assert way.config is not None
            operands = _dense_operands(layer, x.dtype)
            s: Tensor | None = operands.s
            if x.dtype == torch.float16:
                # where stock operations have it: s ⊙ z would overflow before s ⊙ u does
                operands, s = operands._replace(u=_scaled(operands.u, operands.s)), None
            self._kernels.back_to_back.forward(
                x, operands, s, residual, out, way.config, convolution_precision(x.dtype)
            )
            return y, self._kept(out, keep_mask)
        z = v_convolution(x, layer, memory_format)
        return self._projected(way, z, layer, residual, keep_z, keep_mask, memory_format)

    def _projected(
        self, way: Way, z: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        """y and what is kept from z [N, R, Ho, Wo], by the second half of a way."""
        if way.path == "project":
            assert way.config is not None
            y = empty((z.shape[0], layer.u.shape[0], *z.shape[2:]), z, memory_format)
            out = self._outputs(y, z.shape[1], "int8" if keep_z == "int8" else "none", keep_mask, memory_format)
            operands = _dense_operands(layer, z.dtype)
            left = _scaled(operands.u, operands.s)
            self._kernels.projection.forward(
                z, left, operands, residual, out, way.config, convolution_precision(z.dtype)
            )
            return y, self._kept(out._replace(z=z if keep_z == "exact" else None), keep_mask)
        if way.path == "epilogue":
            groups = layer.geometry.groups
            left = fold_left(layer.u, groups, layer.s, layer.scale, z.dtype)
            if groups == 1:
                y = pointwise(z, left.flatten(1), memory_format)
            else:
                y = convolve(z, left, None, Geometry(groups=groups), memory_format)
            return self._finished(y, z, layer._replace(scale=None), residual, keep_z, keep_mask)
        if way != COMPOSED:
            raise ValueError(f"no way of a forward is called {way}")
        y, mask = self._composed.project(z, layer, residual, keep_mask, memory_format)
        return y, _kept_of(y, z, keep_z, mask, partial(quantize, group_pixels=GROUP_PIXELS))

    def _finished(
        self, y: Tensor, z: Tensor | None, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool
    ) -> tuple[Tensor, Kept]:
        """The epilogue kernel on a bare product y, in place."""
        mask = _empty_mask(y) if keep_mask and self._kernels.masks_epilogue(y) else None
        out = Outputs(y, mask)
        self._kernels.elementwise.epilogue(_dense_operands(layer, y.dtype), residual, out)
        return y, _kept_of(y, z, keep_z, self._mask(out, keep_mask), self._quantize)

    def _mask(self, out: Outputs, keep_mask: bool) -> Tensor:
        """The mask as the contract has it; one that no kernel could write is packed from y."""
        if out.mask is not None:
            return out.mask
        return self._kernels.elementwise.pack(out.y) if keep_mask else out.y.new_empty(0, dtype=torch.uint8)

    def _outputs(
        self, y: Tensor, rank: int, keep_z: str, keep_mask: bool, memory_format: torch.memory_format
    ) -> Outputs:
        """Fresh tensors for what a product's kernel writes beside y."""
        batch, _, height, width = y.shape
        shape = (batch, rank, height, width)
        z = q = q_scale = None
        mask = _empty_mask(y) if keep_mask and self._kernels.masks_product(y) else None
        if keep_z == "exact":
            z = empty(shape, y, memory_format)
        elif keep_z == "int8":
            q = torch.empty(shape, dtype=torch.int8, device=y.device, memory_format=memory_format)
            groups = blocks(batch * height * width, GROUP_PIXELS)
            q_scale = torch.empty(groups, rank, dtype=torch.float32, device=y.device)
        return Outputs(y, mask, z, q, q_scale)

    def _kept(self, out: Outputs, keep_mask: bool) -> Kept:
        """What the kernels wrote, as the contract has it."""
        z = out.q if out.z is None else out.z
        no_scale = out.y.new_empty(0, dtype=torch.float32) if out.q_scale is None else out.q_scale
        return Kept(out.y.new_empty(0) if z is None else z, no_scale, self._mask(out, keep_mask))

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Levels and scales of z by the kernel."""
        q = torch.empty_like(z, dtype=torch.int8)
        q_scale = z.new_empty(blocks(z.numel() // z.shape[1], GROUP_PIXELS), z.shape[1], dtype=torch.float32)
        if z.numel():
            self._kernels.elementwise.quantize(z, q, q_scale)
        return q, q_scale

    def run_backward(
        self, way: Way, dy: Tensor, layer: Layer, kept: Kept, size: Sequence[int],
        memory_format: torch.memory_format, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """`backward` in one way of `backward_ways`, or COMPOSED; z is in `kept`."""
        if way == COMPOSED:
            return self._composed.backward(dy, layer, kept, None, size, memory_format, needs)
        if way.path == "epilogue":
            return self._masked_backward(dy, layer, kept, size, memory_format, needs)
        config = way.config
        assert config is not None
        batch, _, height, width = dy.shape
        rank = layer.v.shape[0]
        d, partial_sums = None, None
        if needs.d and kept.mask.numel():
            d = empty(dy.shape, dy, memory_format)
        if needs.ds:
            programs = blocks(batch * height * width, config.BM)
            partial_sums = torch.empty(programs, rank, dtype=torch.float32, device=dy.device)
        out = Gradients(d, partial_sums, dense_strides(dy.shape, memory_format))
        products = convolution_precision(dy.dtype)
        if kept.z_scale.shape[0] == 1:
            # kept by a backend that has one group of all pixels
            groups = blocks(batch * height * width, GROUP_PIXELS)
            kept = kept._replace(z_scale=kept.z_scale.expand(groups, rank).contiguous())
        operands = _dense_operands(layer, dy.dtype)
        s: Tensor | None = operands.s
        if dy.dtype == torch.float16:
            # where stock operations have them: d ⊙ scale and s ⊙ g would overflow before the factors do
            folded = fold_left(operands.u, 1, None, operands.scale, dy.dtype).flatten(1)
            values = operands.s.view(-1, 1, 1, 1)
            operands, s = operands._replace(u=folded, scale=None, v=(operands.v * values).to(dy.dtype)), None
        dx = dy.new_empty(0)
        if way.path == "fused":
            dx = empty((batch, layer.v.shape[1], *size), dy, memory_format)
            if layer.geometry.stride != (1, 1):
                dx.zero_()
            self._kernels.back_to_back.backward(dy, operands, s, kept, out, dx, config, products)
        else:
            weighted = empty((batch, rank, height, width), dy, memory_format) if needs.dx else None
            self._kernels.projection.backward(dy, operands, s, kept, out, weighted, config, products)
            if weighted is not None:
                dx = data_gradient_of(weighted, operands.v.to(dy.dtype), layer, size, memory_format)
        ds = dy.new_empty(0) if partial_sums is None else partial_sums.sum(0)
        return dx, ds, dy.new_empty(0) if d is None else d

    def _masked_backward(
        self,
        dy: Tensor,
        layer: Layer,
        kept: Kept,
        size: Sequence[int],
        memory_format: torch.memory_format,
        needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One kernel for the mask, stock operations behind it."""
        if not kept.mask.numel():
            return self._composed.backward(dy, layer, kept, None, size, memory_format, needs)
        d = self._kernels.elementwise.keep_masked(dense(dy, memory_format), kept.mask)
        unmasked = kept._replace(mask=kept.mask.new_empty(0))
        dx, ds, nothing = self._composed.backward(d, layer, unmasked, None, size, memory_format, needs)
        return dx, ds, d if needs.d else nothing


def _device_of(t: Tensor) -> AbstractContextManager[object]:
    """Makes the device of t, where kernels are compiled, timed and launched, the current one."""
    is_elsewhere = t.is_cuda and t.device.index != torch.cuda.current_device()
    return torch.cuda.device(t.device) if is_elsewhere else nullcontext()


def _kept_of(
    y: Tensor, z: Tensor | None, keep_z: str, mask: Tensor, to_int8: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Kept:
    """What is kept of a z that stock operations made."""
    no_scale = y.new_empty(0, dtype=torch.float32)
    if z is None or keep_z not in ("exact", "int8"):
        return Kept(y.new_empty(0), no_scale, mask)
    return Kept(z, no_scale, mask) if keep_z == "exact" else Kept(*to_int8(z), mask)


def _cosine_key(what: str, query: Tensor, support: Tensor, *about: Hashable) -> Key:
    shapes = (query.shape, query.stride(), support.shape, support.stride())
    return Key(what, product_precision(query.dtype), (query.dtype, *shapes, *about))


def _key(what: str, t: Tensor, layer: Layer, memory_format: torch.memory_format, *about: Hashable) -> Key:
    shapes = (t.shape, t.stride(), layer.v.shape, layer.u.shape)
    types = (t.dtype, layer.u.dtype, memory_format is torch.channels_last)
    return Key(what, convolution_precision(t.dtype), (*types, *shapes, layer.geometry, *about))


def _dense_operands(layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer with its factors dense and of `dtype` and its vectors dense, as the kernels read them."""
    # nearly always they are, and asking costs a fifth of making sure; v is the vendor's unless the layer is pointwise
    read = (layer.s, layer.u, layer.scale, layer.shift, layer.v if layer.is_pointwise else None)
    if layer.u.dtype == layer.v.dtype == dtype and all(t is None or t.is_contiguous() for t in read):
        return layer
    return layer._replace(
        v=layer.v.to(dtype).contiguous() if layer.is_pointwise else layer.v,
        u=layer.u.to(dtype).contiguous(),
        s=layer.s.contiguous(),
        scale=None if layer.scale is None else layer.scale.contiguous(),
        shift=None if layer.shift is None else layer.shift.contiguous(),
    )


def _scaled(u: Tensor, s: Tensor) -> Tensor:
    """u ⊙ s [Co, R] in u's dtype, multiplied in the wider one, by one kernel."""
    return torch.mul(u, s, out=torch.empty(u.shape, dtype=u.dtype, device=u.device))


def _merged_weight(layer: Layer, dtype: torch.dtype) -> Tensor:
    """scale ⊙ U diag(s) Vᵀ [Co, Ci, K, K]."""
    left = fold_left(layer.u, 1, layer.s, layer.scale, torch.promote_types(dtype, layer.v.dtype)).flatten(1)
    return (left @ layer.v.flatten(1).to(left.dtype)).view(-1, *layer.v.shape[1:]).to(dtype)


def _empty_mask(y: Tensor) -> Tensor:
    return torch.empty(packed_bytes(y.numel()), dtype=torch.uint8, device=y.device)


def measured_backend(kernels: KernelSet, versions: str, unfit: tuple[type[Exception], ...]) -> WaysBackend:
    """The backend of this process's CUDA devices, which are taken to be alike; `versions` names what its kernels depend on."""
    # made now: no table can be while a graph is captured
    noise(torch.device("cuda", torch.cuda.current_device()))
    library = f"torch {torch.__version__} cudnn {torch.backends.cudnn.version()}"
    environment = f"{torch.cuda.get_device_name()} {library} {kernels.name} {versions}"
    return WaysBackend(kernels, Measured(Chooser(environment, device_seconds, unfit), unfit))
