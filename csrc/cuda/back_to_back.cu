// z = x vᵀ, y = act(scale ⊙ ((z ⊙ s) uᵀ) + shift + residual): a 1x1 layer in one pass over memory, z between its products on the chip.
//
// A block takes 64 pixels. First product: z [64, R] in registers, x and v through a ring of cp.async stages. z goes, rounded as it is kept,
// into shared memory as the panels of the second product's left operand; from there it is written (or quantised) and weighted with s where
// it lies. Second product: u in column blocks (second_product.cuh).
#include "epilogue.cuh"
#include "kept_z.cuh"
#include "second_product.cuh"

namespace svf::cuda {
namespace {

struct Aligned {
  bool x, v, u, residual, y, z;
};

template <Products P, int R>
struct Plan {
  using T = typename ElementOf<P>::type;
  static constexpr int BM = 64, BN = 128, kWarpsM = 2, kWarpsN = 4, kStages = R > 128 ? 2 : 3;
  using Warp = WarpTile<BM, R, kWarpsM, kWarpsN>;
  using Second = SecondProduct<P, BM, BN, kWarpsM, kWarpsN, kStages, false>;
  static constexpr int kThreads = Warp::kThreads;
  static constexpr int kStageBytes = (BM + R) * kPanelBytes;
  // two tables of offsets, the panels, then what the rings of both products take in turn
  static constexpr int kPanelsAt = 2 * BM * 8;
  static constexpr int kWorkAt = kPanelsAt + Panels<T, BM>::bytes(R);
  static constexpr int kSharedBytes = kWorkAt + larger(kStages * kStageBytes, Second::kBytes);
};

// Keeps the z in `panels` as asked and weights it with s, in place.
template <class T, int R, int THREADS>
__device__ __forceinline__ void keep_z(const Panels<T, 64>& panels, const BackToBackForward& p, int first_pixel, uint32_t scratch,
                                       bool is_aligned) {
  const int rank = p.v.rows, pixels = p.extent.pixels;
  if (p.kept.q != nullptr) {
    for (int channel = 0; channel < rank; channel += 64) {
      quantize_group<BlockTeam<THREADS>>(scratch, p.kept, first_pixel, pixels, channel, rank,
                              [&](int row, int octet) { return panels.load(row, channel + 8 * octet); });
    }
  }
  if (p.kept.z == nullptr && p.s == nullptr) {
    return;
  }
  constexpr int kOctets = R / 8;
  const int at = threadIdx.x % kOctets * 8;
  Octet s;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    s.value[c] = p.s != nullptr && at + c < rank ? ptx::load_global(p.s + at + c) : 1.0f;
  }
#pragma unroll 2
  for (int row = threadIdx.x / kOctets; row < 64; row += THREADS / kOctets) {
    Octet z = panels.load(row, at);
    const int pixel = first_pixel + row;
    if (p.kept.z != nullptr && pixel < pixels && at < rank) {
      store_octet(static_cast<T*>(p.kept.z) + static_cast<int64_t>(pixel) * rank + at, z, rank - at, is_aligned);
    }
    if (p.s != nullptr) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        z.value[c] *= s.value[c];
      }
      panels.store(row, at, z);
    }
  }
  ptx::sync_block();
}

template <Products P, int R>
__global__ void __launch_bounds__(Plan<P, R>::kThreads, kBackToBackResident<P, R, false>)
    back_to_back_kernel(const BackToBackForward p, const Aligned aligned) {
  using Plan = Plan<P, R>;
  using T = typename Plan::T;
  constexpr int BM = Plan::BM, kThreads = Plan::kThreads;
  ptx::declare_shared<Plan::kSharedBytes>();
  const int first_pixel = blockIdx.x * BM, inputs = p.v.columns;
  const PixelRows x_rows = tabulate<BM, kThreads>(0, p.x, p.extent, first_pixel);
  const PixelRows residual_rows = tabulate<BM, kThreads>(BM * 8, p.out.residual, p.extent, first_pixel);
  ptx::sync_block();
  const Panels<T, BM> panels{Plan::kPanelsAt};
  {
    typename Plan::Warp z;
    z.clear();
    pipeline<Plan::kStages, Plan::kStageBytes>(
        Plan::kWorkAt, static_cast<int>(divide_up(inputs, kDepth<T>)),
        [&](int step, uint32_t buffer) {
          copy_panel<T, BM, kThreads>(buffer, static_cast<const T*>(p.x.data), x_rows, step * kDepth<T>, inputs, aligned.x);
          copy_factor<T, R, kThreads, false>(buffer + BM * kPanelBytes, p.v, 0, step * kDepth<T>, aligned.v);
        },
        Nothing{},
        [&](int, uint32_t buffer) { z.template add<P, false>(buffer, buffer + BM * kPanelBytes); });
    z.for_pairs([&](int row, int column, float first, float second) { panels.store(row, column, first, second); });
  }
  ptx::sync_block();
  keep_z<T, R, kThreads>(panels, p, first_pixel, Plan::kWorkAt, aligned.z);
  Plan::Second::run(panels, p.u, p.out.channels, p.v.rows, Plan::kWorkAt, aligned.u, [&](const auto& staging, int column) {
    finish_tile<T, BM, Plan::BN, BlockTeam<kThreads>>(staging, p.out, residual_rows, first_pixel, p.extent.pixels, column,
                                           aligned.residual, aligned.y);
  });
}

template <Products P, int R>
cudaError_t launch(const BackToBackForward& p, cudaStream_t stream) {
  using T = typename Plan<P, R>::T;
  const Matrix y{p.out.y, p.extent.pixels, p.out.channels}, z{p.kept.z, p.extent.pixels, p.v.rows};
  const Aligned aligned{is_aligned<T>(p.x), is_aligned<T>(p.v),  is_aligned<T>(p.u), is_aligned<T>(p.out.residual),
                        is_aligned<T>(y),   is_aligned<T>(z)};
  return ptx::launch(back_to_back_kernel<P, R>, divide_up(p.extent.pixels, Plan<P, R>::BM), Plan<P, R>::kThreads,
                     Plan<P, R>::kSharedBytes, stream, p, aligned);
}

}  // namespace

cudaError_t back_to_back_forward(const BackToBackForward& p, Products products, int64_t tile, cudaStream_t stream) {
  if (p.v.rows > kLargestRank || (tile != 64 && tile != 128)) {
    return cudaErrorInvalidValue;
  }
  if (tile == 128 && fits_sm90(p, products)) {
    const cudaError_t status = back_to_back_forward_sm90(p, products, stream);
    if (status != cudaErrorNotSupported) {
      return status;
    }
  }
  return for_products(products, [&](auto constant) {
    constexpr Products P = decltype(constant)::value;
    return p.v.rows <= 128 ? launch<P, 128>(p, stream) : launch<P, 256>(p, stream);
  });
}

}  // namespace svf::cuda
