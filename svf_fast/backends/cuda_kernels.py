"""The kernel set in CUDA C++ (csrc/cuda), and the backend over it: tensors as the native ops take them, tiles on offer, when it can
run. For NVIDIA devices of compute capability 8.0 and newer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from svf_fast.backends import native
from svf_fast.backends.by_ways import WaysBackend, measured_backend
from svf_fast.backends.kernel_set import Config, Gradients, KernelSet, Outputs, product_precision, why_no_device
from svf_fast.backends.streamed_cosine import rows, search, won
from svf_fast.bits import packed_bytes
from svf_fast.contract import Kept, Layer, dense, memory_format_of

_LARGEST_RANK = 256
# Query positions × support positions of a block.
_COSINE_TILE = (128, 128)
# How csrc/cuda/launch.h numbers the kinds of products.
_PRODUCTS = {"tf32": 2, "tf32x3": 3}
# Bytes of shared memory that a block of the back-to-back kernels takes, by the rank's tile, in half precisions and in float32. The other
# kernels fit on every device; that by wgmma, where there is wgmma.
_SHARED_BYTES = {(128, False): 101_376, (256, False): 115_712, (128, True): 117_760, (256, True): 148_480}
# What a block may have on compute capability 9.0, more than any of them takes.
_MOST_SHARED_BYTES = 227 * 1024
_HALVES = {torch.bfloat16: 0, torch.float16: 1}


class Offers:
    """The tiles that csrc/cuda compiles; the contraction goes by 128 bytes. `shared_bytes`: what the device gives a block."""

    def __init__(self, has_wgmma: bool, shared_bytes: int = _MOST_SHARED_BYTES) -> None:
        self._has_wgmma = has_wgmma
        self._shared_bytes = shared_bytes

    def back_to_back_forward(self, rank: int, precision: str, is_int8: bool, is_roomy: bool) -> list[Config]:
        if not self._keeps_tile(rank, precision):
            return []
        by_wgmma = [Config(128, 64, 64, _rank_tile(rank), 12, 4)] * (self._has_wgmma and precision == "ieee")
        return [*by_wgmma, Config(64, 128, 0, _rank_tile(rank), 8, 3)]

    def back_to_back_backward(self, rank: int, precision: str, is_strided: bool) -> list[Config]:
        return [Config(64, 128, 0, _rank_tile(rank), 8, 3)] if self._keeps_tile(rank, precision) else []

    def projection_forward(self, precision: str) -> list[Config]:
        return [Config(128, 128, 0, 0, 8, 3), Config(64, 64, 0, 0, 4, 4)]

    def projection_backward(self, rank: int, precision: str) -> list[Config]:
        wide, narrow = Config(128, 0, 0, 128, 8, 3), Config(64, 0, 0, 64, 4, 4)
        return [narrow] if rank <= 64 else [wide, narrow]

    def _keeps_tile(self, rank: int, precision: str) -> bool:
        """Whether a tile of z or g fits on the chip beside the operands of both products."""
        return rank <= _LARGEST_RANK and _SHARED_BYTES[_rank_tile(rank), precision != "ieee"] <= self._shared_bytes


class _BackToBack:
    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def forward(
        self, x: Tensor, layer: Layer, s: Tensor | None, residual: Tensor | None, out: Outputs, config: Config, precision: str
    ) -> None:  # fmt: skip
        self._ops.cuda_back_to_back(
            _adjacent(_visited(x, layer)), layer.v, _single(s), layer.u, _single(layer.scale), _single(layer.shift),
            None if residual is None else _adjacent(residual), out.y, out.mask, out.z, out.q, out.q_scale, layer.relu,
            _products(x.dtype, precision), config.BM,
        )  # fmt: skip

    def backward(
        self, dy: Tensor, layer: Layer, s: Tensor | None, kept: Kept, out: Gradients, dx: Tensor, config: Config,
        precision: str,
    ) -> None:  # fmt: skip
        self._ops.cuda_back_to_back_backward(
            _adjacent(dy), _present(kept.mask), layer.u, _single(layer.scale), _single(s), layer.v, *_kept_z(kept, out),
            out.d, out.partial, _visited(dx, layer), _products(dy.dtype, precision),
        )  # fmt: skip


class _Projection:
    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def forward(
        self, z: Tensor, left: Tensor, layer: Layer, residual: Tensor | None, out: Outputs, config: Config, precision: str
    ) -> None:  # fmt: skip
        self._ops.cuda_project(
            dense(z, torch.channels_last), left, _single(layer.scale), _single(layer.shift),
            None if residual is None else _adjacent(residual), out.y, out.mask, out.q, out.q_scale, layer.relu,
            _products(z.dtype, precision), config.BM,
        )  # fmt: skip

    def backward(
        self, dy: Tensor, layer: Layer, s: Tensor | None, kept: Kept, out: Gradients, weighted: Tensor | None,
        config: Config, precision: str,
    ) -> None:  # fmt: skip
        self._ops.cuda_project_backward(
            _adjacent(dy), _present(kept.mask), layer.u, _single(layer.scale), _single(s), *_kept_z(kept, out),
            out.d, out.partial, weighted, _products(dy.dtype, precision), config.BM,
        )  # fmt: skip


class _Elementwise:
    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def pack(self, y: Tensor) -> Tensor:
        mask = torch.empty(packed_bytes(y.numel()), dtype=torch.uint8, device=y.device)
        self._ops.cuda_pack(y, mask)
        return mask

    def keep_masked(self, values: Tensor, mask: Tensor) -> Tensor:
        out = torch.empty_like(values)
        self._ops.cuda_keep_masked(values, mask, out)
        return out

    def epilogue(self, layer: Layer, residual: Tensor | None, out: Outputs) -> None:
        added = None if residual is None else dense(residual, memory_format_of(out.y))
        self._ops.cuda_epilogue(out.y, _single(layer.scale), _single(layer.shift), added, out.mask, layer.relu)

    def quantize(self, z: Tensor, q: Tensor, q_scale: Tensor) -> None:
        z = z if z.dtype in (torch.float32, *_HALVES) else z.float()
        self._ops.cuda_quantize(dense(z, memory_format_of(q)), q, q_scale)


class _Cosine:
    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def max_cosine(self, query: Tensor, support: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        task = search(query, support, mask, *_COSINE_TILE)
        products = _products(query.dtype, product_precision(query.dtype))
        self._ops.cuda_max_cosine(
            task.query, task.support, _single(task.weight), task.query_norm, task.support_norm, task.best, task.winner, eps,
            task.per_split, products,
        )  # fmt: skip
        return task.results(query.dtype)

    def max_cosine_backward(
        self, dvalue: Tensor, query: Tensor, source: Tensor, winners: Tensor, mask: Tensor | None, eps: float,
        size: Sequence[int], is_gathered: bool, need_query: bool, need_support: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, channels, height, width = size
        supports = height * width
        if is_gathered:
            source = source.contiguous()
        order, first_of, source, row_of, _ = won(winners, source, size, is_gathered)
        q = rows(query)
        weight = None if mask is None else mask.flatten(1).float().contiguous()
        nothing = query.new_empty(0)
        # written with channels adjacent, whatever the query's own layout is
        dquery = torch.empty_like(query, memory_format=torch.channels_last) if need_query else None
        dsupport = query.new_empty(batch, supports, channels) if need_support else None
        coefficients = torch.empty(batch, q.shape[2], 3, dtype=torch.float32, device=q.device)
        self._ops.cuda_max_cosine_backward(
            dvalue.contiguous(), q, source, weight, row_of.expand(batch, supports).contiguous(), winners.contiguous(), order,
            first_of, coefficients, dquery, dsupport, eps,
        )  # fmt: skip
        return (
            nothing if dquery is None else dense(dquery, memory_format_of(query)),
            nothing if dsupport is None else dsupport.view(batch, height, width, channels).permute(0, 3, 1, 2),
        )


def kernel_set(ops: Any, has_wgmma: bool, shared_bytes: int = _MOST_SHARED_BYTES) -> KernelSet:
    """The kernels behind a namespace of native ops; `has_wgmma`: compiled for compute capability 9.0, and on it."""
    return KernelSet(
        "cuda", _BackToBack(ops), _Projection(ops), _Elementwise(ops), _Cosine(ops), Offers(has_wgmma, shared_bytes),
        # whole bytes of it
        masks_product=lambda y: y.shape[1] % 8 == 0,
        # in memory order, whatever the layout
        masks_epilogue=lambda y: True,
    )  # fmt: skip


def why_unusable() -> str | None:
    """Why the kernels cannot run on this process's CUDA devices, or None."""
    reason = native.load()
    if reason is not None:
        return reason
    if not native.has_cuda_kernels():
        return "the extension was built without its CUDA kernels: they need nvcc on PATH while it is built"
    return why_no_device() or _launch_error(torch.cuda.current_device())


