// The floating-point mode of a thread: how it rounds, and whether it flushes subnormal numbers to zero. Every thread of
// a pool takes over the caller's mode while it works for the caller, because bits would otherwise depend on the thread
// that took a row.
#pragma once
#include "inline.h"

#if defined(__SSE__) || defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace rlk {

#if defined(__SSE__) || defined(__x86_64__)
// Flushing of subnormal numbers, read and written, and the rounding. Not the traps.
constexpr unsigned kModeBits = 0xe040;
RLK_INLINE unsigned long long float_mode() { return _mm_getcsr() & kModeBits; }
RLK_INLINE void set_float_mode(unsigned long long mode) { _mm_setcsr((_mm_getcsr() & ~kModeBits) | unsigned(mode)); }
#elif defined(__aarch64__)
constexpr unsigned long long kModeBits = 0x3c80000;  // DN, FZ, the rounding, FZ16
RLK_INLINE unsigned long long float_register() {
  unsigned long long all;
  asm volatile("mrs %0, fpcr" : "=r"(all));
  return all;
}
RLK_INLINE unsigned long long float_mode() { return float_register() & kModeBits; }
RLK_INLINE void set_float_mode(unsigned long long mode) {
  const unsigned long long all = (float_register() & ~kModeBits) | mode;
  asm volatile("msr fpcr, %0" : : "r"(all));
}
#else
RLK_INLINE unsigned long long float_mode() { return 0; }
RLK_INLINE void set_float_mode(unsigned long long) {}
#endif

namespace {

// Sets the mode of one thread of a parallel region, and restores the thread's own at its end.
struct FloatMode {
  unsigned long long before;
  __attribute__((always_inline)) explicit FloatMode(unsigned long long mode) : before(float_mode()) {
    if (mode != before) set_float_mode(mode);
  }
  __attribute__((always_inline)) ~FloatMode() {
    if (float_mode() != before) set_float_mode(before);
  }
  FloatMode(const FloatMode&) = delete;
};

}  // namespace
}  // namespace rlk
