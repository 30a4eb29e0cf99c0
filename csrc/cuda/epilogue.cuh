// What follows a product on its way to memory: scale, shift, residual, ReLU, mask bits; eight channels a thread at a time.
//
// A thread holds eight adjacent channels, one byte of the mask: it is written without asking other lanes.
#pragma once

#include "tile.cuh"

namespace svf::cuda {

// Scale and shift of the channels that a thread finishes.
struct Affine {
  Octet scale, shift;

  __device__ __forceinline__ Affine(const Epilogue& out, int channel) {
    const int count = out.channels - channel;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = i < count;
      scale.value[i] = exists && out.scale != nullptr ? ptx::load_global(out.scale + channel + i) : 1.0f;
      shift.value[i] = exists && out.shift != nullptr ? ptx::load_global(out.shift + channel + i) : 0.0f;
    }
  }
};

__device__ __forceinline__ void apply(Octet& octet, const Affine& affine, const Octet& residual, bool relu) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = octet.value[i] * affine.scale.value[i] + affine.shift.value[i] + residual.value[i];
    // not fmaxf: NaN stays NaN, as in torch
    octet.value[i] = relu && value < 0.0f ? 0.0f : value;
  }
}

// The mask's byte of values as they are stored; NaN counts as let through.
__device__ __forceinline__ uint8_t mask_byte(const Octet& stored) {
  uint32_t byte = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    byte |= (stored.value[i] != 0.0f ? 1u : 0u) << i;
  }
  return static_cast<uint8_t>(byte);
}

// Writes a tile [ROWS, WIDTH] of finished y from channel `column` on.
template <class T, int ROWS, int WIDTH, class Team>
__device__ __forceinline__ void finish_tile(const Staging<WIDTH>& staging, const Epilogue& out, const PixelRows& residual_rows,
                                            int first_pixel, int pixels, int column, bool residual_aligned, bool y_aligned) {
  constexpr int kOctets = WIDTH / 8;
  static_assert(Team::kThreads % kOctets == 0);
  const int own = Team::index(), octet = own % kOctets, channel = column + 8 * octet, count = out.channels - channel;
  if (count <= 0) {
    return;
  }
  const Affine affine(out, channel);
#pragma unroll 2
  for (int row = own / kOctets; row < ROWS; row += Team::kThreads / kOctets) {
    const int pixel = first_pixel + row;
    if (pixel >= pixels) {
      break;
    }
    Octet residual{};
    if (out.residual.data != nullptr) {
      residual = load_octet(static_cast<const T*>(out.residual.data) + residual_rows(row) + channel, count, residual_aligned);
    }
    Octet value = staging.load(row, octet);
    apply(value, affine, residual, out.relu);
    const int64_t element = static_cast<int64_t>(pixel) * out.channels + channel;
    store_octet(static_cast<T*>(out.y) + element, value, count, y_aligned);
    if (out.mask != nullptr) {
      round_to<T>(value);
      ptx::store_global(out.mask + element / 8, mask_byte(value));
    }
  }
}

}  // namespace svf::cuda
