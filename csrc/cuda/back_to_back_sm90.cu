// The back-to-back 1x1 forward (back_to_back.cu has the formula) by wgmma and TMA, for half precisions on compute capability 9.0.
//
// A block takes 128 pixels: a producer thread copies x and v, then u, box by box through one ring of slots (TMA, mbarriers); two consumer
// warpgroups of 64 pixels each multiply. z [64, R] stays in a warpgroup's registers: it is kept from there, rounded and weighted with s, and
// is the left operand of the second product as it lies, since the layout of a sum is that of an operand. Each warpgroup finishes 64 channels
// of y at a time through a staging tile of its own, while the other multiplies.
//
// A slot is full when its bytes have arrived, and empty when the products that read it have completed for every consumer warp: a wait of
// one warp says nothing of the others.
#include <type_traits>

#include "epilogue.cuh"
#include "kept_z.cuh"

// unused where other architectures are compiled
#pragma nv_diag_suppress 177

namespace svf::cuda {
namespace {

constexpr int kPixels = 128, kRows = 64, kColumns = 64, kConsumers = 2;

struct WarpgroupTeam {
  static constexpr int kThreads = 128;
  static __device__ __forceinline__ int index() { return threadIdx.x % 128; }
  static __device__ __forceinline__ void sync() { ptx::sync_named(1 + threadIdx.x / 128, 128); }
};

template <class ELEMENT, int R>
struct Plan {
  using T = ELEMENT;
  static constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;
  static constexpr int kThreads = 128 * (kConsumers + 1), kSlots = R > 128 ? 3 : 4, kPanels = R / 64;
  static constexpr int kSlotBytes = (kPixels + R) * kPanelBytes;
  static constexpr int kStagingAt = kSlots * kSlotBytes;
  static constexpr int kScratchAt = kStagingAt + kConsumers * Staging<kColumns>::bytes(kRows);
  static constexpr int kTableAt = kScratchAt + kConsumers * kRangeBytes<128>;
  static constexpr int kBarriersAt = kTableAt + kPixels * 8;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kSlots * 8;
  // one factor block of the second product fits where x and v of a step were
  static_assert(kColumns * R * 2 <= kSlotBytes && kSlotBytes % 1024 == 0);

