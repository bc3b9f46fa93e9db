// Memory for a large gradient. A few freed ones are kept for the next step: the kernel clears every page that a process touches for the
// first time, and clearing 262 MB takes as long as computing the gradient that goes there.
#pragma once
#include <cstdint>

namespace rlk {

class Buffer {
 public:
  explicit Buffer(int64_t size);  // throws std::bad_alloc
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  void* data_;
  int64_t size_, capacity_;
};

// Before so many new bytes are touched: as many of those kept go back, or both would be resident (a head's logits and then its gradient,
// rounded: 259 and 33 MB). Touching 33 MB anew takes 3 ms, once.
void make_room(int64_t bytes);
int64_t kept_bytes();  // of what is kept
void release();        // gives it back

}  // namespace rlk
