"""The `triton` backend: which kernels run for a layer. Several exact ways are offered for each shape; the fastest is found by
measurement on first use and remembered, and the plain composition is taken where nothing beats it.

fused      both matrix products of a pointwise layer in one kernel (rank ≤ 256)
project    the vendor's V-convolution or data gradient, the projection with everything around it in one kernel
epilogue   the vendor's convolution and matrix product, everything element-wise in one kernel behind them
merged     the vendor's convolution with U diag(s) Vᵀ multiplied out, where no z has to be kept: orthogonal factors make this the
           cheaper order where V is square
composed   stock operations alone (the `torch` backend)"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from svf_fast.backends.composed import ComposedBackend, data_gradient_of, v_convolution
from svf_fast.bits import packed_bytes
from svf_fast.choice import Chooser
from svf_fast.contract import Geometry, Kept, Layer, Needs, fold_left
from svf_fast.kernels import back_to_back, configs, cosine, elementwise, projection
from svf_fast.kernels.launch import (
    Config,
    Gradients,
    Outputs,
    blocks,
    convolution_precision,
    dense_strides,
    has_words,
    strides_of,
)
from svf_fast.quantize import GROUP_PIXELS
from svf_fast.vendor import convolve, empty, pointwise

# What does not compile, or does not fit, on a device is left out there.
UNFIT = (OutOfResources, triton.CompilationError, torch.OutOfMemoryError)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Way(NamedTuple):
    """One exact way to compute a layer's forward or backward, and the tiles of its kernel."""

    path: str
    config: Config | None = None

    def __str__(self) -> str:
        return self.path if self.config is None else f"{self.path} {'x'.join(map(str, self.config))}"


COMPOSED = Way("composed")
# What forward, backward or projection return.
Results = tuple[Tensor | Kept, ...]
# Largest difference between two exact ways, relative to the result: several times the rounding of half precisions and int8,
# and far below what a wrong index does.
_AGREEMENT = 3e-2
# Decides for a key which of the ways on offer to take; the last argument runs one.
Pick = Callable[[Hashable, Callable[[], list[Way]], Callable[[Way], Any]], Way]


def first_offer(key: Hashable, offer: Callable[[], list[Way]], run: Callable[[Way], object]) -> Way:
    """The choice without measuring, the same in every run."""
    return offer()[0]


class Measured:
    """The fastest way of each key as a Chooser finds it, of those whose results agree with the plain composition's.

    Nothing is measured while a CUDA graph is captured, and nothing measured is used under torch.use_deterministic_algorithms:
    what is not known then takes the first offer. (Inside torch.compile the op is opaque: it measures on its first run.)
    """

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self._ways: dict[Hashable, Way] = {}

    def __call__(self, key: Hashable, offer: Callable[[], list[Way]], run: Callable[[Way], Results]) -> Way:
        # two roundings of one sum are both right, but only one of them is the same in every run
        if torch.are_deterministic_algorithms_enabled():
            return first_offer(key, offer, run)
        way = self._ways.get(key)
        if way is not None:
            return way
        ways = offer()
        by_name = {str(way): way for way in (*ways, COMPOSED)}
        name = self._chooser.known(key)
        if name not in by_name:
            if _is_capturing():
                return ways[0]
            expected = _tensors(run(COMPOSED))
            if not all(t.isfinite().all() for t in expected if t.is_floating_point()):
                # nothing can be compared: decided another time
                return COMPOSED
            agreeing = {
                n: partial(run, w) for n, w in by_name.items() if w == COMPOSED or _agrees(key, w, run, expected)
            }
            name = str(COMPOSED)
            if len(agreeing) > 1:
                name = self._chooser.choose(key, agreeing, name)
        self._ways[key] = by_name[name]
        return by_name[name]


def _agrees(key: Hashable, way: Way, run: Callable[[Way], Results], expected: list[Tensor]) -> bool:
    """Whether the results of `way` are those expected, to rounding; False where it does not fit on the device."""
    try:
        found = _tensors(run(way))
    except UNFIT:
        return False
    for result, reference in zip(found, expected, strict=True):
        if result.shape != reference.shape or result.dtype != reference.dtype:
            difference = torch.inf
        elif reference.dtype == torch.uint8:
            # a byte of the mask differs where rounding decides one of its eight signs
            difference = float((result != reference).float().mean()) / 8 if reference.numel() else 0.0
        else:
            difference = max(
                _ratio(result.double() - reference, reference.double(), order) for order in (2.0, torch.inf)
            )
        # NaN compares false
        if not difference <= _AGREEMENT:
            warnings.warn(
                f"svf_fast: the kernels of {way} differ from stock operations by {difference:.1e} and are not used for {key}",
                stacklevel=2,
            )
            return False
    return True