  static __device__ __forceinline__ uint32_t full(int slot) { return kBarriersAt + slot * 8; }
  static __device__ __forceinline__ uint32_t empty(int slot) { return kBarriersAt + (kSlots + slot) * 8; }
};

struct Maps {
  ptx::TensorMap x, v, u;
};

struct Aligned {
  bool residual, y, z;
};

// Where in the ring a step is: its slot, and the parity of the slot's phase.
template <int SLOTS>
struct Place {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// One thread: fills slot after slot, first with x and v for 64 inputs, then with u for 64 outputs.
template <class Plan, int R>
__device__ __forceinline__ void produce(const BackToBackForward& p, const Maps& maps, int first_pixel) {
  const int inputs = static_cast<int>(divide_up(p.v.columns, 64)), blocks = static_cast<int>(divide_up(p.out.channels, kColumns));
  Place<Plan::kSlots> place;
  for (int step = 0; step < inputs + blocks; ++step) {
    // every slot is empty in the beginning: the phase before the first counts as completed
    ptx::wait(Plan::empty(place.slot), place.parity ^ 1);
    const uint32_t slot = place.slot * Plan::kSlotBytes, full = Plan::full(place.slot);
    if (step < inputs) {
      ptx::arrive_expecting(full, Plan::kSlotBytes);
      ptx::copy_box(slot, &maps.x, first_pixel, step * 64, full);
      ptx::copy_box(slot + kPixels * kPanelBytes, &maps.v, 0, step * 64, full);
    } else {
      ptx::arrive_expecting(full, kColumns * R * 2);
      for (int panel = 0; panel < Plan::kPanels; ++panel) {
        ptx::copy_box(slot + panel * kColumns * kPanelBytes, &maps.u, (step - inputs) * kColumns, panel * 64, full);
      }
    }
    place.advance();
  }
}

// This warp has done with a slot.
template <class Plan>
__device__ __forceinline__ void release(int slot) {
  if (threadIdx.x % 32 == 0) {
    ptx::arrive(Plan::empty(slot));
  }
}

// Starts the products of 64 inputs, once they have arrived.
template <class Plan, int R>
__device__ __forceinline__ void multiply_step(float (&z)[R / 2], const Place<Plan::kSlots>& place, int warpgroup) {
  ptx::wait(Plan::full(place.slot), place.parity);
  const uint32_t slot = place.slot * Plan::kSlotBytes;
  const uint64_t x = ptx::wgmma_operand(slot + warpgroup * kRows * kPanelBytes);
  const uint64_t v = ptx::wgmma_operand(slot + kPixels * kPanelBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    // 16 elements on: 32 bytes, in units of 16
    ptx::wgmma<Plan::kIsBFloat16>(z, x + 2 * k, v + 2 * k);
  }
  ptx::wgmma_commit();
}

// z [64, R] of a warpgroup, products of the last step but one released as the next are under way.
template <class Plan, int R>
__device__ __forceinline__ void first_product(float (&z)[R / 2], Place<Plan::kSlots>& place, int steps, int warpgroup) {
  // before the loop: where a step may go without a wait, ptxas makes every product wait for the one before it
  multiply_step<Plan, R>(z, place, warpgroup);
  int last = place.slot;
  place.advance();
#pragma unroll 1
  for (int step = 1; step < steps; ++step) {
    multiply_step<Plan, R>(z, place, warpgroup);
    ptx::wgmma_wait<1>();
    release<Plan>(last);
    last = place.slot;
    place.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(z);
  release<Plan>(last);
}

// 64 columns of a warpgroup's sum into its staging tile; element (4 j + i) of the sum is at row lane / 4 + 8 (i / 2), column 8 j + …
template <int N>
__device__ __forceinline__ void stage(const Staging<kColumns>& staging, const float (&sum)[N], int first) {
  const int lane = threadIdx.x % 32, row = WarpgroupTeam::index() / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = 4 * (first / 8 + j) + 2 * half;
      staging.store(row + 8 * half, 8 * j + lane % 4 * 2, sum[at], sum[at + 1]);
    }
  }
}

// Keeps z as asked, 64 ranks at a time.
template <class T, int R>
__device__ __forceinline__ void keep_z(const float (&z)[R / 2], const Staging<kColumns>& staging, uint32_t scratch,
                                       const BackToBackForward& p, int first_pixel, bool is_aligned) {
  const int rank = p.v.rows, own = WarpgroupTeam::index();
  if (p.kept.q == nullptr && p.kept.z == nullptr) {
    return;
  }
#pragma unroll
  for (int first = 0; first < R; first += kColumns) {
    stage(staging, z, first);
    WarpgroupTeam::sync();
    // a whole group of pixels may be past the end
    if (p.kept.q != nullptr && first_pixel < p.extent.pixels && first < rank) {
      quantize_group<WarpgroupTeam>(scratch, p.kept, first_pixel, p.extent.pixels, first, rank,
                                    [&](int row, int octet) { return staging.load(row, octet); });
    }
    if (p.kept.z != nullptr) {
      const int at = first + own % 8 * 8;
      for (int row = own / 8; row < kRows && first_pixel + row < p.extent.pixels && at < rank; row += 16) {
        const int64_t element = static_cast<int64_t>(first_pixel + row) * rank + at;
        store_octet(static_cast<T*>(p.kept.z) + element, staging.load(row, own % 8), rank - at, is_aligned);
      }
    }
    WarpgroupTeam::sync();
  }
}

// z rounded, times s: the left operand of the second product, 16 ranks each.
template <class T, int R>
__device__ __forceinline__ void weigh(uint32_t (&weighted)[R / 16][4], const float (&z)[R / 2], const float* s, int rank) {
#pragma unroll
  for (int j = 0; j < R / 8; ++j) {
    const int r = 8 * j + threadIdx.x % 4 * 2;
    const float first = s != nullptr && r < rank ? ptx::load_global(s + r) : 1.0f;
    const float second = s != nullptr && r + 1 < rank ? ptx::load_global(s + r + 1) : 1.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t kept = Half<T>::pack(z[4 * j + 2 * half], z[4 * j + 2 * half + 1]);
      const float low = to_float(T{static_cast<uint16_t>(kept)}), high = to_float(T{static_cast<uint16_t>(kept >> 16)});
      weighted[j / 2][j % 2 * 2 + half] = Half<T>::pack(low * first, high * second);
    }
  }
}

// One warpgroup, from z to y.
template <class Plan, int R>
__device__ __forceinline__ void consume(const BackToBackForward& p, const PixelRows& residual_rows, int first_pixel,
                                        const Aligned& aligned) {
  using T = typename Plan::T;
  const int warpgroup = threadIdx.x / 128;
  const Staging<kColumns> staging{static_cast<uint32_t>(Plan::kStagingAt + warpgroup * Staging<kColumns>::bytes(kRows))};
  const PixelRows own_residual{residual_rows.table + warpgroup * kRows * 8};
  first_pixel += warpgroup * kRows;
  Place<Plan::kSlots> place;
  uint32_t weighted[R / 16][4];
  {
    float z[R / 2] = {};
    first_product<Plan, R>(z, place, static_cast<int>(divide_up(p.v.columns, 64)), warpgroup);
    keep_z<T, R>(z, staging, Plan::kScratchAt + warpgroup * kRangeBytes<128>, p, first_pixel, aligned.z);
    weigh<T, R>(weighted, z, p.s, p.v.rows);
  }
#pragma unroll 1
  for (int column = 0; column < p.out.channels; column += kColumns) {
    float y[kColumns / 2] = {};
    ptx::wait(Plan::full(place.slot), place.parity);
    const uint64_t u = ptx::wgmma_operand(place.slot * Plan::kSlotBytes);
    ptx::wgmma_hold(y);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < R / 16; ++k) {
      ptx::wgmma<Plan::kIsBFloat16>(y, weighted[k], u + k / 4 * (kColumns * kPanelBytes / 16) + k % 4 * 2);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(y);
    release<Plan>(place.slot);
    place.advance();
    stage(staging, y, 0);
    WarpgroupTeam::sync();
    finish_tile<T, kRows, kColumns, WarpgroupTeam>(staging, p.out, own_residual, first_pixel, p.extent.pixels, column,
                                                   aligned.residual, aligned.y);
    WarpgroupTeam::sync();
  }
}

template <class T, int R>
__global__ void __launch_bounds__(Plan<T, R>::kThreads, 1)
    back_to_back_sm90_kernel(const BackToBackForward p, const Aligned aligned, const __grid_constant__ Maps maps) {
  // other architectures: no launcher takes it there
  if constexpr (ptx::kHasWgmma) {
    using Plan = Plan<T, R>;
    ptx::declare_shared<Plan::kSharedBytes>();
    const int first_pixel = blockIdx.x * kPixels;
    const PixelRows residual_rows = tabulate<kPixels, Plan::kThreads>(Plan::kTableAt, p.out.residual, p.extent, first_pixel);
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < Plan::kSlots; ++slot) {
        ptx::init_barrier(Plan::full(slot), 1);
        ptx::init_barrier(Plan::empty(slot), 4 * kConsumers);
      }
      ptx::publish_barriers();
    }
    ptx::sync_block();
    if (threadIdx.x >= 128 * kConsumers) {
      ptx::give_up_registers<40>();
      if (threadIdx.x == 128 * kConsumers) {
        produce<Plan, R>(p, maps, first_pixel);
      }
    } else {
      ptx::claim_registers<232>();
      consume<Plan, R>(p, residual_rows, first_pixel, aligned);
    }
  } else {
    ptx::trap();
  }
}

