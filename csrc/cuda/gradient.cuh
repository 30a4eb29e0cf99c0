// The first half of every backward: the gradient behind the ReLU projected onto the left factors, and what is made of the result.
//
// g = ((dy ⊙ mask) ⊙ scale) u. dy is copied to shared memory as it is; each thread then masks and scales the chunks that it copied itself,
// between its own wait and the block's barrier, and writes d on the way. The mask's bits are read one panel ahead.
#pragma once

#include "kept_z.cuh"

namespace svf::cuda {

struct GradientAligned {
  bool dy, u, d, z, weighted;
};

template <class T>
GradientAligned aligned_of(const Gradient& p, const void* weighted) {
  const int64_t z_bytes = p.u.columns * static_cast<int64_t>(sizeof(T));
  const int64_t y_bytes = p.u.rows * static_cast<int64_t>(sizeof(T));
  return {is_aligned<T>(p.dy), is_aligned<T>(p.u), is_aligned(p.d, y_bytes), is_aligned(p.kept.z, z_bytes),
          is_aligned(weighted, z_bytes)};
}

// Mask bits of `count` elements from `element` on, lowest bit first.
__device__ __forceinline__ uint32_t load_bits(const uint8_t* mask, int64_t element, int count) {
  const int shift = static_cast<int>(element & 7);
  uint32_t bits = ptx::load_global(mask + element / 8);
  if (shift + count > 8) {
    bits |= uint32_t{ptx::load_global(mask + element / 8 + 1)} << 8;
  }
  return bits >> shift;
}

// The chunks of a gradient tile [BM, panel] that a thread copies, masks and scales.
template <class T, int BM, int THREADS>
class MaskedGradient {
 public:
  static constexpr int kChunks = BM * 8 / THREADS;

  __device__ __forceinline__ MaskedGradient(const Gradient& p, const PixelRows& rows, int first_pixel, bool writes_d,
                                            const GradientAligned& aligned)
      : p_(p), rows_(rows), first_pixel_(first_pixel), writes_d_(writes_d), aligned_(aligned) {}

  __device__ __forceinline__ void copy(int step, uint32_t panel) const {
    copy_panel<T, BM, THREADS>(panel, static_cast<const T*>(p_.dy.data), rows_, step * kDepth<T>, p_.u.rows, aligned_.dy);
  }

  // Reads the bits of the panel that `apply` is called for next.
  __device__ __forceinline__ void fetch_bits(int step) {
    if (p_.mask == nullptr) {
      return;
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int pixel = pixel_of(i), column = column_of(step), count = elements(pixel, column);
      bits_[i] = count > 0 ? load_bits(p_.mask, static_cast<int64_t>(pixel) * p_.u.rows + column, count) : 0;
    }
  }

  __device__ __forceinline__ void apply(int step, uint32_t panel) const {
    if (p_.mask == nullptr && p_.scale == nullptr && !writes_d_) {
      return;
    }
    const int column = column_of(step);
    float scale[kVector<T>];
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      scale[e] = p_.scale != nullptr && column + e < p_.u.rows ? ptx::load_global(p_.scale + column + e) : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int pixel = pixel_of(i), count = elements(pixel, column);
      if (count > 0) {
        apply_chunk(i, pixel, column, count, scale, chunk_of(panel, pixel - first_pixel_, threadIdx.x % 8));
      }
    }
  }

 private:
  __device__ __forceinline__ int pixel_of(int i) const { return first_pixel_ + threadIdx.x / 8 + i * (THREADS / 8); }
  __device__ __forceinline__ int column_of(int step) const { return step * kDepth<T> + threadIdx.x % 8 * kVector<T>; }
  __device__ __forceinline__ int elements(int pixel, int column) const {
    return pixel < p_.extent.pixels ? min(p_.u.rows - column, kVector<T>) : 0;
  }

  __device__ __forceinline__ void apply_chunk(int i, int pixel, int column, int count, const float (&scale)[kVector<T>],
                                              uint32_t chunk) const {
    float value[kVector<T>];
    unpack<T>(ptx::load_shared<Vector16>(chunk), value);
    if (p_.mask != nullptr) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        // a choice, not a product: what the ReLU stopped is zero even where dy is not finite
        value[e] = bits_[i] >> e & 1 ? value[e] : 0.0f;
      }
    }
    if (writes_d_) {
      T* to = static_cast<T*>(p_.d) + static_cast<int64_t>(pixel) * p_.u.rows + column;
      if (aligned_.d && count == kVector<T>) {
        ptx::store_global(reinterpret_cast<Vector16*>(to), pack_vector<T>(value));
      } else {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          if (e < count) {
            ptx::store_global(to + e, from_float<T>(value[e]));
          }
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      value[e] *= scale[e];
    }
    ptx::store_shared(chunk, pack_vector<T>(value));
  }

  const Gradient& p_;
  const PixelRows rows_;
  const int first_pixel_;
  const bool writes_d_;
  const GradientAligned aligned_;
  uint32_t bits_[kChunks];
};

