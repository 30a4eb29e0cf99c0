// What compute capability 9.0 has: mbarriers, boxes copied by TMA, products of a warpgroup (PTX ISA: wgmma.mma_async, matrix descriptors with
// the 128-byte swizzle). Boxes land when their barrier is waited for, and products read their operands when they are waited for: what is
// reused too early shows.
#include <utility>

#include "state.h"

namespace emulation {

bool has_wgmma = true;

static Mbarrier& mbarrier(uint32_t at) {
  const auto found = block.mbarriers.find(at);
  if (found == block.mbarriers.end()) {
    fail("the mbarrier at %u is not initialised", at);
  }
  return found->second;
}

static void complete(Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    ++progress;
  }
}

// The worst that may happen: whoever waits for this goes on first.
static void give_way() {
  block.is_leaving = true;
  ++progress;
  yield();
}

void init_barrier(uint32_t at, int arrivals) {
  check_place(at, 8, 8);
  block.mbarriers[at].arrivals = block.mbarriers[at].pending = arrivals;
}

void arrive(uint32_t at, int bytes) {
  Mbarrier& barrier = mbarrier(at);
  if (barrier.pending == 0) {
    fail("more arrivals at the mbarrier at %u than it waits for", at);
  }
  --barrier.pending;
  barrier.bytes += bytes;
  complete(barrier);
  if (bytes == 0) {
    give_way();
  }
}

// TMA's 128-byte swizzle: address bits 4 to 6 are turned by bits 7 to 9.
static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

static void land(const Box& box) {
  for (int r = 0; r < box.map.box_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const int64_t row = box.row + r, column = box.column + c;
      uint16_t value = 0;
      if (row < box.map.rows && column < box.map.columns) {
        const auto* from = static_cast<const uint16_t*>(box.map.data) + row * box.map.step + column;
        check_global(from, 2, 2);
        value = *from;
      }
      const uint32_t to = swizzled(box.to + r * 128 + c * 2);
      std::memcpy(block.shared.data() + to, &value, 2);
      block.bytes[to] = block.bytes[to + 1] = Byte::kWritten;
    }
  }
}

void copy_box(uint32_t to, const TensorMap& map, int row, int column, uint32_t barrier) {
  const size_t bytes = static_cast<size_t>(map.box_rows) * 128;
  check_place(to, bytes, 1024);
  std::fill_n(block.bytes.begin() + to, bytes, Byte::kOnItsWay);
  mbarrier(barrier).boxes.push_back({to, map, row, column});
}

void wait(uint32_t at, uint32_t parity) {
  Mbarrier& barrier = mbarrier(at);
  while ((barrier.phase & 1) == parity) {
    for (const Box& box : std::exchange(barrier.boxes, {})) {
      land(box);
      barrier.bytes -= box.map.box_rows * 128;
      if (barrier.bytes < 0) {
        fail("more bytes arrive at the mbarrier at %u than it expects", at);
      }
      complete(barrier);
    }
    if ((barrier.phase & 1) == parity) {
      yield();
    }
  }
}

void fence_products() { current->is_fenced = true; }

void begin_product(const WarpgroupProduct& product) {
  if (!current->is_fenced) {
    fail("a wgmma without a fence before its group");
  }
  current->products.push_back(product);
  ++current->uncommitted_products;
}

void commit_products() {
  current->product_groups.push_back(current->uncommitted_products);
  current->uncommitted_products = 0;
  current->is_fenced = false;
}

// Element (row, k) of a K-major operand [rows, 16] described with the 128-byte swizzle.
static float operand(uint64_t descriptor, int row, int k, int kind) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4, group = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) {
    fail("an operand of wgmma that is not swizzled by 128 bytes");
  }
  // 8 rows of 128 bytes, from a multiple of which the swizzle counts; the contraction goes on within a row
  if (group != 1024 || start % 1024 >= 128 || (descriptor >> 49 & 7) != 0) {
    fail("an operand of wgmma at %u with groups of 8 rows %u bytes apart", start, group);
  }
  const uint32_t at = swizzled(start + row / 8 * group + row % 8 * 128 + k * 2);
  check_place(at, 2, 2);
  check_written(at, 2);
  uint16_t bits;
  std::memcpy(&bits, block.shared.data() + at, 2);
  return from_half(bits, kind);
}

// One product of the 128 threads from `first` on, each the `index`-th of its own.
static void carry_out(int first, size_t index) {
  const WarpgroupProduct& common = block.threads[first].products[index];
  const int kind = common.is_bfloat16 ? svf::cuda::ptx::kBFloat16 : svf::cuda::ptx::kFloat16;
  float a[64][16];
  std::vector<float> b(16 * common.columns);
  std::vector<double> sum(common.columns);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < common.columns; ++n) {
      b[k * common.columns + n] = operand(common.b, n, k, kind);
    }
    for (int m = 0; m < 64 && !common.has_registers; ++m) {
      a[m][k] = operand(common.a, m, k, kind);
    }
  }
  for (int t = 0; t < 128; ++t) {
    const WarpgroupProduct& own = block.threads[first + t].products[index];
    if (own.b != common.b || own.a != common.a || own.columns != common.columns) {
      fail("threads of a warpgroup multiply different operands");
    }
    for (int i = 0; i < 8 && own.has_registers; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, k = t % 4 * 2 + i % 2 + i / 4 * 8;
      a[row][k] = from_half(static_cast<uint16_t>(own.a_registers[i / 2] >> (i % 2 * 16)), kind);
    }
  }
  // where element (m, n) of the sum lies: thread and register
  const auto element = [&](int m, int n) -> float& {
    const int thread = m / 16 * 32 + m % 8 * 4 + n % 8 / 2;
    return block.threads[first + thread].products[index].sum[n / 8 * 4 + m % 16 / 8 * 2 + n % 2];
  };
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < common.columns; ++n) {
      sum[n] = element(m, n);
    }
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < common.columns; ++n) {
        sum[n] += double{a[m][k]} * b[k * common.columns + n];
      }
    }
    for (int n = 0; n < common.columns; ++n) {
      element(m, n) = truncated(sum[n]);
    }
  }
}

void finish_products(size_t pending_groups) {
  const int warpgroup = current->index / 128;
  meet(block.warpgroups[warpgroup], 128, [&] {
    auto& groups = block.threads[warpgroup * 128].product_groups;
    const size_t done = groups.size() > pending_groups ? groups.size() - pending_groups : 0;
    size_t count = 0;
    for (size_t i = 0; i < done; ++i) {
      count += groups[i];
    }
    for (size_t i = 0; i < count; ++i) {
      carry_out(warpgroup * 128, i);
    }
    for (int t = warpgroup * 128; t < warpgroup * 128 + 128; ++t) {
      Thread& thread = block.threads[t];
      thread.products.erase(thread.products.begin(), thread.products.begin() + static_cast<ptrdiff_t>(count));
      thread.product_groups.erase(thread.product_groups.begin(), thread.product_groups.begin() + static_cast<ptrdiff_t>(done));
    }
  });
}

}  // namespace emulation
