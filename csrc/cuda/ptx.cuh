// Every instruction that C++ has no word for, one function each, and every access to shared memory. Nothing else in csrc/cuda holds
// PTX, so that a host emulator can stand in for this one file (tests/cuda_emulation).
//
// Shared memory is one dynamic array; kernels address it by byte offset.
#ifndef SVF_FAST_PTX_CUH
#define SVF_FAST_PTX_CUH

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace svf::cuda::ptx {

// 1024 bytes: the alignment of a swizzled TMA tile.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_window(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())) + offset;
}

// Says in the PTX how much dynamic shared memory this kernel is launched with: no binary knows, and bench/nvcc.py asks.
template <int BYTES>
__device__ __forceinline__ void declare_shared() {
  asm volatile("// dynamic shared memory: %0" ::"n"(BYTES));
}

template <class V>
__device__ __forceinline__ V load_shared(uint32_t offset) {
  return *reinterpret_cast<const V*>(shared_memory() + offset);
}

template <class V>
__device__ __forceinline__ void store_shared(uint32_t offset, V value) {
  *reinterpret_cast<V*>(shared_memory() + offset) = value;
}

template <class V>
__device__ __forceinline__ V load_global(const V* from) {
  return *from;
}

template <class V>
__device__ __forceinline__ void store_global(V* to, V value) {
  *to = value;
}

// Copies 16 bytes, the last 16 - `bytes` of them zeros, past the registers; both addresses in multiples of 16.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_window(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies but those of the last PENDING groups.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_window(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_window(row))
               : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8], in float32.
__device__ __forceinline__ void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_float16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum [16, 8] += a [16, 8] b [8, 8] of TF32 bits.
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounded to ten bits of mantissa, to nearest.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ uint32_t to_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float from_float16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Two values rounded to nearest even, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// The value of lane `lane ^ distance`; all lanes take part.
template <class V>
__device__ __forceinline__ V from_lane(V value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// Bit l is lane l's flag; all lanes take part.
__device__ __forceinline__ uint32_t ballot(bool flag) { return __ballot_sync(0xffffffffu, flag); }

__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Ends the launch with an error.
__device__ __forceinline__ void trap() { __trap(); }

// Host side: launches `kernel` with `shared` bytes of dynamic shared memory.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t stream,
                   Arguments... arguments) {
  if (blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) {
    // a sticky error would be blamed on the next launch
    cudaGetLastError();
    return status;
  }
  kernel<<<static_cast<uint32_t>(blocks), threads, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

// From here on: what compute capability 9.0 alone has. Names after the PTX ISA.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

using TensorMap = CUtensorMap;

// Host side: describes a matrix of half precision, `columns` wide and `step` elements from row to row, that is copied in boxes of 64 columns
// by `box_rows`, their 16-byte chunks swizzled in rows of 128 bytes; outside of the matrix are zeros. cudaErrorNotSupported where the driver
// will not.
inline cudaError_t describe(TensorMap* map, const void* data, bool is_bfloat16, int64_t rows, int64_t columns, int64_t step,
                            int box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool is_found = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return is_found ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  if (encode == nullptr) {
    // the error would be blamed on the next launch
    cudaGetLastError();
    return cudaErrorNotSupported;
  }
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(step) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
  const CUresult result = encode(
      map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data), sizes,
      strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorNotSupported;
}

// Host side: whether the current device has wgmma and TMA as they are used here.
inline bool has_wgmma() {
  // by device, asked once
  static const std::vector<bool> known = [] {
    int count = 0;
    std::vector<bool> answers(cudaGetDeviceCount(&count) == cudaSuccess ? count : 0);
    for (int device = 0; device < static_cast<int>(answers.size()); ++device) {
      int major = 0, minor = 0;
      answers[device] = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
                        minor == 0;
    }
    return answers;
  }();
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && device < static_cast<int>(known.size()) && known[device];
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_window(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the asynchronous proxy.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_window(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_window(barrier)), "r"(bytes) : "memory");
}

// Waits until the barrier's phase of this parity has completed.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_window(barrier)),
      "r"(parity)
      : "memory");
}

