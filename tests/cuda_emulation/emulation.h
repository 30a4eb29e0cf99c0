// A block of CUDA threads on the host, for the very sources that nvcc compiles: g++ gets this file with -include and the twin of ptx.cuh
// below takes the place of the real one.
//
// Threads are fibers that run in turn and give way at barriers and warp-wide operations, which are carried out by their documented
// fragment layouts (PTX ISA) once all lanes are there. Asynchronous copies land, and products of a warpgroup are computed, when they are
// waited for. Tensor cores truncate: the sum of a product and what it is added to is exact here, and then rounded toward zero to float32
// (real ones also drop low bits of each term). Found and reported as a launch error: shared memory read where it was never written, out of bounds, unaligned, before its
// asynchronous copy was waited for, or written and read by two threads without a barrier between; rows of ldmatrix in the same banks; global
// memory outside the tensors of the call or unaligned; lanes at different warp-wide operations; products of a warpgroup without a fence before them, or with operands described otherwise than
// as rows of 128 swizzled bytes; threads that wait for each other for ever.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define SVF_FAST_PTX_CUH

using std::max;
using std::min;

struct Index {
  int x = 0;
};
extern Index threadIdx, blockIdx;

namespace emulation {

// Ends the launch that is running; what went wrong becomes its error string.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Gives other threads their turn.
void yield();

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
};

// A wgmma under way: a in registers or described, b described, 64 × `columns`.
struct WarpgroupProduct {
  float* sum;
  int columns;
  bool is_bfloat16, has_registers;
  uint32_t a_registers[4];
  uint64_t a, b;
};

struct Thread {
  int index = 0;
  void* stack = nullptr;
  bool is_finished = false;
  std::vector<Copy> copies;
  // how many of `copies` each committed group has
  std::vector<size_t> groups;
  size_t uncommitted = 0;
  std::vector<WarpgroupProduct> products;
  std::vector<size_t> product_groups;
  size_t uncommitted_products = 0;
  // registers were ordered before the products that follow
  bool is_fenced = false;
};

// One warp-wide operation at a time: what lanes bring and what they take away.
struct Warp {
  static constexpr int kBytes = 64;
  alignas(16) unsigned char in[32][kBytes], out[32][kBytes];
  int arrived = 0, kind = 0;
  uint64_t generation = 0;

  template <class V>
  const V* from(int lane) const {
    return reinterpret_cast<const V*>(in[lane]);
  }
  template <class V>
  V* to(int lane) {
    return reinterpret_cast<V*>(out[lane]);
  }
};
// Brings `bytes` to operation `kind` of this thread's warp and returns what it takes away, once all lanes were there and one carried it out.
const void* together(int kind, const void* input, size_t bytes, void (*carry_out)(Warp&));

// Addresses of shared memory, checked.
void check_declared(size_t bytes);
const unsigned char* read_shared(uint32_t offset, size_t bytes, size_t alignment);
unsigned char* write_shared(uint32_t offset, size_t bytes, size_t alignment);
void begin_copy(uint32_t to, const void* from, int bytes);
void finish_copies(size_t pending_groups);
void commit();
void barrier();

// Whether the device has what compute capability 9.0 alone has.
extern bool has_wgmma;
// What the last launch asked for.
extern int shared_bytes;

// Memory that the kernels of the coming launches may touch.
void forbid_all();
void allow(const void* data, int64_t bytes);
void check_global(const void* address, size_t bytes, size_t alignment);

// A matrix of 16-bit elements that boxes are copied of.
struct TensorMap {
  const void* data;
  int64_t rows, columns, step;
  int box_rows;
};
void init_barrier(uint32_t at, int arrivals);
void arrive(uint32_t at, int bytes);
void wait(uint32_t at, uint32_t parity);
void copy_box(uint32_t to, const TensorMap& map, int row, int column, uint32_t barrier);
void sync_named(int barrier, int threads);
void fence_products();
void begin_product(const WarpgroupProduct& product);
void commit_products();
void finish_products(size_t pending_groups);

cudaError_t run(int64_t blocks, int threads, int shared, const std::function<void()>& kernel);

float from_float16(uint16_t bits);
uint16_t to_float16(float value);
uint16_t to_bfloat16(float value);
void multiply(Warp& warp, int kind);

}  // namespace emulation

