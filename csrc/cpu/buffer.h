// Memory for a large gradient. A few freed buffers are kept for the next step, because Linux clears every page that a
// process touches for the first time. Clearing 262 MB takes as long as computing the gradient that goes there.
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

int64_t kept_bytes();  // size of the buffers that are kept
void release();        // gives them back to the system

}  // namespace rlk
