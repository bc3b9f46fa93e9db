// A vector of floats and its operations, in the instruction set that RLK_ISA names.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../objective_functions.h"
#include "inline.h"

namespace rlk {
namespace RLK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
// 2 to this power is exactly 0, also times the largest coefficient of a gradient. scalef reaches the subnormal numbers,
// so that no larger result is lost.
constexpr float kLowest = -300.0f;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr float kLowest = -127.0f;
#else
constexpr int kLanes = 4;
constexpr float kLowest = -127.0f;
#endif
constexpr int kPairs = 2;
constexpr int kPair = 2 * kLanes;
constexpr int kChunk = kPairs * kPair;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));

template <class V, class T>
RLK_INLINE V read(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

RLK_INLINE Vec all(float x) { return x - Vec{}; }

#if defined(__AVX512F__)
RLK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The larger operand, or the second one where either is NaN, because a NaN of the row must survive.
RLK_INLINE Vec larger(Vec bound, Vec x) { return _mm512_max_ps(bound, x); }
RLK_INLINE Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
RLK_INLINE Vec times_exp2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
RLK_INLINE Vec even(Vec a, Vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
}
RLK_INLINE Vec odd(Vec a, Vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b);
}
#elif defined(__AVX2__)
RLK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
RLK_INLINE Vec larger(Vec bound, Vec x) { return _mm256_max_ps(bound, x); }
RLK_INLINE Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
RLK_INLINE Vec times_exp2(Vec x, Vec n) {
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(n + all(127.0f)), 23));
}
RLK_INLINE Vec even(Vec a, Vec b) {
  return (Vec)_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0))),
                                    _MM_SHUFFLE(3, 1, 2, 0));
}
RLK_INLINE Vec odd(Vec a, Vec b) {
  return (Vec)_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1))),
                                    _MM_SHUFFLE(3, 1, 2, 0));
}
#else
RLK_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
RLK_INLINE Vec larger(Vec bound, Vec x) { return bound > x ? bound : x; }
RLK_INLINE Vec nearest(Vec x) { return (x + all(12582912.0f)) - all(12582912.0f); }  // 1.5 * 2^23: |x| stays below 2^22
RLK_INLINE Vec times_exp2(Vec x, Vec n) {
  // The integer n sits in the low bits of n + 1.5 * 2^23. A NaN gives some power of two, which does no harm because x
  // is then NaN itself.
  const Bits power = ((Bits)(n + all(12582912.0f + 127.0f))) << 23;
  return x * (Vec)power;
}
RLK_INLINE Vec even(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
RLK_INLINE Vec odd(Vec a, Vec b) { return Vec{a[1], a[3], b[1], b[3]}; }
#endif

// Two vectors of neighbouring columns, the even ones and the odd ones. One shift or one mask then widens a bf16. The
// other dtypes are put in the same order, so that a column meets the same lane whatever its dtype.
struct Pair {
  Vec a, b;
};

RLK_INLINE Pair load(const Bf16* from) {
  const Bits bits = read<Bits>(from);
  return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000u)};
}
// Two vectors as they lie in memory, for work on each column alone.
RLK_INLINE Pair load_straight(const float* from) { return {read<Vec>(from), read<Vec>(from + kLanes)}; }
RLK_INLINE Pair load_straight(const Bf16* from) { return load(from); }
RLK_INLINE Pair load_straight(const F16* from) {
#if defined(__AVX512F__)
  return {_mm512_cvtph_ps(read<__m256i>(from)), _mm512_cvtph_ps(read<__m256i>(from + kLanes))};
#elif defined(__AVX2__)
  return {_mm256_cvtph_ps(read<__m128i>(from)), _mm256_cvtph_ps(read<__m128i>(from + kLanes))};
#else
  Pair x;
  for (int i = 0; i < kLanes; ++i) x.a[i] = widen(from[i]), x.b[i] = widen(from[i + kLanes]);
  return x;
#endif
}
template <class T>
RLK_INLINE Pair load(const T* from) {
  const Pair x = load_straight(from);
  return {even(x.a, x.b), odd(x.a, x.b)};
}

