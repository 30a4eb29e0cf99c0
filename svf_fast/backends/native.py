"""The `cpp` backend on CPU: the whole layer in compiled kernels (csrc/cpu) that make a tile of z, keep it, weight it by s and project
it while it lies in cache. float32 and bfloat16, channels_last, one group; stock operations otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svf_fast import bits
from svf_fast.backends import composed_cosine
from svf_fast.backends.composed import ComposedBackend
from svf_fast.backends.packed import DTYPES, PackedWeights, owner
from svf_fast.contract import Geometry, Kept, Layer, Needs, dense, memory_format_of
from svf_fast.quantize import GROUP_PIXELS
from svf_fast.vendor import empty

# Support positions whose features are copied into rows at a time.
_SUPPORT_ROWS = 1024


def library_path() -> Path | None:
    """Where the compiled extension lies, or None."""
    return next(iter(sorted(Path(__file__).resolve().parent.parent.glob("_C*.so"))), None)


@cache
def load() -> str | None:
    """Loads the compiled extension; the reason why it cannot be had, or None."""
    path = library_path()
    if path is None:
        return "the C++ extension is not built: it needs a C++ compiler and `pip install --no-build-isolation` (README)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the C++ extension {path.name} does not load: {error}"
    for name in (
        "use_instruction_set",
        "forward",
        "backward",
        "data_gradient",
        "max_cosine",
        "quantize",
        "pack_mask",
        "keep_masked",
    ):
        torch.library.register_fake(f"svf_fast_cpp::{name}", lambda *arguments: None)
    # how many bytes depends on the instruction set
    torch.library.register_fake(
        "svf_fast_cpp::pack",
        lambda matrix, half: matrix.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8),
    )
    return None


def why_unusable(device: str) -> str | None:
    """Why the CPU kernels cannot run, or None."""
    reason = load()
    if reason is None and device != "cpu":
        reason = f"the kernels run on CPU and CUDA tensors, not on {device}"
    if reason is None and not instruction_sets():
        reason = "the kernels need an x86-64 processor with AVX2 and FMA"
    return reason


def describe() -> str:
    """The compiled extension in one line: its file, the instruction sets of its CPU kernels, and whether it has CUDA kernels."""
    reason, path = load(), library_path()
    if reason is not None or path is None:
        return reason or ""
    sets = instruction_sets()
    parts = [f"CPU kernels for {', '.join(sets)}" if sets else "no CPU kernels for this processor"]
    if sets:
        parts.append(f"{torch.ops.svf_fast_cpp.instruction_set()} in force")
    parts.append("CUDA kernels" if has_cuda_kernels() else "no CUDA kernels (they need nvcc and a CUDA build of torch)")
    return f"{path.name}: {'; '.join(parts)}"


def has_cuda_kernels() -> bool:
    """Whether the loaded extension was compiled with nvcc: a schema alone is no kernel."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("svf_fast_cpp::cuda_project", "CUDA"))


def instruction_sets() -> list[str]:
    """Names of the instruction sets that kernels were compiled for and this machine has, newest first: the first is in force."""
    return [name for name in torch.ops.svf_fast_cpp.instruction_sets().split(",") if name]


