"""One-pass element-wise kernels for what is not fused behind a matrix product: the epilogue in place, mask packing and
unpacking in any layout, z as int8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.backends.kernel_set import Outputs, blocks, strides_of
from svf_fast.bits import packed_bytes
from svf_fast.contract import Layer, dense_view
from svf_fast.kernels.launch import PICTURE_SIZES, is_uniform, launch
from svf_fast.kernels.tiles import finish, rows_of, store_bits, store_quantized, tile_offsets

# Memory-bound: enough for every thread to hold a few 16-byte accesses.
_FLAT = 4096
_TILE = (64, 64)


@triton.jit(do_not_specialize=("count",))
def pack_kernel(values, mask, count, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    is_kept = tl.load(values + index, mask=index < count, other=0.0).to(tl.float32) != 0
    bits = tl.reshape(is_kept.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = first // 8 + tl.arange(0, BLOCK // 8)
    tl.store(mask + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte * 8 < count)


@triton.jit(do_not_specialize=("count",))
def keep_kernel(values, mask, out, count, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    byte = first // 8 + tl.arange(0, BLOCK // 8)
    packed = tl.load(mask + byte, mask=byte * 8 < count, other=0).to(tl.int32)
    bits = tl.reshape((packed[:, None] >> tl.arange(0, 8)[None, :]) & 1, (BLOCK,))
    value = tl.load(values + index, mask=index < count, other=0.0)
    tl.store(out + index, tl.where(bits != 0, value, 0.0), mask=index < count)


@triton.jit(do_not_specialize=PICTURE_SIZES)
def epilogue_kernel(
    y, scale, shift, residual, mask, pixels, plane, width, channels, y_strides, residual_strides,
    RELU: tl.constexpr, UNIFORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(channels, BN)
    first_pixel = (tl.program_id(0) // columns) * BM
    rows_ok = first_pixel + tl.arange(0, BM) < pixels
    first = (tl.program_id(0) % columns) * BN
    c = first + tl.arange(0, BN)
    ok = rows_ok[:, None] & (c < channels)[None, :]
    start, rows = rows_of(first_pixel, plane, width, y_strides, UNIFORM, BM)
    residual_start, residual_rows = start, rows
    if residual is not None:
        residual_start, residual_rows = rows_of(first_pixel, plane, width, residual_strides, UNIFORM, BM)
    offsets = start + tile_offsets(rows, c, y_strides)
    value = tl.load(y + offsets, mask=ok, other=0.0).to(tl.float32)
    residual_offsets = residual_start + tile_offsets(residual_rows, c, residual_strides)
    value = finish(value, c, channels, scale, shift, residual, residual_offsets, ok, RELU)
    out = value.to(y.dtype.element_ty)
    tl.store(y + offsets, out, mask=ok)
    if mask is not None:
        store_bits(mask, out.to(tl.float32) != 0, start, rows, rows_ok, first, channels)


@triton.jit(do_not_specialize=PICTURE_SIZES)
def quantize_kernel(
    z, q, q_scale, pixels, plane, width, rank, z_strides, q_strides,
    UNIFORM: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(rank, BR)
    first_pixel = (tl.program_id(0) // columns) * BM
    rows_ok = first_pixel + tl.arange(0, BM) < pixels
    r = (tl.program_id(0) % columns) * BR + tl.arange(0, BR)
    ok = rows_ok[:, None] & (r < rank)[None, :]
    z_start, z_rows = rows_of(first_pixel, plane, width, z_strides, UNIFORM, BM)
    q_start, q_rows = rows_of(first_pixel, plane, width, q_strides, UNIFORM, BM)
    tile = tl.load(z + z_start + tile_offsets(z_rows, r, z_strides), mask=ok, other=0.0).to(tl.float32)
    store_quantized(q, q_scale, tile, first_pixel, q_start, q_rows, rows_ok, r, rank, pixels, q_strides)


def pack(y: Tensor) -> Tensor:
    """Mask [ceil(n / 8)] uint8 of the non-zero elements of a dense y, in memory order."""
    flat = dense_view(y)
    mask = torch.empty(packed_bytes(flat.numel()), dtype=torch.uint8, device=y.device)
    launch(pack_kernel, (blocks(flat.numel(), _FLAT), 1, 1), (flat, mask), (flat.numel(),), (_FLAT,), {"num_warps": 8})
    return mask


def keep_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Copy of the dense `values` with exact zeros where the mask's bit is 0."""
    flat = dense_view(values)
    out = torch.empty_like(flat)
    launch(
        keep_kernel, (blocks(flat.numel(), _FLAT), 1, 1), (flat, mask, out), (flat.numel(),), (_FLAT,), {"num_warps": 8}
    )  # fmt: skip
    return out.as_strided(values.shape, values.stride())


def epilogue(layer: Layer, residual: Tensor | None, out: Outputs) -> None:
    """out.y ← act(scale ⊙ out.y + shift + residual) in place, and its mask, from any strides."""
    batch, channels, height, width = out.y.shape
    pixels = batch * height * width
    strides = strides_of(out.y), strides_of(out.y if residual is None else residual)
    uniform = is_uniform((batch, height, width), channels, strides)
    BM, BN = _TILE
    launch(
        epilogue_kernel, (blocks(pixels, BM) * blocks(channels, BN), 1, 1),
        (out.y, layer.scale, layer.shift, residual, out.mask), (pixels, height * width, width, channels, *strides),
        (layer.relu, uniform, BM, BN), {"num_warps": 4},
    )  # fmt: skip


def quantize(z: Tensor, q: Tensor, q_scale: Tensor) -> None:
    """Fills q (int8, shape of z, dense) and q_scale [groups of 64 pixels, R] from z [N, R, H, W] of any strides."""
    batch, rank, height, width = z.shape
    pixels = batch * height * width
    strides = strides_of(z), strides_of(q)
    uniform = is_uniform((batch, height, width), rank, strides)
    BM, BR = _TILE
    launch(
        quantize_kernel, (blocks(pixels, BM) * blocks(rank, BR), 1, 1), (z, q, q_scale),
        (pixels, height * width, width, rank, *strides), (uniform, BM, BR), {"num_warps": 4},
    )  # fmt: skip
