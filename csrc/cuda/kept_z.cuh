// z as int8 (svf_fast/quantize.py): one scale a channel and group of 64 pixels, subtractive dither from a hash of the element's place.
//
// q = ⌊127 z / m + u⌋, m the group's largest |z|; kept scale = m / 127; read back as (q - u + ½) · scale.
#pragma once

#include "tile.cuh"

namespace svf::cuda {

constexpr int kGroupPixels = 64;
constexpr float kLevels = 127.0f;
// A prime, as quantize.py has it.
constexpr int64_t kNoiseLength = 1048573;

// The noise in [0, 1) of place `index` below kNoiseLength: C. Wellons' lowbias32.
__device__ __forceinline__ float noise(uint32_t index) {
  uint32_t x = (index ^ (index >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  x ^= x >> 16;
  return static_cast<float>(x >> 8) * 5.9604644775390625e-08f;
}

// Noise of one element after the other, from `element` on.
struct Dither {
  uint32_t index;

  explicit __device__ __forceinline__ Dither(int64_t element) : index(static_cast<uint32_t>(element % kNoiseLength)) {}

  __device__ __forceinline__ float next() {
    const float value = noise(index);
    index = index + 1 == kNoiseLength ? 0 : index + 1;
    return value;
  }
};

// What a channel's largest magnitude says: levels a unit, and the kept scale. NaN in z made `largest` infinite, so that it shows in ds.
struct Range {
  float per_unit, scale;
};

__device__ __forceinline__ Range range_of(float largest) {
  // what is smaller is as good as zero, and its inverse would overflow
  const float bound = fmaxf(largest, 1e-36f);
  return {kLevels / bound, (largest > 0.0f ? bound : 0.0f) / kLevels};
}

__device__ __forceinline__ float magnitude(float z) { return z == z ? fabsf(z) : INFINITY; }

__device__ __forceinline__ int8_t level_of(float z, float per_unit, float noise) {
  return static_cast<int8_t>(fminf(fmaxf(floorf(z * per_unit + noise), -kLevels), kLevels));
}

// Whether eight levels can be read and written at once.
__device__ __forceinline__ bool has_octets(const int8_t* q, int rank) { return (reinterpret_cast<uintptr_t>(q) | rank) % 8 == 0; }

// The bytes of scratch that quantize_group takes.
template <int THREADS>
constexpr int kRangeBytes = THREADS / 32 * 64 * 4;

// Writes 64 pixels × 64 channels as int8; load(row, octet) gives the float32 octet of a row, zeros where there is nothing. All threads of
// the team take part; ends with a barrier.
template <class Team, class Load>
__device__ __forceinline__ void quantize_group(uint32_t scratch, const KeptZ& kept, int first_pixel, int pixels, int channel,
                                               int rank, const Load& load) {
  constexpr int kWarps = Team::kThreads / 32, kStep = Team::kThreads / 8, kRows = kGroupPixels / kStep;
  const int own = Team::index(), lane = own % 32, warp = own / 32, octet = own % 8;
  Octet row[kRows];
  float largest[8] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    row[i] = load(own / 8 + i * kStep, octet);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      largest[c] = fmaxf(largest[c], magnitude(row[i].value[c]));
    }
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    largest[c] = fmaxf(largest[c], ptx::from_lane(largest[c], 8));
    largest[c] = fmaxf(largest[c], ptx::from_lane(largest[c], 16));
    if (lane < 8) {
      ptx::store_shared(scratch + (warp * 64 + octet * 8 + c) * 4, largest[c]);
    }
  }
  Team::sync();
  if (own < 64) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      all = fmaxf(all, ptx::load_shared<float>(scratch + (w * 64 + own) * 4));
    }
    const Range range = range_of(all);
    const int c = channel + own;
    if (c < rank) {
      ptx::store_global(kept.q_scale + static_cast<int64_t>(first_pixel / kGroupPixels) * rank + c, range.scale);
    }
    // one thread read this column, and writes it
    ptx::store_shared(scratch + own * 4, range.per_unit);
  }
  Team::sync();
  const int first = channel + octet * 8, count = rank - first;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int pixel = first_pixel + own / 8 + i * kStep;
    if (pixel < pixels && count > 0) {
      const int64_t element = static_cast<int64_t>(pixel) * rank + first;
      Dither dither(element);
      int8_t level[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        level[c] = level_of(row[i].value[c], ptx::load_shared<float>(scratch + (octet * 8 + c) * 4), dither.next());
      }
      if (has_octets(kept.q, rank)) {
        Vector8 packed{};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          packed.word[c / 4] |= uint32_t{static_cast<uint8_t>(level[c])} << (c % 4 * 8);
        }
        ptx::store_global(reinterpret_cast<Vector8*>(kept.q + element), packed);
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (c < count) {
            ptx::store_global(kept.q + element + c, level[c]);
          }
        }
      }
    }
  }
  Team::sync();
}

// Eight levels of a dense q [pixels, rank] in units of their scale, zeros after the `count`-th.
__device__ __forceinline__ Octet load_levels(const int8_t* q, int64_t element, int count, int rank) {
  Octet octet;
  Dither dither(element);
  Vector8 packed{};
  if (has_octets(q, rank)) {
    packed = ptx::load_global(reinterpret_cast<const Vector8*>(q + element));
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (c < count) {
        packed.word[c / 4] |= uint32_t{static_cast<uint8_t>(ptx::load_global(q + element + c))} << (c % 4 * 8);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const auto level = static_cast<int8_t>(packed.word[c / 4] >> (c % 4 * 8));
    octet.value[c] = c < count ? static_cast<float>(level) - dither.next() + 0.5f : 0.0f;
  }
  return octet;
}

}  // namespace svf::cuda