@cache
def _launch_error(device: int) -> str | None:
    """What the device says to the smallest of the kernels, such as one compiled for other architectures alone; None where it runs."""
    values = torch.ones(8, device=torch.device("cuda", device))
    try:
        torch.ops.svf_fast_cpp.cuda_pack(values, values.new_empty(1, dtype=torch.uint8))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def make() -> WaysBackend:
    """The backend of this process's CUDA devices, which are taken to be alike."""
    library = native.library_path()
    assert library is not None
    version = hashlib.sha256(library.read_bytes()).hexdigest()[:12]
    return measured_backend(native_kernel_set(), version, (RuntimeError,))


def native_kernel_set() -> KernelSet:
    """The kernels of the compiled extension, on the current device."""
    ops = torch.ops.svf_fast_cpp
    # its stub does not have all of it
    properties: Any = torch.cuda.get_device_properties()
    has_wgmma = torch.cuda.get_device_capability() == (9, 0) and ops.cuda_has_wgmma()
    return kernel_set(ops, has_wgmma, properties.shared_memory_per_block_optin)


def _rank_tile(rank: int) -> int:
    return 128 if rank <= 128 else 256


def _products(dtype: torch.dtype, precision: str) -> int:
    return _HALVES[dtype] if precision == "ieee" else _PRODUCTS[precision]


def _single(vector: Tensor | None) -> Tensor | None:
    """A dense vector in float32, as the kernels read it."""
    return None if vector is None else vector.float()


def _present(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def _adjacent(t: Tensor) -> Tensor:
    """t [N, C, H, W] of any pixel strides with its channels adjacent: a copy where they are not."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else dense(t, torch.channels_last)


def _visited(t: Tensor, layer: Layer) -> Tensor:
    """The pixels of t [N, Ci, H, W] that a pointwise layer of any stride visits."""
    down, right = layer.geometry.stride
    return t if (down, right) == (1, 1) else t[:, :, ::down, ::right]


def _kept_z(kept: Kept, out: Gradients) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """z in full, or int8 levels and their scales, where ds is asked for."""
    if out.partial is None:
        return None, None, None
    z = dense(kept.z, torch.channels_last)
    return (None, z, kept.z_scale) if kept.z_scale.numel() else (z, None, None)
