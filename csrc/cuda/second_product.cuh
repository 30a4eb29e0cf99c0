// The second product of a back-to-back kernel: a tile [BM, rank] that lies in shared memory as panels, times a factor, column block by
// column block. The factor's tiles run through one ring of cp.async stages without a break between column blocks.
#pragma once

#include "tile.cuh"

namespace svf::cuda {

// Blocks that a multiprocessor should hold at once, where registers suffice: two hide each other's waits. Below compute capability 9.0 there
// is shared memory for one. The compiler for 10.0 cannot do with half of the registers behind a gradient at the larger rank.
template <Products P, int R, bool IS_BACKWARD>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBackToBackResident = P == Products::kTf32x3 || (IS_BACKWARD && R > 128) ? 1 : 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBackToBackResident = 1;
#else
constexpr int kBackToBackResident = P == Products::kTf32x3 ? 1 : 2;
#endif

template <Products P, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES, bool ACROSS>
struct SecondProduct {
  using T = typename ElementOf<P>::type;
  using Warp = WarpTile<BM, BN, WARPS_M, WARPS_N>;
  static constexpr int kStageBytes = kFactorBytes<T, BN>;
  static constexpr int kRingBytes = STAGES * kStageBytes;
  static constexpr int kBytes = kRingBytes + Staging<BN>::bytes(BM);

  // Calls emit(staging, column) for each block of BN of the product's `columns`; `work` has kBytes. `rank` is what the tile is wide.
  template <class Emit>
  static __device__ __forceinline__ void run(const Panels<T, BM>& left, const Matrix& factor, int columns, int rank, uint32_t work,
                                             bool is_aligned, const Emit& emit) {
    const int panels = static_cast<int>(divide_up(rank, kDepth<T>));
    const Staging<BN> staging{work + kRingBytes};
    Warp product;
    product.clear();
    pipeline<STAGES, kStageBytes>(
        work, panels * static_cast<int>(divide_up(columns, BN)),
        [&](int step, uint32_t buffer) {
          copy_factor<T, BN, Warp::kThreads, ACROSS>(buffer, factor, step / panels * BN, step % panels * kDepth<T>, is_aligned);
        },
        Nothing{},
        [&](int step, uint32_t buffer) {
          product.template add<P, ACROSS>(left.panel(step % panels), buffer);
          if (step % panels + 1 == panels) {
            // every thread has read the last block from staging: it has passed the barrier of this step
            product.for_pairs([&](int row, int at, float first, float second) { staging.store(row, at, first, second); });
            product.clear();
            ptx::sync_block();
            emit(staging, step / panels * BN);
          }
        });
  }
};

}  // namespace svf::cuda
