"""The U-projection behind a V-convolution of the vendor's, and its gradient in front of the vendor's data gradient.

forward    y = act(scale ⊙ (z leftᵀ) + shift + residual), left = u ⊙ s; mask bits, and z as int8, beside it
backward   d = dy ⊙ mask;  g = (d ⊙ scale) u;  ds = Σ z ⊙ g (partial sums a row of programs);  s ⊙ g

Any rank: the contraction is tiled. Programs that share pixels run one after the other, so that their tile stays in L2."""

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
    z, left, scale, shift, residual, y, mask, q, q_scale,
    pixels, plane, width, rank, channels, z_strides, y_strides, residual_strides, q_strides,
    RELU: tl.constexpr, PRECISION: tl.constexpr, UNIFORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(channels, BN)
    first_pixel = (tl.program_id(0) // columns) * BM
    first = (tl.program_id(0) % columns) * BN
    rows_ok = first_pixel + tl.arange(0, BM) < pixels
    c = first + tl.arange(0, BN)
    z_start, z_rows = rows_of(first_pixel, plane, width, z_strides, UNIFORM, BM)
    product = tl.zeros((BM, BN), tl.float32)
    for start in range(0, rank, BK):
        r = start + tl.arange(0, BK)
        z_tile = tl.load(
            z + z_start + tile_offsets(z_rows, r, z_strides), mask=rows_ok[:, None] & (r < rank)[None, :], other=0.0
        )
        left_tile = tl.load(
            left + first.to(tl.int64) * rank + (tl.arange(0, BN)[None, :] * rank + r[:, None]),
            mask=(r < rank)[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        product = tl.dot(z_tile, left_tile, product, input_precision=PRECISION)
    y_start, y_rows = rows_of(first_pixel, plane, width, y_strides, UNIFORM, BM)
    residual_start, residual_rows = y_start, y_rows
    if residual is not None:
        residual_start, residual_rows = rows_of(first_pixel, plane, width, residual_strides, UNIFORM, BM)
    ok = rows_ok[:, None] & (c < channels)[None, :]
    residual_offsets = residual_start + tile_offsets(residual_rows, c, residual_strides)
    product = finish(product, c, channels, scale, shift, residual, residual_offsets, ok, RELU)
    out = product.to(y.dtype.element_ty)
    tl.store(y + y_start + tile_offsets(y_rows, c, y_strides), out, mask=ok)
    if mask is not None:
        store_bits(mask, out.to(tl.float32) != 0, y_start, y_rows, rows_ok, first, channels)
    if q is not None:  # noqa: SIM102 (this is decided while compiling, the next while running)
        if first == 0:
            # read once more, from the cache, rather than held in registers during the product
            q_start, q_rows = rows_of(first_pixel, plane, width, q_strides, UNIFORM, BM)
            for start in range(0, rank, BK):
                r = start + tl.arange(0, BK)
                z_tile = tl.load(
                    z + z_start + tile_offsets(z_rows, r, z_strides),
                    mask=rows_ok[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                store_quantized(
                    q, q_scale, z_tile.to(tl.float32), first_pixel, q_start, q_rows, rows_ok, r, rank, pixels, q_strides
                )


@triton.jit(do_not_specialize=PICTURE_SIZES)
def backward_kernel(
    dy, mask, u, scale, s, z, q, q_scale, d, weighted, partial,
    pixels, plane, width, rank, channels, dy_strides, y_strides, z_strides, weighted_strides,
    WORDS: tl.constexpr, PRECISION: tl.constexpr, UNIFORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(rank, BR)
    program = tl.program_id(0) // columns
    block = tl.program_id(0) % columns
    first_pixel = program * BM
    rows_ok = first_pixel + tl.arange(0, BM) < pixels
    r = block * BR + tl.arange(0, BR)
    # of the programs that share pixels, one writes d
    d_channels = tl.where(block == 0, channels, 0)
    g = projected_gradient(
        dy, mask, u, scale, d, d_channels, first_pixel, rows_ok, r, plane, width, rank, channels, dy_strides, y_strides,
        WORDS, PRECISION, UNIFORM, BN,
    )  # fmt: skip
    if partial is not None:
        store_partial(
            partial, program, g, z, q, q_scale, first_pixel, rows_ok, r, plane, width, rank, pixels, z_strides, UNIFORM
        )  # fmt: skip
    if weighted is not None:
        if s is not None:
            g = g * tl.load(s + r, mask=r < rank, other=0.0).to(tl.float32)[None, :]
        w_start, rows = rows_of(first_pixel, plane, width, weighted_strides, UNIFORM, BM)
        ok = rows_ok[:, None] & (r < rank)[None, :]
        tl.store(weighted + w_start + tile_offsets(rows, r, weighted_strides), g.to(weighted.dtype.element_ty), mask=ok)


def forward(
    z: Tensor, left: Tensor, layer: Layer, residual: Tensor | None, out: Outputs, config: Config, precision: str
) -> None:
    """Fills `out` from z [N, R, Ho, Wo] of any strides and left = u ⊙ s [Co, R] in z's dtype. `out.z` is not written: z is
    there."""
    batch, channels, height, width = out.y.shape
    pixels = batch * height * width
    strides = (
        strides_of(z), strides_of(out.y), strides_of(out.y if residual is None else residual), out.z_strides(),
    )  # fmt: skip
    uniform = is_uniform((batch, height, width), max(z.shape[1], channels), strides)
    launch(
        forward_kernel, (blocks(pixels, config.BM) * blocks(channels, config.BN), 1, 1),
        (z, left, layer.scale, layer.shift, residual, out.y, out.mask, out.q, out.q_scale),
        (pixels, height * width, width, z.shape[1], channels, *strides),
        (layer.relu, precision, uniform, config.BM, config.BN, config.BK), config.options(),
    )  # fmt: skip


def backward(
    dy: Tensor,
    layer: Layer,
    s: Tensor | None,
    kept: Kept,
    out: Gradients,
    weighted: Tensor | None,
    config: Config,
    precision: str,
) -> None:
    """Fills `out` and, where dx is needed, weighted = s ⊙ g [N, R, Ho, Wo] (g where s is None), from dy
    [N, Co, Ho, Wo] of any strides."""
    batch, channels, height, width = dy.shape
    pixels, rank = batch * height * width, layer.u.shape[1]
    is_int8 = kept.z_scale.numel() > 0
    strides = (
        strides_of(dy), out.y_strides, strides_of(kept.z) if kept.z.numel() else out.y_strides,
        out.y_strides if weighted is None else strides_of(weighted),
    )  # fmt: skip
    uniform = is_uniform((batch, height, width), max(rank, channels), strides)
    launch(
        backward_kernel, (blocks(pixels, config.BM) * blocks(rank, config.BR), 1, 1),
        (dy, kept.mask if kept.mask.numel() else None, layer.u, layer.scale, s,
         None if is_int8 else kept.z, kept.z if is_int8 else None, kept.z_scale if is_int8 else None,
         out.d, weighted, out.partial),
        (pixels, height * width, width, rank, channels, *strides),
        (has_words(out.y_strides, channels), precision, uniform, config.BM, config.BN, config.BR), config.options(),
    )  # fmt: skip
