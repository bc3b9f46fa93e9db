// The sums over one row, how eight columns are added to them, and how the sums of 32 threads become one.
//
// Everything is measured from the largest logit met so far; when it grows, what was added before is rescaled. With t = (x - top) / T in
// units of log 2 and e = 2^t, a column of -inf has e = 0 and weighs nothing; NaN, and +inf through inf - inf, make the sums NaN.
#pragma once
#include <cfloat>
#include <climits>

#include "vector_load.cuh"

namespace rlk {

// What is summed beyond e: flags of the template, so that what is not wanted costs nothing.
constexpr unsigned kWeighted = 1;    // e t: the entropy
constexpr unsigned kEverything = 2;  // e^2, x, the number of columns, the first place of the maximum
constexpr unsigned kReference = 4;   // the second row's sum, and e (t - t_ref): the exact KL

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kNone = -FLT_MAX;  // "no finite logit yet": finite, so that -inf - kNone is no NaN
constexpr float kFar = -1e4f;      // 2^kFar is 0; a bound for t where 0 times it is formed

struct Sums {
  float top = kNone, sum = 0, weighted = 0, squares = 0, plain = 0, count = 0;
  float ref_top = kNone, ref_sum = 0, cross = 0;
  int first = INT_MAX;
};

__device__ __forceinline__ float largest(const float (&x)[kGroup]) {
  return fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
}
__device__ __forceinline__ float total(const float (&x)[kGroup]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Measures the sums from `to` (and `ref_to`) instead. scale = log2(e) / T.
template <unsigned kWhat>
__device__ __forceinline__ void rebase(Sums& s, float to, float ref_to, float scale) {
  const float gap = fmaxf((s.top - to) * scale, kFar), decay = exp2_fast(gap);
  if (kWhat & kReference) {
    const float ref_gap = s.ref_top == kNone ? 0.0f : (s.ref_top - ref_to) * scale;
    // A column that the reference rules out makes this inf; it must vanish with the weight of its column, and 0 inf is NaN.
    if (s.sum != 0) s.cross = decay == 0 ? 0.0f : decay * fmaf(gap - ref_gap, s.sum, s.cross);
    s.ref_sum *= exp2_fast(fmaxf(ref_gap, kFar));
    s.ref_top = ref_to;
  }
  if (kWhat & kWeighted) s.weighted = decay * fmaf(gap, s.sum, s.weighted);
  if (kWhat & kEverything) s.squares *= decay * decay;
  s.sum *= decay;
  s.top = to;
}

template <unsigned kWhat>
__device__ __forceinline__ void add_group(Sums& s, const float (&x)[kGroup], const float (&r)[kGroup], unsigned kept, long long column,
                                          float scale) {
  const float top = largest(x);
  if (kWhat & kEverything) {
    int at = 0;
#pragma unroll
    for (int i = kGroup - 1; i >= 0; --i)
      if (x[i] == top) at = i;
    if (top > s.top || (s.first == INT_MAX && top == kNone)) s.first = int(column) + at;
  }
  rebase<kWhat>(s, fmaxf(s.top, top), kWhat & kReference ? fmaxf(s.ref_top, largest(r)) : 0.0f, scale);
  float t[kGroup], e[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    t[i] = (x[i] - s.top) * scale;
    e[i] = exp2_fast(t[i]);
  }
  s.sum += total(e);
  if (kWhat & kWeighted) {
    float even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {  // the bound keeps 0 (-inf) from being NaN; a NaN passes through e
      even = fmaf(e[i], fmaxf(t[i], kFar), even);
      odd = fmaf(e[i + 1], fmaxf(t[i + 1], kFar), odd);
    }
    s.weighted += even + odd;
  }
  if (kWhat & kEverything) {
    float square[kGroup], plain[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      square[i] = e[i] * e[i];
      plain[i] = kept >> i & 1 ? x[i] : 0.0f;
    }
    s.squares += total(square);
    s.plain += total(plain);
    s.count += float(__popc(kept));
  }
  if (kWhat & kReference) {
    float q[kGroup], cross[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float u = (r[i] - s.ref_top) * scale;
      q[i] = exp2_fast(u);
      cross[i] = e[i] == 0 ? 0.0f : e[i] * (t[i] - u);
    }
    s.ref_sum += total(q);
    s.cross += total(cross);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// By the order of the bits: the maximum does not depend on who is asked first, not even between the two zeros.
__device__ __forceinline__ float warp_max(float x) {
  const int bits = __float_as_int(x), key = bits ^ (bits >> 31 & 0x7fffffff);
  const int best = __reduce_max_sync(0xffffffffu, key);
  return __int_as_float(best ^ (best >> 31 & 0x7fffffff));
}

// Every thread of the warp ends with the sums of all 32, added by one fixed tree.
template <unsigned kWhat>
__device__ __forceinline__ void fold_warp(Sums& s, float scale) {
  const float top = warp_max(s.top), ref_top = kWhat & kReference ? warp_max(s.ref_top) : 0.0f;
  if (kWhat & kEverything) s.first = __reduce_min_sync(0xffffffffu, s.top == top ? s.first : INT_MAX);
  rebase<kWhat>(s, top, ref_top, scale);
  s.sum = warp_sum(s.sum);
  if (kWhat & kWeighted) s.weighted = warp_sum(s.weighted);
  if (kWhat & kEverything) {
    s.squares = warp_sum(s.squares);
    s.plain = warp_sum(s.plain);
    s.count = warp_sum(s.count);
  }
  if (kWhat & kReference) {
    s.ref_sum = warp_sum(s.ref_sum);
    s.cross = warp_sum(s.cross);
  }
}

// A row without a finite logit: nothing was summed, and the shift is what eager's maximum is.
template <unsigned kWhat>
__device__ __forceinline__ void finish(Sums& s) {
  if (s.sum == 0) s.top = -INFINITY, s.sum = NAN;
  if ((kWhat & kReference) && s.ref_sum == 0) s.ref_top = -INFINITY, s.ref_sum = NAN;
  s.top += 0.0f, s.ref_top += 0.0f;  // which of the two zeros a row holds must not show
}

// One record per warp of lanes, field by field, for whoever adds the warps up.
constexpr int kFields = 10;
template <unsigned kWhat>
__device__ __forceinline__ void write_record(float* at, const Sums& s, int stride) {
  at[0] = s.top;
  at[stride] = s.sum;
  if (kWhat & kWeighted) at[2 * stride] = s.weighted;
  if (kWhat & kEverything) {
    at[3 * stride] = s.squares;
    at[4 * stride] = s.plain;
    at[5 * stride] = s.count;
    at[6 * stride] = __int_as_float(s.first);
  }
  if (kWhat & kReference) {
    at[7 * stride] = s.ref_top;
    at[8 * stride] = s.ref_sum;
    at[9 * stride] = s.cross;
  }
}

template <unsigned kWhat>
__device__ __forceinline__ Sums read_record(const float* at, int stride) {
  Sums s;
  s.top = at[0];
  s.sum = at[stride];
  if (kWhat & kWeighted) s.weighted = at[2 * stride];
  if (kWhat & kEverything) {
    s.squares = at[3 * stride];
    s.plain = at[4 * stride];
    s.count = at[5 * stride];
    s.first = __float_as_int(at[6 * stride]);
  }
  if (kWhat & kReference) {
    s.ref_top = at[7 * stride];
    s.ref_sum = at[8 * stride];
    s.cross = at[9 * stride];
  }
  return s;
}

}  // namespace rlk