// Stores a vector, around the cache where kStream asks for it and the machine can. `to` is then aligned to the vector.
template <bool kStream, class V, class T>
RLK_INLINE void put(T* to, V v) {
#if defined(__x86_64__)
  if constexpr (kStream && sizeof v == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)v);
  if constexpr (kStream && sizeof v == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)v);
  if constexpr (kStream && sizeof v == 16) return _mm_stream_si128((__m128i*)to, (__m128i)v);
#endif
  __builtin_memcpy(to, &v, sizeof v);
}

// The inverse of load_straight.
template <bool kStream>
RLK_INLINE void store_straight(float* to, Pair x) {
  put<kStream>(to, x.a), put<kStream>(to + kLanes, x.b);
}
// Rounds to nearest even, into the upper half of each lane. The caller keeps NaN canonical (low 16 bits clear), so that
// the increment never carries out of a NaN.
RLK_INLINE Bits round_to_bf16(Vec v) {
  const Bits bits = (Bits)v;
  return bits + 0x7fff + ((bits >> 16) & 1);
}
template <bool kStream>
RLK_INLINE void store_straight(Bf16* to, Pair x) {
  put<kStream>(to, (round_to_bf16(x.a) >> 16) | (round_to_bf16(x.b) & 0xffff0000u));
}
template <bool kStream>
RLK_INLINE void store_straight(F16* to, Pair x) {
#if defined(__AVX512F__)
  put<kStream>(to, _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  put<kStream>(to + kLanes, _mm512_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  put<kStream>(to, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  put<kStream>(to + kLanes, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes; ++i) narrow(x.a[i], to + i), narrow(x.b[i], to + i + kLanes);
#endif
}

// factor exp(d / T) for d <= 0, as 2^n times a polynomial in the rest. d log2(e) / T = n + rest, with |rest| <= 1/2.
struct Exponential {
  Vec scale, lowest, c0, c1, c2, c3, c4, c5;
  RLK_INLINE Exponential times(double factor, double temperature) {
    const double scale = 1.4426950408889634 / temperature;
    // Minimax for 2^rest with the constant term held at 1, so that exp(0) is exactly 1. Relative error: at most 9.2e-8.
    return {all(float(scale)),
            all(float(kLowest / scale)),
            all(float(factor)),
            all(float(factor * 0x1.62e42ap-1)),
            all(float(factor * 0x1.ebf9bap-3)),
            all(float(factor * 0x1.c6b756p-5)),
            all(float(factor * 0x1.3ceafap-7)),
            all(float(factor * 0x1.5bb99ep-10))};
  }
  // Makes -inf a finite number whose exponential is exactly 0, so that 0 * (-inf) never arises. NaN stays NaN.
  __attribute__((always_inline)) Vec bound(Vec d) const { return larger(lowest, d); }
  // Works on several vectors in step, because one chain of a dozen dependent operations after the other would not fit
  // the scheduler of the processor (Zen 4: 24 cycles for 32 columns one by one).
  template <int kMany>
  __attribute__((always_inline)) void operator()(const Vec (&d)[kMany], Vec (&e)[kMany]) const {
    Vec n[kMany], rest[kMany];
    RLK_UNROLL_FOR (int k = 0; k < kMany; ++k) n[k] = nearest(d[k] * scale);
    RLK_UNROLL_FOR (int k = 0; k < kMany; ++k) rest[k] = fma(d[k], scale, -n[k]);
    RLK_UNROLL_FOR (int k = 0; k < kMany; ++k) e[k] = fma(c5, rest[k], c4);
    RLK_UNROLL_FOR (int k = 0; k < kMany; ++k) e[k] = fma(e[k], rest[k], c3);
    RLK_UNROLL_FOR (int k = 0; k < kMany; ++k) e[k] = fma(e[k], rest[k], c2);
    RLK_UNROLL_FOR (int k = 0; k < kMany; ++k) e[k] = fma(e[k], rest[k], c1);
    RLK_UNROLL_FOR (int k = 0; k < kMany; ++k) e[k] = fma(e[k], rest[k], c0);
    RLK_UNROLL_FOR (int k = 0; k < kMany; ++k) e[k] = times_exp2(e[k], n[k]);
  }
};

}  // namespace
}  // namespace RLK_ISA
}  // namespace rlk
