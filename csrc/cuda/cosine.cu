// The max-cosine prior, streamed: a block holds 128 query positions, walks over its part of the support and keeps the largest cosine and
// where it was. The matrix of cosines never leaves registers.
//
// cos(i, j) = w_i ⟨a_i, q_j⟩ / (|w_i| ‖a_i‖ ‖q_j‖ + eps), value_j = max_i cos(i, j)      (PFENet's prior mask; w the support mask)
//
// Both operands run through one ring of cp.async stages, support tile after support tile. A lane keeps the best of its own columns; lanes and
// warps that share a query compare once, at the end. The first of equals wins, and NaN above all, as in torch.max.
#include "tile.cuh"

namespace svf::cuda {
namespace {

constexpr int kBlock = 128, kWarpsM = 4, kWarpsN = 2;

struct Aligned {
  bool query, support;
};

struct Best {
  float value;
  int position;

  __device__ __forceinline__ void offer(float other, int at) {
    if (other > value || (other == value && at < position)) {
      value = other;
      position = at;
    }
  }
};

template <Products P>
struct Plan {
  using T = typename ElementOf<P>::type;
  using Warp = WarpTile<kBlock, kBlock, kWarpsM, kWarpsN>;
  static constexpr int kStages = 3, kThreads = Warp::kThreads;
  static constexpr int kStageBytes = 2 * kBlock * kPanelBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// The rows of a warp tile that a lane has elements of, two for every 16.
template <class Warp>
using Bests = Best[Warp::M][2];

// Takes a tile of dot products, columns those of support positions from `first` on, into `best`.
template <class Warp>
__device__ __forceinline__ void compare(const Warp& dots, Bests<Warp>& best, const MaxCosine& p, const float (&query_norm)[Warp::M][2],
                                        int64_t batch, int first, int end) {
#pragma unroll
  for (int n = 0; n < Warp::N; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = first + Warp::column() + 8 * n + threadIdx.x % 4 * 2 + e;
      if (i < end) {
        const float weight = p.weight != nullptr ? ptx::load_global(p.weight + batch * p.supports + i) : 1.0f;
        const float norm = ptx::load_global(p.support.norm + batch * p.supports + i) * fabsf(weight);
#pragma unroll
        for (int m = 0; m < Warp::M; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float cosine = dots.sum[m][n][2 * half + e] * weight / (norm * query_norm[m][half] + p.eps);
            // NaN counts as the largest, and is one again at the end
            best[m][half].offer(cosine == cosine ? cosine : INFINITY, i);
          }
        }
      }
    }
  }
}

// Lanes that share rows, then the warps beside each other, agree on the best; the result of row r in `best_at` + 8 r.
template <class Warp>
__device__ __forceinline__ void agree(Bests<Warp>& best, uint32_t best_at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < Warp::M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        const float value = ptx::from_lane(best[m][half].value, distance);
        best[m][half].offer(value, ptx::from_lane(best[m][half].position, distance));
      }
      if (lane % 4 == 0) {
        const int row = Warp::row() + 16 * m + 8 * half + lane / 4;
        const Vector8 packed{{ptx::to_bits(best[m][half].value), static_cast<uint32_t>(best[m][half].position)}};
        ptx::store_shared(best_at + (warp / kWarpsM * kBlock + row) * 8, packed);
      }
    }
  }
  ptx::sync_block();
}

template <Products P>
__global__ void __launch_bounds__(Plan<P>::kThreads) max_cosine_kernel(const MaxCosine p, const Aligned aligned) {
  using Plan = Plan<P>;
  using T = typename Plan::T;
  using Warp = typename Plan::Warp;
  ptx::declare_shared<Plan::kSharedBytes>();
  const int tiles = static_cast<int>(divide_up(p.queries, kBlock));
  const int first_query = blockIdx.x % tiles * kBlock, split = blockIdx.x / tiles % p.splits;
  const int64_t batch = blockIdx.x / tiles / p.splits;
  const int begin = split * p.per_split, end = min(begin + p.per_split, p.supports);
  const auto* query = static_cast<const T*>(p.query.data) + batch * p.query.batch;
  const auto* support = static_cast<const T*>(p.support.data) + batch * p.support.batch;
  const MatrixRows query_rows{first_query, p.queries, p.query.position};
  Bests<Warp> best;
  float query_norm[Warp::M][2];
#pragma unroll
  for (int m = 0; m < Warp::M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best[m][half] = {-INFINITY, INT32_MAX};
      const int j = first_query + Warp::row() + 16 * m + 8 * half + threadIdx.x % 32 / 4;
      query_norm[m][half] = j < p.queries ? ptx::load_global(p.query.norm + batch * p.queries + j) : 1.0f;
    }
  }
  const int panels = static_cast<int>(divide_up(p.channels, kDepth<T>));
  Warp dots;
  dots.clear();
  pipeline<Plan::kStages, Plan::kStageBytes>(
      0, panels * static_cast<int>(divide_up(end - begin, kBlock)),
      [&](int step, uint32_t buffer) {
        const int depth = step % panels * kDepth<T>;
        const MatrixRows support_rows{begin + step / panels * kBlock, end, p.support.position};
        copy_panel<T, kBlock, Plan::kThreads>(buffer, query, query_rows, depth, p.channels, aligned.query);
        copy_panel<T, kBlock, Plan::kThreads>(buffer + kBlock * kPanelBytes, support, support_rows, depth, p.channels,
                                              aligned.support);
      },
      Nothing{},
      [&](int step, uint32_t buffer) {
        dots.template add<P, false>(buffer, buffer + kBlock * kPanelBytes);
        if (step % panels + 1 == panels) {
          compare(dots, best, p, query_norm, batch, begin + step / panels * kBlock, end);
          dots.clear();
        }
      });
  agree<Warp>(best, 0);
  const int j = first_query + threadIdx.x;
  if (threadIdx.x < kBlock && j < p.queries) {
    Best winner{-INFINITY, INT32_MAX};
#pragma unroll
    for (int n = 0; n < kWarpsN; ++n) {
      const auto packed = ptx::load_shared<Vector8>((n * kBlock + threadIdx.x) * 8);
      winner.offer(ptx::from_bits(packed.word[0]), static_cast<int>(packed.word[1]));
    }
    const int64_t out = (batch * p.splits + split) * p.queries + j;
    ptx::store_global(p.best + out, winner.value == INFINITY ? NAN : winner.value);
    ptx::store_global(p.winner + out, winner.position);
  }
}

}  // namespace

cudaError_t max_cosine(const MaxCosine& p, Products products, cudaStream_t stream) {
  return for_products(products, [&](auto constant) {
    constexpr Products P = decltype(constant)::value;
    const auto bytes = static_cast<int64_t>(sizeof(typename Plan<P>::T));
    const Aligned aligned{is_aligned(p.query.data, (p.query.batch | p.query.position) * bytes),
                          is_aligned(p.support.data, (p.support.batch | p.support.position) * bytes)};
    const int64_t blocks = divide_up(p.queries, kBlock) * p.splits * p.batch;
    return ptx::launch(max_cosine_kernel<P>, blocks, Plan<P>::kThreads, Plan<P>::kSharedBytes, stream, p, aligned);
  });
}

}  // namespace svf::cuda
