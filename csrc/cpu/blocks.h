// The parts of a row: blocks that fit the first-level cache, and chunks of a few vectors. Absent columns become -inf.
#pragma once
#include "simd.h"

namespace rlk {
namespace RLK_ISA {
namespace {

constexpr int64_t kBlock = 64 * kChunk;  // a lane is added to 64 times in fp32: 16 KiB of floats with AVX-512
constexpr float kNone = -__builtin_inff();

// Makes x the logit of an absent column, which is behind the end of a row or outside the support.
RLK_INLINE void set_none(float& x) { x = kNone; }
RLK_INLINE void set_none(Bf16& x) { x.bits = 0xff80; }
RLK_INLINE void set_none(F16& x) { x.bits = 0xfc00; }

// Copies x where the mask is set, and `other` elsewhere. A loop over bits, because the compiler turns it into vectors.
RLK_INLINE void select(float* to, const float* x, float other, const uint8_t* mask, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] = mask[c] ? x[c] : other;
}
template <class T>
RLK_INLINE void select(T* to, const T* x, T other, const uint8_t* mask, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c].bits = mask[c] ? x[c].bits : other.bits;
}

// The support of a block. Columns that the mask takes out become -inf, and no arithmetic reads them.
template <class T>
RLK_INLINE const T* stage(T* to, const T* x, const uint8_t* mask, int64_t n) {
  T none;
  set_none(none);
  select(to, x, none, mask, n);
  return to;
}

// A chunk from the last n columns of a row.
template <class T>
RLK_INLINE const T* padded(T* to, const T* x, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] = x[c];
  for (int64_t c = n; c < kChunk; ++c) set_none(to[c]);
  return to;
}

RLK_INLINE float largest_lane(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// The largest value of whole chunks. A NaN may be lost here, because it reaches the sums by itself.
RLK_INLINE float chunks_max(const float* x, int64_t n) {
  Vec m[4] = {all(kNone), all(kNone), all(kNone), all(kNone)};
  for (int64_t c = 0; c < n; c += kChunk)
    RLK_UNROLL_FOR (int k = 0; k < 4; ++k) m[k] = larger(m[k], read<Vec>(x + c + k * kLanes));
  return largest_lane(larger(larger(m[0], m[1]), larger(m[2], m[3])));
}

// The same for 16-bit formats, by their bits, which are a sign and a magnitude. The largest value is the largest signed
// integer where that is positive. It is the smallest unsigned integer where every column is negative.
template <class T>
RLK_INLINE float chunks_max(const T* x, int64_t n) {
  typedef int16_t Signed __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Unsigned __attribute__((vector_size(4 * kLanes)));
  T none;
  set_none(none);
  Signed most[kPairs];
  Unsigned least[kPairs];
  RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) most[k] = Signed{} + int16_t(-32768), least[k] = Unsigned{} + none.bits;
  for (int64_t c = 0; c < n; c += kChunk)
    RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k) {
      const Unsigned bits = read<Unsigned>(x + c + k * kPair);
      most[k] = (Signed)bits > most[k] ? (Signed)bits : most[k];
      least[k] = bits < least[k] ? bits : least[k];
    }
  int16_t top = -32768;
  uint16_t bottom = none.bits;
  RLK_UNROLL_FOR (int k = 0; k < kPairs; ++k)
    for (int i = 0; i < kPair; ++i) {
      top = most[k][i] > top ? most[k][i] : top;
      bottom = least[k][i] < bottom ? least[k][i] : bottom;
    }
  return widen(T{top >= 0 ? uint16_t(top) : bottom});
}

template <class T>
RLK_INLINE float block_max(const T* x, int64_t n) {
  const int64_t whole = n - n % kChunk;
  const float m = chunks_max(x, whole);
  if (whole == n) return m;
  T rest[kChunk];
  const float last = chunks_max(padded(rest, x + whole, n - whole), kChunk);
  return last > m ? last : m;
}

}  // namespace
}  // namespace RLK_ISA
}  // namespace rlk
