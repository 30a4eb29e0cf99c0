// One-pass element-wise kernels for what is not fused behind a product: the epilogue in place, masks packed and applied, z as int8.
//
// A thread takes eight elements in memory order, one byte of the mask. Where they cannot be read 16 bytes at a time it takes them one by
// one, but for packing: there a warp takes 32 adjacent ones at a time and packs by ballot. int8 goes by groups of 64 pixels instead.
#include "epilogue.cuh"
#include "kept_z.cuh"

namespace svf::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t octet_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// y ← act(scale ⊙ y + shift + residual), and its mask. PLANAR: each channel of a picture is a plane of `plane` elements.
template <class T, bool PLANAR>
__global__ void __launch_bounds__(kThreads) epilogue_kernel(const Epilogue p, int64_t count, int64_t plane, bool is_aligned) {
  const int64_t first = octet_index() * 8;
  if (first >= count) {
    return;
  }
  const int elements = static_cast<int>(min(count - first, int64_t{8}));
  T* y = static_cast<T*>(p.y) + first;
  Octet value = load_octet<T>(y, elements, is_aligned);
  if (!PLANAR && p.channels % 8 == 0) {
    Octet residual{};
    if (p.residual.data != nullptr) {
      residual = load_octet(static_cast<const T*>(p.residual.data) + first, elements, is_aligned);
    }
    apply(value, Affine(p, static_cast<int>(first % p.channels)), residual, p.relu);
  } else {
    // counted on from the first: no division an element
    const int64_t step = PLANAR ? plane : 1;
    int64_t in_channel = PLANAR ? first % plane : 0;
    int channel = static_cast<int>(first / step % p.channels);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < elements) {
        float v = value.value[i];
        v = p.scale != nullptr ? v * ptx::load_global(p.scale + channel) : v;
        v = p.shift != nullptr ? v + ptx::load_global(p.shift + channel) : v;
        v = p.residual.data != nullptr ? v + to_float(ptx::load_global(static_cast<const T*>(p.residual.data) + first + i)) : v;
        value.value[i] = p.relu && v < 0.0f ? 0.0f : v;
        if (++in_channel >= step) {
          in_channel = 0;
          channel = channel + 1 == p.channels ? 0 : channel + 1;
        }
      }
    }
  }
  store_octet(y, value, elements, is_aligned);
  if (p.mask != nullptr) {
    round_to<T>(value);
    ptx::store_global(p.mask + first / 8, mask_byte(value));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const T* values, uint8_t* mask, int64_t count, bool is_aligned) {
  if (is_aligned) {
    const int64_t first = octet_index() * 8;
    if (first < count) {
      ptx::store_global(mask + first / 8, mask_byte(load_octet(values + first, static_cast<int>(min(count - first, int64_t{8})), true)));
    }
    return;
  }
  // 256 elements a warp, 32 at a time; lane i then writes the i-th byte of the word
  const int lane = threadIdx.x % 32;
  const int64_t first = (octet_index() - lane) * 8;
#pragma unroll
  for (int part = 0; part < 8; ++part) {
    const int64_t at = first + part * 32;
    const uint32_t word = ptx::ballot(at + lane < count && to_float(ptx::load_global(values + at + lane)) != 0.0f);
    if (lane < 4 && at + lane * 8 < count) {
      ptx::store_global(mask + at / 8 + lane, static_cast<uint8_t>(word >> (8 * lane)));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) keep_kernel(const T* values, const uint8_t* mask, T* out, int64_t count, bool is_aligned) {
  const int64_t first = octet_index() * 8;
  if (first >= count) {
    return;
  }
  const int elements = static_cast<int>(min(count - first, int64_t{8}));
  Octet value = load_octet(values + first, elements, is_aligned);
  const uint8_t bits = ptx::load_global(mask + first / 8);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    value.value[i] = bits >> i & 1 ? value.value[i] : 0.0f;
  }
  store_octet(out + first, value, elements, is_aligned);
}

// A block: 64 pixels × 64 channels of z with adjacent channels.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const KeptZ kept, int pixels, int rank, bool is_aligned) {
  const int columns = static_cast<int>(divide_up(rank, 64));
  ptx::declare_shared<kRangeBytes<kThreads>>();
  const int first_pixel = blockIdx.x / columns * kGroupPixels, channel = blockIdx.x % columns * 64;
  const auto* z = static_cast<const T*>(kept.z);
  quantize_group<BlockTeam<kThreads>>(0, kept, first_pixel, pixels, channel, rank, [&](int row, int octet) {
    const int pixel = first_pixel + row, at = channel + 8 * octet;
    const bool exists = pixel < pixels && at < rank;
    return load_octet(z + (exists ? static_cast<int64_t>(pixel) * rank + at : 0), exists ? rank - at : 0, is_aligned);
  });
}