// g for BR ranks from `first_rank` on, into the warps' registers.
template <Products P, int BM, int BR, int STAGES, class Warp>
__device__ __forceinline__ void project_gradient(Warp& g, uint32_t ring, const Gradient& p, const PixelRows& rows, int first_pixel,
                                                 int first_rank, const GradientAligned& aligned) {
  using T = typename ElementOf<P>::type;
  constexpr int kStageBytes = BM * kPanelBytes + kFactorBytes<T, BR>;
  // of the blocks that share pixels, one writes d
  MaskedGradient<T, BM, Warp::kThreads> d(p, rows, first_pixel, p.d != nullptr && first_rank == 0, aligned);
  g.clear();
  d.fetch_bits(0);
  pipeline<STAGES, kStageBytes>(
      ring, static_cast<int>(divide_up(p.u.rows, kDepth<T>)),
      [&](int step, uint32_t buffer) {
        d.copy(step, buffer);
        copy_factor<T, BR, Warp::kThreads, true>(buffer + BM * kPanelBytes, p.u, first_rank, step * kDepth<T>, aligned.u);
      },
      [&](int step, uint32_t buffer) { d.apply(step, buffer); },
      [&](int step, uint32_t buffer) {
        d.fetch_bits(step + 1);
        g.template add<P, true>(buffer, buffer + BM * kPanelBytes);
      });
}

// The octet z [pixel, rank …] as it was kept, in units of `scale_of`.
template <class T>
__device__ __forceinline__ Octet load_kept(const KeptZ& kept, int pixel, int at, int rank, bool is_aligned) {
  const int64_t element = static_cast<int64_t>(pixel) * rank + at;
  if (kept.q != nullptr) {
    return load_levels(kept.q, element, rank - at, rank);
  }
  return load_octet(static_cast<const T*>(kept.z) + element, rank - at, is_aligned);
}

// Scales of eight channels of int8 z in a group of pixels, ones where z is kept in full.
__device__ __forceinline__ Octet scale_of(const KeptZ& kept, int group, int at, int rank) {
  Octet scale;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const bool is_kept = kept.q != nullptr && at + c < rank;
    scale.value[c] = is_kept ? ptx::load_global(kept.q_scale + static_cast<int64_t>(group) * rank + at + c) : 1.0f;
  }
  return scale;
}

// What is made of a tile g [BM, BR]: emit(row, octet, s ⊙ g) for every row, pixels that do not exist included, and a row of `partial`.
// Sums run over a thread's rows, the lanes of a warp, then the warps, always in that order: no atomics, the same bits every time.
// `scratch`: WARPS · BR floats. Ends without a barrier.
template <class T, int BM, int BR, int THREADS, class Emit>
__device__ __forceinline__ void use_gradient(const Staging<BR>& g, uint32_t scratch, const Gradient& p, int first_pixel,
                                             int first_rank, const GradientAligned& aligned, const Emit& emit) {
  constexpr int kOctets = BR / 8, kWarps = THREADS / 32;
  const int octet = threadIdx.x % kOctets, at = first_rank + 8 * octet, rank = p.u.columns;
  Octet s, total{};
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    s.value[c] = p.s != nullptr && at + c < rank ? ptx::load_global(p.s + at + c) : 1.0f;
  }
#pragma unroll 1
  for (int group = 0; group < BM; group += kGroupPixels) {
    Octet sum{};
#pragma unroll 2
    for (int row = group + threadIdx.x / kOctets; row < group + kGroupPixels; row += THREADS / kOctets) {
      Octet value = g.load(row, octet);
      const int pixel = first_pixel + row;
      if (p.partial != nullptr && pixel < p.extent.pixels && at < rank) {
        const Octet z = load_kept<T>(p.kept, pixel, at, rank, aligned.z);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          sum.value[c] += z.value[c] * value.value[c];
        }
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        value.value[c] *= s.value[c];
      }
      emit(row, octet, value);
    }
    if (p.partial != nullptr && first_pixel + group < p.extent.pixels) {
      const Octet scale = scale_of(p.kept, (first_pixel + group) / kGroupPixels, at, rank);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        total.value[c] += scale.value[c] * sum.value[c];
      }
    }
  }
  if (p.partial == nullptr) {
    return;
  }
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
#pragma unroll
    for (int distance = kOctets; distance < 32; distance *= 2) {
      total.value[c] += ptx::from_lane(total.value[c], distance);
    }
    if (lane < kOctets) {
      ptx::store_shared(scratch + (threadIdx.x / 32 * BR + octet * 8 + c) * 4, total.value[c]);
    }
  }
  ptx::sync_block();
  for (int r = threadIdx.x; r < BR && first_rank + r < rank; r += THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += ptx::load_shared<float>(scratch + (w * BR + r) * 4);
    }
    ptx::store_global(p.partial + static_cast<int64_t>(first_pixel / BM) * rank + first_rank + r, sum);
  }
}

}  // namespace svf::cuda
