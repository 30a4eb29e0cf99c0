// What tests/kernels/test_emulation.py asks of the emulator: kernels with one fault each, which it has to find, and its device.
#include <cstring>

#include "numbers.cuh"

namespace svf::cuda {
namespace {

constexpr int kThreads = 128, kSharedBytes = 16384;

struct Fault {
  const char* name;
  void (*kernel)(const float* data);
};

void write_own() { ptx::store_shared(threadIdx.x * 4, 1.0f); }

uint64_t described_tile() {
  if (threadIdx.x == 0) {
    ptx::init_barrier(16000, 1);
  }
  ptx::sync_block();
  return ptx::wgmma_operand(0);
}

void copy_tile(const float* data) {
  ptx::TensorMap map;
  ptx::describe(&map, data, true, 64, 64, 64, 64);
  ptx::arrive_expecting(16000, 64 * 128);
  ptx::copy_box(0, &map, 0, 0, 16000);
}

enum class Mistake { kNone, kReleasesEarly, kNoFence, kOtherStride };

// Multiplies a tile that was copied; kReleasesEarly: its slot is filled again before the product was waited for.
void multiply_tile(const float* data, Mistake mistake) {
  float sum[32] = {};
  const uint32_t a[4] = {};
  uint64_t tile = described_tile();
  if (threadIdx.x == 0) {
    copy_tile(data);
  }
  ptx::wait(16000, 0);
  if (mistake == Mistake::kOtherStride) {
    // twice the bytes between groups of 8 rows
    tile += uint64_t{1024 >> 4} << 32;
  }
  if (mistake != Mistake::kNoFence) {
    ptx::wgmma_fence();
  }
  ptx::wgmma<true>(sum, a, tile);
  ptx::wgmma_commit();
  if (mistake == Mistake::kReleasesEarly && threadIdx.x == 0) {
    copy_tile(data);
  }
  ptx::wgmma_wait<0>();
}

const Fault kFaults[] = {
    {"none",
     [](const float* data) {
       write_own();
       ptx::sync_block();
       ptx::load_shared<float>((kThreads - 1 - threadIdx.x) * 4);
       ptx::load_global(data + threadIdx.x);
     }},
    {"read but never written", [](const float*) { ptx::load_shared<float>(threadIdx.x * 4); }},
    {"beyond shared memory", [](const float*) { ptx::store_shared(kSharedBytes - 2, 1.0f); }},
    {"shared memory unaligned", [](const float*) { ptx::store_shared(threadIdx.x * 4 + 2, 1.0f); }},
    {"read without a barrier",
     [](const float*) {
       write_own();
       ptx::load_shared<float>(0);
     }},
    {"overwritten without a barrier",
     [](const float*) {
       write_own();
       ptx::sync_block();
       ptx::load_shared<float>(0);
       if (threadIdx.x == 64) {
         ptx::store_shared(0, 2.0f);
       }
     }},
    {"copy not waited for",
     [](const float* data) {
       ptx::copy_async(threadIdx.x * 16, data, 16);
       ptx::commit_copies();
       ptx::load_shared<float>(threadIdx.x * 16);
     }},
    {"copy of too late a group",
     [](const float* data) {
       ptx::copy_async(threadIdx.x * 16, data, 16);
       ptx::commit_copies();
       ptx::wait_copies<1>();
       ptx::load_shared<float>(threadIdx.x * 16);
     }},
    {"lanes apart",
     [](const float*) {
       if (threadIdx.x % 32 < 16) {
         ptx::ballot(true);
       } else {
         ptx::from_lane(1.0f, 1);
       }
     }},
    {"a thread misses a barrier",
     [](const float*) {
       if (threadIdx.x != 5) {
         ptx::sync_block();
       }
     }},
    {"global memory of nobody", [](const float* data) { ptx::load_global(data + 1000000); }},
    {"global memory unaligned", [](const float* data) { ptx::load_global(reinterpret_cast<const Vector16*>(data + 1)); }},
    {"rows in the same banks",
     [](const float*) {
       for (int i = 0; i < 32; ++i) {
         ptx::store_shared((threadIdx.x * 32 + i) * 4, 1.0f);
       }
       ptx::sync_block();
       uint32_t to[4];
       ptx::load_matrices(to, threadIdx.x % 32 * 128);
     }},
    {"shared memory not as declared", [](const float*) { ptx::declare_shared<kSharedBytes / 2>(); }},
    {"none, of a warpgroup", [](const float* data) { multiply_tile(data, Mistake::kNone); }},
    {"a slot filled before its product", [](const float* data) { multiply_tile(data, Mistake::kReleasesEarly); }},
    {"a product without a fence", [](const float* data) { multiply_tile(data, Mistake::kNoFence); }},
    {"an operand of another stride", [](const float* data) { multiply_tile(data, Mistake::kOtherStride); }},
    {"more arrivals than a barrier waits for",
     [](const float*) {
       described_tile();
       ptx::arrive(16000);
       ptx::wait(16000, 1);
       ptx::arrive_expecting(16000, 16);
       ptx::arrive(16000);
     }},
    {"a barrier that nobody completes",
     [](const float*) {
       described_tile();
       ptx::wait(16000, 0);
     }},
};

}  // namespace
}  // namespace svf::cuda

extern "C" void emulated_set_wgmma(bool has_wgmma) { emulation::has_wgmma = has_wgmma; }

// Of the last launch.
extern "C" int emulated_shared_bytes() { return emulation::shared_bytes; }

// What the emulator says of a fault, nothing where it finds none; null for a name that there is not.
extern "C" const char* emulated_fault(const char* name) {
  alignas(16) static float data[64 * 64];
  for (const auto& fault : svf::cuda::kFaults) {
    if (std::strcmp(fault.name, name) == 0) {
      emulation::forbid_all();
      emulation::allow(data, sizeof(data));
      const cudaError_t status =
          svf::cuda::ptx::launch(fault.kernel, 1, svf::cuda::kThreads, svf::cuda::kSharedBytes, nullptr, static_cast<const float*>(data));
      emulation::forbid_all();
      return status == cudaSuccess ? "" : cudaGetErrorString(status);
    }
  }
  return nullptr;
}
