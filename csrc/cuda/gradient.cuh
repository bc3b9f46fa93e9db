// The gradient of eight logits, from a row's statistics and the upstream gradients of logp, entropy and KL.
#pragma once
#include "sums.cuh"

namespace rlk {

// The coefficients of dx = e (flat + slope t + cross (t - t_ref)), and those of the target's column.
struct Slope {
  float row_max, ref_row_max, scale, flat, slope, cross;
  float dlogp, rest, inverse_temperature, sum_exp;  // of the target; rest is flat without its share of dlogp
};

// A term whose upstream gradient is 0 is left out and not multiplied, because its statistics may be NaN or absent.
__device__ __forceinline__ Slope slope_of(const SavedRow<float>& s, const Upstream<float>& up,
                                          float inverse_temperature) {
  const float log_sum = logf(s.sum_exp), k = inverse_temperature / s.sum_exp;
  Slope to{s.row_max, s.ref_row_max, kLog2E * inverse_temperature, 0, 0, 0, up.logp, 0, inverse_temperature, s.sum_exp};
  if (up.entropy != 0) {
    to.rest -= up.entropy * (s.entropy - log_sum);
    to.slope = -up.entropy * kLn2 * k;
  }
  if (up.kl != 0) {
    to.rest += up.kl * ((logf(s.ref_sum_exp) - log_sum) - s.kl);
    to.cross = up.kl * kLn2 * k;
  }
  to.flat = (to.rest - up.logp) * k;
  to.rest *= k;
  return to;
}

template <bool kRef>
__device__ __forceinline__ void gradient_group(const Slope& at, const float (&x)[kGroup], const float (&r)[kGroup],
                                               float (&g)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float t = (x[i] - at.row_max) * at.scale, e = exp2_fast(t);
    float sum = fmaf(at.slope, fmaxf(t, kFar), at.flat);
    if (kRef) {
      const float u = (r[i] - at.ref_row_max) * at.scale;
      sum = at.cross == 0 || e == 0 ? sum : fmaf(at.cross, t - u, sum);
    }
    g[i] = e * sum;
  }
}

// The gradient of the target's own column. 1 - p is formed before the one rounding of the store, because a p that is
// rounded first would be 1.
template <bool kRef>
__device__ __forceinline__ float gradient_of_target(const Slope& at, float x, float r) {
  const float t = (x - at.row_max) * at.scale, e = rlk::exp((x - at.row_max) * at.inverse_temperature);
  float rest = fmaf(at.slope, fmaxf(t, kFar), at.rest);
  if (kRef && at.cross != 0 && e != 0) rest = fmaf(at.cross, t - (r - at.ref_row_max) * at.scale, rest);
  return at.dlogp * (1.0f - e / at.sum_exp) * at.inverse_temperature + e * rest;
}

// The gradient of eight packed columns, as if none of them were the target's. Loads and stores nothing, because the
// caller decides where a row lies.
template <class T, class Out, bool kRef>
__device__ __forceinline__ Packed<Out> gradient_packed(const Slope& at, const Packed<T>& x, const Packed<T>& r,
                                                       const unsigned char* mask, long long column, long long columns) {
  float a[kGroup], b[kGroup], g[kGroup];
  unpack(x, a);
  if (kRef) unpack(r, b);
  gradient_group<kRef>(at, a, b, g);
  if (mask) {
    const unsigned kept = kept_columns(mask, column, columns);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) g[i] = kept >> i & 1 ? g[i] : 0.0f;
  }
  return pack(g, Out());
}

// Stores the gradient of the target's column, where the target is in the support. The thread that has stored the group
// of that column does this behind its loop, because a test of every group for one column costs more than the group's
// own arithmetic can hide. x and r are the logits of that column, read before the loop stored over them.
template <class Out, bool kRef>
__device__ __forceinline__ void store_target(const Slope& at, float x, float r, const unsigned char* mask, Out* row,
                                             long long y) {
  if (!mask || mask[y]) row[y] = rounded(gradient_of_target<kRef>(at, x, r), Out());
}

}  // namespace rlk
