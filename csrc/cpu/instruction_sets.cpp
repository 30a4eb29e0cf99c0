#include "instruction_sets.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace svf {
namespace {

struct InstructionSet {
  bool (*is_here)();
  const Kernels& (*kernels)();
};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bfloat16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tile registers have to be asked for, once a process.
bool has_amx() {
  static const bool is_granted = [] {
    uint32_t a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool has_tiles = (d >> 22 & 1) && (d >> 24 & 1);
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return has_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return is_granted && has_avx512_bfloat16();
}

constexpr InstructionSet kSets[] = {
    {has_amx, amx_kernels},
    {has_avx512_bfloat16, avx512_bfloat16_kernels},
    {has_avx512, avx512_kernels},
    {has_avx2, avx2_kernels},
};

std::atomic<const Kernels*> in_force{nullptr};

}  // namespace

const Kernels& kernels() {
  if (const Kernels* chosen = in_force.load(std::memory_order_relaxed)) return *chosen;
  for (const InstructionSet& set : kSets)
    if (set.is_here()) {
      in_force = &set.kernels();
      return *in_force;
    }
  throw std::runtime_error("the CPU kernels need a processor with AVX2 and FMA");
}

std::string instruction_set_names() {
  std::string names;
  for (const InstructionSet& set : kSets)
    if (set.is_here()) {
      if (!names.empty()) names += ',';
      names += set.kernels().name;
    }
  return names;
}

bool use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : kSets)
    if (set.is_here() && name == set.kernels().name) {
      in_force = &set.kernels();
      return true;
    }
  return false;
}

void* scratch(int slot, size_t bytes) {
  constexpr int kSlots = 7;
  struct Buffer {
    std::unique_ptr<void, void (*)(void*)> memory{nullptr, std::free};
    size_t bytes = 0;
  };
  thread_local Buffer buffers[kSlots];
  Buffer& buffer = buffers[slot];
#ifdef SVF_FAST_EXACT_SCRATCH
  // for the sanitizers: nothing behind the end, and nothing left of the last call
  const bool is_enough = false;
#else
  const bool is_enough = buffer.bytes >= bytes;
#endif
  if (!is_enough) {
    // freed first, and empty should there be no more
    buffer.memory.reset();
    buffer.bytes = 0;
    const size_t size = (bytes + 63) / 64 * 64;
    buffer.memory.reset(std::aligned_alloc(64, size));
    if (!buffer.memory) throw std::runtime_error("out of memory: the CPU kernels need " + std::to_string(size) + " bytes more");
    buffer.bytes = size;
#ifdef SVF_FAST_EXACT_SCRATCH
    std::memset(buffer.memory.get(), 0xFF, size);
#endif
  }
  return buffer.memory.get();
}

}  // namespace svf
