// Threads as fibers: who runs, who waits, and what ends a launch.
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <string>

#include "state.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

Index threadIdx, blockIdx;

namespace emulation {

Block block;
Thread* current = nullptr;
uint64_t progress = 0;
int shared_bytes = 0;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMostThreads = 1024;
// the most that any of the architectures gives a block
constexpr int kLargestShared = 227 * 1024;

void* scheduler_stack = nullptr;
const std::function<void()>* running = nullptr;
bool has_failed = false;
std::string message;
std::unique_ptr<unsigned char[]> stacks;

}  // namespace

#if defined(__x86_64__)
// Saves the registers that a call keeps, and goes on with another stack.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
#else
static void emulation_switch(void** save, void* load) {
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
#endif

namespace {

void enter() {
  (*running)();
  current->is_finished = true;
  ++block.finished;
  ++progress;
  yield();
}

void* fresh_stack(size_t index) {
  unsigned char* base = stacks.get() + index * kStackBytes;
#if defined(__x86_64__)
  // as after a call: the return address lies where the stack is 8 off a multiple of 16
  auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(base) + kStackBytes) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr;
  }
  return top;
#else
  static ucontext_t contexts[kMostThreads], scheduler;
  scheduler_stack = &scheduler;
  getcontext(&contexts[index]);
  contexts[index].uc_stack.ss_sp = base;
  contexts[index].uc_stack.ss_size = kStackBytes;
  makecontext(&contexts[index], enter, 0);
  return &contexts[index];
#endif
}

void resume(Thread& thread) {
  current = &thread;
  threadIdx.x = thread.index;
  emulation_switch(&scheduler_stack, thread.stack);
}

// Runs each warp as far as it comes alone, again and again, until all threads are through.
void run_block(int threads, int shared) {
  if (stacks == nullptr) {
    stacks = std::make_unique<unsigned char[]>(kMostThreads * kStackBytes);
  }
  const uint64_t epoch = block.epoch + 1;
  block.threads.assign(threads, Thread{});
  block.warps.assign((threads + 31) / 32, Warp{});
  // NaN in every type
  block.shared.assign(shared, 0xFF);
  block.bytes.assign(shared, Byte::kNever);
  block.words.assign((shared + 3) / 4, Word{});
  block.arrived = block.finished = 0;
  block.mbarriers.clear();
  block.named.clear();
  block.warpgroups.clear();
  block.team_epochs.clear();
  block.epoch = epoch;
  for (int i = 0; i < threads; ++i) {
    block.threads[i].index = i;
    block.threads[i].stack = fresh_stack(i);
  }
  while (block.finished < threads && !has_failed) {
    const uint64_t before = progress;
    for (int first = 0; first < threads && !has_failed; first += 32) {
      uint64_t own = 0;
      do {
        own = progress;
        block.is_leaving = false;
        for (int i = first; i < std::min(first + 32, threads) && !has_failed && !block.is_leaving; ++i) {
          if (!block.threads[i].is_finished) {
            resume(block.threads[i]);
          }
        }
      } while (progress != own && !has_failed && !block.is_leaving);
    }
    if (progress == before && !has_failed) {
      has_failed = true;
      message = "threads wait for each other for ever: " + std::to_string(block.arrived) + " of " + std::to_string(threads) +
                " are at a barrier, " + std::to_string(block.finished) + " have ended";
    }
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  has_failed = true;
  message = std::string(text) + " (thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x) + ")";
  for (;;) {
    // never resumed
    yield();
  }
}

void yield() { emulation_switch(&current->stack, scheduler_stack); }

const void* together(int kind, const void* input, size_t bytes, void (*carry_out)(Warp&)) {
  const int lane = current->index % 32;
  Warp& warp = block.warps[current->index / 32];
  if (warp.arrived == 0) {
    warp.kind = kind;
  } else if (warp.kind != kind) {
    fail("lanes of a warp are at different operations (%d and %d)", warp.kind, kind);
  }
  std::memcpy(warp.in[lane], input, bytes);
  const uint64_t generation = warp.generation;
  if (++warp.arrived == 32) {
    carry_out(warp);
    warp.arrived = 0;
    ++warp.generation;
    ++progress;
  }
  while (warp.generation == generation) {
    yield();
  }
  return warp.out[lane];
}

void barrier() {
  const uint64_t epoch = block.epoch;
  if (!current->copies.empty() && current->uncommitted != 0) {
    fail("a barrier with copies that were not committed");
  }
  if (++block.arrived == static_cast<int>(block.threads.size())) {
    block.arrived = 0;
    ++block.epoch;
    ++progress;
  }
  while (block.epoch == epoch) {
    yield();
  }
}

void sync_named(int barrier, int threads) {
  meet(block.named[barrier], threads, [] { ++block.team_epochs[current->index / 128]; });
}

cudaError_t run(int64_t blocks, int threads, int shared, const std::function<void()>& kernel) {
  has_failed = false;
  running = &kernel;
  shared_bytes = shared;
  if (threads % 32 != 0 || threads > kMostThreads || shared > kLargestShared || blocks < 1) {
    message = "a launch that no device can run";
    return cudaErrorInvalidValue;
  }
  for (int64_t i = 0; i < blocks && !has_failed; ++i) {
    blockIdx.x = static_cast<int>(i);
    run_block(threads, shared);
  }
  return has_failed ? cudaErrorUnknown : cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNotSupported ? "operation not supported" : emulation::message.c_str();
}
