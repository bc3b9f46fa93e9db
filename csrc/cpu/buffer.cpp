#include "buffer.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rlk {
namespace {

constexpr int64_t kHugePage = int64_t(1) << 21;

struct Kept {
  void* data = nullptr;
  int64_t capacity = 0, touched = 0;  // bytes from the start that may have pages
};
constexpr size_t kSlots = 3;  // a step of a head frees its logits, the sum of its weight's gradient and, rounded, that gradient
// The oldest first. Never destroyed: a tensor may outlive this module's statics.
std::vector<Kept>& kept = *[] {
  auto* blocks = new std::vector<Kept>;
  blocks->reserve(kSlots);  // a destructor adds to it, and may not throw
  return blocks;
}();
std::mutex guard;

#if defined(__linux__)
void* map(int64_t capacity) {
  // One page more than needed, so that the rest can start at a page of 2 MiB: 128 page faults for 262 MB instead of 65 536.
  void* const all = mmap(nullptr, size_t(capacity + kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(all), aligned = (begin + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  if (aligned != begin) munmap(all, aligned - begin);
  munmap(reinterpret_cast<void*>(aligned + uintptr_t(capacity)), begin + kHugePage - aligned);
  void* const data = reinterpret_cast<void*>(aligned);
#if defined(MADV_HUGEPAGE)
  (void)madvise(data, size_t(capacity), MADV_HUGEPAGE);  // advice: a refusal changes no result
#endif
  return data;
}
void unmap(const Kept& block) {
  if (block.data) munmap(block.data, size_t(block.capacity));
}
// Kept, but the kernel may take its pages whenever memory is short; what was not taken is written again without a fault.
void lend(const Kept& block) {
#if defined(MADV_FREE)
  (void)madvise(block.data, size_t(block.capacity), MADV_FREE);
#endif
}
// The last of its pages are gone at once, its addresses stay.
void drop(Kept& block, int64_t bytes) {
  block.touched -= bytes;
  (void)madvise(static_cast<char*>(block.data) + block.touched, size_t(bytes), MADV_DONTNEED);
}
#else
void drop(Kept&, int64_t) {}
void* map(int64_t capacity) {
  void* const data = std::malloc(size_t(capacity));
  if (!data) throw std::bad_alloc();
  return data;
}
void unmap(const Kept& block) { std::free(block.data); }
void lend(const Kept&) {}
#endif

// Before so many new bytes are touched: as many of those kept go back, or both would be resident. Only a new block does it, not one that is taken
// again: dropped and touched anew in every step, 33 MB cost 30 ms of 145.
void make_room(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(guard);
  for (Kept& block : kept) {
    const int64_t part = bytes < block.touched ? bytes : block.touched;
    drop(block, part);
    bytes -= part;
  }
}

}  // namespace

Buffer::Buffer(int64_t size) : data_(nullptr), size_(size), capacity_((size + kHugePage - 1) / kHugePage * kHugePage) {
  {
    const std::lock_guard<std::mutex> lock(guard);
    // The smallest that is large enough. One more than twice as large is not tied up: it would hold memory that nobody asked for.
    auto best = kept.end();
    for (auto it = kept.begin(); it != kept.end(); ++it)
      if (it->capacity >= capacity_ && it->capacity / 2 <= capacity_ && (best == kept.end() || it->capacity < best->capacity)) best = it;
    if (best != kept.end()) {
      data_ = best->data;
      capacity_ = best->capacity;
      kept.erase(best);
    }
  }
  if (!data_) {
    make_room(capacity_);
    data_ = map(capacity_);
  }
}

Buffer::~Buffer() {
  const Kept mine{data_, capacity_, capacity_};
  lend(mine);
  const std::lock_guard<std::mutex> lock(guard);
  if (kept.size() == kSlots) {
    unmap(kept.front());
    kept.erase(kept.begin());
  }
  kept.push_back(mine);
}

int64_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(guard);
  int64_t bytes = 0;
  for (const Kept& block : kept) bytes += block.capacity;
  return bytes;
}

void release() {
  const std::lock_guard<std::mutex> lock(guard);
  for (const Kept& block : kept) unmap(block);
  kept.clear();
}

}  // namespace rlk
