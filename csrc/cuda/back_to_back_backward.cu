// d = dy ⊙ mask, g = (d ⊙ scale) u, ds = Σ z ⊙ g, dx = (s ⊙ g) v: the backward of a 1x1 layer in one pass over memory.
//
// A block takes 64 pixels: g [64, R] in registers (gradient.cuh), once through shared memory for ds; s ⊙ g becomes the panels of the second
// product's left operand, and v follows in column blocks (second_product.cuh).
#include "gradient.cuh"
#include "second_product.cuh"

namespace svf::cuda {
namespace {

struct Aligned {
  bool v, dx;
};

template <Products P, int R>
struct Plan {
  using T = typename ElementOf<P>::type;
  static constexpr int BM = 64, BN = 128, kWarpsM = 2, kWarpsN = 4, kStages = R > 128 ? 2 : 3;
  using Warp = WarpTile<BM, R, kWarpsM, kWarpsN>;
  using Second = SecondProduct<P, BM, BN, kWarpsM, kWarpsN, kStages, true>;
  static constexpr int kThreads = Warp::kThreads;
  static constexpr int kRingBytes = kStages * (BM * kPanelBytes + kFactorBytes<T, R>);
  static constexpr int kScratchBytes = kThreads / 32 * R * 4;
  static constexpr int kPanelsAt = 2 * BM * 8;
  static constexpr int kWorkAt = kPanelsAt + Panels<T, BM>::bytes(R);
  static constexpr int kSharedBytes =
      kWorkAt + larger(larger(kRingBytes, Second::kBytes), Staging<R>::bytes(BM) + kScratchBytes);
};

// Writes a tile [BM, WIDTH] of dx from channel `column` on.
template <class T, int BM, int WIDTH, int THREADS>
__device__ __forceinline__ void store_tile(const Staging<WIDTH>& staging, const Picture& dx, const PixelRows& rows, int column,
                                           int columns, bool is_aligned) {
  constexpr int kOctets = WIDTH / 8;
  const int octet = threadIdx.x % kOctets, channel = column + 8 * octet;
  if (channel >= columns) {
    return;
  }
#pragma unroll 2
  for (int row = threadIdx.x / kOctets; row < BM; row += THREADS / kOctets) {
    const int64_t offset = rows(row);
    if (offset < 0) {
      break;
    }
    store_octet(static_cast<T*>(dx.data) + offset + channel, staging.load(row, octet), columns - channel, is_aligned);
  }
}

template <Products P, int R>
__global__ void __launch_bounds__(Plan<P, R>::kThreads, kBackToBackResident<P, R, true>)
    back_to_back_backward_kernel(const BackToBackBackward p, const GradientAligned gradient_aligned, const Aligned aligned) {
  using Plan = Plan<P, R>;
  using T = typename Plan::T;
  constexpr int BM = Plan::BM, kThreads = Plan::kThreads;
  ptx::declare_shared<Plan::kSharedBytes>();
  const Gradient& gradient = p.gradient;
  const int first_pixel = blockIdx.x * BM;
  const PixelRows dy_rows = tabulate<BM, kThreads>(0, gradient.dy, gradient.extent, first_pixel);
  const PixelRows dx_rows = tabulate<BM, kThreads>(BM * 8, p.dx, gradient.extent, first_pixel);
  ptx::sync_block();
  const Staging<R> staging{Plan::kWorkAt};
  {
    typename Plan::Warp g;
    project_gradient<P, BM, R, Plan::kStages>(g, Plan::kWorkAt, gradient, dy_rows, first_pixel, 0, gradient_aligned);
    g.for_pairs([&](int row, int column, float first, float second) { staging.store(row, column, first, second); });
  }
  ptx::sync_block();
  const Panels<T, BM> panels{Plan::kPanelsAt};
  use_gradient<T, BM, R, kThreads>(
      staging, Plan::kWorkAt + Staging<R>::bytes(BM), gradient, first_pixel, 0, gradient_aligned,
      [&](int row, int octet, const Octet& value) { panels.store(row, 8 * octet, value); });
  ptx::sync_block();
  Plan::Second::run(panels, p.v, p.v.columns, p.v.rows, Plan::kWorkAt, aligned.v, [&](const auto& product, int column) {
    store_tile<T, BM, Plan::BN, kThreads>(product, p.dx, dx_rows, column, p.v.columns, aligned.dx);
  });
}

template <Products P, int R>
cudaError_t launch(const BackToBackBackward& p, cudaStream_t stream) {
  using T = typename Plan<P, R>::T;
  return ptx::launch(back_to_back_backward_kernel<P, R>, divide_up(p.gradient.extent.pixels, Plan<P, R>::BM), Plan<P, R>::kThreads,
                     Plan<P, R>::kSharedBytes, stream, p, aligned_of<T>(p.gradient, nullptr),
                     Aligned{is_aligned<T>(p.v), is_aligned<T>(p.dx)});
}

}  // namespace

cudaError_t back_to_back_backward(const BackToBackBackward& p, Products products, cudaStream_t stream) {
  if (p.v.rows > kLargestRank) {
    return cudaErrorInvalidValue;
  }
  return for_products(products, [&](auto constant) {
    constexpr Products P = decltype(constant)::value;
    return p.v.rows <= 128 ? launch<P, 128>(p, stream) : launch<P, 256>(p, stream);
  });
}

}  // namespace svf::cuda
