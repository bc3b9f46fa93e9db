// The gradient of the logits of a slice of one row, in one read and one write. It is in place where `out` is the
// logits, because a thread stores only what it has read itself.
#pragma once
#include "gradient.cuh"

namespace rlk {

// Groups whose loads are issued before the first store. No bit depends on that number.
template <class T>
constexpr int kTogetherOf = sizeof(T) == 4 ? 2 : 4;

template <class T, class Out, bool kRef, int BLOCK>
__device__ __forceinline__ void backward_slice(const Rows& rows, const BackwardInputs& in, const Layout& to,
                                               long long r, long long from, long long slice) {
  constexpr int kTogether = kTogetherOf<T>;
  constexpr long long kStep = (long long)BLOCK * kGroup;
  const long long stop = from + slice < rows.columns ? from + slice : rows.columns;
  const long long y = rows.target(r);
  const unsigned char* mask = rows.mask_row(r);
  Out* const out = to.row<Out>(r);
  Upstream<float> up{get(in.dlogp, r), get(in.dentropy, r), get(in.dkl, r)};
  if (mask && rows.holds(y) && !mask[y]) up.logp = 0;  // a target outside the support moves nothing
  // A dead row is not read, so that nothing in it can reach the loss. Its gradient is written, because fresh memory
  // holds garbage.
  if (y == rows.ignore_index || (up.logp == 0 && up.entropy == 0 && up.kl == 0))
    return fill_zero(out, from, stop, rows.columns, int(threadIdx.x), BLOCK);
  const SavedRow<float> state{get(in.row_max, r),     get(in.sum_exp, r),     get(in.entropy, r),
                              get(in.ref_row_max, r), get(in.ref_sum_exp, r), get(in.kl, r)};
  const Slope slope = slope_of(state, up, rows.inverse_temperature_of(r));
  const T* const row = rows.logits.row<const T>(r);
  const T* const ref = kRef ? rows.ref.row<const T>(r) : row;
  const bool wide = aligned(row) && aligned(ref), wide_out = aligned(out);
  // Read before the loops, because these may store over it.
  const bool owns_target = y >= from && y < stop && (y - from) / kGroup % BLOCK == threadIdx.x;
  const float target = owns_target ? as_float(row[y]) : 0.0f,
              ref_target = kRef && owns_target ? as_float(ref[y]) : 0.0f;
  long long column = from + (long long)threadIdx.x * kGroup;
  for (; wide && wide_out && column + (kTogether - 1) * kStep + kGroup <= stop; column += kTogether * kStep) {
    Packed<T> x[kTogether], q[kRef ? kTogether : 1];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      x[k] = load_whole<true>(row + column + k * kStep);
      if (kRef) q[k] = load_whole<true>(ref + column + k * kStep);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const long long at = column + k * kStep;
      store_whole(out + at, gradient_packed<T, Out, kRef>(slope, x[k], q[kRef ? k : 0], mask, at, at + kGroup));
    }
  }
#pragma unroll 1
  for (; column < stop; column += kStep) {
    const Packed<T> x = load_group<true>(row, column, rows.columns, wide);
    const Packed<T> q = kRef ? load_group<true>(ref, column, rows.columns, wide) : x;
    store_group(out, column, rows.columns, wide_out,
                gradient_packed<T, Out, kRef>(slope, x, q, mask, column, rows.columns));
  }
  if (owns_target) store_target<Out, kRef>(slope, target, ref_target, mask, out, y);
}

// A block takes one slice, or with `unless` every gridDim.x-th.
template <class T, class Out, bool kRef, int BLOCK>
__global__ void __launch_bounds__(BLOCK, kRef ? (kDense ? 3 : 2) : 4)
    token_stats_backward(const Rows rows, const BackwardInputs in, const uintptr_t unless, const Layout to,
                         const long long slices, const long long slice) {
  if (get(unless, 0) == 1.0f) return;
  for (long long job = blockIdx.x; job < rows.rows * slices; job += gridDim.x)
    backward_slice<T, Out, kRef, BLOCK>(rows, in, to, job / slices, job % slices * slice, slice);
}

}  // namespace rlk
