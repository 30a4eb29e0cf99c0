// What the parts of the emulator share: the block that runs, its threads and its memory (emulation.h has what kernels see).
#pragma once

#include <map>

#include "emulation.h"

namespace emulation {

enum class Byte : uint8_t { kNever, kWritten, kOnItsWay };
// When a thread did something: its warpgroup (kMany: threads of several), and how many barriers of the block and of the warpgroup were
// behind it.
constexpr int kMany = -2, kNobody = -1;
struct Stamp {
  int thread = kNobody, warpgroup = kNobody;
  uint64_t block = 0, team = 0;
};

// Who wrote and read a word of shared memory last.
struct Word {
  Stamp written, read;
};

struct Box {
  uint32_t to;
  TensorMap map;
  int row, column;
};

// An mbarrier: what its phase still waits for, and the boxes on their way to it.
struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  std::vector<Box> boxes;
};

// Threads that meet: at a named barrier, or to carry out a warpgroup's products.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::map<int, Meeting> named, warpgroups;
  // counts the barriers of each warpgroup
  std::map<int, uint64_t> team_epochs;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<Byte> bytes;
  std::vector<Word> words;
  int arrived = 0, finished = 0;
  // the thread that runs gives way to other warps
  bool is_leaving = false;
  // counts barriers
  uint64_t epoch = 1;
};

extern Block block;
extern Thread* current;
// counts what lets a waiting thread go on
extern uint64_t progress;

// Shared memory from `offset` on lies in the block's, and was written.
void check_place(uint32_t offset, size_t bytes, size_t alignment);
void check_written(size_t offset, size_t bytes);
// The float32 of a half precision's bits, `kind` as warp-wide operations are called.
float from_half(uint16_t bits, int kind);
// As tensor cores round a sum: toward zero.
float truncated(double sum);

// Has `threads` come together, the last of them doing `act`.
template <class Act>
void meet(Meeting& meeting, int threads, const Act& act) {
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == threads) {
    act();
    meeting.arrived = 0;
    ++meeting.generation;
    ++progress;
  }
  while (meeting.generation == generation) {
    yield();
  }
}

}  // namespace emulation
