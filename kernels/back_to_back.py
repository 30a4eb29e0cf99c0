"""1x1 convolutions and linear layers in one pass over memory: both matrix products of a tile of pixels, z between them on
the chip.

forward    z = x vᵀ, kept as it is or as int8;  y = act(scale ⊙ (z ⊙ s) uᵀ + shift + residual), mask bits beside it
backward   d = dy ⊙ mask;  g = (d ⊙ scale) u;  ds = Σ z ⊙ g (partial sums a program);  dx = (s ⊙ g) v

The rank has to fit on the chip (BR ≥ R)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svf_fast.backends.kernel_set import Config, Gradients, Outputs, blocks, strides_of
from svf_fast.contract import Kept, Layer
from svf_fast.kernels.gradient import projected_gradient, store_partial
from svf_fast.kernels.launch import PICTURE_SIZES, has_words, is_uniform, launch
from svf_fast.kernels.tiles import finish, rows_of, store_bits, store_quantized, tile_offsets


@triton.jit(do_not_specialize=PICTURE_SIZES)
def forward_kernel(
    x, v, s, u, scale, shift, residual, y, mask, z, q, q_scale,
    pixels, plane, width, inputs, rank, channels, x_strides, y_strides, residual_strides, z_strides,
    RELU: tl.constexpr, PRECISION: tl.constexpr, UNIFORM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    first_pixel = tl.program_id(0) * BM
    rows_ok = first_pixel + tl.arange(0, BM) < pixels
    r = tl.arange(0, BR)
    x_start, x_rows = rows_of(first_pixel, plane, width, x_strides, UNIFORM, BM)
    accumulated = tl.zeros((BM, BR), tl.float32)
    for start in range(0, inputs, BK):
        k = start + tl.arange(0, BK)
        x_tile = tl.load(
            x + x_start + tile_offsets(x_rows, k, x_strides), mask=rows_ok[:, None] & (k < inputs)[None, :], other=0.0
        )
        v_tile = tl.load(
            v + start + (r[None, :] * inputs + tl.arange(0, BK)[:, None]),
            mask=(k < inputs)[:, None] & (r < rank)[None, :],
            other=0.0,
        )
        accumulated = tl.dot(x_tile, v_tile, accumulated, input_precision=PRECISION)
    if z is not None:
        z_start, rows = rows_of(first_pixel, plane, width, z_strides, UNIFORM, BM)
        z_ok = rows_ok[:, None] & (r < rank)[None, :]
        tl.store(z + z_start + tile_offsets(rows, r, z_strides), accumulated.to(z.dtype.element_ty), mask=z_ok)
    if q is not None:
        z_start, rows = rows_of(first_pixel, plane, width, z_strides, UNIFORM, BM)
        store_quantized(q, q_scale, accumulated, first_pixel, z_start, rows, rows_ok, r, rank, pixels, z_strides)
    if s is not None:
        accumulated = accumulated * tl.load(s + r, mask=r < rank, other=0.0).to(tl.float32)[None, :]
    weighted = accumulated.to(y.dtype.element_ty)
    y_start, y_rows = rows_of(first_pixel, plane, width, y_strides, UNIFORM, BM)
    residual_start, residual_rows = y_start, y_rows
    if residual is not None:
        residual_start, residual_rows = rows_of(first_pixel, plane, width, residual_strides, UNIFORM, BM)
    u_block = u
    for start in range(0, channels, BN):
        c = start + tl.arange(0, BN)
        u_tile = tl.load(
            u_block + (tl.arange(0, BN)[None, :] * rank + r[:, None]),
            mask=(r < rank)[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        product = tl.dot(weighted, u_tile, input_precision=PRECISION)
        ok = rows_ok[:, None] & (c < channels)[None, :]
        residual_offsets = residual_start + tile_offsets(residual_rows, c, residual_strides)
        product = finish(product, c, channels, scale, shift, residual, residual_offsets, ok, RELU)
        out = product.to(y.dtype.element_ty)
        tl.store(y + y_start + tile_offsets(y_rows, c, y_strides), out, mask=ok)
        if mask is not None:
            store_bits(mask, out.to(tl.float32) != 0, y_start, y_rows, rows_ok, start, channels)
        u_block += BN * rank


@triton.jit(do_not_specialize=PICTURE_SIZES)
def backward_kernel(
    dy, mask, u, scale, s, v, z, q, q_scale, d, dx, partial,
    pixels, plane, width, inputs, rank, channels, dy_strides, y_strides, z_strides, dx_strides,
    WORDS: tl.constexpr, PRECISION: tl.constexpr, UNIFORM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first_pixel = program * BM
    rows_ok = first_pixel + tl.arange(0, BM) < pixels
    r = tl.arange(0, BR)
    g = projected_gradient(
        dy, mask, u, scale, d, channels, first_pixel, rows_ok, r, plane, width, rank, channels, dy_strides, y_strides,
        WORDS, PRECISION, UNIFORM, BN,
    )  # fmt: skip
    if partial is not None:
        store_partial(
            partial, program, g, z, q, q_scale, first_pixel, rows_ok, r, plane, width, rank, pixels, z_strides, UNIFORM
        )  # fmt: skip
    if s is not None:
        g = g * tl.load(s + r, mask=r < rank, other=0.0).to(tl.float32)[None, :]
    weighted = g.to(dx.dtype.element_ty)
    dx_start, dx_rows = rows_of(first_pixel, plane, width, dx_strides, UNIFORM, BM)
    for start in range(0, inputs, BK):
        k = start + tl.arange(0, BK)
        v_tile = tl.load(
            v + start + (r[:, None] * inputs + tl.arange(0, BK)[None, :]),
            mask=(r < rank)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        product = tl.dot(weighted, v_tile, input_precision=PRECISION)
        ok = rows_ok[:, None] & (k < inputs)[None, :]
        tl.store(dx + dx_start + tile_offsets(dx_rows, k, dx_strides), product.to(dx.dtype.element_ty), mask=ok)


def forward(
    x: Tensor, layer: Layer, s: Tensor | None, residual: Tensor | None, out: Outputs, config: Config, precision: str
) -> None:
    """Fills `out` from x [N, Ci, H, W] of any strides; the layer is pointwise, its factors in x's dtype. `s` is
    None where u has it already."""
    batch, channels, height, width = out.y.shape
    pixels = batch * height * width
    strides = (
        strides_of(x, layer.geometry.stride), strides_of(out.y), strides_of(out.y if residual is None else residual),
        out.z_strides(),
    )  # fmt: skip
    uniform = is_uniform((batch, height, width), max(x.shape[1], layer.u.shape[1], channels), strides)
    launch(
        forward_kernel, (blocks(pixels, config.BM), 1, 1),
        (x, layer.v, s, layer.u, layer.scale, layer.shift, residual, out.y, out.mask, out.z, out.q, out.q_scale),
        (pixels, height * width, width, x.shape[1], layer.u.shape[1], channels, *strides),
        (layer.relu, precision, uniform, config.BM, config.BN, config.BK, config.BR), config.options(),
    )  # fmt: skip


def backward(
    dy: Tensor, layer: Layer, s: Tensor | None, kept: Kept, out: Gradients, dx: Tensor, config: Config, precision: str
) -> None:
    """Fills `out` and dx [N, Ci, H, W] from dy [N, Co, Ho, Wo] of any strides; a strided layer's dx must hold zeros.
    `s` is None where v has it already."""
    batch, channels, height, width = dy.shape
    pixels = batch * height * width
    is_int8 = kept.z_scale.numel() > 0
    strides = (
        strides_of(dy), out.y_strides, strides_of(kept.z) if kept.z.numel() else out.y_strides,
        strides_of(dx, layer.geometry.stride),
    )  # fmt: skip
    uniform = is_uniform((batch, height, width), max(dx.shape[1], layer.u.shape[1], channels), strides)
    launch(
        backward_kernel, (blocks(pixels, config.BM), 1, 1),
        (dy, kept.mask if kept.mask.numel() else None, layer.u, layer.scale, s, layer.v,
         None if is_int8 else kept.z, kept.z if is_int8 else None, kept.z_scale if is_int8 else None,
         out.d, dx, out.partial),
        (pixels, height * width, width, dx.shape[1], layer.u.shape[1], channels, *strides),
        (has_words(out.y_strides, channels), precision, uniform, config.BM, config.BN, config.BK, config.BR),
        config.options(),
    )  # fmt: skip
