"""What a set of fused kernels is: launchers for every part of a layer, the tiles on offer, and what they take and fill. Triton's
kernels are one set, those in CUDA C++ another; by_ways.py computes layers with either. Knows tensors and layers, no compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from svf_fast.contract import Kept, Layer

Strides = tuple[int, int, int, int]


class Config(NamedTuple):
    """Tile sizes and compiler options of one launch: pixels, output channels, contracted channels, the rank's tile."""

    BM: int
    BN: int
    BK: int
    BR: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Triton's compiler options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Outputs(NamedTuple):
    """What forward writes; None where nothing is asked for. z is kept in full or as q (int8) with q_scale."""

    y: Tensor
    mask: Tensor | None = None
    z: Tensor | None = None
    q: Tensor | None = None
    q_scale: Tensor | None = None

    def z_strides(self) -> Strides:
        """Of z or q, whichever is written."""
        kept = self.q if self.z is None else self.z
        return strides_of(self.y if kept is None else kept)


class Gradients(NamedTuple):
    """What backward writes; None where nothing is asked for. `partial` [programs, R] sums up to ds. `y_strides` are those of
    the y that the mask describes, and of d."""

    d: Tensor | None
    partial: Tensor | None
    y_strides: Strides


class BackToBack(Protocol):
    """Both matrix products of a pointwise layer in one kernel; factors dense and in x's dtype."""

    def forward(
        self, x: Tensor, layer: Layer, s: Tensor | None, residual: Tensor | None, out: Outputs, config: Config, precision: str
    ) -> None:  # fmt: skip
        """Fills `out` from x [N, Ci, H, W] of any strides. `s` is None where u has it already."""

    def backward(
        self, dy: Tensor, layer: Layer, s: Tensor | None, kept: Kept, out: Gradients, dx: Tensor, config: Config,
        precision: str,
    ) -> None:  # fmt: skip
        """Fills `out` and dx [N, Ci, H, W], which must hold zeros where the layer is strided. `s` is None where v has it
        already."""


class Projection(Protocol):
    """The projection by the left factors with everything around it, and its gradient; factors dense and in z's dtype."""

    def forward(
        self, z: Tensor, left: Tensor, layer: Layer, residual: Tensor | None, out: Outputs, config: Config, precision: str
    ) -> None:  # fmt: skip
        """Fills `out` but z from z [N, R, Ho, Wo] of any strides and left = u ⊙ s [Co, R]."""

    def backward(
        self, dy: Tensor, layer: Layer, s: Tensor | None, kept: Kept, out: Gradients, weighted: Tensor | None,
        config: Config, precision: str,
    ) -> None:  # fmt: skip
        """Fills `out` and, where dx is needed, weighted = s ⊙ g [N, R, Ho, Wo] (g where s is None)."""


class Elementwise(Protocol):
    """One pass each over tensors that are dense in either memory format."""

    def pack(self, y: Tensor) -> Tensor:
        """Mask [ceil(n / 8)] uint8 of the non-zero elements of y, in memory order."""

    def keep_masked(self, values: Tensor, mask: Tensor) -> Tensor:
        """Copy of `values` with exact zeros where the mask's bit is 0."""

    def epilogue(self, layer: Layer, residual: Tensor | None, out: Outputs) -> None:
        """out.y ← act(scale ⊙ out.y + shift + residual) in place, and its mask; a residual of any strides."""

    def quantize(self, z: Tensor, q: Tensor, q_scale: Tensor) -> None:
        """Fills q (int8, shape of z) and q_scale [groups of 64 pixels, R] from z [N, R, H, W]."""


class Cosine(Protocol):
    """The max-cosine prior, streamed: contract.Backend has what the functions return."""

    def max_cosine(self, query: Tensor, support: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        """Largest cosine and its position."""

    def max_cosine_backward(
        self, dvalue: Tensor, query: Tensor, source: Tensor, winners: Tensor, mask: Tensor | None, eps: float,
        size: Sequence[int], is_gathered: bool, need_query: bool, need_support: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """dquery and dsupport, empty where not needed."""


class Offers(Protocol):
    """The tiles on offer for each kernel by how it multiplies (`precision`), the one to take unmeasured first; none where a
    kernel does not fit."""

    def back_to_back_forward(self, rank: int, precision: str, is_int8: bool, is_roomy: bool) -> list[Config]:
        """`is_int8`: z is kept as int8. `is_roomy`: z is kept in full and every pixel visited."""

    def back_to_back_backward(self, rank: int, precision: str, is_strided: bool) -> list[Config]:
        """`is_strided`: the layer visits every other pixel."""

    def projection_forward(self, precision: str) -> list[Config]:
        """For any rank."""

    def projection_backward(self, rank: int, precision: str) -> list[Config]:
        """For any rank."""


@dataclass(frozen=True)
class KernelSet:
    """One implementation of all kernels."""

    name: str
    back_to_back: BackToBack
    projection: Projection
    elementwise: Elementwise
    cosine: Cosine
    offers: Offers
    # whether the mask of a dense y can be written beside a product, and beside the epilogue; it is packed from y otherwise
    masks_product: Callable[[Tensor], bool]
    masks_epilogue: Callable[[Tensor], bool]


def why_no_device() -> str | None:
    """Why fused kernels cannot run on this process's CUDA devices, whoever compiles them, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA devices"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the kernels need compute capability 8.0 or newer, this device has {major}.{minor}"


def strides_of(t: Tensor, step: tuple[int, int] = (1, 1)) -> Strides:
    """Strides (n, h, w, c) of t [N, C, H, W] when every `step`-th pixel is visited."""
    n, c, h, w = t.stride()
    return n, h * step[0], w * step[1], c


def dense_strides(shape: Sequence[int], memory_format: torch.memory_format) -> Strides:
    """Strides (n, h, w, c) of a dense tensor [N, C, H, W]."""
    _, channels, height, width = shape
    if memory_format is torch.channels_last:
        return height * width * channels, width * channels, channels, 1
    return channels * height * width, width, 1, height * width


def precision(dtype: torch.dtype, is_tf32: bool) -> str:
    """How products are multiplied: half precisions exactly ("ieee"); float32 as TF32, else as three TF32 products (error 1e-6),
    since plain float32 has no tensor cores."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if is_tf32 else "tf32x3"


def convolution_precision(dtype: torch.dtype) -> str:
    """`precision` by torch's switch of convolutions, which this layer is."""
    # the switch is asked for float32 alone: it takes microseconds
    return precision(dtype, dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def product_precision(dtype: torch.dtype) -> str:
    """`precision` by torch's switch of matrix products."""
    return precision(dtype, dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32")


def blocks(total: int, size: int) -> int:
    """How many tiles of `size` cover `total`."""
    return -(-total // size)
