"""What the kernels share, inside a program: where a pixel's channels lie, mask bits, int8 with dither, the epilogue.

A program works on tiles of pixels × channels. Pixels are numbered 0 … N·H·W − 1; every activation comes with its four
strides, so contiguous, channels_last, strided and sliced tensors are read and written where they are. Offsets are 64-bit."""

from __future__ import annotations

import triton
import triton.language as tl

from svf_fast.quantize import GROUP_PIXELS, LEVELS, NOISE_LENGTH

# read inside kernels, hence constants of the compiler
_GROUP = tl.constexpr(GROUP_PIXELS)
_LEVELS = tl.constexpr(LEVELS)
_NOISE_LENGTH = tl.constexpr(NOISE_LENGTH)


@triton.jit
def rows_of(first_pixel, plane, width, strides, UNIFORM: tl.constexpr, BM: tl.constexpr):
    """Where channel 0 of BM pixels lies in a tensor of strides (n, h, w, c): an offset common to all, and one each [BM].

    plane = H·W, the pixels of a picture. UNIFORM (launch.is_uniform): pixels are equally far apart, so that 32 bits hold
    what is not common: half the registers, and no division.
    """
    local = tl.arange(0, BM)
    if UNIFORM:
        start = first_pixel.to(tl.int64) * strides[2]
        rows = local * strides[2]
    else:
        pixel = first_pixel + local
        p = pixel % plane
        start = first_pixel.to(tl.int64) * 0
        rows = (
            (pixel // plane).to(tl.int64) * strides[0]
            + (p // width).to(tl.int64) * strides[1]
            + (p % width).to(tl.int64) * strides[2]
        )
    return start, rows


@triton.jit
def tile_offsets(rows, columns, strides):
    """Offsets [BM, BN] from the pixels' own offsets [BM] and the channel numbers [BN]."""
    return rows[:, None] + columns.to(rows.dtype)[None, :] * strides[3]


@triton.jit
def kept_bits(mask, start, rows, rows_ok, first, channels, strides, WORDS: tl.constexpr, BN: tl.constexpr):
    """Which elements [BM, BN] of channels `first` … the ReLU let through, from the packed mask.

    `start` and `rows` say where the pixels lie in the activation that the mask describes. WORDS: its channels are adjacent and come in
    multiples of 32, so that whole words are read; else every element looks up its byte.
    """
    if WORDS:
        words, ok = _words(mask, start, rows, rows_ok, first, channels, BN)
        bits = (tl.load(words, mask=ok, other=0)[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        return tl.reshape(bits, (rows.shape[0], BN)) != 0
    else:
        columns = first + tl.arange(0, BN)
        index = start + tile_offsets(rows, columns, strides)
        ok = rows_ok[:, None] & (columns < channels)[None, :]
        byte = tl.load(mask + index // 8, mask=ok, other=0).to(tl.int32)
        return ((byte >> (index % 8).to(tl.int32)) & 1) != 0


@triton.jit
def store_bits(mask, is_kept, start, rows, rows_ok, first, channels):
    """Writes the bits of a tile [BM, BN] as whole words: channels adjacent, in multiples of 32."""
    BN: tl.constexpr = is_kept.shape[1]
    bits = tl.reshape(is_kept.to(tl.int32), (rows.shape[0], BN // 32, 32))
    words, ok = _words(mask, start, rows, rows_ok, first, channels, BN)
    tl.store(words, tl.sum(bits << tl.arange(0, 32)[None, None, :], 2), mask=ok)


@triton.jit
def _words(mask, start, rows, rows_ok, first, channels, BN: tl.constexpr):
    """Pointers [BM, BN/32] to the mask's words of a tile, and which of them exist."""
    word = first // 32 + tl.arange(0, BN // 32)
    pointers = mask.to(tl.pointer_type(tl.int32)) + start // 32 + (rows // 32)[:, None] + word[None, :]
    return pointers, rows_ok[:, None] & (word * 32 < channels)[None, :]


@triton.jit
def dither(start, rows, columns, strides):
    """The noise u [BM, BN] in [0, 1) of each element of a dense tensor, by its place in memory (quantize.noise)."""
    # as little as possible in 64 bits: a division there costs dozens of registers
    row = (start % _NOISE_LENGTH).to(tl.int32) + (rows % _NOISE_LENGTH).to(tl.int32)
    if strides[3] == 1:
        column = columns
    else:
        column = (columns.to(tl.int64) * strides[3] % _NOISE_LENGTH).to(tl.int32)
    index = tl.where(row >= _NOISE_LENGTH, row - _NOISE_LENGTH, row)[:, None] + column[None, :]
    x = tl.where(index >= _NOISE_LENGTH, index - _NOISE_LENGTH, index).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def store_quantized(q, q_scale, z, first_pixel, start, rows, rows_ok, columns, rank, pixels, strides):
    """Writes the float32 tile z [BM, BR] as int8, with one scale a channel and group of pixels (quantize.py)."""
    BM: tl.constexpr = z.shape[0]
    BR: tl.constexpr = z.shape[1]
    GROUPS: tl.constexpr = BM // _GROUP
    ok = rows_ok[:, None] & (columns < rank)[None, :]
    # NaN makes the scale infinite, so that it shows in ds
    size = tl.where(ok, tl.where(z == z, tl.abs(z), float("inf")), 0.0)
    # one group a tile needs no change of layout
    if GROUPS == 1:
        largest = tl.max(size, 0)[None, :]
    else:
        largest = tl.max(tl.reshape(size, (GROUPS, _GROUP, BR)), 1)
    # what is smaller is as good as zero, and its inverse would overflow
    bound = tl.maximum(largest, 1e-36)
    per_unit = _LEVELS / bound
    level = tl.floor(z * _each_pixel(per_unit, BM) + dither(start, rows, columns, strides))
    level = tl.minimum(tl.maximum(level, -_LEVELS), _LEVELS)
    tl.store(q + start + tile_offsets(rows, columns, strides), level.to(tl.int8), mask=ok)
    pointers, known = _scales(q_scale, first_pixel, columns, rank, pixels, BM)
    tl.store(pointers, tl.where(largest > 0, bound, 0.0) / _LEVELS, mask=known)


@triton.jit
def load_quantized(q, q_scale, first_pixel, start, rows, rows_ok, columns, rank, pixels, strides):
    """The float32 tile z [BM, BR] that `store_quantized` kept, its noise taken out again."""
    BM: tl.constexpr = rows.shape[0]
    ok = rows_ok[:, None] & (columns < rank)[None, :]
    level = tl.load(q + start + tile_offsets(rows, columns, strides), mask=ok, other=0).to(tl.float32)
    pointers, known = _scales(q_scale, first_pixel, columns, rank, pixels, BM)
    scale = _each_pixel(tl.load(pointers, mask=known, other=0.0), BM)
    return tl.where(ok, (level - dither(start, rows, columns, strides) + 0.5) * scale, 0.0)


@triton.jit
def _scales(q_scale, first_pixel, columns, rank, pixels, BM: tl.constexpr):
    """Pointers [BM/64, BR] to the scales of a tile's groups of pixels, and which of them exist."""
    group = first_pixel // _GROUP + tl.arange(0, BM // _GROUP)
    known = (group * _GROUP < pixels)[:, None] & (columns < rank)[None, :]
    return q_scale + group.to(tl.int64)[:, None] * rank + columns[None, :], known


@triton.jit
def _each_pixel(per_group, BM: tl.constexpr):
    """[BM/64, BR] → [BM, BR]."""
    BR: tl.constexpr = per_group.shape[1]
    if BM == _GROUP:
        return tl.broadcast_to(per_group, (BM, BR))
    else:
        return tl.reshape(tl.broadcast_to(per_group[:, None, :], (BM // _GROUP, _GROUP, BR)), (BM, BR))


@triton.jit
def finish(y, columns, channels, scale, shift, residual, residual_offsets, ok, RELU: tl.constexpr):
    """scale ⊙ y + shift + residual, then the ReLU, in float32; absent pointers are None."""
    exists = columns < channels
    if scale is not None:
        y = y * tl.load(scale + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        y = y + tl.load(shift + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y = y + tl.load(residual + residual_offsets, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        # not maximum(): NaN stays NaN, as in torch
        y = tl.where(y < 0, 0.0, y)
    return y
