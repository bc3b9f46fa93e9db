// The C++ twins of rlkernels/objectives/functions.py, for host and device. The file is not called math.h, because with
// -Icsrc it would shadow the system's <math.h>.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RLK_HD __host__ __device__ inline
#else
// Forced inline, because a copy that a file for AVX-512 left out of line could be linked into code for another machine.
#define RLK_HD inline __attribute__((always_inline))
#endif

namespace rlk {

// The result of an objective: its value and the derivative with respect to its first column.
template <class S>
struct Term {
  S value, derivative;
};

RLK_HD float exp(float x) { return ::expf(x); }
RLK_HD double exp(double x) { return ::exp(x); }
RLK_HD float expm1(float x) { return ::expm1f(x); }
RLK_HD double expm1(double x) { return ::expm1(x); }
RLK_HD float log(float x) { return ::logf(x); }
RLK_HD double log(double x) { return ::log(x); }
RLK_HD float log1p(float x) { return ::log1pf(x); }
RLK_HD double log1p(double x) { return ::log1p(x); }
RLK_HD float tanh(float x) { return ::tanhf(x); }
RLK_HD double tanh(double x) { return ::tanh(x); }
RLK_HD float sqrt(float x) { return ::sqrtf(x); }
RLK_HD double sqrt(double x) { return ::sqrt(x); }
RLK_HD float abs(float x) { return ::fabsf(x); }
RLK_HD double abs(double x) { return ::fabs(x); }

template <class S>
RLK_HD S where(bool condition, S a, S b) {
  return condition ? a : b;
}

// Compares instead of calling fmin and fmax, because those return the operand that is not NaN.
template <class S>
RLK_HD S clip(S x, S low, S high) {
  return x < low ? low : x > high ? high : x;
}

// The second operand where both are equal. The sum is NaN where an operand is.
template <class S>
RLK_HD S maximum(S a, S b) {
  return a > b ? a : b >= a ? b : a + b;
}

template <class S>
RLK_HD S minimum(S a, S b) {
  return -rlk::maximum(-a, -b);
}

template <class S>
RLK_HD S sigmoid(S x) {
  return S(1) / (S(1) + rlk::exp(-x));
}

// min(x, 0) - log(1 + e^-|x|), because this exp never overflows and log1p keeps the tail.
template <class S>
RLK_HD S log_sigmoid(S x) {
  return (x > S(0) ? S(0) : x) - rlk::log1p(rlk::exp(x > S(0) ? -x : x));
}

// The two 16-bit formats as bits. Conversions round to nearest even, keep NaN and reach every subnormal number.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

RLK_HD float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

RLK_HD uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

RLK_HD float widen(float x) { return x; }
RLK_HD double widen(double x) { return x; }
RLK_HD float widen(Bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
RLK_HD float widen(F16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // 2^112 moves the exponent of a half to that of a float, and normalises a subnormal on the way.
  const uint32_t finite = to_bits(from_bits(magnitude) * from_bits(0x77800000u));
  return from_bits((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | uint32_t(x.bits & 0x8000) << 16);
}

RLK_HD void narrow(float x, float* out) { *out = x; }
RLK_HD void narrow(float x, Bf16* out) {
  const uint32_t bits = to_bits(x);
  // Adding to a NaN could carry out of its payload and make it a zero.
  out->bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
RLK_HD void narrow(float x, F16* out) {
  const uint32_t sign = to_bits(x) & 0x80000000u, magnitude = to_bits(x) ^ sign;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinity, NaN
    half = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the float unit round at 2^-24
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(half | sign >> 16);
}

}  // namespace rlk
