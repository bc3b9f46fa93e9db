// The sums over one row, how eight columns are added to them, and how the sums of 32 threads become one.
//
// The statistics are named in ../arguments.h. Everything is measured from the largest logit so far. The sums are
// rescaled when that grows. With t = (x - row_max) / T in units of log 2 and e = 2^t, a column of -inf has e = 0 and
// weighs nothing. A NaN makes the sums NaN, and so does +inf, through inf - inf.
#pragma once
#include <cfloat>
#include <climits>

#include "vector_load.cuh"

namespace rlk {

// The compile-time variants of the sums, beyond row_max and sum_exp. The template argument kSums holds their flags, so
// that a sum that no output needs costs nothing. They are fewer than the outputs, because every combination is a kernel
// of its own.
//   kSumsWeighted   weighted_sum                               for entropy
//   kSumsExtra      square_sum, logit_sum, count, first_max    for log_sum_sq, mean_logits, is_top1
//   kSumsReference  ref_row_max, ref_sum_exp, cross_sum        for ref_logp, ref_row_max, ref_sum_exp, kl
constexpr unsigned kSumsWeighted = 1, kSumsExtra = 2, kSumsReference = 4;

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kNone = -FLT_MAX;  // no finite logit yet; a finite number, so that -inf - kNone is no NaN
constexpr float kFar = -1e4f;      // the bound of t where 0 times t is formed; 2^kFar is 0

struct Sums {
  float row_max = kNone, sum_exp = 0, weighted_sum = 0, square_sum = 0, logit_sum = 0, count = 0;
  float ref_row_max = kNone, ref_sum_exp = 0, cross_sum = 0;
  int first_max = INT_MAX;
};

__device__ __forceinline__ float largest(const float (&x)[kGroup]) {
  return fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
}
__device__ __forceinline__ float add_eight(const float (&x)[kGroup]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Measures the sums from `to` (and `ref_to`) instead. scale = log2(e) / T.
template <unsigned kSums>
__device__ __forceinline__ void rebase(Sums& s, float to, float ref_to, float scale) {
  const float gap = fmaxf((s.row_max - to) * scale, kFar), decay = exp2_fast(gap);
  if (kSums & kSumsReference) {
    const float ref_gap = s.ref_row_max == kNone ? 0.0f : (s.ref_row_max - ref_to) * scale;
    // Chosen by branch, because a column that the reference rules out makes the sum inf. It must vanish with the weight
    // of its column, and 0 times inf is NaN.
    if (s.sum_exp != 0) s.cross_sum = decay == 0 ? 0.0f : decay * fmaf(gap - ref_gap, s.sum_exp, s.cross_sum);
    s.ref_sum_exp *= exp2_fast(fmaxf(ref_gap, kFar));
    s.ref_row_max = ref_to;
  }
  if (kSums & kSumsWeighted) s.weighted_sum = decay * fmaf(gap, s.sum_exp, s.weighted_sum);
  if (kSums & kSumsExtra) s.square_sum *= decay * decay;
  s.sum_exp *= decay;
  s.row_max = to;
}

template <unsigned kSums>
__device__ __forceinline__ void add_group(Sums& s, const float (&x)[kGroup], const float (&r)[kGroup], unsigned kept,
                                          long long column, float scale) {
  const float group_max = largest(x);
  if (kSums & kSumsExtra) {
    int at = 0;
#pragma unroll
    for (int i = kGroup - 1; i >= 0; --i)
      if (x[i] == group_max) at = i;
    if (group_max > s.row_max || (s.first_max == INT_MAX && group_max == kNone)) s.first_max = int(column) + at;
  }
  rebase<kSums>(s, fmaxf(s.row_max, group_max), kSums & kSumsReference ? fmaxf(s.ref_row_max, largest(r)) : 0.0f,
                scale);
  float t[kGroup], e[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    t[i] = (x[i] - s.row_max) * scale;
    e[i] = exp2_fast(t[i]);
  }
  s.sum_exp += add_eight(e);
  if (kSums & kSumsWeighted) {
    float even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {  // bounded, because 0 times -inf would be NaN; a NaN itself passes through e
      even = fmaf(e[i], fmaxf(t[i], kFar), even);
      odd = fmaf(e[i + 1], fmaxf(t[i + 1], kFar), odd);
    }
    s.weighted_sum += even + odd;
  }
  if (kSums & kSumsExtra) {
    float square[kGroup], logit[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      square[i] = e[i] * e[i];
      logit[i] = kept >> i & 1 ? x[i] : 0.0f;
    }
    s.square_sum += add_eight(square);
    s.logit_sum += add_eight(logit);
    s.count += float(__popc(kept));
  }
  if (kSums & kSumsReference) {
    float q[kGroup], cross[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float u = (r[i] - s.ref_row_max) * scale;
      q[i] = exp2_fast(u);
      cross[i] = e[i] == 0 ? 0.0f : e[i] * (t[i] - u);
    }
    s.ref_sum_exp += add_eight(q);
    s.cross_sum += add_eight(cross);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// The maximum by the order of the bits, so that it does not depend on who is asked first, even between the two zeros.
__device__ __forceinline__ float warp_max(float x) {
  const int bits = __float_as_int(x), key = bits ^ (bits >> 31 & 0x7fffffff);
  const int best = __reduce_max_sync(0xffffffffu, key);
  return __int_as_float(best ^ (best >> 31 & 0x7fffffff));
}

// Every thread of the warp ends with the sums of all 32, added by one fixed tree.
template <unsigned kSums>
__device__ __forceinline__ void fold_warp(Sums& s, float scale) {
  const float row_max = warp_max(s.row_max), ref_row_max = kSums & kSumsReference ? warp_max(s.ref_row_max) : 0.0f;
  if (kSums & kSumsExtra) s.first_max = __reduce_min_sync(0xffffffffu, s.row_max == row_max ? s.first_max : INT_MAX);
  rebase<kSums>(s, row_max, ref_row_max, scale);
  s.sum_exp = warp_sum(s.sum_exp);
  if (kSums & kSumsWeighted) s.weighted_sum = warp_sum(s.weighted_sum);
  if (kSums & kSumsExtra) {
    s.square_sum = warp_sum(s.square_sum);
    s.logit_sum = warp_sum(s.logit_sum);
    s.count = warp_sum(s.count);
  }
  if (kSums & kSumsReference) {
    s.ref_sum_exp = warp_sum(s.ref_sum_exp);
    s.cross_sum = warp_sum(s.cross_sum);
  }
}

// Makes sum_exp of a row without a finite logit NaN and its row_max -inf, as in eager.
template <unsigned kSums>
__device__ __forceinline__ void finish(Sums& s) {
  if (s.sum_exp == 0) s.row_max = -INFINITY, s.sum_exp = NAN;
  if ((kSums & kSumsReference) && s.ref_sum_exp == 0) s.ref_row_max = -INFINITY, s.ref_sum_exp = NAN;
  s.row_max += 0.0f, s.ref_row_max += 0.0f;  // because it must not show which of the two zeros a row holds
}

// One record per warp of lanes, field by field, for the reduction over warps.
constexpr int kFields = 10;
template <unsigned kSums>
__device__ __forceinline__ void write_record(float* at, const Sums& s, int stride) {
  at[0] = s.row_max;
  at[stride] = s.sum_exp;
  if (kSums & kSumsWeighted) at[2 * stride] = s.weighted_sum;
  if (kSums & kSumsExtra) {
    at[3 * stride] = s.square_sum;
    at[4 * stride] = s.logit_sum;
    at[5 * stride] = s.count;
    at[6 * stride] = __int_as_float(s.first_max);
  }
  if (kSums & kSumsReference) {
    at[7 * stride] = s.ref_row_max;
    at[8 * stride] = s.ref_sum_exp;
    at[9 * stride] = s.cross_sum;
  }
}

template <unsigned kSums>
__device__ __forceinline__ Sums read_record(const float* at, int stride) {
  Sums s;
  s.row_max = at[0];
  s.sum_exp = at[stride];
  if (kSums & kSumsWeighted) s.weighted_sum = at[2 * stride];
  if (kSums & kSumsExtra) {
    s.square_sum = at[3 * stride];
    s.logit_sum = at[4 * stride];
    s.count = at[5 * stride];
    s.first_max = __float_as_int(at[6 * stride]);
  }
  if (kSums & kSumsReference) {
    s.ref_row_max = at[7 * stride];
    s.ref_sum_exp = at[8 * stride];
    s.cross_sum = at[9 * stride];
  }
  return s;
}

}  // namespace rlk