namespace svf::cuda::ptx {

enum Kind { kLoad = 1, kLoadTransposed, kBFloat16, kFloat16, kTf32, kShuffle, kBallot };

template <int BYTES>
void declare_shared() {
  emulation::check_declared(BYTES);
}

template <class V>
V load_shared(uint32_t offset) {
  V value;
  std::memcpy(&value, emulation::read_shared(offset, sizeof(V), alignof(V)), sizeof(V));
  return value;
}

template <class V>
void store_shared(uint32_t offset, V value) {
  std::memcpy(emulation::write_shared(offset, sizeof(V), alignof(V)), &value, sizeof(V));
}

template <class V>
V load_global(const V* from) {
  emulation::check_global(from, sizeof(V), alignof(V));
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
void store_global(V* to, V value) {
  emulation::check_global(to, sizeof(V), alignof(V));
  std::memcpy(to, &value, sizeof(V));
}

inline void copy_async(uint32_t to, const void* from, int bytes) { emulation::begin_copy(to, from, bytes); }
inline void commit_copies() { emulation::commit(); }
template <int PENDING>
void wait_copies() {
  emulation::finish_copies(PENDING);
}

void load_matrices(uint32_t (&to)[4], uint32_t row);
void load_matrices_transposed(uint32_t (&to)[4], uint32_t row);

template <Kind KIND>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t input[10] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(input + 6, sum, 16);
  std::memcpy(sum, emulation::together(KIND, input, sizeof(input), [](emulation::Warp& warp) { emulation::multiply(warp, KIND); }), 16);
}
inline void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply<kBFloat16>(sum, a, b0, b1); }
inline void multiply_float16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply<kFloat16>(sum, a, b0, b1); }
inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply<kTf32>(sum, a, b0, b1); }

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
// cvt.rna: to nearest, ties away from zero
inline uint32_t to_tf32(float value) { return std::isfinite(value) ? (to_bits(value) + 0x1000u) & 0xFFFFE000u : to_bits(value); }
inline float from_float16(uint16_t bits) { return emulation::from_float16(bits); }
inline uint32_t pack_bfloat16(float low, float high) {
  return emulation::to_bfloat16(low) | uint32_t{emulation::to_bfloat16(high)} << 16;
}
inline uint32_t pack_float16(float low, float high) {
  return emulation::to_float16(low) | uint32_t{emulation::to_float16(high)} << 16;
}

template <class V>
V from_lane(V value, int distance) {
  static_assert(sizeof(V) == 4);
  struct Input {
    V value;
    int distance;
  } input{value, distance};
  V result;
  std::memcpy(&result, emulation::together(kShuffle, &input, sizeof(input), [](emulation::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      *warp.to<V>(lane) = warp.from<Input>(lane ^ warp.from<Input>(lane)->distance)->value;
    }
  }), sizeof(V));
  return result;
}

inline uint32_t ballot(bool flag) {
  return *static_cast<const uint32_t*>(emulation::together(kBallot, &flag, sizeof(flag), [](emulation::Warp& warp) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      bits |= uint32_t{*warp.from<bool>(lane)} << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      *warp.to<uint32_t>(lane) = bits;
    }
  }));
}

inline void sync_block() { emulation::barrier(); }

inline void trap() { emulation::fail("a trap"); }

constexpr bool kHasWgmma = true;
using TensorMap = emulation::TensorMap;

inline cudaError_t describe(TensorMap* map, const void* data, bool, int64_t rows, int64_t columns, int64_t step, int box_rows) {
  // what the driver's encoder refuses
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || step * 2 % 16 != 0 || step < columns || box_rows > 256) {
    return cudaErrorNotSupported;
  }
  *map = {data, rows, columns, step, box_rows};
  return cudaSuccess;
}
inline bool has_wgmma() { return emulation::has_wgmma; }

inline void init_barrier(uint32_t barrier, int arrivals) { emulation::init_barrier(barrier, arrivals); }
inline void publish_barriers() {}
inline void arrive(uint32_t barrier) { emulation::arrive(barrier, 0); }
inline void arrive_expecting(uint32_t barrier, int bytes) { emulation::arrive(barrier, bytes); }
inline void wait(uint32_t barrier, uint32_t parity) { emulation::wait(barrier, parity); }
inline void copy_box(uint32_t to, const TensorMap* map, int row, int column, uint32_t barrier) {
  emulation::copy_box(to, *map, row, column, barrier);
}
inline void sync_named(int barrier, int threads) { emulation::sync_named(barrier, threads); }
template <int REGISTERS>
void give_up_registers() {}
template <int REGISTERS>
void claim_registers() {}

inline void wgmma_fence() { emulation::fence_products(); }
inline void wgmma_commit() { emulation::commit_products(); }
template <int PENDING>
void wgmma_wait() {
  emulation::finish_products(PENDING);
}
template <int N>
void wgmma_hold(float (&)[N]) {}
inline uint64_t wgmma_operand(uint32_t tile) {
  return (tile & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
template <bool BFLOAT16, int N>
void wgmma(float (&sum)[N], uint64_t a, uint64_t b) {
  emulation::begin_product({sum, 2 * N, BFLOAT16, false, {}, a, b});
}
template <bool BFLOAT16>
void wgmma(float (&sum)[32], const uint32_t (&a)[4], uint64_t b) {
  emulation::begin_product({sum, 64, BFLOAT16, true, {a[0], a[1], a[2], a[3]}, 0, b});
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t, Arguments... arguments) {
  return emulation::run(blocks, threads, shared, [&] { kernel(arguments...); });
}

}  // namespace svf::cuda::ptx