// A warp: one channel of 64 pixels of a z whose channels are planes.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_planes_kernel(const KeptZ kept, int pixels, int rank, int plane) {
  const int64_t warp = octet_index() / 32;
  const int group = static_cast<int>(warp / rank), channel = static_cast<int>(warp % rank), lane = threadIdx.x % 32;
  if (group * kGroupPixels >= pixels) {
    return;
  }
  const auto* z = static_cast<const T*>(kept.z);
  int64_t element[2];
  float value[2], largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pixel = group * kGroupPixels + 32 * i + lane;
    const bool exists = pixel < pixels;
    element[i] = exists ? (static_cast<int64_t>(pixel / plane) * rank + channel) * plane + pixel % plane : -1;
    value[i] = exists ? to_float(ptx::load_global(z + element[i])) : 0.0f;
    largest = fmaxf(largest, magnitude(value[i]));
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    largest = fmaxf(largest, ptx::from_lane(largest, distance));
  }
  const Range range = range_of(largest);
  if (lane == 0) {
    ptx::store_global(kept.q_scale + static_cast<int64_t>(group) * rank + channel, range.scale);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (element[i] >= 0) {
      ptx::store_global(kept.q + element[i], level_of(value[i], range.per_unit, Dither(element[i]).next()));
    }
  }
}

int64_t blocks_of(int64_t count) { return divide_up(count, int64_t{8} * kThreads); }

}  // namespace

cudaError_t epilogue(const Epilogue& p, int64_t count, int64_t plane, Element element, cudaStream_t stream) {
  return for_element(element, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = is_aligned(p.y, 0) && is_aligned(p.residual.data, 0);
    return ptx::launch(plane == 0 ? epilogue_kernel<T, false> : epilogue_kernel<T, true>, blocks_of(count), kThreads, 0, stream, p, count,
                       plane, aligned);
  });
}

cudaError_t pack(const void* values, uint8_t* mask, int64_t count, Element element, cudaStream_t stream) {
  return for_element(element, [&](auto zero) {
    using T = decltype(zero);
    return ptx::launch(pack_kernel<T>, blocks_of(count), kThreads, 0, stream, static_cast<const T*>(values), mask, count,
                       is_aligned(values, 0));
  });
}

cudaError_t keep_masked(const void* values, const uint8_t* mask, void* out, int64_t count, Element element, cudaStream_t stream) {
  return for_element(element, [&](auto zero) {
    using T = decltype(zero);
    return ptx::launch(keep_kernel<T>, blocks_of(count), kThreads, 0, stream, static_cast<const T*>(values), mask, static_cast<T*>(out),
                       count, is_aligned(values, 0) && is_aligned(out, 0));
  });
}

cudaError_t quantize(const KeptZ& kept, int64_t batch, int64_t rank, int64_t plane, bool is_planar, Element element,
                     cudaStream_t stream) {
  const auto pixels = static_cast<int>(batch * plane);
  const int64_t groups = divide_up(pixels, kGroupPixels);
  return for_element(element, [&](auto zero) {
    using T = decltype(zero);
    if (is_planar) {
      return ptx::launch(quantize_planes_kernel<T>, divide_up(groups * rank, kThreads / 32), kThreads, 0, stream, kept, pixels,
                         static_cast<int>(rank), static_cast<int>(plane));
    }
    const bool aligned = is_aligned(kept.z, rank * static_cast<int64_t>(sizeof(T)));
    return ptx::launch(quantize_kernel<T>, groups * divide_up(rank, 64), kThreads, kRangeBytes<kThreads>, stream, kept, pixels,
                       static_cast<int>(rank), aligned);
  });
}

}  // namespace svf::cuda
