"""The first half of every backward, inside a program: the gradient behind the ReLU, projected onto the left factors, and
the z that ds multiplies it with."""

from __future__ import annotations

import triton
import triton.language as tl

from svf_fast.kernels.tiles import kept_bits, load_quantized, rows_of, tile_offsets


@triton.jit
def projected_gradient(
    dy, mask, u, scale, d, d_channels, first_pixel, rows_ok, r, plane, width, rank, channels, dy_strides, y_strides,
    WORDS: tl.constexpr, PRECISION: tl.constexpr, UNIFORM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """g [BM, BR] = ((dy ⊙ mask) ⊙ scale) u in float32; writes the first `d_channels` channels of d = dy ⊙ mask on the way, where
    d is given."""
    BM: tl.constexpr = rows_ok.shape[0]
    dy_start, dy_rows = rows_of(first_pixel, plane, width, dy_strides, UNIFORM, BM)
    y_start, y_rows = rows_of(first_pixel, plane, width, y_strides, UNIFORM, BM)
    g = tl.zeros((BM, r.shape[0]), tl.float32)
    u_block = u
    for start in range(0, channels, BN):
        c = start + tl.arange(0, BN)
        ok = rows_ok[:, None] & (c < channels)[None, :]
        d_tile = tl.load(dy + dy_start + tile_offsets(dy_rows, c, dy_strides), mask=ok, other=0.0)
        if mask is not None:
            # a choice, not a product: what the ReLU stopped is zero even where dy is not finite
            is_kept = kept_bits(mask, y_start, y_rows, rows_ok, start, channels, y_strides, WORDS, BN)
            d_tile = tl.where(is_kept, d_tile, 0.0)
        if d is not None:
            tl.store(
                d + y_start + tile_offsets(y_rows, c, y_strides),
                d_tile,
                mask=rows_ok[:, None] & (c < d_channels)[None, :],
            )
        if scale is not None:
            factor = tl.load(scale + c, mask=c < channels, other=0.0).to(tl.float32)
            d_tile = (d_tile.to(tl.float32) * factor[None, :]).to(dy.dtype.element_ty)
        u_tile = tl.load(
            u_block + (tl.arange(0, BN)[:, None] * rank + r[None, :]),
            mask=(c < channels)[:, None] & (r < rank)[None, :],
            other=0.0,
        )
        g = tl.dot(d_tile, u_tile, g, input_precision=PRECISION)
        u_block += BN * rank
    return g


@triton.jit
def kept_z(
    z, q, q_scale, first_pixel, rows_ok, r, plane, width, rank, pixels, z_strides, UNIFORM: tl.constexpr
):  # fmt: skip
    """The tile z [BM, BR] in float32 as it was kept: in full (z) or as int8 (q, q_scale)."""
    start, rows = rows_of(first_pixel, plane, width, z_strides, UNIFORM, rows_ok.shape[0])
    if q is not None:
        return load_quantized(q, q_scale, first_pixel, start, rows, rows_ok, r, rank, pixels, z_strides)
    else:
        ok = rows_ok[:, None] & (r < rank)[None, :]
        return tl.load(z + start + tile_offsets(rows, r, z_strides), mask=ok, other=0.0).to(tl.float32)


@triton.jit
def store_partial(
    partial, program, g, z, q, q_scale, first_pixel, rows_ok, r, plane, width, rank, pixels, z_strides,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """Σ z ⊙ g over this program's pixels, its row of `partial` [programs, R]."""
    tile = kept_z(z, q, q_scale, first_pixel, rows_ok, r, plane, width, rank, pixels, z_strides, UNIFORM)
    tl.store(partial + program.to(tl.int64) * rank + r, tl.sum(tile * g, 0), mask=r < rank)