def _ratio(difference: Tensor, reference: Tensor, order: float) -> float:
    """‖difference‖ / ‖reference‖: of order 2 for what is wrong everywhere, of the largest elements for what is wrong in a few."""
    if difference.numel() == 0:
        return 0.0
    off, size = (float(torch.linalg.vector_norm(t, order)) for t in (difference, reference))
    return (off / size if size else torch.inf) if off else 0.0


def _tensors(results: Results) -> list[Tensor]:
    """The tensors of a forward's, projection's or backward's results."""
    return [t for part in results for t in ([part] if isinstance(part, Tensor) else part)]


class TritonBackend:
    """Kernels in the way that `pick` decides for each shape."""

    max_cosine = staticmethod(cosine.max_cosine)
    max_cosine_backward = staticmethod(cosine.max_cosine_backward)

    def __init__(self, pick: Pick) -> None:
        self._way = pick
        self._composed = ComposedBackend()

    def scale_groups(self, pixels: int) -> int:
        return (pixels + GROUP_PIXELS - 1) // GROUP_PIXELS

    def v_convolution(self, x: Tensor, layer: Layer, memory_format: torch.memory_format) -> Tensor:
        return v_convolution(x, layer, memory_format)

    def forward(
        self, x: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        def run(way: Way) -> tuple[Tensor, Kept]:
            return self.run_forward(way, x, layer, residual, keep_z, keep_mask, memory_format)

        about = (layer.scale is None, layer.shift is None, residual is None, layer.relu, keep_z, keep_mask)
        key = _key("forward", x, layer, memory_format, *about)
        return run(self._way(key, partial(forward_ways, x, layer, keep_z, memory_format), run))

    def backward(
        self, dy: Tensor, layer: Layer, kept: Kept, x: Tensor | None, size: Sequence[int],
        memory_format: torch.memory_format, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if needs.ds and x is not None:
            kept = kept._replace(z=v_convolution(x, layer, memory_format))

        def run(way: Way) -> tuple[Tensor, Tensor, Tensor]:
            return self.run_backward(way, dy, layer, kept, size, memory_format, needs)

        about = (layer.scale is None, tuple(size), kept.z.dtype, kept.mask.numel() > 0, needs, dy.stride())
        key = _key("backward", dy, layer, memory_format, *about)
        return run(self._way(key, partial(backward_ways, dy, layer, memory_format, needs), run))

    def project(
        self, z: Tensor, layer: Layer, residual: Tensor | None, keep_mask: bool, memory_format: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        def run(way: Way) -> tuple[Tensor, Tensor]:
            y, kept = self._projected(way, z, layer, residual, "none", keep_mask, memory_format)
            return y, kept.mask

        key = _key("project", z, layer, memory_format, residual is None, layer.relu, keep_mask)
        return run(self._way(key, partial(projection_ways, z, layer, memory_format), run))

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
            y = empty((len(x), layer.u.shape[0], *size), x, memory_format)
            out = _outputs(y, layer.v.shape[0], keep_z, keep_mask, memory_format)
            assert way.config is not None
            back_to_back.forward(
                x, _dense_operands(layer, x.dtype), residual, out, way.config, convolution_precision(x.dtype)
            )
            return y, _kept(out, keep_mask)
        z = v_convolution(x, layer, memory_format)
        return self._projected(way, z, layer, residual, keep_z, keep_mask, memory_format)

    def _projected(
        self, way: Way, z: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        """y and what is kept from z [N, R, Ho, Wo], by the second half of a way."""
        if way.path == "project":
            assert way.config is not None
            y = empty((len(z), layer.u.shape[0], *z.shape[2:]), z, memory_format)
            out = _outputs(y, z.shape[1], "int8" if keep_z == "int8" else "none", keep_mask, memory_format)
            left = torch.empty(layer.u.shape, dtype=z.dtype, device=z.device)
            torch.mul(layer.u, layer.s, out=left)
            products = convolution_precision(z.dtype)
            projection.forward(z, left, _dense_operands(layer, z.dtype), residual, out, way.config, products)
            return y, _kept(out._replace(z=z if keep_z == "exact" else None), keep_mask)
        if way.path == "epilogue":
            groups = layer.geometry.groups
            left = fold_left(layer.u, groups, layer.s, None, z.dtype)
            if groups == 1:
                y = pointwise(z, left.flatten(1), memory_format)
            else:
                y = convolve(z, left, None, Geometry(groups=groups), memory_format)
            return self._finished(y, z, layer, residual, keep_z, keep_mask)
        y, mask = self._composed.project(z, layer, residual, keep_mask, memory_format)
        return y, self._kept_of(y, z, keep_z, mask)

    def _finished(
        self, y: Tensor, z: Tensor | None, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool
    ) -> tuple[Tensor, Kept]:
        """The epilogue kernel on a bare product y, in place."""
        mask = None
        if keep_mask and has_words(strides_of(y), y.shape[1]):
            mask = torch.empty(packed_bytes(y.numel()), dtype=torch.uint8, device=y.device)
        elementwise.epilogue(_dense_operands(layer, y.dtype), residual, Outputs(y, mask))
        if mask is None:
            mask = elementwise.pack(y) if keep_mask else y.new_empty(0, dtype=torch.uint8)
        return y, self._kept_of(y, z, keep_z, mask)

    def _kept_of(self, y: Tensor, z: Tensor | None, keep_z: str, mask: Tensor) -> Kept:
        """What is kept of a z that stock operations made."""
        no_scale = y.new_empty(0, dtype=torch.float32)
        if z is None or keep_z not in ("exact", "int8"):
            return Kept(y.new_empty(0), no_scale, mask)
        if keep_z == "exact":
            return Kept(z, no_scale, mask)
        q = torch.empty_like(z, dtype=torch.int8)
        q_scale = z.new_empty(self.scale_groups(z.numel() // z.shape[1]), z.shape[1], dtype=torch.float32)
        if z.numel():
            elementwise.quantize(z, q, q_scale)
        return Kept(q, q_scale, mask)

    def run_backward(
        self, way: Way, dy: Tensor, layer: Layer, kept: Kept, size: Sequence[int],
        memory_format: torch.memory_format, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """`backward` in one way of `backward_ways`, or COMPOSED; z is in `kept`."""
        if way.path == "composed":
            return self._composed.backward(dy, layer, kept, None, size, memory_format, needs)
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
        dx = dy.new_empty(0)
        if way.path == "fused":
            dx = empty((batch, layer.v.shape[1], *size), dy, memory_format)
            if layer.geometry.stride != (1, 1):
                dx.zero_()
            back_to_back.backward(dy, _dense_operands(layer, dy.dtype), kept, out, dx, config, products)
        else:
            weighted = empty((batch, rank, height, width), dy, memory_format) if needs.dx else None
            projection.backward(dy, _dense_operands(layer, dy.dtype), kept, out, weighted, config, products)
            if weighted is not None:
                dx = data_gradient_of(weighted, layer.v.to(dy.dtype), layer, size, memory_format)
        ds = dy.new_empty(0) if partial_sums is None else partial_sums.sum(0)
        return dx, ds, dy.new_empty(0) if d is None else d


def forward_ways(x: Tensor, layer: Layer, keep_z: str, memory_format: torch.memory_format) -> list[Way]:
    """What is offered for a forward; the first is taken where nothing may be measured."""
    ways = projection_ways(x, layer, memory_format, keep_z == "int8")
    if ways == [COMPOSED]:
        return ways
    rank = layer.v.shape[0]
    if layer.geometry.groups == 1:
        if keep_z not in ("exact", "int8"):
            ways.append(Way("merged"))
        if layer.is_pointwise:
            products = convolution_precision(x.dtype)
            fused = [Way("fused", c) for c in configs.back_to_back_forward(rank, products, keep_z == "int8")]
            ways = fused + ways if memory_format is torch.channels_last else ways + fused
    return ways


def projection_ways(z: Tensor, layer: Layer, memory_format: torch.memory_format, is_int8: bool = False) -> list[Way]:
    """What is offered from z on."""
    if z.dtype not in _DTYPES or z.numel() == 0:
        return [COMPOSED]
    ways = [Way("epilogue")]
    if layer.geometry.groups == 1:
        ways = [Way("project", c) for c in configs.projection_forward(convolution_precision(z.dtype), is_int8)] + ways
    # contiguous pictures are read pixel by pixel: stock operations are the safe choice there
    return ways if memory_format is torch.channels_last else [COMPOSED, *ways]


def backward_ways(dy: Tensor, layer: Layer, memory_format: torch.memory_format, needs: Needs) -> list[Way]:
    """What is offered for a backward; the first is taken where nothing may be measured."""
    if dy.dtype not in _DTYPES or dy.numel() == 0 or layer.geometry.groups != 1 or not (needs.dx or needs.ds):
        return [COMPOSED]
    rank, products = layer.v.shape[0], convolution_precision(dy.dtype)
    ways = [Way("project", c) for c in configs.projection_backward(rank, products)]
    if layer.is_pointwise and needs.dx:
        ways = [Way("fused", c) for c in configs.back_to_back_backward(rank, products)] + ways
    return ways if memory_format is torch.channels_last else [COMPOSED, *ways]


def _key(what: str, t: Tensor, layer: Layer, memory_format: torch.memory_format, *about: Hashable) -> Hashable:
    """What a choice depends on; its text is the key on disk."""
    return (
        what, str(t.dtype), tuple(t.shape), tuple(layer.v.shape), tuple(layer.u.shape), tuple(layer.geometry),
        memory_format is torch.channels_last, convolution_precision(t.dtype), *about,
    )  # fmt: skip


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


def _merged_weight(layer: Layer, dtype: torch.dtype) -> Tensor:
    """scale ⊙ U diag(s) Vᵀ [Co, Ci, K, K]."""
    left = fold_left(layer.u, 1, layer.s, layer.scale, torch.promote_types(dtype, layer.v.dtype)).flatten(1)
    return (left @ layer.v.flatten(1).to(left.dtype)).view(-1, *layer.v.shape[1:]).to(dtype)


def _outputs(y: Tensor, rank: int, keep_z: str, keep_mask: bool, memory_format: torch.memory_format) -> Outputs:
    """Fresh tensors for what a kernel writes beside y; the mask only where it can be written in words."""
    shape = (len(y), rank, *y.shape[2:])
    mask = z = q = q_scale = None
    if keep_mask and has_words(strides_of(y), y.shape[1]):
        mask = torch.empty(packed_bytes(y.numel()), dtype=torch.uint8, device=y.device)
    if keep_z == "exact":
        z = empty(shape, y, memory_format)
    elif keep_z == "int8":
        q = torch.empty(shape, dtype=torch.int8, device=y.device, memory_format=memory_format)
        groups = blocks(len(y) * y.shape[2] * y.shape[3], GROUP_PIXELS)
        q_scale = torch.empty(groups, rank, dtype=torch.float32, device=y.device)
    return Outputs(y, mask, z, q, q_scale)


def _kept(out: Outputs, keep_mask: bool) -> Kept:
    """What the kernels wrote, as the contract has it; a mask that could not be written in words is packed from y."""
    mask = out.mask
    if mask is None:
        mask = elementwise.pack(out.y) if keep_mask else out.y.new_empty(0, dtype=torch.uint8)
    z = out.q if out.z is None else out.z
    no_scale = out.y.new_empty(0, dtype=torch.float32) if out.q_scale is None else out.q_scale
    return Kept(out.y.new_empty(0) if z is None else z, no_scale, mask)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _seconds(way: Callable[[], object]) -> list[float]:
    """Seconds of ten runs on the current CUDA device, after three that compile and warm up."""
    for _ in range(3):
        way()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    marks[0].record()
    for mark in marks[1:]:
        way()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def make() -> TritonBackend:
    """The backend of this process's CUDA devices, which are taken to be alike."""
    versions = f"{torch.cuda.get_device_name()} torch {torch.__version__} triton {triton.__version__}"
    return TritonBackend(Measured(Chooser(versions, _seconds, UNFIT)))