class NativeBackend:
    """Compiled kernels for CPU tensors."""

    def __init__(self) -> None:
        reason = load()
        if reason is not None:
            raise RuntimeError(reason)
        self._ops: Any = torch.ops.svf_fast_cpp
        self._composed = _StockAroundMasks()
        self._weights = PackedWeights(self._ops)

    def scale_groups(self, x: Tensor, geometry: Geometry, pixels: int) -> int:
        return _scale_groups(pixels) if _takes(x, geometry, memory_format_of(x)) else 1

    def packed_bytes(self) -> int:
        """Bytes of all packed weights of models that are still there."""
        return self._weights.held_bytes()

    def forward(
        self, x: Tensor, layer: Layer, residual: Tensor | None, keep_z: str, keep_mask: bool,
        memory_format: torch.memory_format,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        if not _takes(x, layer.geometry, memory_format):
            return self._composed.forward(x, layer, residual, keep_z, keep_mask, memory_format)
        if not _is_owned(layer):
            is_int8 = keep_z == "int8"
            y, kept = self._composed.forward(
                x, layer, residual, "exact" if is_int8 else keep_z, keep_mask, memory_format
            )
            return y, self._quantized(kept) if is_int8 else kept
        right, is_winograd = self._weights.right(layer.v, layer.geometry, x.dtype)
        size = layer.geometry.output_size(x.shape[2:], layer.v.shape[2:])
        return self._projected(x, right, is_winograd, layer, size, residual, keep_z, keep_mask)

    def project(
        self, z: Tensor, layer: Layer, residual: Tensor | None, keep_mask: bool, memory_format: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        if not _takes(z, layer.geometry, memory_format) or not _is_owned(layer):
            return self._composed.project(z, layer, residual, keep_mask, memory_format)
        y, kept = self._projected(z, None, False, layer, z.shape[2:], residual, "none", keep_mask)
        return y, kept.mask

    def v_convolution(self, x: Tensor, layer: Layer, memory_format: torch.memory_format) -> Tensor:
        if not _takes(x, layer.geometry, memory_format) or not _is_owned(layer):
            return self._composed.v_convolution(x, layer, memory_format)
        return self.convolve(x, layer.v, None, layer.geometry, None, False, memory_format)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, relu: bool,
        memory_format: torch.memory_format,
    ) -> Tensor:  # fmt: skip
        # what has no derivative here, or is not to be run, has to be seen as stock operations
        if not _takes(x, geometry, memory_format) or _is_traced():
            return self._composed.convolve(x, weight, bias, geometry, residual, relu, memory_format)
        right, is_winograd = self._weights.right(weight, geometry, x.dtype)
        y = empty((len(x), len(weight), *geometry.output_size(x.shape[2:], weight.shape[2:])), x, torch.channels_last)
        self._ops.forward(
            _rows(x), right, is_winograd, None, None, _vector(bias), _rows(residual), y, None, None, None, relu,
            _flat(geometry, weight.shape[2:]),
        )  # fmt: skip
        return y

    def backward(
        self, dy: Tensor, layer: Layer, kept: Kept, x: Tensor | None, size: Sequence[int],
        memory_format: torch.memory_format, needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        nothing = dy.new_empty(0)
        if not _takes(dy, layer.geometry, memory_format) or not _is_owned(layer):
            return self._composed.backward(dy, layer, kept, x, size, memory_format, needs)
        mask = kept.mask if kept.mask.numel() else None
        d = dx = ds = right = None
        if needs.d and mask is not None:
            d = empty(dy.shape, dy, memory_format)
        if needs.ds:
            ds = torch.empty(len(layer.s), dtype=torch.float32)
            if x is not None:
                kept = kept._replace(z=self.v_convolution(x, layer, memory_format))
        is_fused = needs.dx and layer.is_pointwise
        if is_fused:
            dx = empty((len(dy), layer.v.shape[1], *size), dy, memory_format)
            if layer.geometry.stride != (1, 1):
                dx.zero_()
            right = self._weights.right_transposed(layer.v, dy.dtype)
        elif needs.dx:
            dx = empty((len(dy), len(layer.s), *dy.shape[2:]), dy, memory_format)
        left = self._weights.left_transposed(layer.u, layer.scale, dy.dtype) if needs.dx or needs.ds else None
        stride = layer.geometry if is_fused else Geometry()
        self._ops.backward(
            _rows(dy), mask, left, _vector(layer.s), kept.z if needs.ds else None,
            kept.z_scale if needs.ds and kept.z_scale.numel() else None, right, dx, d, ds, _flat(stride),
        )  # fmt: skip
        if dx is not None and not is_fused:
            dx = self._data_gradient(dx, layer, size)
        return nothing if dx is None else dx, nothing if ds is None else ds, nothing if d is None else d

    def max_cosine(self, query: Tensor, support: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        is_taken = query.dtype in DTYPES
        return composed_cosine.max_cosine(query, support, mask, eps, self._search if is_taken else None)

    def _search(
        self, q: Tensor, rows: Callable[[int, int], Tensor], count: int, eps: float, best: Tensor, winner: Tensor
    ) -> None:  # fmt: skip
        packed, q_norm = self._ops.pack(q.unsqueeze(0), False), torch.linalg.vector_norm(q, dim=0)
        for start in range(0, count, _SUPPORT_ROWS):
            part = rows(start, start + _SUPPORT_ROWS).contiguous()
            part_norm = torch.linalg.vector_norm(part, dim=1)
            self._ops.max_cosine(packed, q_norm, part, part_norm, eps, start, best, winner)

    def max_cosine_backward(
        self, dvalue: Tensor, query: Tensor, source: Tensor, winners: Tensor, mask: Tensor | None, eps: float,
        size: Sequence[int], is_gathered: bool, need_query: bool, need_support: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self._composed.max_cosine_backward(
            dvalue, query, source, winners, mask, eps, size, is_gathered, need_query, need_support
        )

    def _projected(
        self, x: Tensor, right: Tensor | None, is_winograd: bool, layer: Layer, size: Sequence[int],
        residual: Tensor | None, keep_z: str, keep_mask: bool,
    ) -> tuple[Tensor, Kept]:  # fmt: skip
        """y [N, Co, *size] and what is kept, from x by packed right factors, or from z where those are None."""
        y = empty((len(x), len(layer.u), *size), x, torch.channels_last)
        z, z_scale, mask = x.new_empty(0), x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.uint8)
        if keep_mask:
            mask = x.new_empty(bits.packed_bytes(y.numel()), dtype=torch.uint8)
        if keep_z in ("exact", "int8"):
            # the pixels of a scale do not lie in one tile of Winograd's patches: there z is quantised behind
            is_late = keep_z == "int8" and is_winograd
            dtype = torch.int8 if keep_z == "int8" and not is_late else x.dtype
            z = torch.empty((len(x), len(layer.s), *size), dtype=dtype, memory_format=torch.channels_last)
            if keep_z == "int8":
                z_scale = x.new_empty(_scale_groups(z.numel() // len(layer.s)), len(layer.s), dtype=torch.float32)
        self._ops.forward(
            _rows(x), right, is_winograd, self._weights.left(layer.u, layer.scale, x.dtype), _vector(layer.s),
            _vector(layer.shift), _rows(residual), y, z if z.numel() else None,
            z_scale if z.dtype == torch.int8 else None, mask if keep_mask else None, layer.relu,
            _flat(layer.geometry, layer.v.shape[2:]) if right is not None else _flat(Geometry()),
        )  # fmt: skip
        kept = Kept(z, z_scale, mask)
        return y, self._quantized(kept) if z_scale.numel() and z.dtype != torch.int8 else kept

    def _quantized(self, kept: Kept) -> Kept:
        """The same with its z, in full, as int8."""
        rank, pixels = kept.z.shape[1], kept.z.numel() // kept.z.shape[1]
        z = torch.empty_like(kept.z, dtype=torch.int8)
        z_scale = torch.empty(_scale_groups(pixels), rank, dtype=torch.float32)
        self._ops.quantize(kept.z, z, z_scale)
        return Kept(z, z_scale, kept.mask)

    def _data_gradient(self, g: Tensor, layer: Layer, size: Sequence[int]) -> Tensor:
        """dx of height and width `size` from s ⊙ g [N, R, Ho, Wo]."""
        dx = empty((len(g), layer.v.shape[1], *size), g, torch.channels_last)
        geometry = layer.geometry
        if geometry.stride != (1, 1):
            right = self._weights.right_transposed(layer.v, g.dtype)
            self._ops.data_gradient(g, right, dx, _flat(geometry, layer.v.shape[2:]))
            return dx
        # at stride 1 it is the convolution of g by the taps turned round
        right, is_winograd = self._weights.right_turned(layer.v, geometry, g.dtype)
        around = tuple(
            dilation * (taps - 1) - padding
            for dilation, taps, padding in zip(geometry.dilation, layer.v.shape[2:], geometry.padding, strict=True)
        )
        turned = geometry._replace(padding=(around[0], around[1]))
        self._ops.forward(
            g, right, is_winograd, None, None, None, None, dx, None, None, None, False, _flat(turned, layer.v.shape[2:])
        )
        return dx


class _StockAroundMasks(ComposedBackend):
    """Stock operations, with masks by kernels where they take the dtype."""

    @staticmethod
    def pack_nonzero(values: Tensor) -> Tensor:
        if values.dtype not in DTYPES:
            return bits.pack_nonzero(values)
        mask = torch.empty(bits.packed_bytes(values.numel()), dtype=torch.uint8)
        torch.ops.svf_fast_cpp.pack_mask(values, mask)
        return mask

    @staticmethod
    def keep_masked(values: Tensor, mask: Tensor) -> Tensor:
        if values.dtype not in DTYPES:
            return bits.keep_masked(values, mask)
        out = torch.empty_like(values)
        torch.ops.svf_fast_cpp.keep_masked(values, mask, out)
        return out


def _scale_groups(pixels: int) -> int:
    return (pixels + GROUP_PIXELS - 1) // GROUP_PIXELS


def _takes(t: Tensor, geometry: Geometry, memory_format: torch.memory_format) -> bool:
    return t.dtype in DTYPES and t.numel() > 0 and geometry.groups == 1 and memory_format is torch.channels_last


def _is_owned(layer: Layer) -> bool:
    """Whether the factors are a module's: packing others at every call would cost more than the kernels gain."""
    return owner(layer.v) is not None and owner(layer.u) is not None


def _is_traced() -> bool:
    """Whether something looks at the operations themselves: forward-mode AD, functorch, torch.jit, a dispatch mode."""
    return (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _rows(t: Tensor | None) -> Any:
    """`t` itself where its channels are adjacent, else a copy whose are."""
    return t if t is None or t.stride(1) == 1 else dense(t, torch.channels_last)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _flat(geometry: Geometry, taps: Sequence[int] = (1, 1)) -> list[int]:
    return [*taps, *geometry.stride, *geometry.padding, *geometry.dilation]
