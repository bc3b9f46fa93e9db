// The tile instructions of AMX, and the conversion to bf16, in plain C++: with `-include` in front of gemm_amx.cpp,
// whose source stays as it is. A register that is not configured, or a size that it has not, ends the program.
//
// The order of the sums is that of TDPBF16PS: test_cpu_tiles.py compares the bits with the instruction's, where there
// is one.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd amx_emulation::load
#define _tile_stream_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_zero amx_emulation::zero
#define _tile_dpbf16ps amx_emulation::multiply
#define _tile_loadconfig amx_emulation::configure
#define _tile_release amx_emulation::release
#define _mm512_cvtne2ps_pbh amx_emulation::to_bf16

namespace amx_emulation {

struct Register {
  int rows, bytes;
  uint32_t words[16][16];
};

inline Register* registers() {
  static thread_local Register all[8];
  return all;
}

inline Register& at(int i) {
  Register& tile = registers()[i];
  if (tile.rows == 0) std::abort();
  return tile;
}

inline void release() { std::memset(registers(), 0, 8 * sizeof(Register)); }

inline void configure(const void* from) {
  unsigned char bytes[64];
  std::memcpy(bytes, from, 64);
  release();
  if (bytes[0] != 1) std::abort();
  for (int i = 0; i < 8; ++i) {
    registers()[i].rows = bytes[48 + i], registers()[i].bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    if (registers()[i].rows > 16 || registers()[i].bytes > 64) std::abort();
  }
}

inline void load(int i, const void* from, int64_t stride) {
  Register& tile = at(i);
  std::memset(tile.words, 0, sizeof(tile.words));
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.words[r], static_cast<const char*>(from) + r * stride, size_t(tile.bytes));
}

inline void store(int i, void* to, int64_t stride) {
  const Register& tile = at(i);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tile.words[r], size_t(tile.bytes));
}

inline void zero(int i) { std::memset(at(i).words, 0, sizeof(Register::words)); }

inline float normal_or_zero(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return normal_or_zero(x);
}
inline float sum(float a, float b) { return normal_or_zero(a + b); }
inline float low(uint32_t word) { return of_bits(word << 16); }
inline float high(uint32_t word) { return of_bits(word & 0xffff0000u); }

// to += a b
inline void multiply(int to, int a, int b) {
  Register &sums = at(to), &left = at(a), &right = at(b);
  if (left.bytes != 4 * right.rows || sums.rows != left.rows || sums.bytes != right.bytes) std::abort();
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x1f80);  // the instruction does not ask for the mode
  for (int r = 0; r < sums.rows; ++r)
    for (int c = 0; c < sums.bytes / 4; ++c) {
      float even = 0, odd = 0;
      for (int k = 0; k < right.rows; ++k) {
        even = normal_or_zero(std::fma(low(left.words[r][k]), low(right.words[k][c]), even));
        odd = normal_or_zero(std::fma(high(left.words[r][k]), high(right.words[k][c]), odd));
      }
      const float all = sum(of_bits(sums.words[r][c]), sum(even, odd));
      std::memcpy(&sums.words[r][c], &all, 4);
    }
  _mm_setcsr(mode);
}

// VCVTNE2PS2BF16: the elements of `second` first.
inline __m512i to_bf16(__m512 first, __m512 second) {
  uint16_t out[32];
  for (int i = 0; i < 32; ++i) {
    const float x = i < 16 ? second[i] : first[i - 16];
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u)
      bits |= 0x400000u;
    else if (size < 0x00800000u)
      bits &= 0x80000000u;
    else
      bits += 0x7fffu + (bits >> 16 & 1);
    out[i] = uint16_t(bits >> 16);
  }
  return _mm512_loadu_si512(out);
}

}  // namespace amx_emulation
