// What the binding and the kernels of one instruction set share: plain structs over raw memory, and the table of entry points.
// No torch header here: each instruction set compiles this with its own flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace svf {

// Runs body(context, begin, end) over parts of [0, count) on torch's threads. Which thread runs what must not matter.
using Body = void (*)(void* context, int64_t begin, int64_t end);
struct Threads {
  int64_t count;
  void (*parallel_for)(int64_t count, void* context, Body body);
};

enum class Type : int32_t { kFloat, kBFloat16, kInt8 };

// A picture [n, h, w, channels] whose channels are adjacent; strides in elements.
struct Picture {
  void* data = nullptr;
  int64_t n = 0, h = 0, w = 0;
};

// The V-convolution: input and output extents, taps, stride, zero padding, dilation; each (height, width).
struct Geometry {
  int64_t batch, in[2], out[2], taps[2], stride[2], padding[2], dilation[2];

  int64_t out_pixels() const { return batch * out[0] * out[1]; }
};

// z = conv(x, right), y = act(left (s ⊙ z) + shift + residual), and what is kept; null where nothing is asked for. Everything but x
// and the residual is dense, [pixels, channels].
struct Forward {
  Geometry geometry;
  int64_t inputs, rank, outputs;
  Type type;
  // [.., inputs]; where `right` is null, z itself
  Picture x;
  // null `left`: y = act(z + shift + residual), rank = outputs
  const void *right, *left;
  // `right` holds the 16 transformed taps of winograd.h
  bool is_winograd;
  const float *s, *shift;
  Picture residual;
  void *y, *z;
  // z is int8 where this is given: [groups of pixels, rank]
  float* z_scale;
  uint8_t* mask;
  bool relu;
};

// g = left (dy ⊙ mask), ds = Σ z ⊙ g, dx = (s ⊙ g) right at every stride-th pixel; null where nothing is asked for. Where `right` is
// null, dx [pixels, rank] takes s ⊙ g itself. Everything but dy and dx is dense.
struct Backward {
  Geometry geometry;
  int64_t inputs, rank, outputs;
  Type type, z_type;
  Picture dy, dx;
  void* d;
  const void* z;
  const uint8_t* mask;
  const void *right, *left;
  const float *s, *z_scale;
  // elements between the scales of two groups of pixels: 0 where all pixels have one
  int64_t z_scale_step;
  // [tiles, rank]: summed up by the caller
  float* partial;
};

// dx = data gradient of a strided V-convolution from g [pixels, rank]; both dense.
struct DataGradient {
  Geometry geometry;
  int64_t inputs, rank;
  Type type;
  const void* g;
  void* dx;
  const void* right;
};

// The largest cosine of each query position to any support row: running over tiles, never the matrix.
struct MaxCosine {
  int64_t channels, queries, supports;
  // [queries, channels] packed as a right operand, [supports, channels] in rows
  const void* query;
  const float* support;
  const float *query_norm, *support_norm;
  float eps;
  // [queries]; read first: what has been found so far
  float* value;
  int32_t* winner;
  // number of the first support row
  int32_t first;
};

// A matrix [k, n] to be packed as a right operand, at strides in elements, one for each tap.
struct Matrix {
  const void* data;
  Type type;
  int64_t taps, tap_stride, k, k_stride, n, n_stride;
};

// z [pixels, rank] as int8 with a scale a channel and group of pixels; all dense.
struct Quantize {
  int64_t pixels, rank;
  Type type;
  const void* z;
  int8_t* q;
  float* scale;
};

// `count` dense values, their mask, and the values again where the mask's bit is 1.
struct Masked {
  int64_t count;
  Type type;
  const void* values;
  uint8_t* mask;
  void* out;
};

struct Kernels {
  const char* name;
  // `half`: for layers that compute in bfloat16
  size_t (*packed_bytes)(const Matrix&, bool half);
  void (*pack)(const Matrix&, bool half, void* out, const Threads&);
  void (*forward)(const Forward&, const Threads&);
  void (*backward)(const Backward&, const Threads&);
  void (*data_gradient)(const DataGradient&, const Threads&);
  void (*max_cosine)(const MaxCosine&, const Threads&);
  void (*quantize)(const Quantize&, const Threads&);
  void (*pack_mask)(const Masked&, const Threads&);
  void (*keep_masked)(const Masked&, const Threads&);
  // whether products of bfloat16 layers run on bfloat16 operands
  bool has_half_products;
};

// Pixels of int8's scale groups.
constexpr int64_t kGroupPixels = 64;

// How `total` pixels (or blocks of pixels) are dealt out: in `tiles` of equal size but for rounding.
struct Tiling {
  int64_t total, tiles, most;
  int64_t begin(int64_t tile) const { return total * tile / tiles; }
  int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
};

// Tiles of at most `most` of `total`, as many for each of `threads`.
inline Tiling deal_out(int64_t total, int64_t most, int64_t threads) {
  const int64_t least = (total + most - 1) / most, each = (least + threads - 1) / threads;
  const int64_t tiles = each * threads < total ? each * threads : total;
  return {total, tiles, tiles == 0 ? 0 : (total + tiles - 1) / tiles};
}

// The tiles of a backward: by the shape alone, so that the order of ds's sums never depends on threads.
inline Tiling backward_tiles(int64_t pixels) { return deal_out(pixels, 128, 8); }

// Memory of this thread that lasts from call to call, a 64-byte aligned buffer for each slot.
void* scratch(int slot, size_t bytes);

const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
// with products of bfloat16 pairs
const Kernels& avx512_bfloat16_kernels();
// with products of bfloat16 tiles
const Kernels& amx_kernels();

}  // namespace svf
