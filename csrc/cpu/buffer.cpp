// The buffers of buffer.h, mapped in huge pages on Linux and allocated elsewhere.
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
// One step of a head frees three buffers: its logits, the sum of its weight's gradient, and that gradient rounded.
constexpr size_t kSlots = 3;
// The oldest comes first. Never destroyed, because a tensor may outlive the statics of this module.
std::vector<Kept>& kept = *[] {
  auto* blocks = new std::vector<Kept>;
  blocks->reserve(kSlots);  // because a destructor adds to it and may not throw
  return blocks;
}();
std::mutex guard;

#if defined(__linux__)
void* map(int64_t capacity) {
  // Maps a huge page more than needed, so that the block can start at one: 128 page faults for 262 MB and not 65 536.
  void* const all =
      mmap(nullptr, size_t(capacity + kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(all),
                  aligned = (begin + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
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
// Keeps a block that Linux may take the pages of when memory is short. A page that was not taken is written again
// without a fault.
void lend(const Kept& block) {
#if defined(MADV_FREE)
  (void)madvise(block.data, size_t(block.capacity), MADV_FREE);
#endif
}
// Gives back the last pages of a block at once. Its addresses stay.
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

// Gives back as many kept bytes as are about to be touched, because both would be resident otherwise. Only a new block
// does so and not one that is taken again, because 33 MB that are dropped and touched anew cost 30 ms of a step of 145.
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
    // Takes the smallest block that is large enough. One more than twice as large is left, because it would hold memory
    // that nobody asked for.
    auto best = kept.end();
    for (auto it = kept.begin(); it != kept.end(); ++it)
      if (it->capacity >= capacity_ && it->capacity / 2 <= capacity_ &&
          (best == kept.end() || it->capacity < best->capacity))
        best = it;
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
