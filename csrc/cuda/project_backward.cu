// d = dy ⊙ mask, g = (d ⊙ scale) u, ds = Σ z ⊙ g, s ⊙ g: one pass over dy, mask and z, in front of the vendor's data gradient.
//
// A block computes g for a tile [BM pixels, BR ranks] (gradient.cuh); blocks that share pixels are neighbours, and the first writes d.
#include "gradient.cuh"

namespace svf::cuda {
namespace {

template <Products P, int BM, int BR, int WARPS_M, int WARPS_N, int STAGES>
struct Plan {
  using T = typename ElementOf<P>::type;
  using Warp = WarpTile<BM, BR, WARPS_M, WARPS_N>;
  static constexpr int kThreads = Warp::kThreads;
  static constexpr int kTableBytes = BM * 8;
  static constexpr int kScratchBytes = kThreads / 32 * BR * 4;
  static constexpr int kRingBytes = STAGES * (BM * kPanelBytes + kFactorBytes<T, BR>);
  static constexpr int kSharedBytes = kTableBytes + larger(kRingBytes, Staging<BR>::bytes(BM) + kScratchBytes);
};

template <Products P, int BM, int BR, int WARPS_M, int WARPS_N, int STAGES>
__global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, kResident<P, 32 * WARPS_M * WARPS_N>)
    project_backward_kernel(const ProjectBackward p, const GradientAligned aligned) {
  using Plan = Plan<P, BM, BR, WARPS_M, WARPS_N, STAGES>;
  using T = typename Plan::T;
  constexpr int kThreads = Plan::kThreads;
  ptx::declare_shared<Plan::kSharedBytes>();
  const Gradient& gradient = p.gradient;
  const int rank = gradient.u.columns, columns = static_cast<int>(divide_up(rank, BR));
  const int first_pixel = blockIdx.x / columns * BM, first_rank = blockIdx.x % columns * BR;
  const uint32_t work = Plan::kTableBytes;
  const PixelRows rows = tabulate<BM, kThreads>(0, gradient.dy, gradient.extent, first_pixel);
  ptx::sync_block();
  typename Plan::Warp g;
  project_gradient<P, BM, BR, STAGES>(g, work, gradient, rows, first_pixel, first_rank, aligned);
  const Staging<BR> staging{work};
  g.for_pairs([&](int row, int column, float first, float second) { staging.store(row, column, first, second); });
  ptx::sync_block();
  use_gradient<T, BM, BR, kThreads>(
      staging, work + Staging<BR>::bytes(BM), gradient, first_pixel, first_rank, aligned,
      [&](int row, int octet, const Octet& value) {
        const int pixel = first_pixel + row, at = first_rank + 8 * octet;
        if (p.weighted != nullptr && pixel < gradient.extent.pixels && at < rank) {
          T* to = static_cast<T*>(p.weighted) + static_cast<int64_t>(pixel) * rank + at;
          store_octet(to, value, rank - at, aligned.weighted);
        }
      });
}

template <Products P, int BM, int BR, int WARPS_M, int WARPS_N, int STAGES>
cudaError_t launch(const ProjectBackward& p, cudaStream_t stream) {
  using Plan = Plan<P, BM, BR, WARPS_M, WARPS_N, STAGES>;
  const GradientAligned aligned = aligned_of<typename Plan::T>(p.gradient, p.weighted);
  const int64_t blocks = divide_up(p.gradient.extent.pixels, BM) * divide_up(p.gradient.u.columns, BR);
  return ptx::launch(project_backward_kernel<P, BM, BR, WARPS_M, WARPS_N, STAGES>, blocks, Plan::kThreads, Plan::kSharedBytes,
                     stream, p, aligned);
}

}  // namespace

cudaError_t project_backward(const ProjectBackward& p, Products products, int64_t tile, cudaStream_t stream) {
  return for_products(products, [&](auto constant) {
    constexpr Products P = decltype(constant)::value;
    switch (tile) {
      case 128: return launch<P, 128, 128, 4, 2, 3>(p, stream);
      case 64: return launch<P, 64, 64, 2, 2, 4>(p, stream);
      default: return cudaErrorInvalidValue;
    }
  });
}

}  // namespace svf::cuda
