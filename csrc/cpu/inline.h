// For files that are compiled for one instruction set each. Everything in them is forced inline, and nothing of the standard library is used:
// a template shared with another translation unit could be linked in its AVX-512 form into code that runs on a machine without.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // _mm512_undefined_ps of GCC's own header
#endif

#define RLK_INLINE static inline __attribute__((always_inline))
#define RLK_UNROLL _Pragma("GCC unroll 16")
