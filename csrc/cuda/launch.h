// The CUDA kernels as their callers see them: plain structs over device memory, one launcher a kernel. No torch here, and no PTX.
//
// Activations are pictures whose channels are adjacent. What a launcher writes or reads back (y, d, z, masks) is dense: pixel p begins
// at element p · channels. Null pointers stand for what is absent or not asked for. Strides and counts are in elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace svf::cuda {

// How two operands are multiplied: half precisions exactly, float32 as one TF32 product or as three (error 1e-6).
enum class Products : int32_t { kBFloat16, kFloat16, kTf32, kTf32x3 };

enum class Element : int32_t { kBFloat16, kFloat16, kFloat32 };

// A picture [n, h, w, channels] with adjacent channels. A stride is 0 where there is one step of it.
struct Picture {
  void* data;
  int64_t n, h, w;
};

// The pixels of a launch, numbered in n, h, w order: all of them, those of one picture and those of one row.
struct Extent {
  int32_t pixels, plane, width;
};

// y = act(scale ⊙ product + shift + residual), and one mask bit an element; channels in multiples of 8 where there is a mask.
struct Epilogue {
  const float *scale, *shift;
  Picture residual;
  void* y;
  uint8_t* mask;
  int32_t channels;
  bool relu;
};

// z in full, or as int8 with scales [groups of 64 pixels, rank].
struct KeptZ {
  void* z;
  int8_t* q;
  float* q_scale;
};

// A matrix [rows, columns], dense.
struct Matrix {
  const void* data;
  int32_t rows, columns;
};

// y from z [pixels, rank] and left = u ⊙ s [channels, rank]; writes only `kept.q`.
struct ProjectForward {
  Extent extent;
  const void* z;
  Matrix left;
  Epilogue out;
  KeptZ kept;
};

// y from x through both factors, z between them on the chip; v [rank, inputs], u [channels, rank], s [rank] where u lacks it.
struct BackToBackForward {
  Extent extent;
  Picture x;
  Matrix v, u;
  const float* s;
  Epilogue out;
  KeptZ kept;
};

// g = ((dy ⊙ mask) ⊙ scale) u, d = dy ⊙ mask; partial [pixel tiles, rank] sums up to ds = Σ z ⊙ g.
struct Gradient {
  Extent extent;
  Picture dy;
  const uint8_t* mask;
  const float* scale;
  Matrix u;
  void* d;
  KeptZ kept;
  float* partial;
  const float* s;
};

// s ⊙ g [pixels, rank] into `weighted`.
struct ProjectBackward {
  Gradient gradient;
  void* weighted;
};

// dx = (s ⊙ g) v.
struct BackToBackBackward {
  Gradient gradient;
  Matrix v;
  Picture dx;
};

// Features [batch, positions, channels] with adjacent channels.
struct Features {
  const void* data;
  int64_t batch, position;
  const float* norm;
};

// For each query the largest cosine to a support position and where it is, one of each for every split of the support:
// best, winner [batch, splits, queries].
struct MaxCosine {
  Features query, support;
  const float* weight;
  float* best;
  int32_t* winner;
  float eps;
  int32_t batch, channels, queries, supports, splits, per_split;
};

// What the gradients of a max-cosine need of each query: [batch, queries, 3], as cosine_backward.cu fills it.
struct CosineBackward {
  Features query, source;
  const void* dvalue;
  const float* weight;
  // where a support position's row lies in `source`, in elements [batch, supports]
  const int64_t* row_of;
  const int32_t* winner;
  // the queries of support position i: order[first_of[i]] … order[first_of[i + 1] - 1]
  const int64_t *order, *first_of;
  float* coefficients;
  void *dquery, *dsupport;
  float eps;
  int32_t batch, channels, queries, supports;
};

// Whether sm_90a is among the architectures that were compiled: the kernels by wgmma are empty otherwise.
#ifdef SVF_FAST_HAS_SM90A
constexpr bool kHasSm90a = true;
#else
constexpr bool kHasSm90a = false;
#endif

// The largest rank whose z tile stays on the chip.
constexpr int32_t kLargestRank = 256;

// `tile`: pixels of a block, 128 or 64.
cudaError_t project_forward(const ProjectForward&, Products, int64_t tile, cudaStream_t);
cudaError_t project_backward(const ProjectBackward&, Products, int64_t tile, cudaStream_t);
// Tiles of 64 pixels by mma.sync on any device; tiles of 128 by wgmma where that can be had, else the same as 64.
cudaError_t back_to_back_forward(const BackToBackForward&, Products, int64_t tile, cudaStream_t);
// Whether the layer can run on the current device by wgmma: half precision, pixels equally far apart, everything on 16 bytes.
bool fits_sm90(const BackToBackForward&, Products);
// cudaErrorNotSupported, and nothing launched, where the driver does not describe the operands.
cudaError_t back_to_back_forward_sm90(const BackToBackForward&, Products, cudaStream_t);
cudaError_t back_to_back_backward(const BackToBackBackward&, Products, cudaStream_t);
cudaError_t max_cosine(const MaxCosine&, Products, cudaStream_t);
cudaError_t max_cosine_backward(const CosineBackward&, Element, cudaStream_t);

// Element-wise, on dense tensors of `count` elements in memory order. `plane`: pixels of a picture where each channel is a plane of its
// own, 0 where channels are adjacent.
cudaError_t epilogue(const Epilogue&, int64_t count, int64_t plane, Element, cudaStream_t);
cudaError_t pack(const void* values, uint8_t* mask, int64_t count, Element, cudaStream_t);
cudaError_t keep_masked(const void* values, const uint8_t* mask, void* out, int64_t count, Element, cudaStream_t);
cudaError_t quantize(const KeptZ&, int64_t batch, int64_t rank, int64_t plane, bool is_planar, Element, cudaStream_t);

}  // namespace svf::cuda
