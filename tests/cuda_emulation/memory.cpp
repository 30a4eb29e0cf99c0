// Shared and global memory, every access checked; copies past the registers land when they are waited for.
#include "state.h"

namespace emulation {
namespace {

struct Range {
  const char *begin, *end;
};

std::vector<Range> ranges;

}  // namespace

void check_declared(size_t bytes) {
  if (bytes != block.shared.size()) {
    fail("launched with %zu bytes of shared memory where the kernel declares %zu", block.shared.size(), bytes);
  }
}

void check_place(uint32_t offset, size_t bytes, size_t alignment) {
  if (offset + bytes > block.shared.size()) {
    fail("shared memory at %u, %zu bytes, is beyond its %zu", offset, bytes, block.shared.size());
  }
  if (offset % alignment != 0) {
    fail("shared memory at %u is not aligned to %zu", offset, alignment);
  }
}

void check_written(size_t offset, size_t bytes) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (block.bytes[i] != Byte::kWritten) {
      fail("shared memory at %zu is read %s", i,
           block.bytes[i] == Byte::kNever ? "but was never written" : "before its copy was waited for");
    }
  }
}

static Stamp now() {
  const int warpgroup = current->index / 128;
  return {current->index, warpgroup, block.epoch, block.team_epochs[warpgroup]};
}

// Whether a barrier lies between `before` and what this thread does now.
static bool is_ordered(const Stamp& before, const Stamp& now) {
  return before.thread == kNobody || before.thread == now.thread || before.block < now.block ||
         (before.warpgroup == now.warpgroup && before.team < now.team);
}

static void note_write(uint32_t offset, size_t bytes) {
  const Stamp own = now();
  for (size_t w = offset / 4; w <= (offset + bytes - 1) / 4; ++w) {
    Word& word = block.words[w];
    if (!is_ordered(word.read, own)) {
      fail("shared memory at %zu is written by thread %d and read by another without a barrier between", w * 4, own.thread);
    }
    word.written = own;
  }
}

const unsigned char* read_shared(uint32_t offset, size_t bytes, size_t alignment) {
  check_place(offset, bytes, alignment);
  check_written(offset, bytes);
  const Stamp own = now();
  for (size_t w = offset / 4; w <= (offset + bytes - 1) / 4; ++w) {
    Word& word = block.words[w];
    if (!is_ordered(word.written, own)) {
      fail("shared memory at %zu is read by thread %d, and written by thread %d without a barrier between", w * 4, own.thread,
           word.written.thread);
    }
    const bool is_alone = is_ordered(word.read, own);
    const int warpgroup = is_alone || word.read.warpgroup == own.warpgroup ? own.warpgroup : kMany;
    word.read = {is_alone ? own.thread : kMany, warpgroup, own.block, own.team};
  }
  return block.shared.data() + offset;
}

unsigned char* write_shared(uint32_t offset, size_t bytes, size_t alignment) {
  check_place(offset, bytes, alignment);
  note_write(offset, bytes);
  std::fill_n(block.bytes.begin() + offset, bytes, Byte::kWritten);
  return block.shared.data() + offset;
}

void begin_copy(uint32_t to, const void* from, int bytes) {
  check_place(to, 16, 16);
  if (bytes > 0) {
    check_global(from, bytes, 16);
  }
  note_write(to, 16);
  std::fill_n(block.bytes.begin() + to, 16, Byte::kOnItsWay);
  current->copies.push_back({to, from, bytes});
  ++current->uncommitted;
}

void commit() {
  current->groups.push_back(current->uncommitted);
  current->uncommitted = 0;
}

void finish_copies(size_t pending_groups) {
  auto& groups = current->groups;
  const size_t done = groups.size() > pending_groups ? groups.size() - pending_groups : 0;
  size_t count = 0;
  for (size_t i = 0; i < done; ++i) {
    count += groups[i];
  }
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = current->copies[i];
    note_write(copy.to, 16);
    std::memset(block.shared.data() + copy.to, 0, 16);
    std::memcpy(block.shared.data() + copy.to, copy.from, copy.bytes);
    std::fill_n(block.bytes.begin() + copy.to, 16, Byte::kWritten);
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(done));
  current->copies.erase(current->copies.begin(), current->copies.begin() + static_cast<ptrdiff_t>(count));
}

void forbid_all() { ranges.clear(); }

void allow(const void* data, int64_t bytes) {
  const char* begin = static_cast<const char*>(data);
  ranges.push_back({begin, begin + bytes});
}

void check_global(const void* address, size_t bytes, size_t alignment) {
  const char* begin = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail("global memory is read or written unaligned to %zu", alignment);
  }
  for (const Range& range : ranges) {
    if (begin >= range.begin && begin + bytes <= range.end) {
      return;
    }
  }
  fail("global memory is read or written outside of every tensor");
}

}  // namespace emulation
