// y = act(scale ⊙ (z leftᵀ) + shift + residual), left = u ⊙ s: the projection behind a V-convolution of the vendor's.
//
// A block computes a tile [BM pixels, BN channels]: operands through a ring of cp.async stages, products by mma.sync, the sum once through
// shared memory so that everything around it reads and writes 16 bytes a thread. Blocks that share pixels are neighbours, so that their z
// stays in L2; the first of them keeps z as int8 where asked, reading it once more from there.
#include "epilogue.cuh"
#include "kept_z.cuh"

namespace svf::cuda {
namespace {

struct Aligned {
  bool z, left, residual, y;
};

template <Products P, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES>
struct Plan {
  using T = typename ElementOf<P>::type;
  using Warp = WarpTile<BM, BN, WARPS_M, WARPS_N>;
  static constexpr int kThreads = Warp::kThreads;
  static constexpr int kStageBytes = (BM + BN) * kPanelBytes;
  static constexpr int kTableBytes = BM * 8;
  static constexpr int kWorkBytes = larger(STAGES * kStageBytes, Staging<BN>::bytes(BM));
  static constexpr int kSharedBytes = kTableBytes + kWorkBytes;
  static_assert(kRangeBytes<kThreads> <= kWorkBytes);
};

template <Products P, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES>
__global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, kResident<P, 32 * WARPS_M * WARPS_N>)
    project_kernel(const ProjectForward p, const Aligned aligned) {
  using Plan = Plan<P, BM, BN, WARPS_M, WARPS_N, STAGES>;
  using T = typename Plan::T;
  constexpr int kThreads = Plan::kThreads;
  ptx::declare_shared<Plan::kSharedBytes>();
  const int columns = static_cast<int>(divide_up(p.out.channels, BN));
  const int first_pixel = blockIdx.x / columns * BM, column = blockIdx.x % columns * BN, rank = p.left.columns;
  const uint32_t work = Plan::kTableBytes;
  const auto* z = static_cast<const T*>(p.z);
  const MatrixRows z_rows{first_pixel, p.extent.pixels, rank};
  const PixelRows residual_rows = tabulate<BM, kThreads>(0, p.out.residual, p.extent, first_pixel);
  typename Plan::Warp product;
  product.clear();
  pipeline<STAGES, Plan::kStageBytes>(
      work, static_cast<int>(divide_up(rank, kDepth<T>)),
      [&](int step, uint32_t buffer) {
        copy_panel<T, BM, kThreads>(buffer, z, z_rows, step * kDepth<T>, rank, aligned.z);
        copy_factor<T, BN, kThreads, false>(buffer + BM * kPanelBytes, p.left, column, step * kDepth<T>, aligned.left);
      },
      Nothing{},
      [&](int, uint32_t buffer) { product.template add<P, false>(buffer, buffer + BM * kPanelBytes); });
  const Staging<BN> staging{work};
  product.for_pairs([&](int row, int at, float first, float second) { staging.store(row, at, first, second); });
  ptx::sync_block();
  finish_tile<T, BM, BN, BlockTeam<kThreads>>(staging, p.out, residual_rows, first_pixel, p.extent.pixels, column, aligned.residual,
                                   aligned.y);
  if (p.kept.q != nullptr && column == 0) {
    ptx::sync_block();
    for (int group = first_pixel; group < min(first_pixel + BM, p.extent.pixels); group += kGroupPixels) {
      for (int channel = 0; channel < rank; channel += 64) {
        quantize_group<BlockTeam<kThreads>>(work, p.kept, group, p.extent.pixels, channel, rank, [&](int row, int octet) {
          const int pixel = group + row, at = channel + 8 * octet;
          const bool exists = pixel < p.extent.pixels && at < rank;
          return load_octet(z + (exists ? static_cast<int64_t>(pixel) * rank + at : 0), exists ? rank - at : 0, aligned.z);
        });
      }
    }
  }
}

template <Products P, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES>
cudaError_t launch(const ProjectForward& p, cudaStream_t stream) {
  using Plan = Plan<P, BM, BN, WARPS_M, WARPS_N, STAGES>;
  using T = typename Plan::T;
  const Matrix y{p.out.y, p.extent.pixels, p.out.channels}, z{p.z, p.extent.pixels, p.left.columns};
  const Aligned aligned{is_aligned<T>(z), is_aligned<T>(p.left), is_aligned<T>(p.out.residual), is_aligned<T>(y)};
  const int64_t blocks = divide_up(p.extent.pixels, BM) * divide_up(p.out.channels, BN);
  return ptx::launch(project_kernel<P, BM, BN, WARPS_M, WARPS_N, STAGES>, blocks, Plan::kThreads, Plan::kSharedBytes, stream, p,
                     aligned);
}

}  // namespace

cudaError_t project_forward(const ProjectForward& p, Products products, int64_t tile, cudaStream_t stream) {
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