// Starts copying the box whose first element is (row, column); its bytes arrive at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* map, int row, int column, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_window(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_window(barrier))
      : "memory");
}

// A barrier of `threads` of the block; barrier 0 is that of all.
__device__ __forceinline__ void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The registers that each thread of this warpgroup may use from here on.
template <int REGISTERS>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of `sum` over a wait.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    asm volatile("" : "+f"(sum[i])::"memory");
  }
}

// Describes a K-major operand in shared memory, rows of 128 bytes swizzled by TMA: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t tile) {
  const uint64_t start = (shared_window(tile) & 0x3FFFF) >> 4;
  return start | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define SVF_FAST_SUM8(i) \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), "+f"(sum[i + 6]), \
      "+f"(sum[i + 7])
#define SVF_FAST_SUM32(i) SVF_FAST_SUM8(i), SVF_FAST_SUM8(i + 8), SVF_FAST_SUM8(i + 16), SVF_FAST_SUM8(i + 24)
#define SVF_FAST_NAMES32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SVF_FAST_NAMES64 \
  SVF_FAST_NAMES32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SVF_FAST_NAMES128 \
  SVF_FAST_NAMES64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// sum [64, 2 N] += a b of a warpgroup, both operands described in shared memory.
template <bool BFLOAT16, int N>
__device__ __forceinline__ void wgmma(float (&sum)[N], uint64_t a, uint64_t b) {
  static_assert(N == 64 || N == 128);
#define SVF_FAST_WGMMA(COLUMNS, TYPE, NAMES, A, B, ...)                                                                 \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, 1, 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES "}, %" #A ", %" #B        \
               ", adds, 1, 1, 0, 0;\n}"                                                                                  \
               : __VA_ARGS__                                                                                             \
               : "l"(a), "l"(b))
  if constexpr (N == 64) {
    if constexpr (BFLOAT16) {
      SVF_FAST_WGMMA(128, "bf16", SVF_FAST_NAMES64, 64, 65, SVF_FAST_SUM32(0), SVF_FAST_SUM32(32));
    } else {
      SVF_FAST_WGMMA(128, "f16", SVF_FAST_NAMES64, 64, 65, SVF_FAST_SUM32(0), SVF_FAST_SUM32(32));
    }
  } else if constexpr (BFLOAT16) {
    SVF_FAST_WGMMA(256, "bf16", SVF_FAST_NAMES128, 128, 129, SVF_FAST_SUM32(0), SVF_FAST_SUM32(32), SVF_FAST_SUM32(64),
                   SVF_FAST_SUM32(96));
  } else {
    SVF_FAST_WGMMA(256, "f16", SVF_FAST_NAMES128, 128, 129, SVF_FAST_SUM32(0), SVF_FAST_SUM32(32), SVF_FAST_SUM32(64),
                   SVF_FAST_SUM32(96));
  }
#undef SVF_FAST_WGMMA
}

// sum [64, 64] += a b, a [64, 16] in registers as mma.sync has it, a warp 16 rows.
template <bool BFLOAT16>
__device__ __forceinline__ void wgmma(float (&sum)[32], const uint32_t (&a)[4], uint64_t b) {
#define SVF_FAST_WGMMA(TYPE)                                                                                                \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, 1, 0;\n"                                                           \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" SVF_FAST_NAMES32                            \
               "}, {%32, %33, %34, %35}, %36, adds, 1, 1, 0;\n}"                                                            \
               : SVF_FAST_SUM32(0)                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (BFLOAT16) {
    SVF_FAST_WGMMA("bf16");
  } else {
    SVF_FAST_WGMMA("f16");
  }
#undef SVF_FAST_WGMMA
}

#undef SVF_FAST_SUM8
#undef SVF_FAST_SUM32
#undef SVF_FAST_NAMES32
#undef SVF_FAST_NAMES64
#undef SVF_FAST_NAMES128

}  // namespace svf::cuda::ptx

#endif
