// The macros of files that are compiled for one instruction set each. Everything in such a file is forced inline, and
// nothing of the standard library is used, because the linker could keep the AVX-512 form of a template that another
// file shares, for code that runs on a machine without AVX-512.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in _mm512_undefined_ps of GCC's own header
#endif

#define RLK_INLINE static inline __attribute__((always_inline))
#define RLK_UNROLL_FOR _Pragma("GCC unroll 16") for