// Elements from pixel to pixel where they are equally far apart, else 0. From the only pixel of all it is any that rows of `columns` fit in.
int64_t pixel_step(const Picture& picture, const Extent& extent, int columns) {
  const int64_t alone = divide_up(columns, 8) * 8;
  const int64_t step = extent.width > 1 ? picture.w : extent.plane > 1 ? picture.h : extent.pixels > 1 ? picture.n : alone;
  const bool rows_fit = extent.plane == extent.width || picture.h == extent.width * step;
  const bool pictures_fit = extent.pixels == extent.plane || picture.n == extent.plane * step;
  return rows_fit && pictures_fit ? step : 0;
}

template <class T, int R>
cudaError_t launch(const BackToBackForward& p, cudaStream_t stream) {
  constexpr bool kIsBFloat16 = Plan<T, R>::kIsBFloat16;
  Maps maps;
  const int64_t step = pixel_step(p.x, p.extent, p.v.columns);
  cudaError_t status = ptx::describe(&maps.x, p.x.data, kIsBFloat16, p.extent.pixels, p.v.columns, step, kPixels);
  if (status == cudaSuccess) {
    status = ptx::describe(&maps.v, p.v.data, kIsBFloat16, p.v.rows, p.v.columns, p.v.columns, R);
  }
  if (status == cudaSuccess) {
    status = ptx::describe(&maps.u, p.u.data, kIsBFloat16, p.u.rows, p.u.columns, p.u.columns, kColumns);
  }
  if (status != cudaSuccess) {
    return status;
  }
  const Matrix y{p.out.y, p.extent.pixels, p.out.channels}, z{p.kept.z, p.extent.pixels, p.v.rows};
  const Aligned aligned{is_aligned<T>(p.out.residual), is_aligned<T>(y), is_aligned<T>(z)};
  return ptx::launch(back_to_back_sm90_kernel<T, R>, divide_up(p.extent.pixels, kPixels), Plan<T, R>::kThreads,
                     Plan<T, R>::kSharedBytes, stream, p, aligned, maps);
}

}  // namespace

bool fits_sm90(const BackToBackForward& p, Products products) {
  if (products != Products::kBFloat16 && products != Products::kFloat16) {
    return false;
  }
  const int64_t step = pixel_step(p.x, p.extent, p.v.columns);
  return kHasSm90a && step >= p.v.columns && is_aligned(p.x.data, 2 * step) && is_aligned<BFloat16>(p.v) && is_aligned<BFloat16>(p.u) &&
         ptx::has_wgmma();
}

cudaError_t back_to_back_forward_sm90(const BackToBackForward& p, Products products, cudaStream_t stream) {
  if (products == Products::kBFloat16) {
    return p.v.rows <= 128 ? launch<BFloat16, 128>(p, stream) : launch<BFloat16, 256>(p, stream);
  }
  return p.v.rows <= 128 ? launch<Float16, 128>(p, stream) : launch<Float16, 256>(p, stream);
}

}  // namespace svf::cuda
